"""Sentences and images that attend to each other, and where what comes of it goes: see the recipe of crisp-sam2."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.language import mean_words
from medcook.recipes.architectures._blocks import resized
from medcook.recipes.pretraining._tokens import grid_places, sinusoids

SPARSE = 2
"""Sparse prompts a side: there are four."""


def tokens_of(maps: Tensor) -> Tensor:
    """(B, C, H, W) as (B, H W, C)."""
    return maps.flatten(2).transpose(1, 2)


def mapped(tokens: Tensor, size: tuple[int, ...]) -> Tensor:
    """(B, H W, C) as (B, C, H, W)."""
    return tokens.transpose(1, 2).unflatten(2, tuple(size))


def places(like: Tensor, width: int, size: tuple[int, ...] | None = None) -> Tensor:
    """(h w, width): codes of the places of maps (..., H, W); with a size, of a grid of that size over the same area."""
    whole, size = like.shape[-2:], tuple(size or like.shape[-2:])
    steps = torch.tensor([all_of / few for all_of, few in zip(whole, size, strict=True)])
    return sinusoids(((grid_places(size) + 0.5) * steps - 0.5).to(like.device), width)


def mlp(width: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


class Attend(nn.Module):
    """A(x, y): tokens (B, N, C) attend to others (B, M, C), both normalised before; those that are `empty` (B, M) are
    none. It is what `nn.MultiheadAttention` does, without the fused kernel, which is slow on CPUs."""

    def __init__(self, width: int, heads: int = 2):
        super().__init__()
        self.heads, self.mine, self.theirs = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.ask, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.offer = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, y: Tensor, empty: Tensor | None = None) -> Tensor:
        split = lambda tokens: tokens.unflatten(2, (self.heads, -1)).transpose(1, 2)  # noqa: E731
        key, value = map(split, self.offer(self.theirs(y)).chunk(2, dim=2))
        query = split(self.ask(self.mine(x)))
        fits = (query / query.shape[3] ** 0.5 @ key.transpose(2, 3)).float()
        if empty is not None:
            fits = fits.masked_fill(empty[:, None, None], -torch.inf)
        return self.out((fits.softmax(3).to(value.dtype) @ value).transpose(1, 2).flatten(2))


class Interaction(nn.Module):
    """Progressive cross-attention, the formula above: maps (B, C, H, W), words (B, L, width) and where there is none to
    semantics (B, width, H / 2, W / 2). The second level hears each modality as the first one has left it."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.see = nn.Linear(channels, width)
        self.first = nn.ModuleDict({"places": Attend(width), "words": Attend(width)})
        self.second = nn.ModuleDict({"places": Attend(width), "words": Attend(width)})
        self.joint = nn.Linear(2 * width, width)

    def forward(self, maps: Tensor, words: Tensor, empty: Tensor) -> Tensor:
        maps = F.avg_pool2d(maps, 2)
        seen = self.see(tokens_of(maps)) + places(maps, words.shape[2])
        told = seen + self.first["places"](seen, words, empty)
        shown = words + self.first["words"](words, seen)
        joint = self.joint(torch.cat([seen, mean_words(words, empty)[:, None].expand_as(seen)], dim=2))
        joint = joint + self.second["places"](joint, told) + self.second["words"](joint, shown, empty)
        return mapped(joint, maps.shape[2:])


class Injection(nn.Module):
    """Adds semantics (B, width, h, w) to the maps of a level: a layer that all share, then each level's own."""

    def __init__(self, width: int, channels: tuple[int, ...]):
        super().__init__()
        self.shared = nn.Conv2d(width, width // 4, 1)
        self.own = nn.ModuleList(nn.Conv2d(width // 4, count, 1) for count in channels)

    def forward(self, level: int, maps: Tensor, semantics: Tensor) -> Tensor:
        return maps + resized(self.own[level](F.relu(self.shared(semantics))), maps.shape[2:])


class SemanticPrompts(nn.Module):
    """Features and semantics (B, width, h, w) to sparse prompts (B, P, width) and a dense one (B, width, h, w)."""

    def __init__(self, width: int):
        super().__init__()
        self.hear, self.mix = Attend(width), nn.Conv2d(width, width, 1)
        self.dense = nn.Conv2d(2 * width, width, 1)
        self.sparse = mlp(width, width // 2, width)

    def forward(self, features: Tensor, semantics: Tensor) -> tuple[Tensor, Tensor]:
        heard = self.hear(tokens_of(features), tokens_of(semantics)) + places(features, features.shape[1])
        heard = self.mix(mapped(heard, features.shape[2:]))
        sparse = self.sparse(tokens_of(F.adaptive_avg_pool2d(heard, SPARSE)))
        return sparse, self.dense(torch.cat([features, heard], dim=1))
