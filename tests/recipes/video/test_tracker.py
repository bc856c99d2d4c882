"""The tracker: what is in a bank and what is not, what an answer depends on, its loss, and measures of following."""

import pytest
import torch
import torch.nn.functional as F

from medcook.data import IGNORE
from medcook.recipes.language._slice_memory import PATCH, Memory
from medcook.recipes.video import _tracker
from medcook.recipes.video._tracker import LONG, NOW, RECENT, SLOTS, Answer, Tracker, answer_loss, region_and_contour

SIDE = 16


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Tracker(1, (4, 8, 8), words=6).eval()


def frames(count=2, seed=0):
    return torch.randn(count, 1, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def bank(net, count=2, there=(True,) * SLOTS, seed=1):
    rng, side = torch.Generator().manual_seed(seed), SIDE // 4
    looks = torch.randn(count, SLOTS, 8, side, side, generator=rng)
    masks = (torch.rand(count, SLOTS, PATCH * side, PATCH * side, generator=rng) > 0.5).float()
    return Memory(looks, masks, torch.tensor(there).repeat(count, 1))


def disc(row, column, radius=4, side=24):
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return (rows - row) ** 2 + (columns - column) ** 2 <= radius**2


class TestAnswer:
    def test_what_is_not_in_the_bank_does_not_matter(self, net):
        maps, there = net.encode(frames()), (True, False, True, *[False] * (SLOTS - 3))
        given = bank(net, there=there)
        changed = Memory(given.looks.clone(), given.masks.clone(), given.there)
        absent = ~torch.tensor(there)
        changed.looks[:, absent], changed.masks[:, absent] = 7.0, 1.0
        torch.testing.assert_close(net.answer(maps, given).logits, net.answer(maps, changed).logits)
        changed.masks[:, 0] = 1 - changed.masks[:, 0]
        assert not torch.allclose(net.answer(maps, given).logits, net.answer(maps, changed).logits)

    def test_an_empty_bank_is_as_good_as_none(self, net):
        maps, given = net.encode(frames()), bank(net)
        given.there[0] = False
        found, none = net.answer(maps, given).logits, net.answer(maps).logits
        torch.testing.assert_close(found[0], none[0])
        assert not torch.allclose(found[1], none[1]) and found.shape == (2, SIDE, SIDE)

    def test_places_of_a_bank_are_told_apart(self, net):
        maps, given = net.encode(frames()), bank(net)
        order = torch.arange(SLOTS).roll(1)
        turned = Memory(given.looks[:, order], given.masks[:, order], given.there)
        assert not torch.allclose(net.answer(maps, given).logits, net.answer(maps, turned).logits, atol=1e-6)

    def test_an_image_model_knows_no_bank(self):
        net = Tracker(1, (4, 8, 8), memory=False).eval()
        maps = net.encode(frames())
        assert torch.equal(net.answer(maps, bank(net)).logits, net.answer(maps).logits)
        assert not [name for name, _ in net.named_parameters() if "memory" in name or "hear" in name]

    def test_prompts_are_seen_deep_and_fine(self, net):
        maps, nothing = net.encode(frames()), torch.zeros(2, 3, SIDE, SIDE)
        shown = nothing.clone()
        shown[0, 2, 4:6, 4:6] = 1
        one, other = (net.answer(maps, prompts=each) for each in (nothing, shown))
        assert not torch.allclose(one.logits[0], other.logits[0]) and torch.equal(one.logits[1], other.logits[1])
        deep = net.patches(shown, maps[-1][:, :, 0])
        weights = net.drawn.weight @ F.pixel_unshuffle(shown, PATCH)[0, :, 1, 1] + net.drawn.bias
        torch.testing.assert_close(deep[0, :, 1, 1], weights)
        with torch.no_grad():
            net.drawn.weight.zero_()
        finely = [net.answer(maps, prompts=each).logits[0] for each in (nothing, shown)]
        assert not torch.allclose(*finely)

    def test_words_are_heard(self, net):
        with torch.no_grad():
            net.hear.line.weight.normal_()
        maps = net.encode(frames())
        one, other = (net.answer(maps, words=torch.full((2, 6), value)).logits for value in (0.0, 1.0))
        assert not torch.allclose(one, other)

    def test_frames_do_not_hear_of_each_other(self, net):
        together = net.answer(net.encode(frames(3)), bank(net, 3)).logits
        alone = net.answer(net.encode(frames(3)[1:2]), Memory(*(part[1:2] for part in bank(net, 3)))).logits
        torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=1e-4)

    def test_a_mask_is_empty_where_the_object_is_not_believed_to_be_there(self):
        found = Answer(torch.ones(2, 3, 3), torch.tensor([2.0, -2.0]), torch.ones(2))
        assert found.masks[0].all() and not found.masks[1].any()
        assert found.seen.tolist() == pytest.approx([0.8808, 0.1192], abs=1e-4)


