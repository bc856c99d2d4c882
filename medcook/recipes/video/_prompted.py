"""Prompts for the frames of a flight, drawn as the book's SAM draws them, and flights of one organ after another's."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from medcook.recipes.sam_adaptation._concepts import tight_boxes
from medcook.recipes.video._flights import FlightTask
from medcook.sam.asking import draw_box, draw_points, pick
from medcook.sam.model import DENSE, PADDING, SIZE
from medcook.sam.prompts import middle_of
from medcook.tasks import Samples

Kind = Literal["point", "points", "box"]
KINDS: tuple[Kind, ...] = ("point", "points", "box")
POINTS = 3
"""Of a prompt of several points."""


@dataclass(frozen=True)
class ElsewhereTask(FlightTask):
    """Training flights are through another data set, with that one's structures; scored is this one.

    learnt_on  the other data set; empty: it is learnt here, as ever
    """

    learnt_on: str = ""

    @property
    def elsewhere(self) -> FlightTask:
        """The flights that are learnt on."""
        return FlightTask(self.learnt_on, frames=self.frames, side=self.side, versions=self.versions, many=self.many)

    @cached_property
    def labelled_patients(self) -> tuple[str, ...]:
        return self.elsewhere.labelled_patients if self.learnt_on else super().labelled_patients

    def samples(self, role: str) -> Samples:
        if role == "labelled" and self.learnt_on:
            return self.elsewhere.samples(role)
        return super().samples(role)


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
