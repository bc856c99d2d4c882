"""Prompts, questions, corruption, what is learnt elsewhere, banks while following, and what a row measures."""

from dataclasses import replace
from zlib import crc32

import numpy as np
import pytest
import torch
from scipy import ndimage

from medcook.methods import Batch, Moment
from medcook.recipes.findings._corruptions import STRENGTHS, corrupt
from medcook.recipes.language._slice_memory import Memory
from medcook.recipes.video import _prompted, _specialist, sam2_robotic
from medcook.recipes.video._flights import FlightTask
from medcook.recipes.video._prompted import AnythingTask, UnseenTask, shown, shown_at_random
from medcook.recipes.video._specialist import Asked, Specialist
from medcook.recipes.video._tracker import RECENT, SLOTS, Answer, Tracker
from medcook.recipes.video.sam2_robotic import (
    QUESTIONS,
    SEVERITIES,
    Prompted,
    Question,
    answered,
    corrupted,
    prompted_rows,
    prompts_of,
    recipe,
)
from medcook.tasks import Budget
from medcook.training import Loop

SIDE = 40
LITTLE = Prompted(channels=(4, 8, 8))


def square(top=10, left=16, height=8, width=12, side=SIDE):
    mask = torch.zeros(1, side, side, dtype=torch.bool)
    mask[0, top : top + height, left : left + width] = True
    return mask


@pytest.mark.component("point and box prompts")
class TestPrompts:
    def test_a_point_is_drawn_in_the_middle_and_a_box_around(self):
        mask = square()
        point, box = shown(mask, "point")[0], shown(mask, "box")[0]
        row, column = np.unravel_index(int(point[2].argmax()), (SIDE, SIDE))
        assert abs(row - 13.5) <= 1 and abs(column - 21.5) <= 3 and point[2].max() > 0.8 and not point[:2].any()
        assert torch.equal(box[1] == 1, mask[0]) and torch.equal(box[1] == -1, ~mask[0]) and not box[2].any()

    def test_several_points_lie_in_the_structure_and_are_the_same_again(self):
        mask = square()
        drawn = shown(mask, "points")[0, 2]
        peaks = (drawn == torch.nn.functional.max_pool2d(drawn[None], 3, 1, 1)[0]) & (drawn > 0.8)
        assert 2 <= int(peaks.sum()) <= 3 and mask[0][peaks].all()
        assert torch.equal(shown(mask, "points"), shown(mask, "points"))

    def test_nothing_is_shown_of_what_is_not_there(self):
        masks = torch.cat([square(), square() & False])
        for kind in _prompted.KINDS:
            found = shown(masks, kind)
            assert found[0].any() and not found[1].any()
            assert not shown(masks, kind, torch.Generator().manual_seed(0))[1].any()

    def test_training_draws_a_kind_for_each_flight_and_points_anywhere(self):
        torch.manual_seed(0)
        drawn = shown_at_random(square().expand(60, -1, -1), 3)
        boxes, points = drawn[:, 1].flatten(1).any(1), drawn[:, 2].flatten(1).any(1)
        assert torch.equal(boxes, ~points)
        kinds = boxes.view(20, 3)
        assert (kinds == kinds[:, :1]).all() and 0.1 < kinds.float().mean() < 0.6
        assert len({tuple(row) for row in drawn[points][:, 2].flatten(1).topk(1).indices.tolist()}) > 5

    def test_prompts_fit_frames_of_any_size(self):
        drawn = shown(square(side=20, height=4, width=4), "box")
        assert drawn.shape == (1, 3, 20, 20) and (drawn[0, 1] > 0).sum() == 16


