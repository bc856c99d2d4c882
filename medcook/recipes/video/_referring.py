"""A tracker that hears words: how these and frames meet before anything is in its bank. See resurgsam2."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.language import TextEncoder, mean_words
from medcook.recipes.architectures._scan import SelectiveStateSpace
from medcook.recipes.language._semantics import mapped, places, tokens_of
from medcook.recipes.language._slice_memory import Memory
from medcook.recipes.video._tracker import Answer, Tracker

PAST = 2
"""Earlier frames that detection looks at besides the present one."""


class Fusion(nn.Module):
    """Words and the deepest features of some frames, as one row of tokens, are scanned there and back.

    words (N, L, width), where there is none (N, L), and features (N, P, C, h, w) of P frames, the present one last
    """

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.enter, self.leave = nn.Linear(channels, width), nn.Linear(width, channels)
        self.norm = nn.LayerNorm(width)
        self.scans = nn.ModuleList(SelectiveStateSpace(width, states=4) for _ in range(2))
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, words: Tensor, empty: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C, h, w) that joins the present frame's features, and (N, width): what the words have become."""
        count, frames, _, *size = features.shape
        pooled = F.avg_pool2d(features.flatten(0, 1), 2)
        tokens = self.enter(tokens_of(pooled)) + places(pooled, words.shape[2])
        row = torch.cat([words * ~empty[..., None], tokens.unflatten(0, (count, frames)).flatten(1, 2)], 1)
        normed = self.norm(row)
        row = row + self.scans[0](normed) + self.scans[1](normed.flip(1)).flip(1)
        present = self.leave(row[:, -tokens.shape[1] :])
        found = F.interpolate(mapped(present, pooled.shape[2:]), size=size, mode="bilinear", align_corners=False)
        return found, mean_words(row[:, : words.shape[1]], empty)


class Referring(Tracker):
    """A tracker that hears words, and finds with their help what it has not been shown."""

    def __init__(self, inputs: int, channels: tuple[int, ...], width: int):
        super().__init__(inputs, channels, words=width)
        self.text, self.fuse = TextEncoder(width), Fusion(channels[-1], width)

    def detect(self, maps: list[Tensor], features: Tensor, sentences: tuple[str, ...]) -> Answer:
        """Without any memory: maps of present frames, and features (N, PAST + 1, C, h, w) that end with theirs."""
        added, heard = self.fuse(*self.text.tokens(sentences), features)
        return self.answer(maps, words=heard, added=added)

    def track(self, maps: list[Tensor], bank: Memory) -> Answer:
        """With a bank, of which the first place is the initial frame's, and without words."""
        return self.answer(maps, bank)
