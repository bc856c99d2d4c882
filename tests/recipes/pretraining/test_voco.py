"""VoCo: shares against counted voxels, losses against loops, and a teacher that follows."""

import math

import pytest
import torch
import torch.nn.functional as F
from pretexts import assert_both_phases_work, built, unlabelled
from torch import nn

from medcook.data.transforms import NONE
from medcook.image_pool import cut
from medcook.methods import Batch, Moment
from medcook.pretraining import encoded
from medcook.recipes.pretraining.voco import (
    VolumeContrast,
    apart_loss,
    corners,
    crop,
    described,
    divisible,
    overlaps,
    position_loss,
    recipe,
    sides,
    similarity,
)

TINY = dict(channels=(4, 8))
SIZE = (8, 14, 10)
NOW = Moment(0, 10)


def batch(size: tuple[int, ...] = SIZE, count: int = 3) -> Batch:
    return unlabelled(size, count)


def loss_by_loops(alike, y) -> float:
    near = far = shares = others = 0.0
    for mine, wanted in zip(alike.flatten().tolist(), y.flatten().tolist(), strict=True):
        if wanted:
            near -= wanted * math.log(1 - abs(wanted - mine))
            shares += wanted
        else:
            far -= math.log(1 - mine)
            others += 1
    return near / (shares or 1) + far / (others or 1)


@pytest.mark.component("base crops")
class TestBaseCrops:
    def test_they_tile_the_volume_and_do_not_overlap(self):
        size = (8, 14, 10)
        assert sides(size) == (8, 4, 3) and sides((32, 56, 40)) == (32, 18, 13)
        numbered = torch.arange(8 * 14 * 10).view(1, 1, *size)
        found = cut(numbered, sides(size))
        assert found.shape == (9, 1, 8, 4, 3) and len(found.unique()) == found.numel()
        assert torch.equal(found[5, 0], numbered[0, 0, :, 4:8, 6:9])

    def test_they_are_held_apart(self):
        bases = torch.randn(2, 4, 6)
        pairs = [
            F.cosine_similarity(b[i], b[j], dim=0).clamp_min(0) ** 2 for b in bases for i in range(4) for j in range(i)
        ]
        assert apart_loss(bases).item() == pytest.approx(torch.stack(pairs).mean().item(), rel=1e-5)
        assert apart_loss(torch.eye(4)[None]).item() == 0
        assert apart_loss(torch.ones(1, 4, 4)).item() == pytest.approx(1)

    def test_the_encoder_can_take_them(self):
        for size in ((32, 56, 40), (8, 64, 64), (16, 16, 16)):
            crops = divisible(torch.randn(2, 1, *sides(size)), 8)
            assert all(side % 8 == 0 and side >= 8 for side in crops.shape[2:])
        assert divisible(torch.randn(1, 1, 32, 18, 13), 8).shape[2:] == (32, 16, 16)  # 4 slices at the deepest level