@pytest.mark.component("prompts in each image, or in the first frame alone")
class TestQuestions:
    truth = torch.cat([square() & False, square(), square(top=14), square(top=18), square() & False])

    def test_each_frame_or_the_first_one_alone(self):
        each = prompts_of(self.truth, 1, Question("box"), memory=True)
        once = prompts_of(self.truth, 1, Question("box", once=True), memory=True)
        taken = prompts_of(self.truth, 1, Question("box", once=True), memory=False)
        shows = lambda prompts: prompts.flatten(1).any(1).tolist()  # noqa: E731
        assert shows(each) == [False, True, True, True, False]
        assert shows(once) == [False, True, False, False, False] and torch.equal(once[1], each[1])
        assert shows(taken) == [False, True, True, True, True] and (taken[2:] == each[1]).all()

    def test_what_is_pointed_at_is_there(self):
        found = Answer(torch.ones(3, 4, 4), torch.tensor([-1.0, -1.0, 1.0]), torch.ones(3))
        prompts = torch.zeros(3, 3, 4, 4)
        prompts[0, 1] = -1.0
        assert sam2_robotic.believed(found, prompts).flatten(1).all(1).tolist() == [True, False, True]

    def test_columns_say_what_was_asked(self):
        columns = [question.column for question in QUESTIONS]
        assert columns[:5] == ["point", "points", "box", "first_point", "first_box"]
        assert {f"{name}_{k}" for name in ("point", "box", "first_box") for k in SEVERITIES} == set(columns[5:])
        assert len(set(columns)) == len(columns)

    def test_a_bank_has_the_first_frame_and_recent_ones_after_it(self):
        looks = torch.arange(9.0).view(1, 9, 1, 1, 1).expand(3, -1, 1, 2, 2)
        masks = torch.arange(9.0).view(1, 9, 1, 1).expand(3, -1, 8, 8)
        found = LITTLE.bank(looks, masks, 6, torch.tensor([0, 5, 6]))
        assert found.looks.shape == (3, SLOTS, 1, 2, 2)
        numbers = found.looks[..., 0, 0, 0]
        assert numbers[0, : 1 + RECENT].tolist() == [0, 5, 4, 3] and torch.equal(found.masks[..., 0, 0], numbers)
        assert found.there[:, : 1 + RECENT].tolist() == [[True] * 4, [True, False, False, False], [False] * 4]
        assert not found.there[:, 1 + RECENT :].any()

    def test_a_memory_carries_what_was_shown_once(self):
        torch.manual_seed(0)
        flights = torch.randn(1, 5, 16, 16)
        prompts = torch.zeros(5, 3, 16, 16)
        other = prompts.clone()
        other[1, 2, 4:8, 4:8] = 1
        for method, carries in ((LITTLE, True), (replace(LITTLE, memory=False), False)):
            nets = method.build(1, 3, 3).eval()
            net, heard = nets["average"], {}
            torch.nn.init.constant_(net.judge[-1].bias, 9.0)  # whatever it is, it is believed to be there
            torch.nn.init.normal_(net.fine.weight, std=3.0)
            plain = net.answer

            def answer(maps, bank=None, prompts=None, heard=heard, plain=plain):
                found = plain(maps, bank, prompts)
                heard.setdefault("banks", []).append(0 if bank is None else int(bank.there.sum()))
                return found._replace(logits=found.logits - found.logits.mean())

            net.answer = answer
            one, two = (method.answers(nets, flights, [Asked(0, 1, 1, each)]) for each in (prompts, other))
            assert not one[0, 0].any() and not torch.equal(one[0, 1], two[0, 1])
            assert heard["banks"] == ([0, 0, 1, 2, 3, 0, 0, 1, 2, 3] if carries else [0] * 10)
            if not carries:
                assert torch.equal(one[0, 2:], two[0, 2:])

    def test_questions_do_not_hear_of_each_other(self):
        torch.manual_seed(0)
        nets, flights = LITTLE.build(1, 3, 3).eval(), torch.randn(2, 4, 16, 16)
        asked = [Asked(k, 1, k, torch.rand(4, 3, 16, 16)) for k in (0, 1)]
        together = LITTLE.answers(nets, flights, asked)
        assert torch.equal(together[1:], LITTLE.answers(nets, flights, asked[1:]))


@pytest.mark.component("zero-shot segmentation")
class TestUnseen:
    task = UnseenTask("embedded", frames=12, side=24)

    def test_a_watershed_cuts_along_edges(self):
        images = torch.zeros(6, 24, 24)
        images[:, :, 12:], images[3:, :12] = 3.0, -2.0
        images += 0.01 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        found = _prompted.regions_of(images, 20)
        assert found.dtype == torch.uint8 and found.min() == 1 and 10 <= len(found.unique()) <= 30
        levels = (images > 1.5).int() - (images < -1).int()
        shares = [levels[found == value].unique(return_counts=True)[1] for value in found.unique()]
        assert sum(float(count.max() / count.sum()) for count in shares) / len(shares) > 0.9

    def test_training_shows_no_anatomy_and_scores_show_nothing_else(self):
        labelled, val = self.task.samples("labelled"), self.task.samples("val")
        plain = FlightTask("embedded", frames=12, side=24)
        assert torch.equal(labelled.images, plain.samples("labelled").images)
        assert labelled.labels.max() > 3 and not torch.equal(labelled.labels, plain.samples("labelled").labels)
        assert val.hash() == plain.samples("val").hash()
        seen = replace(self.task, seen=True).samples("labelled")
        assert seen.hash() == plain.samples("labelled").hash()

    def test_how_many_regions_is_the_cases_to_say(self):
        flown = AnythingTask("embedded", frames=12, side=24)
        counts = [len(flown.preparation.slices(case)[1].unique()) for case in flown.cases("val")]
        assert len(set(counts)) > 1 and min(counts) >= 10 and max(counts) <= 130


