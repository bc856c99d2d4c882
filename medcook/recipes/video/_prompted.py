"""Prompts for the frames of a flight, drawn as the book's SAM draws them, and flights with regions that nobody drew."""

from dataclasses import dataclass, fields
from typing import ClassVar, Literal
from zlib import crc32

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from skimage.segmentation import watershed
from torch import Tensor

from medcook.data import Case
from medcook.recipes.sam_adaptation._concepts import tight_boxes
from medcook.recipes.video._flights import FlightTask, Flown
from medcook.sam.asking import draw_box, draw_points, pick
from medcook.sam.model import DENSE, PADDING, SIZE
from medcook.sam.prompts import middle_of
from medcook.tasks import Samples

Kind = Literal["point", "points", "box"]
KINDS: tuple[Kind, ...] = ("point", "points", "box")
POINTS = 3
"""Of a prompt of several points."""


REGIONS = (20, 40, 80)
"""Regions that a volume is cut into; the case's name decides how many."""


def regions_of(images: Tensor, count: int) -> Tensor:
    """Label maps (S, H, W), 1 to about `count`: what a watershed makes of slices (S, H, W), whose ridges are edges."""
    edges = ndimage.gaussian_gradient_magnitude(images.double().numpy(), 1.0)
    return torch.from_numpy(watershed(edges, markers=count).astype(np.uint8))


@dataclass(frozen=True)
class Anything(Flown):
    """Flights whose labels are regions that nobody drew, of any kind, in place of anatomy."""

    def slices(self, case: Case) -> tuple[Tensor, Tensor]:
        images, _ = super().slices(case)
        return images, regions_of(images, REGIONS[crc32(case.case_id.encode()) % len(REGIONS)])


@dataclass(frozen=True)
class AnythingTask(FlightTask):
    """Flights through the training patients with regions of any kind."""

    preparer: ClassVar[type[Flown]] = Anything


@dataclass(frozen=True)
class UnseenTask(FlightTask):
    """Scored are structures of which nothing was seen in training, where flights show regions of any kind.

    seen  the structures themselves are what is learnt, as ever
    """

    seen: bool = False

    def samples(self, role: str) -> Samples:
        if role != "labelled" or self.seen:
            return super().samples(role)
        given = {part.name: getattr(self, part.name) for part in fields(FlightTask)}
        return AnythingTask(**given).samples(role)


def shown(masks: Tensor, kind: Kind, rng: torch.Generator | None = None) -> Tensor:
    """Drawn prompts (N, 3, H, W) for masks (N, H, W) bool: nothing where a mask is empty.

    rng  where points are: anywhere in the mask; without it, one point is in the middle, and others nowhere else twice
    """
    there = masks.flatten(1).any(1)
    dense = torch.zeros(len(masks), 3, DENSE, DENSE)
    if kind == "box":
        draw_box(dense, tight_boxes(masks))
    else:
        count = POINTS if kind == "points" else 1
        points = middles(masks, there) if rng is None and count == 1 else pick(masks, count, rng or fixed())
        draw_points(dense, points, torch.where(there[:, None], 1, PADDING).expand(-1, count))
    return F.adaptive_avg_pool2d(dense, masks.shape[1:])


def fixed() -> torch.Generator:
    """A generator that always begins alike."""
    return torch.Generator().manual_seed(0)


def middles(masks: Tensor, there: Tensor) -> Tensor:
    """(N, 1, 2) x, y in the small SAM's pixels: deep inside each mask."""
    factor = SIZE / max(masks.shape[1:])
    found = [middle_of(mask.numpy()) if seen else (0.0, 0.0) for mask, seen in zip(masks, there, strict=True)]
    return factor * torch.tensor(found)[:, None]


def shown_at_random(masks: Tensor, each: int) -> Tensor:
    """`shown`, with a random kind for every `each` masks in a row, by torch's own generator."""
    rng = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    every = torch.stack([shown(masks, kind, rng) for kind in KINDS])
    kinds = torch.randint(len(KINDS), (len(masks) // each,)).repeat_interleave(each)
    return every[kinds, torch.arange(len(masks))]
