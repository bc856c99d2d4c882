"""Two experts for X-rays, a classifier and a U-Net for lungs, and what they say of an image: words and a picture.

Of each there are two, which learn from one half of the patients. A patient who trains is shown to those of the other
half, anybody else to both.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.losses import find_loss
from medcook.methods import Batch
from medcook.methods.classification import image_labels
from medcook.recipes.fairness.mask_of_truth import apart
from medcook.recipes.findings._asked import FOUND, measured, right_lung
from medcook.recipes.findings.tb_cxr import LungsFirst
from medcook.recipes.language._reading import Reader, Start

LUNGS = (8, 16, 32, 64)
"""Channels of the U-Net."""


class Findings(NamedTuple):
    """What experts found: how probable the outcome is (B,), and the lungs (B, 1, H, W) bool."""

    outcome: Tensor
    lungs: Tensor

    def texts(self) -> list[dict[str, str]]:
        """For each image {expert: what it says}, numbers in whole percent."""
        says = ["yes" if probability > 0.5 else "no" for probability in self.outcome.tolist()]
        sizes = measured(self.lungs).round().int().tolist()
        return [
            {"CXR": FOUND["CXR"].format(said), "LUNGS": FOUND["LUNGS"].format(*size)}
            for said, size in zip(says, sizes, strict=True)
        ]


class Experts(nn.ModuleList):
    """Two of each kind; number k learns from half k."""

    def __init__(self, start: Start, channels: tuple[int, ...]):
        super().__init__(LungsFirst(Reader(start, 1, 2, channels), "unet", LUNGS) for _ in range(2))

    def loss(self, batch: Batch, halves: Tensor) -> Tensor:
        """Of both kinds on a batch's images, each by those who may know it."""
        images, drawn = apart(batch.images)
        outcome, total = image_labels(batch.labels, 2), 0.0
        for number, expert in enumerate(self):
            rows = halves == number
            if rows.any():
                told = F.cross_entropy(expert.reader(images[rows]).float(), outcome[rows])
                lungs = find_loss("both")(expert.lungs(images[rows]), (drawn[rows, 0] > 0.5).byte())
                total = total + told + lungs
        return total

    @torch.no_grad()
    def consult(self, images: Tensor, halves: Tensor | None = None) -> Findings:
        """On images (B, 1, H, W): by those who do not know an image's half (B,); without halves, the mean of both."""
        self.eval()
        weights = images.new_full((2, len(images)), 0.5)
        if halves is not None:
            weights = F.one_hot(1 - halves, 2).T.to(images)
        outcome, lungs = images.new_zeros(len(images)), torch.zeros_like(images)
        for expert, weight in zip(self, weights, strict=True):
            rows = weight > 0
            if rows.any():
                outcome[rows] += weight[rows] * expert.reader(images[rows]).float().softmax(1)[:, 1]
                lungs[rows] += weight[rows, None, None, None] * expert.lungs(images[rows]).diff(dim=1)
        return Findings(outcome, lungs > 0)


def coloured(images: Tensor) -> Tensor:
    """Grey images (B, 1, H, W) as RGB ones."""
    return images.expand(-1, 3, -1, -1)


def overlay(images: Tensor, lungs: Tensor) -> Tensor:
    """RGB images (B, 3, H, W) of grey ones with lungs (B, 1, H, W) bool: the right one redder, the left one bluer, by a
    standard deviation."""
    right = right_lung(lungs)
    return coloured(images) + torch.cat([right, torch.zeros_like(right), lungs & ~right], dim=1).to(images)