@pytest.mark.component("corruption")
class TestCorruption:
    def test_frames_are_corrupted_as_named_and_normalised_again(self):
        frames = torch.rand(3, SIDE, SIDE)
        assert torch.equal(corrupted(frames, "blur", 0, "a"), frames)
        low, high = frames.min(), frames.max()
        scaled = ((frames - low) / (high - low)).double().numpy()
        rng = np.random.default_rng(crc32(b"shot noise 3 in a"))
        wanted = {
            ("blur", 5): [ndimage.gaussian_filter(frame, 0.06 * SIDE) for frame in scaled],
            ("shot noise", 3): [corrupt(frame, "shot noise", STRENGTHS["shot noise"][2], rng) for frame in scaled],
        }
        for (kind, severity), changed in wanted.items():
            changed = torch.from_numpy(np.stack(changed))
            found = corrupted(frames, kind, severity, "a")
            torch.testing.assert_close(found.double(), (changed - changed.mean()) / changed.std(), atol=1e-3, rtol=0)
        assert torch.equal(corrupted(frames, "shot noise", 3, "a"), corrupted(frames, "shot noise", 3, "a"))
        assert not torch.equal(corrupted(frames, "shot noise", 3, "a"), corrupted(frames, "shot noise", 3, "b"))

    @pytest.mark.parametrize("kind", sam2_robotic.CORRUPTIONS)
    def test_it_is_felt_the_more_the_more_severe(self, kind):
        rows = torch.linspace(0, 6, SIDE)
        frames = (rows.sin()[:, None] * rows.cos())[None]
        clean = (frames - frames.mean()) / frames.std()
        away = [(corrupted(frames, kind, k, "a") - clean).square().mean().item() for k in (1, 3, 5)]
        assert away == sorted(away) and away[-1] > 0.005


def flights(count=2, length=14, side=16):
    rng = torch.Generator().manual_seed(0)
    labels = torch.zeros(count, length, side, side, dtype=torch.uint8)
    labels[:, 2:12, 4:10, 5:12] = 1
    return Batch(torch.randn(count, 1, length, side, side, generator=rng) + labels[:, None], labels)


class TestTraining:
    def test_with_a_memory_half_of_the_flights_are_not_prompted_again(self, monkeypatch):
        batch = flights(8)
        for memory, prompted in ((False, {True}), (True, {True, False})):
            torch.manual_seed(1)
            method, asked = replace(LITTLE, memory=memory), []
            nets, plain = method.build(1, 3, 3), Tracker.answer

            def answer(self, maps, bank=None, prompts=None, asked=asked, plain=plain):
                asked.append((bank is not None, prompts))
                return plain(self, maps, bank, prompts)

            monkeypatch.setattr(Tracker, "answer", answer)
            method.training_step(nets, batch, None, Moment(0, 4)).backward()
            monkeypatch.undo()
            assert [banked for banked, _ in asked] == [False, memory]
            alone, again = (prompts.flatten(1).any(1).view(8, -1) for _, prompts in asked)
            assert alone.any(1).all() and set(again.any(1).tolist()) == prompted
            assert alone.shape[1] == 11 and again.shape[1] == 4

    def test_a_prompted_frame_hears_of_no_other(self):
        there = torch.ones(2, SLOTS, dtype=torch.bool)
        prompts = torch.zeros(2, 3, 4, 4)
        prompts[1, 2, 0, 0] = 1.0
        bank = sam2_robotic.unless_prompted(Memory(torch.zeros(2), torch.zeros(2), there), prompts)
        assert bank.there.all(1).tolist() == [True, False] and not bank.there[1].any() and there.all()

    def test_networks_are_alike_but_for_the_memory(self):
        with_memory, without = (recipe.arms[name].method for name in ("sam 2", "sam"))
        assert replace(without, memory=True) == with_memory
        names = [{name for name, _ in m.build(1, 3, 3)["model"].named_parameters()} for m in (with_memory, without)]
        assert {name.split(".")[0] for name in names[0] - names[1]} == {"memory"} and not names[1] - names[0]


