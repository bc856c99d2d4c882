"""Cross-entropy, soft Dice and their sum; unlabelled voxels (`IGNORE`) count in none of them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from medcook.data.case import IGNORE
from medcook.errors import MedcookError


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over labelled voxels; logits (B, classes, *size), labels (B, *size) uint8. 0 when nothing is labelled."""
    total = F.cross_entropy(logits, labels.long(), ignore_index=IGNORE, reduction="sum")
    return total / (labels != IGNORE).sum().clamp_min(1)


def soft_dice(logits: Tensor, labels: Tensor, smooth: float = 1.0) -> Tensor:
    """One minus the mean soft Dice of the structures, each pooled over the batch (Milletari et al., 3DV 2016, eq. 3,
    with sums in place of squares); the background is left out."""
    classes = logits.shape[1]
    known = labels != IGNORE
    truth = F.one_hot(torch.where(known, labels, 0).long(), classes).movedim(-1, 1)[:, 1:] * known[:, None]
    soft = logits.softmax(1)[:, 1:] * known[:, None]
    axes = (0, *range(2, logits.ndim))
    overlap, size = (soft * truth).sum(axes), soft.sum(axes) + truth.sum(axes)
    return 1 - ((2 * overlap + smooth) / (size + smooth)).mean()


def cross_entropy_and_dice(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum of both, as in nnU-Net (Isensee et al., Nature Methods 2021)."""
    return cross_entropy(logits, labels) + soft_dice(logits, labels)


LOSSES = {"cross-entropy": cross_entropy, "dice": soft_dice, "both": cross_entropy_and_dice}


def find_loss(name: str):
    """A loss by name: cross-entropy, dice or both."""
    if name not in LOSSES:
        raise MedcookError(f"Unknown loss {name!r}.", f"Known: {', '.join(LOSSES)}.")
    return LOSSES[name]
