"""Detection by words, the credible initial frame, the diverse memory, and that arms differ in nothing else."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from medcook.language import Names
from medcook.methods import Batch, Moment
from medcook.recipes.language._slice_memory import Memory
from medcook.recipes.video import resurgsam2
from medcook.recipes.video._referring import PAST, Fusion, Referring
from medcook.recipes.video._tracker import LONG, NOW, RECENT, SLOTS, Answer
from medcook.recipes.video.resurgsam2 import (
    POOL,
    ReSurgSam2,
    Track,
    credible_frame,
    most_diverse,
    recipe,
    referred_rows,
)
from medcook.tasks import Budget
from medcook.training import Loop

LITTLE = ReSurgSam2(channels=(4, 8, 8), width=8, language=Names(("grey matter", "white matter", "ventricles")))


def said(seen: float, expected: float) -> Answer:
    """The answer to a frame of 8 x 8 pixels in which a square was found, with so much confidence."""
    logits = torch.full((1, 8, 8), -5.0)
    logits[0, 2:5, 2:5] = 5.0
    return Answer(logits, torch.tensor([seen]).logit(), torch.tensor([expected]))


def played(method: ReSurgSam2, script, looks=None) -> Track:
    """A track through frames with these presences and expected overlaps."""
    looks = torch.randn(len(script), 3, 2, 2, generator=torch.Generator().manual_seed(0)) if looks is None else looks
    track = Track(method, looks)
    for number, (seen, expected) in enumerate(script):
        track.takes(number, said(seen, expected))
    return track


@pytest.mark.component("credible initial frame selection")
class TestCredible:
    def test_the_best_of_a_window_of_neighbours(self):
        assert credible_frame([(3, 0.8), (4, 0.75), (5, 0.9), (6, 0.72), (7, 0.8)]) == 5
        assert credible_frame([(3, 0.8), (4, 0.75), (5, 0.9), (6, 0.72)]) is None
        assert credible_frame([(3, 0.8), (4, 0.75), (6, 0.9), (7, 0.72), (8, 0.8)]) is None
        assert credible_frame([(1, 0.99), (3, 0.8), (4, 0.75), (5, 0.71), (6, 0.72), (7, 0.78)]) == 3
        assert credible_frame([(4, 0.75)], window=1) == 4

    def test_each_frame_of_it_must_be_seen_and_good(self):
        good, unseen, poor = (0.95, 0.8), (0.85, 0.99), (0.99, 0.45)
        assert played(LITTLE, [good] * 4).first is None
        assert played(LITTLE, [*[good] * 4, (0.95, 0.9)]).first == 4
        for gap in (unseen, poor):
            track = played(LITTLE, [*[good] * 3, gap, *[good] * 4])
            assert track.first is None and len(track.answers) == 8
            assert played(LITTLE, [*[good] * 3, gap, *[good] * 2, (0.95, 0.85), *[good] * 2]).first == 6

    def test_without_it_the_first_good_frame_is_taken(self):
        script = [(0.5, 0.9), (0.95, 0.4), (0.95, 0.52), (0.99, 0.99), *[(0.99, 0.95)] * 5]
        assert played(replace(LITTLE, credible=False), script).first == 2
        assert played(LITTLE, script).first == 3

    def test_it_is_chosen_once(self):
        script = [*[(0.95, 0.75)] * 5, *[(0.99, 0.99)] * 8]
        assert played(LITTLE, script).first == 0


@pytest.mark.component("diversity-driven long-term memory")
class TestDiverse:
    def test_the_least_similar_look(self):
        looks, last = torch.randn(6, 4, 3, 3), torch.randn(4, 3, 3)
        a, b = looks.numpy(), last.numpy()
        cosine = (a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(0))
        assert most_diverse(looks, last) == cosine.sum((1, 2)).argmin()
        assert most_diverse(torch.stack([last, 3 * last, -last]), last) == 2

    def test_a_full_pool_gives_one_frame_and_is_emptied(self):
        looks = torch.ones(40, 3, 2, 2) + 0.01 * torch.randn(40, 3, 2, 2)
        looks[7] = -1.0  # unlike the initial frame
        looks[12] = -1.0  # unlike the initial frame again, but like frame 7
        track = played(LITTLE, [(0.99, 0.9)] * 15, looks)
        assert track.first == 0 and track.long[0] == 7 and track.pool == []
        assert len(track.long) == 2 and track.long[1] in (10, 11, 13, 14)

    def test_only_good_frames_are_kept_and_at_most_three(self):
        poor = played(LITTLE, [*[(0.99, 0.8)] * 5, *[(0.99, 0.65)] * 20])
        assert poor.first == 0 and not poor.long and not poor.pool
        track = played(LITTLE, [(0.99, 0.8)] * (5 + 5 * POOL))
        assert len(track.long) == LONG and list(track.long) == sorted(track.long) and track.long[0] >= 5 + 2 * POOL
        assert not played(replace(LITTLE, diverse=False), [(0.99, 0.8)] * 30).long

    def test_the_bank_holds_first_recent_and_diverse_frames(self):
        track = played(LITTLE, [(0.99, 0.8)] * 15)
        track.long.clear()
        track.long.extend([5, 13])
        assert track.slots(15) == [0, 14, 13, 12, 5, None, None]
        assert track.slots(2) == [0, 1, None, None, 5, 13, None]
        bank = track.bank(15)
        assert bank.there.tolist() == [[True] * 5 + [False] * 2] and bank.looks.shape[:2] == (1, SLOTS)
        assert torch.equal(bank.looks[0, 4], track.looks[5]) and bank.masks[0, 0].sum() == track.answers[0].masks.sum()

    def test_an_object_that_is_not_there_leaves_an_empty_mask(self):
        track = played(LITTLE, [*[(0.99, 0.8)] * 5, (0.1, 0.8)])
        assert track.bank(6).masks[0, 1].sum() == 0 and track.bank(6).masks[0, 2].sum() > 0


@pytest.mark.component("text-referred detection")
class TestDetection:
    def test_words_and_frames_become_one_row(self):
        torch.manual_seed(0)
        fuse = Fusion(8, 8)
        words, empty, features = torch.randn(2, 3, 8), torch.zeros(2, 3, dtype=torch.bool), torch.randn(2, 3, 8, 4, 4)
        assert (fuse(words, empty, features)[0] == 0).all()  # it begins by changing nothing
        torch.nn.init.normal_(fuse.leave.weight)
        found, heard = fuse(words, empty, features)
        assert found.shape == (2, 8, 4, 4) and heard.shape == (2, 8)
        for place in range(3):
            others = features.clone()
            others[:, place] += torch.randn(8, 4, 4)
            assert not torch.allclose(fuse(words, empty, others)[0], found)
        assert not torch.allclose(fuse(words.flip(2), empty, features)[0], found)
        assert not torch.allclose(fuse(words, empty, features.flip(0))[1], heard)

    def test_words_that_are_none_say_nothing(self):
        fuse, features, words = Fusion(8, 8), torch.randn(1, 3, 8, 4, 4), torch.randn(1, 2, 8)
        torch.nn.init.normal_(fuse.leave.weight)
        empty, others = torch.tensor([[False, True]]), words.clone()
        others[:, 1] = torch.randn(8)
        for one, other in zip(fuse(words, empty, features), fuse(others, empty, features), strict=True):
            torch.testing.assert_close(one, other)

    def test_it_knows_no_bank_and_tracking_no_words(self, monkeypatch):
        net, asked = Referring(1, (4, 8, 8), 8), []
        monkeypatch.setattr(net, "answer", lambda maps, *banks, **given: asked.append((len(banks), set(given))))
        net.detect([], torch.randn(1, 3, 8, 4, 4), ("a",))
        net.track([], None)
        assert asked == [(0, {"words", "added"}), (1, set())]

    def test_training_shows_each_frame_after_those_before_it(self):
        first, length = 1 + LONG, 1 + LONG + RECENT + NOW
        found = resurgsam2.with_past(torch.arange(2.0 * length).view(2, length, 1, 1, 1))[:, :, 0, 0, 0]
        assert found[:first].tolist() == [[n] * 3 for n in range(first)] and PAST == 2
        assert found[first : first + 2].tolist() == [[first] * 3, [first, first, first + 1]]
        assert found[first + 2 : length].tolist() == [[n - 2, n - 1, n] for n in range(first + 2, length)]
        assert torch.equal(found[length:], found[:length] + length)

    def test_a_flight_is_searched_until_the_object_is_found_and_then_followed(self, monkeypatch):
        nets, done = LITTLE.build(1, 4, 3), []
        net = nets["average"]

        def detect(maps, features, sentences):
            done.append(("detect", features.shape[1], sentences))
            return said(0.99, 0.8)

        def track(maps, bank: Memory):
            done.append(("track", int(bank.there.sum()), ()))
            return said(0.99, 0.8)

        monkeypatch.setattr(net, "detect", detect)
        monkeypatch.setattr(net, "track", track)
        LITTLE.follow(nets, torch.randn(1, 9, 8, 8), "a name")
        assert done[:5] == [("detect", 3, ("a name",))] * 5 and [what for what, *_ in done[5:]] == ["track"] * 4
        assert [count for _, count, _ in done[5:]] == [1 + RECENT] * 4

    def test_a_search_asks_in_every_frame_as_following_does_at_first(self):
        torch.manual_seed(0)
        nets, flight = LITTLE.build(1, 4, 3).eval(), torch.randn(1, 7, 16, 16)
        track, found = LITTLE.follow(nets, flight, "white matter"), LITTLE.search(nets, flight, "white matter")
        assert track.first is None
        torch.testing.assert_close(found.logits, torch.cat([one.logits for one in track.answers]), atol=1e-4, rtol=1e-3)


@pytest.mark.component("ablation")
class TestArms:
    def test_they_differ_by_two_switches_that_training_does_not_know(self):
        switches = {name: (arm.method.credible, arm.method.diverse) for name, arm in recipe.arms.items()}
        assert switches == {
            "first frame, recent memory": (False, False),
            "resurgsam2": (True, True),
            "without credible selection": (False, True),
            "without diverse memory": (True, False),
        }
        losses = set()
        for arm in recipe.arms.values():
            method = replace(LITTLE, credible=arm.method.credible, diverse=arm.method.diverse)
            assert replace(arm.method, credible=True, diverse=True) == recipe.arms["resurgsam2"].method
            torch.manual_seed(0)
            nets = method.build(1, 4, 3)
            losses.add(method.training_step(nets, flights(), None, Moment(0, 4)).item())
        assert len(losses) == 1


def flights(count=2, length=14, side=16):
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (count, length, side, side), generator=rng).byte()
    return Batch(torch.randn(count, 1, length, side, side, generator=rng), labels)


@pytest.mark.parametrize("own", [0.0, 1.1])
def test_banks_hold_true_masks_or_the_networks_own(own, monkeypatch):
    torch.manual_seed(0)
    method, seen = replace(LITTLE, own=own), {}
    nets = method.build(1, 4, 3)
    plain = {"detect": nets["model"].detect, "answer_loss": resurgsam2.answer_loss, "bank_of": resurgsam2.bank_of}

    def spy(name, *given):
        seen.setdefault(name, []).append((given, found := plain[name](*given)))
        return found

    monkeypatch.setattr(nets["model"], "detect", lambda *given: spy("detect", *given))
    for name in ("answer_loss", "bank_of"):
        monkeypatch.setattr(resurgsam2, name, lambda *given, name=name: spy(name, *given))
    method.training_step(nets, flights(), None, Moment(0, 4))
    ((_, masks), _), found, every = *seen["bank_of"], seen["detect"][0][1], seen["answer_loss"][0][0][1]
    wanted = found.masks if own else every == 1
    assert torch.equal(masks.flatten(0, 1), wanted.float()) and not masks.requires_grad
    length = 1 + LONG + RECENT + NOW
    answered = every.view(2, length, 16, 16)[:, -NOW:].flatten(0, 1)
    assert len(every) == 2 * length and torch.equal(seen["answer_loss"][1][0][1], answered)


@pytest.fixture(scope="module")
def fitted():
    task = replace(recipe.scales["quick"].task, frames=12, side=16)
    samples, budget = task.samples("labelled"), Budget(steps=3, batch=2, precision="float32", checks=0)
    return Loop(LITTLE, task, budget, "float32", 0, samples, None, None, False, accelerator="cpu").run()


def test_rows_tell_how_a_structure_was_followed(fitted, monkeypatch):
    case = next(fitted.task.cases("val"))
    (flight,) = fitted.task.preparation.flights(case)
    rows = referred_rows(fitted, case)
    assert [row["structure"] for row in rows] == [f"{n}, flight 1" for n in fitted.task.structures.values()]
    assert all(np.isnan(row["initial"]) and np.isnan(row["begun"]) and row["kept"] == 0 for row in rows)
    assert [row["searched"] for row in rows] == pytest.approx([row["jf"] for row in rows])  # nothing was followed
    number = int((flight.labels == 1).flatten(1).sum(1).argmax())

    def perfect(self, nets, frames, sentence):
        value = 1 + self.language.names.index(sentence)
        track = Track(self, torch.zeros(12, 3, 2, 2))
        logits = 10.0 * (flight.labels == value) - 5
        there = (flight.labels == value).flatten(1).any(1) * 2.0 - 1
        track.answers, track.first = [Answer(logits[[k]], there[[k]], torch.ones(1)) for k in range(12)], number
        return track

    monkeypatch.setattr(ReSurgSam2, "follow", perfect)
    first = referred_rows(fitted, case)[0]
    assert (first["jf"], first["present"], first["initial"], first["right"]) == (1, 1, 1, 1)
    assert first["begun"] == number / 12


def test_probabilities_of_a_flight(fitted):
    found = fitted.answer(torch.randn(1, 1, 12, 16, 16))
    assert found.shape == (1, 4, 12, 16, 16)
    torch.testing.assert_close(found.sum(1), torch.ones(1, 12, 16, 16))