@pytest.mark.component("state of the art without prompts")
class TestSpecialist:
    def test_it_learns_on_what_is_asked_for_and_hears_no_prompt(self):
        arm = recipe.arms["specialist"]
        assert isinstance(arm.method, Specialist) and arm.changes == {"seen": True} and arm.method.trial.seen
        nets = Specialist(channels=(4, 8, 8)).build(1, 3, 3).eval()
        seen = torch.randn(2, 4, 16, 16)
        asked = [Asked(k, v, 0, torch.rand(4, 3, 16, 16)) for k in (0, 1) for v in (1, 2)]
        found = arm.method.answers(nets, seen, asked)
        label = nets["average"](seen[:, None]).argmax(1)
        assert all(torch.equal(masks, label[one.flight] == one.value) for masks, one in zip(found, asked, strict=True))

    def test_a_step_sees_as_many_frames(self, monkeypatch):
        method, seen = Specialist(channels=(4, 8, 8)), []
        nets = method.build(1, 3, 3)
        nets["model"].register_forward_hook(lambda net, given, found: seen.append(given[0].shape))
        method.training_step(nets, flights(), None, Moment(0, 4))
        assert seen == [(2, 1, 11, 16, 16)]

    def test_frames_are_learnt_with_their_own_labels(self, monkeypatch):
        method, batch, given = Specialist(channels=(4, 8, 8)), flights(), []
        labels = (torch.rand(batch.labels.shape) > 0.5).byte()
        nets = method.build(1, 3, 3)
        nets["model"].register_forward_hook(lambda net, frames, found: given.append(frames[0][:, 0]))
        monkeypatch.setattr(_specialist, "find_loss", lambda name: lambda logits, labels: given.append(labels))
        method.training_step(nets, Batch(labels[:, None].float(), labels), None, Moment(0, 4))
        assert torch.equal(given[0], given[1].float()) and len(given[1].unique(dim=1)[0]) > 4


def test_a_row_measures_dice_from_the_first_large_frame_on():
    truth = torch.zeros(6, SIDE, SIDE, dtype=torch.bool)
    truth[0, :2, :2] = truth[2:5, 10:20, 10:20] = True

    class Perfect(Prompted):
        def answers(self, nets, flights, asked):
            masks = truth.expand(len(asked), -1, -1, -1).clone()
            for row, one in zip(masks, asked, strict=True):
                row[4, 15:] &= one.flight == 0  # half of a frame is lost where something is corrupted
            return masks

    values = answered(Perfect(), None, torch.zeros(4, 6, SIDE, SIDE), truth, 1, 2)
    assert values["point"] == values["box"] == values["first_box"] == 1
    lost = (1 + 1 + 2 / 3) / 3
    assert [values[f"box_{k}"] for k in SEVERITIES] == pytest.approx([lost] * 3)
    for name in ("change", "box_change", "first_change"):
        assert values[name] == pytest.approx(lost - 1)


@pytest.fixture(scope="module")
def fitted():
    task = replace(recipe.scales["quick"].task, frames=12, side=16)
    samples, budget = task.samples("labelled"), Budget(steps=2, batch=2, precision="float32", checks=0)
    return Loop(LITTLE, task, budget, "float32", 0, samples, None, None, False, accelerator="cpu").run()


def test_rows_ask_every_question_of_every_structure(fitted):
    rows = prompted_rows(fitted, next(fitted.task.cases("val")))
    assert 2 <= len(rows) <= 3 and {row["corruption"] for row in rows} <= set(sam2_robotic.CORRUPTIONS)
    for row in rows:
        assert all(0 <= row[question.column] <= 1 for question in QUESTIONS)
        assert row["change"] == pytest.approx(np.mean([row[f"point_{k}"] for k in SEVERITIES]) - row["point"])


def test_where_nobody_prompts_the_whole_frame_is_asked_for(fitted):
    found = fitted.answer(torch.randn(1, 1, 12, 16, 16))
    assert found.shape == (1, 4, 12, 16, 16)
    torch.testing.assert_close(found.sum(1), torch.ones(1, 12, 16, 16))
