"""A memory of slices and of the answers to them, sorted by similarity: see the recipe of crisp-sam2."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.recipes.language._semantics import Attend, mapped, places, tokens_of

ENTRIES = 4
"""Slices that a memory keeps."""
PATCH = 4
"""Pixels a side that a mask has in each place of a memory."""


def nearest(present: Tensor, looks: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """Of M looks (B, M, C, h, w), those that are there (B, M) and most similar to the present one (B, C, h, w), the
    most similar first and at most `ENTRIES`: their numbers (B, K), and whether there are so many (B, K)."""
    likeness = F.cosine_similarity(present.flatten(1)[:, None], looks.flatten(2), dim=2).masked_fill(~there, -torch.inf)
    order = likeness.argsort(dim=1, descending=True, stable=True)[:, :ENTRIES]
    return order, there.gather(1, order)


class Memory(NamedTuple):
    """What S sentences have found: how K slices look (S, K, C, h, w), their answers as masks (S, K, PATCH h, PATCH w),
    and which of the K entries there are (S, K)."""

    looks: Tensor
    masks: Tensor
    there: Tensor

    @staticmethod
    def empty(count: int, looks: Tensor) -> "Memory":
        """For slices that look as (T, C, h, w)."""
        _, channels, height, width = looks.shape
        found = looks.new_zeros(count, ENTRIES, channels, height, width)
        masks = looks.new_zeros(count, ENTRIES, PATCH * height, PATCH * width)
        return Memory(found, masks, torch.zeros(count, ENTRIES, dtype=torch.bool, device=looks.device))

    def in_order(self, present: Tensor) -> "Memory":
        """Entries by their similarity to the present slice (S, C, h, w)."""
        order, there = nearest(present, self.looks, self.there)
        rows = torch.arange(len(order), device=order.device)[:, None]
        return Memory(self.looks[rows, order], self.masks[rows, order], there)

    def updated(self, present: Tensor, masks: Tensor, sure: Tensor) -> "Memory":
        """Where new answers (S, H, W) are sure (S), they take the place of what is least similar to their slice."""
        looks, kept, there = (part.clone() for part in self.in_order(present))
        looks[sure, -1], kept[sure, -1], there[sure, -1] = present[sure], small(masks, present)[sure], True
        return Memory(looks, kept, there)


def small(masks: Tensor, looks: Tensor) -> Tensor:
    """Masks (..., H, W) in the size in which a memory keeps them beside looks (..., h, w)."""
    return F.adaptive_avg_pool2d(masks.float(), [PATCH * side for side in looks.shape[-2:]])


class MemoryAttention(nn.Module):
    """Features (B, width, H, W) attend to a memory, and to a vector that stands for none. Entries say their rank."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.attend = Attend(width)
        self.look, self.mask = nn.Linear(channels, width), nn.Linear(PATCH * PATCH, width)
        self.ranks = nn.Parameter(0.02 * torch.randn(ENTRIES, 1, width))
        self.nothing = nn.Parameter(0.02 * torch.randn(1, 1, width))

    def forward(self, features: Tensor, memory: Memory) -> Tensor:
        looks, masks, there = memory
        drawn = F.pixel_unshuffle(masks[:, :, None], PATCH)
        kept = self.look(looks.flatten(3).transpose(2, 3)) + self.mask(drawn.flatten(3).transpose(2, 3))
        kept = kept + self.ranks[: kept.shape[1]] + places(features, features.shape[1], looks.shape[-2:])
        empty = F.pad(~there.repeat_interleave(kept.shape[2], dim=1), (1, 0), value=False)
        kept = torch.cat([self.nothing.expand(len(kept), -1, -1), kept.flatten(1, 2)], dim=1)
        now = tokens_of(features)
        found = self.attend(now + places(features, features.shape[1]), kept, empty)
        return mapped(now + found, features.shape[2:])


def mates(labels: Tensor, groups: Tensor | None, values: Tensor) -> Tensor:
    """(B, B): which other images of the same set show the value (B,) that an image is asked for."""
    shown = torch.stack([(labels == value).flatten(1).any(1) for value in values.tolist()])
    shown &= (values > 0)[:, None] & ~torch.eye(len(values), dtype=torch.bool, device=values.device)
    return shown if groups is None else shown & (groups[:, None] == groups)
