"""Images with captions: X-rays with one finding each, and an image-text model that learns which caption is whose.

The X-rays have one finding each, drawn as in `_findings.py`, and its description is the image's caption.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.language import TextEncoder
from medcook.networks.unet import DoubleConv
from medcook.pretraining import Projector
from medcook.recipes.language._findings import (
    FIELDS,
    KINDS,
    SIDES,
    Finding,
    FindingsTask,
    Painted,
    fields_of,
    shape_of,
    value_of,
)
from medcook.tasks import Budget

BRIGHT = (1.2, 1.8)
"""Of a finding, in standard deviations of the image."""
NOTHING = "no finding"
"""The caption of an image without a finding."""


def one_drawn(image: np.ndarray, lungs: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An image (H, W) with a large finding in its lungs (H, W), if there are any, and its label map (H, W)."""
    image, label, places = image.copy(), np.zeros(image.shape, np.uint8), fields_of(lungs)
    kind, side, place = (part[rng.integers(len(part))] for part in (KINDS, SIDES, FIELDS))
    finding = Finding(kind, "large", side, place)
    cells = np.argwhere(places[finding.side, finding.field])
    if len(cells):
        bright, mask = shape_of(finding, tuple(cells[rng.integers(len(cells))]), image.shape, rng)
        image += rng.uniform(*BRIGHT) * bright
        label[mask] = value_of(finding)
    return image, label


@dataclass(frozen=True)
class OnePainted(Painted):
    """A preparation after which one finding is drawn into every image, in several ways."""

    what = "one finding"

    def paint(self, image: np.ndarray, lungs: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return one_drawn(image, lungs, rng)


@dataclass(frozen=True)
class OneFindingTask(FindingsTask):
    """X-rays with one finding each, which is what their captions speak of."""

    painter = OnePainted


class CaptionNet(nn.Module):
    """Images (B, C, H, W) and sentences to vectors (B, width) of one space.

    The image's vector is linear in the highest values of its cells: a finding is small. Batch normalisation before it
    keeps images apart, as in projection heads: without it, both encoders stayed where all vectors are the same.
    """

    def __init__(self, inputs: int, channels: tuple[int, int, int] = (12, 24, 48), cells: int = 96, width: int = 64):
        super().__init__()
        first = nn.Conv2d(inputs, channels[0], 5, stride=2, padding=2, bias=False)
        self.stem = nn.Sequential(first, nn.BatchNorm2d(channels[0]), nn.ReLU())
        self.near = DoubleConv(channels[0], channels[1], 2)
        last = nn.Conv2d(channels[1], channels[2], 1, bias=False)
        self.last = nn.Sequential(last, nn.BatchNorm2d(channels[2]), nn.ReLU())
        self.wide = nn.Conv2d(channels[-1], cells, 1)
        self.places = nn.Parameter(0.02 * torch.randn(1, cells, 16, 16))
        self.mix = nn.Sequential(nn.ReLU(), nn.Conv2d(cells, cells, 1), nn.ReLU())
        self.spread, self.see = nn.BatchNorm1d(cells), nn.Linear(cells, width)
        self.text, self.hear = TextEncoder(width), Projector(width, width, width)

    def maps(self, images: Tensor) -> Tensor:
        """(B, channels[-1], H / 4, W / 4): features that do not know their place yet, each of 15 x 15 pixels."""
        return self.last(F.max_pool2d(self.near(self.stem(images)), 2))

    def cells(self, maps: Tensor) -> Tensor:
        """(B, cells, H / 4, W / 4): features that know it."""
        places = F.interpolate(self.places, maps.shape[2:], mode="bilinear", align_corners=False)
        return self.mix(self.wide(maps) + places)

    def pooled(self, cells: Tensor) -> Tensor:
        """Unit vectors (B, width) float32."""
        return F.normalize(self.see(self.spread(cells.flatten(2).float().amax(2))).float(), dim=1)

    def images(self, images: Tensor) -> Tensor:
        """Unit vectors (B, width) of images."""
        return self.pooled(self.cells(self.maps(images)))

    def texts(self, sentences: tuple[str, ...]) -> Tensor:
        """Unit vectors (B, width) of sentences."""
        return F.normalize(self.hear(self.text(sentences)).float(), dim=1)


def same_captions(captions: tuple[str, ...]) -> Tensor:
    """(B, B) bool: where two images have the very same caption; none is the other's negative."""
    return torch.tensor([[one == other for other in captions] for one in captions])


def clip_loss(similarity: Tensor, same: Tensor) -> Tensor:
    """The two-way contrastive loss of similarities (B, B), divided by a temperature; row b's partner is column b.

    CLIP's loss: each is to be found among all of the batch, the partner included. `same` (B, B) are no negatives.
    """
    others = same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)
    found = [each.masked_fill(others, -torch.inf).log_softmax(1).diag() for each in (similarity, similarity.T)]
    return -torch.cat(found).mean()


def dhn_nce(similarity: Tensor, same: Tensor, hard: float) -> Tensor:
    """Decoupled hard negative NCE of similarities (B, B), divided by a temperature; row b's partner is column b.

    Decoupled: the partner is not among those that it is told from. Hard: negative j of row b weighs
    N exp(hard s_bj) / sum_k exp(hard s_bk), N their number, so that what looks alike counts more. The mean over both
    ways; rows without negatives are left out.
    """
    losses = []
    for each in (similarity, similarity.T):
        some = (~same).any(1)
        if some.any():
            weight = (hard * each[some]).masked_fill(same[some], -torch.inf).log_softmax(1)
            many = (~same)[some].sum(1, keepdim=True).log()
            losses.append((each[some] + weight + many).logsumexp(1) - each.diag()[some])
    return torch.cat(losses).mean() if losses else 0.0 * similarity.sum()


ONE = OneFindingTask("chest_xray", evaluation="test")
ONE_QUICK = OneFindingTask("embedded", versions=1)
BUDGET = Budget(steps=900, batch=24, checks=0)