class TestBank:
    def test_clips_show_the_object_first_and_end_with_a_run(self):
        there = torch.zeros(50, 30, dtype=torch.bool)
        there[:, 12:15] = True
        there[0] = False
        clip = _tracker.drawn_clip(there)
        assert set(clip.first[1:].tolist()) <= {12, 13, 14} and len(set(clip.first[1:].tolist())) == 3
        assert (clip.run.diff(dim=1) == 1).all() and clip.run.min() >= 0 and clip.run.max() <= 29
        assert clip.run[:, -1].max() == 29 and clip.run[:, 0].min() == 0
        assert clip.every().shape == (50, 1 + LONG + RECENT + NOW) and clip.every()[:, 0].equal(clip.first)
        assert _tracker.drawn_clip(there[:, :4]).every().max() == 3

    def test_a_frame_has_those_before_it_in_its_bank_and_never_itself(self):
        length = 1 + LONG + RECENT + NOW
        looks = torch.arange(2.0 * length).view(2, length, 1, 1, 1).expand(-1, -1, 1, 2, 2)
        masks = (torch.arange(2 * length).view(2, length, 1, 1) % 3 == 0).float().expand(-1, -1, 8, 8)
        found = _tracker.bank_of(looks, masks, keep=(1.1, 1.1, 1.1))
        assert found.there.all() and found.looks.shape == (2 * NOW, SLOTS, 1, 2, 2)
        numbers = found.looks[..., 0, 0, 0].view(2, NOW, SLOTS)
        for now in range(NOW):
            present = 1 + LONG + RECENT + now
            assert numbers[0, now].tolist() == [0, present - 1, present - 2, present - 3, 1, 2, 3]
        assert (numbers[1] == numbers[0] + length).all()
        assert torch.equal(found.masks[..., 0, 0], (found.looks[..., 0, 0, 0] % 3 == 0).float())

    def test_parts_of_a_bank_are_missing_at_random(self):
        looks, masks = torch.zeros(400, 11, 1, 2, 2), torch.zeros(400, 11, 8, 8)
        there = _tracker.bank_of(looks, masks).there.float()
        assert there[:, 0].mean() == pytest.approx(0.95, abs=0.03)
        assert there[:, 1 + RECENT :].mean() == pytest.approx(0.5, abs=0.05)
        recent = there[:, 1 : 1 + RECENT]
        assert (recent.diff(dim=1) <= 0).all()  # none without the ones after it
        assert recent.mean(0).tolist() == pytest.approx([0.8, 0.64, 0.512], abs=0.06)


class TestLoss:
    def test_it_is_made_of_mask_presence_and_overlap(self):
        truth = disc(12, 12).byte()[None].repeat(2, 1, 1)
        truth[1] = 0
        logits = (20.0 * truth - 10) + torch.zeros(2, 24, 24)
        right = Answer(logits, torch.tensor([10.0, -10.0]), torch.tensor([1.0, 1.0]))
        assert answer_loss(right, truth).item() < 0.02
        wrong = right._replace(presence=torch.tensor([10.0, 10.0]))
        assert answer_loss(wrong, truth) - answer_loss(right, truth) == pytest.approx(0.5 * 10 / 2, rel=0.01)
        unsure = right._replace(expected=torch.tensor([0.5, 1.0]))
        assert answer_loss(unsure, truth) - answer_loss(right, truth) == pytest.approx(0.5 * 0.6931 / 2, rel=0.01)

    def test_unknown_pixels_say_nothing(self):
        truth = disc(12, 12).byte()[None]
        logits = torch.randn(1, 24, 24)
        found = Answer(logits, torch.zeros(1), torch.full((1,), 0.5))
        partly = truth.clone()
        partly[:, :5] = IGNORE
        changed = found._replace(logits=torch.where(partly == IGNORE, 9.0, logits))
        torch.testing.assert_close(answer_loss(found, partly), answer_loss(changed, partly))


class TestMeasures:
    def test_overlap(self):
        masks = torch.stack([disc(12, 12), disc(12, 12), torch.zeros(24, 24, dtype=torch.bool)])
        others = torch.stack([disc(12, 12), disc(12, 14), torch.zeros(24, 24, dtype=torch.bool)])
        found = _tracker.overlaps(masks, others)
        both = float((masks[1] & others[1]).sum() / (masks[1] | others[1]).sum())
        assert found.tolist() == pytest.approx([1, both, 1])

    def test_a_contour_may_lie_one_pixel_off(self):
        square = torch.zeros(24, 24, dtype=torch.bool)
        square[6:14, 6:14] = True
        moved = torch.stack([square, square.roll(1, 0), square.roll(4, 0), ~square & False])
        region, contour = region_and_contour(moved, square.expand(4, -1, -1))
        assert region.tolist() == pytest.approx([1, 7 / 9, 1 / 3, 0]) and contour[:2].tolist() == [1, 1]
        # four down: of 28 pixels a side, both sides' columns that still touch, and the rows' ends
        assert 0.2 < contour[2] < 0.6 and contour[3] == 0
        nothing = torch.zeros(1, 24, 24, dtype=torch.bool)
        assert [float(value) for value in region_and_contour(nothing, nothing)] == [1, 1]
        assert [float(value) for value in region_and_contour(square[None], nothing)] == [0, 0]

    def test_an_outline_is_what_touches_the_outside(self):
        square = torch.zeros(1, 10, 10, dtype=torch.bool)
        square[0, 2:7, 0:5] = True
        line = _tracker.outline(square)
        assert int(line.sum()) == 16 and not line[0, 3:6, 1:4].any() and line[0, 4, 0]