@pytest.mark.component("contextual position prediction")
class TestPositions:
    def test_shares_are_those_of_counted_voxels(self):
        torch.manual_seed(0)
        size = (8, 14, 10)
        tiles = cut(torch.arange(8 * 14 * 10).view(1, 1, *size), sides(size)).flatten(1)
        owner = torch.full((8 * 14 * 10,), -1)
        for number, tile in enumerate(tiles):
            owner[tile] = number
        first = corners(size, 50)
        places = crop(owner.view(1, *size), first)
        wanted = torch.stack([(places == number).flatten(1).float().mean(1) for number in range(9)], dim=1)
        assert torch.allclose(overlaps(first, size), wanted, atol=1e-6)

    def test_they_sum_to_one_and_a_base_crop_is_itself(self):
        first = corners((32, 56, 40), 100)
        assert torch.allclose(overlaps(first, (32, 56, 40)).sum(1), torch.ones(100))
        bases = torch.tensor([[0, 18 * row, 13 * column] for row in range(3) for column in range(3)])
        assert torch.equal(overlaps(bases, (32, 56, 40)), torch.eye(9))

    def test_random_crops_come_from_everywhere_within_the_tiles(self):
        torch.manual_seed(0)
        first = corners((32, 56, 40), 2000)
        assert first.amin(0).tolist() == [0, 0, 0] and first.amax(0).tolist() == [0, 36, 26]

    def test_crops_and_shares_of_a_puzzle_belong_together(self):
        """In volumes whose voxels hold the number of their base crop, and their own number times 100."""
        method = VolumeContrast(channels=(4,), augmentation=NONE)
        small = sides(SIZE)
        numbers = torch.full(SIZE, math.nan)
        for row in range(3):
            for column in range(3):
                place = slice(small[1] * row, small[1] * (row + 1)), slice(small[2] * column, small[2] * (column + 1))
                numbers[:, *place] = 3 * row + column
        images = torch.stack([numbers + 100 * k for k in range(3)])[:, None]
        crops, y = method.puzzle(images)
        assert crops.shape == (3 * 9 + 3 * 2, 1, *small) and y.shape == (3, 2, 9)
        random, bases = method.parted(crops.flatten(1), 3)
        for volume in range(3):
            assert torch.allclose(bases[volume].mean(1), 100.0 * volume + torch.arange(9), atol=1e-3)
            for mine, wanted in zip(random[volume], y[volume], strict=True):
                found = (mine - 100 * volume).round().long().bincount(minlength=9) / len(mine)
                assert torch.allclose(found, wanted, atol=1e-5)

    def test_each_crop_has_its_own_brightness(self):
        method = VolumeContrast(channels=(4,))
        crops, _ = method.puzzle(torch.linspace(0, 1, 8 * 14 * 10).view(1, 1, *SIZE).repeat(2, 1, 1, 1, 1))
        first, second = crops[:18].unflatten(0, (2, 9))
        assert (first - second).abs().flatten(1).mean(1).min() > 1e-3

    def test_the_loss_is_that_of_a_loop(self):
        alike, y = torch.rand(2, 2, 9) * 0.9, overlaps(corners((32, 56, 40), 4), (32, 56, 40)).view(2, 2, 9)
        assert position_loss(alike, y).item() == pytest.approx(loss_by_loops(alike, y), rel=1e-4)
        assert position_loss(y.clamp_max(0.999), y).item() < 0.01
        assert torch.isfinite(position_loss(1 - y, y))

    def test_similarity_is_the_cosine_above_zero(self):
        vectors, bases = torch.randn(2, 3, 5), torch.randn(2, 4, 5)
        found = similarity(vectors, bases)
        for b in range(2):
            for m in range(3):
                for n in range(4):
                    wanted = F.cosine_similarity(vectors[b, m], bases[b, n], dim=0).clamp_min(0)
                    assert found[b, m, n].item() == pytest.approx(wanted.item(), abs=1e-6)


