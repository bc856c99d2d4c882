"""M2SNet: what two levels do not share, at several scales, between all levels; and a loss of frozen features."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medcook.data.case import IGNORE
from medcook.losses import cross_entropy_and_dice
from medcook.methods import Batch, Moment
from medcook.recipes.architectures.m2snet import LossNet, M2SNet, Pyramid, SubtractionNet, compared


def maps(*sizes: int, channels: int = 3) -> list[torch.Tensor]:
    return [torch.randn(2, channels, size, size) for size in sizes]


def batch(classes: int = 3) -> Batch:
    return Batch(torch.randn(2, 1, 32, 32), torch.randint(0, classes, (2, 32, 32)).byte())


@pytest.mark.component("subtraction unit")
def test_a_unit_sees_the_absolute_difference():
    fine, coarse = maps(8, 4)
    grown = F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)
    assert torch.allclose(compared(fine, coarse, (1,)), (fine - grown).abs())
    assert torch.allclose(compared(fine, coarse, (1,), subtract=False), (fine + grown).abs())
    assert torch.equal(compared(fine, fine), torch.zeros_like(fine))


@pytest.mark.component("subtraction unit")
def test_what_all_levels_say_is_passed_on_by_none():
    """Levels of the same constant; by addition it would be passed on."""
    same = [torch.full((1, 4, size, size), 2.0) for size in (8, 4, 2)]
    for subtract in (True, False):
        pyramid = Pyramid(3, 4, sides=(1,), subtract=subtract).eval()
        assert subtract == all(found.abs().max() < 1e-6 for found in pyramid(same))


@pytest.mark.component("intra-layer multi-scale")
def test_scales_are_differences_of_box_means():
    """Each map filtered by itself with torch's convolution, and then subtracted."""
    fine, other = maps(9, 9)

    def filtered(x: torch.Tensor, side: int) -> torch.Tensor:
        return F.conv2d(x, torch.ones(3, 1, side, side) / side**2, padding=side // 2, groups=3)

    wanted = sum((filtered(fine, side) - filtered(other, side)).abs() for side in (1, 3, 5))
    assert torch.allclose(compared(fine, other), wanted, atol=1e-5)


@pytest.mark.component("intra-layer multi-scale")
def test_a_structure_counts_for_more_than_a_speckle():
    """Where both differ from nothing by one: a lone pixel is diluted by the boxes, the middle of a square is not."""
    speckle, square = torch.zeros(2, 1, 1, 9, 9)
    speckle[..., 4, 4] = square[..., 2:7, 2:7] = 1
    seen = [compared(x, torch.zeros_like(x))[0, 0, 4, 4].item() for x in (speckle, square)]
    assert seen == pytest.approx([1 + 1 / 9 + 1 / 25, 3])


@pytest.mark.component("inter-layer multi-scale")
def test_units_compare_levels_and_then_their_differences():
    """Three levels a, b, c of one size, and units that pass on what they see."""
    a, b, c = maps(5, 5, 5)
    pyramid = Pyramid(3, 3, sides=(1,))
    pyramid.units = nn.ModuleList(nn.ModuleList(nn.Identity() for _ in row) for row in pyramid.units)
    first, second = pyramid([a, b, c])
    assert torch.allclose(first, (a - b).abs() + ((a - b).abs() - (b - c).abs()).abs())
    assert torch.allclose(second, (b - c).abs())


@pytest.mark.component("inter-layer multi-scale")
def test_every_level_reaches_the_finest():
    """Ten units for five levels; a change of the deepest one alone is noticed on every grid above it."""
    pyramid = Pyramid(5, 3).eval()
    assert [len(row) for row in pyramid.units] == [4, 3, 2, 1]
    levels = maps(32, 16, 8, 4, 2)
    before, after = pyramid(levels), pyramid([*levels[:-1], levels[-1] + 3])
    assert [found.shape[-1] for found in before] == [32, 16, 8, 4]
    assert not any(torch.allclose(old, new) for old, new in zip(before, after, strict=True))


@pytest.mark.component("LossNet")
def test_it_adds_the_distances_of_all_blocks():
    """Against functional convolutions, one block after the other."""
    lossnet = LossNet(3, widths=(4, 6))
    guess, truth = torch.rand(2, 2, 3, 16, 16)
    x, wanted = torch.cat([guess, truth]), 0.0
    for number, block in enumerate(lossnet.blocks):
        x = F.max_pool2d(x, 2) if number else x
        for layer in (block[0], block[2]):
            x = F.relu(F.conv2d(x, layer.weight, padding=1))
        wanted = wanted + (x[:2] - x[2:]).square().mean()
    assert torch.allclose(lossnet(guess, truth), wanted)
    assert lossnet(truth, truth) == 0


@pytest.mark.component("LossNet")
def test_it_is_never_trained_and_always_the_same():
    one, other = LossNet(3), (torch.manual_seed(5), LossNet(3))[1]
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert not any(weight.requires_grad for weight in one.parameters())
    guess = torch.rand(1, 3, 16, 16, requires_grad=True)
    one(guess, torch.rand(1, 3, 16, 16)).backward()
    assert guess.grad.abs().max() > 0


@pytest.mark.component("LossNet")
def test_a_tenth_of_its_distance_is_added_to_the_loss():
    method, data = M2SNet(channels=(4, 8), width=4), batch()
    data.labels[:, :5] = IGNORE
    nets = method.build(1, 3, 2)
    with torch.no_grad():
        logits = nets["model"](data.images)
        known = (data.labels != IGNORE)[:, None]
        truth = F.one_hot(data.labels.where(known[:, 0], 0).long(), 3).movedim(-1, 1) * known
        distance = nets["lossnet"](logits.softmax(1) * known, truth.float())
        wanted = cross_entropy_and_dice(logits, data.labels) + 0.1 * distance
        assert torch.allclose(method.training_step(nets, data, None, Moment(0, 10)), wanted)
    assert distance > 0


@pytest.mark.parametrize("size", [(32, 32), (40, 36), (33, 47)])
def test_any_size_comes_back(size):
    network = SubtractionNet(inputs=1, classes=3, channels=(4, 8, 8), width=4)
    assert network(torch.randn(1, 1, *size)).shape == (1, 3, *size)


@pytest.mark.parametrize("changes", [{}, {"subtract": False}, {"sides": (1,)}, {"lossnet": 0.0}])
def test_every_weight_is_used(changes):
    method = M2SNet(channels=(4, 8, 8), width=4, **changes)
    nets = method.build(1, 3, 2)
    method.training_step(nets, batch(), None, Moment(0, 10)).backward()
    assert all(weight.grad is not None for weight in nets.parameters() if weight.requires_grad)


def test_the_ablation_adds_and_is_otherwise_the_same():
    whole, added, bare = (
        M2SNet(channels=(4, 8), **changes).build(1, 3, 2) for changes in ({}, {"subtract": False}, {"lossnet": 0.0})
    )
    sizes = [{name: weight.shape for name, weight in nets.named_parameters()} for nets in (whole, added)]
    assert sizes[0] == sizes[1]
    assert not added["model"].pyramid.subtract and whole["model"].pyramid.subtract
    assert "lossnet" in added and "lossnet" not in bare
