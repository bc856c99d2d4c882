"""The losses against MONAI's and PyTorch's, and what unlabelled voxels do: nothing."""

import pytest
import torch
import torch.nn.functional as F
from monai.losses import DiceCELoss, DiceLoss

from medcook.data.case import IGNORE
from medcook.errors import MedcookError
from medcook.losses import LOSSES, cross_entropy, cross_entropy_and_dice, find_loss, soft_dice

MONAI = dict(include_background=False, softmax=True, to_onehot_y=True, batch=True, smooth_nr=1.0, smooth_dr=1.0)


def example(dims: int = 2, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(dims)
    logits = torch.randn(3, classes, *[8] * dims, generator=rng)
    return logits, torch.randint(0, classes, (3, *[8] * dims), generator=rng).to(torch.uint8)


@pytest.mark.parametrize("dims", [2, 3])
def test_soft_dice_is_monais(dims):
    logits, labels = example(dims)
    expected = DiceLoss(**MONAI)(logits, labels[:, None]).item()
    assert soft_dice(logits, labels).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("dims", [2, 3])
def test_the_sum_is_monais(dims):
    logits, labels = example(dims)
    expected = DiceCELoss(**MONAI)(logits, labels[:, None].long()).item()
    assert cross_entropy_and_dice(logits, labels).item() == pytest.approx(expected, abs=1e-5)


def test_cross_entropy_is_pytorchs():
    logits, labels = example()
    labels[0, :3] = IGNORE
    expected = F.cross_entropy(logits, labels.long(), ignore_index=IGNORE).item()
    assert cross_entropy(logits, labels).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_predicted_on_unlabelled_voxels_changes_nothing(name):
    logits, labels = example()
    labels[:, 2:5] = IGNORE
    other = logits.clone()
    other[:, :, 2:5] += torch.randn(3, 4, 3, 8) * 10
    assert find_loss(name)(other, labels).item() == pytest.approx(find_loss(name)(logits, labels).item(), abs=1e-6)
    other[:, :, 0] += 10 * F.one_hot(labels[:, 0].long(), 4).movedim(-1, 1)
    assert find_loss(name)(other, labels) < find_loss(name)(logits, labels) - 1e-3, "what is right there does"


def test_nothing_labelled_is_no_cross_entropy():
    logits, labels = example()
    loss = cross_entropy(logits.requires_grad_(), torch.full_like(labels, IGNORE))
    loss.backward()
    assert loss.item() == 0 and (logits.grad == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_a_perfect_prediction_costs_nothing_and_a_wrong_one_much(name):
    _, labels = example()
    perfect = F.one_hot(labels.long(), 4).movedim(-1, 1) * 40.0
    assert find_loss(name)(perfect, labels).item() == pytest.approx(0, abs=1e-3)
    assert find_loss(name)(perfect.roll(1, dims=1), labels).item() > 0.9


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_against_the_gradient_lowers_the_loss(name):
    logits, labels = example()
    loss = find_loss(name)(logits.requires_grad_(), labels)
    loss.backward()
    assert torch.isfinite(logits.grad).all()
    assert find_loss(name)(logits - logits.grad * 10, labels) < loss


def test_dice_pools_a_structure_over_the_batch():
    """Half of the batch without the structure: pooled, a perfect other half costs next to nothing."""
    labels = torch.zeros(2, 8, 8, dtype=torch.uint8)
    labels[0, :4] = 1
    logits = F.one_hot(labels.long(), 2).movedim(-1, 1) * 40.0
    logits[1, :, 0, 0] = logits[1, :, 0, 0].flip(0)  # one false voxel in the empty image
    assert soft_dice(logits, labels).item() == pytest.approx(1 - 65 / 66, abs=1e-4)


def test_an_unknown_loss_is_named():
    with pytest.raises(MedcookError, match="'focal'.*cross-entropy, dice, both"):
        find_loss("focal")