@pytest.mark.component("contrast with positive and negative pairs")
class TestContrast:
    def test_a_step_is_the_sum_of_within_across_and_apart(self):
        """With the projections taken apart by hand, the teacher's unlike the student's."""
        method = VolumeContrast(**TINY, augmentation=NONE)
        nets = built(method)
        for weight in nets["pretext"]["teacher"].parameters():
            nn.init.normal_(weight, std=0.1)
        torch.manual_seed(5)
        found = method.pretext(nets, batch(), NOW)
        torch.manual_seed(5)
        crops, y = method.puzzle(batch().images)
        maps = described(nets["model"], crops)
        mine, theirs = nets["pretext"]["student"](maps), nets["pretext"]["teacher"](maps)
        cosine = lambda a, b: F.cosine_similarity(a, b, dim=0).clamp_min(0).item()  # noqa: E731
        within, mine_across, their_across = torch.zeros(3, 3, 2, 9)
        for volume in range(3):
            other = (volume + 1) % 3
            for m in range(2):
                for n in range(9):
                    own = 27 + 2 * volume + m
                    within[volume, m, n] = cosine(mine[own], theirs[9 * volume + n])
                    mine_across[volume, m, n] = cosine(mine[own], mine[9 * other + n])
                    their_across[volume, m, n] = cosine(theirs[own], theirs[9 * other + n])
        wanted = loss_by_loops(within, y) + loss_by_loops(mine_across, their_across)
        wanted += apart_loss(mine[:27].view(3, 9, -1)).item()
        assert found.item() == pytest.approx(wanted, rel=1e-3)

    def test_the_teacher_follows_and_does_not_learn(self):
        method = VolumeContrast(**TINY)
        nets = built(method)
        student, teacher = nets["pretext"]["student"], nets["pretext"]["teacher"]
        method.training_step(nets, batch(), batch(), NOW).backward()
        assert all(weight.grad is None for weight in teacher.parameters())
        before = teacher[1][0].weight.clone()
        nn.init.ones_(student[1][0].weight)
        method.after_step(nets, NOW)
        assert torch.allclose(teacher[1][0].weight, 0.9 * before + 0.1, atol=1e-6)

    def test_encoder_and_projection_learn(self):
        method = VolumeContrast(**TINY)
        nets = built(method)
        method.training_step(nets, batch(), batch(), NOW).backward()
        for weight in (*nets["model"].down.parameters(), *nets["pretext"]["student"].parameters()):
            assert weight.grad.abs().max() > 0
        assert all(weight.grad is None for weight in (*nets["model"].up.parameters(), *nets["model"].head.parameters()))


@pytest.mark.component("geometric context priors")
class TestContext:
    def test_shuffled_shares_are_the_same_shares_at_other_places(self):
        images, found = batch((8, 24, 24), 8).images, []
        for context in (True, False):
            torch.manual_seed(2)
            found.append(VolumeContrast(**TINY, context=context, augmentation=NONE).puzzle(images)[1].flatten(0, 1))
        (true, shuffled) = found
        assert torch.allclose(true.sort(1).values, shuffled.sort(1).values, atol=1e-6)
        assert (true != shuffled).any(1).float().mean() > 0.8
        moved = [tuple(t.argmax().item() for t in pair) for pair in zip(true, shuffled, strict=True)]
        assert len({(b - a) % 9 for a, b in moved}) > 3  # each crop has its own permutation

    def test_the_ablation_differs_in_nothing_else(self):
        arms = {name: arm.method.settings() for name, arm in recipe.arms.items()}
        full, other = arms["voco"], arms["shuffled positions"]
        assert {key for key in full if full[key] != other[key]} == {"context"}


def test_features_are_the_means_of_all_levels():
    net = built(VolumeContrast(channels=(4, 8, 8)))["model"].eval()
    images = torch.randn(2, 1, 8, 8, 8)
    found = described(net, images)
    assert found.shape == (2, 20)
    assert torch.allclose(found[:, -8:], encoded(net, images).mean((2, 3, 4)), atol=1e-5)
    assert torch.allclose(found[:, :4], net.down[0](images).mean((2, 3, 4)), atol=1e-5)


@pytest.mark.component("benchmark of 48 tasks")
def test_it_runs_on_volumes_of_the_hippocampus_with_three_labelled_patients():
    task = recipe.scales["full"].task
    assert task.dataset == "hippocampus" and task.labelled == 3 and task.evaluation == "test"


@pytest.mark.parametrize("size", [(8, 64, 64), (32, 56, 40), (16, 16, 16), (9, 10, 11)])
def test_any_size(size):
    images = batch(size, 2)
    assert torch.isfinite(VolumeContrast().pretext(built(VolumeContrast()), images, NOW))


@pytest.mark.parametrize("arm", recipe.arms)
def test_every_arm_goes_through_both_phases(arm):
    assert_both_phases_work(recipe.arms[arm].method, batch())
