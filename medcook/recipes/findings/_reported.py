"""Reports of X-rays with findings: how they are worded, what they state, and a network that writes them.

A report names findings region by region, in sentences of one form, so that every fact in it can be found again and is
right or wrong. Images come with the map of their six regions: upper, middle and lower field of either lung.
"""

import re
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.data import Case
from medcook.language import words_of
from medcook.preparation import Preparation
from medcook.recipes.language._findings import (
    FIELDS,
    FINDINGS,
    KINDS,
    SIDES,
    SIZES,
    Finding,
    FindingsTask,
    Painted,
    fields_of,
)
from medcook.recipes.language._parsing import f1

REGIONS = tuple(product(SIDES, FIELDS))
"""Side and field of each region; region k is where the second channel of an image is k + 1."""
WORDS = ("no", "finding", "field", *SIDES, *FIELDS, *SIZES, *KINDS)
STOP = len(WORDS)
"""The token that begins and ends a report."""
MOST = 24
"""Words of a report, at most."""
STATED = re.compile(f"({'|'.join(SIDES)}) ({'|'.join(FIELDS)}) field ({'|'.join(SIZES)}) ({'|'.join(KINDS)})")


def report_of(values: tuple[int, ...]) -> str:
    """What a radiologist would write of findings, given as label values: region by region, each in a sentence."""
    there = sorted((FINDINGS[value - 1] for value in values), key=in_order)
    sentences = [f"{found.side} {found.field} field: {found.size} {found.kind}." for found in there]
    return " ".join(sentences) or "no finding."


def in_order(found: Finding) -> tuple[int, ...]:
    """Where a finding comes in a report."""
    return REGIONS.index((found.side, found.field)), KINDS.index(found.kind), SIZES.index(found.size)


def facts_in(report: str) -> set[Finding]:
    """The findings that a report states; words that make no sentence state nothing."""
    found = STATED.findall(" ".join(words_of(report)))
    return {Finding(kind, size, side, where) for side, where, size, kind in found}


@dataclass(frozen=True)
class PaintedRegions(Painted):
    """Images come with a second channel: the number of the region that each pixel is in, 1 to 6, or 0."""

    def both(self, case: Case) -> tuple[Tensor, Tensor]:
        images, labels = super().both(case)
        lungs = Preparation.labels(self, case).numpy() > 0
        numbers = torch.from_numpy(np.stack([numbered(each) for each in lungs])).repeat_interleave(self.versions, 0)
        return torch.cat([images, numbers[:, None]], dim=1), labels


def numbered(lungs: np.ndarray) -> np.ndarray:
    """(H, W) float32: the number of the region that each pixel of lungs (H, W) bool is in."""
    found = fields_of(lungs)
    return sum(number * found[region].astype(np.float32) for number, region in enumerate(REGIONS, 1))


@dataclass(frozen=True)
class ReportedTask(FindingsTask):
    """X-rays with findings and with the map of their regions."""

    painter: ClassVar[type[Painted]] = PaintedRegions


def apart(images: Tensor) -> tuple[Tensor, Tensor]:
    """(image (B, 1, H, W), masks of the regions (B, 6, H, W) float32); without a second channel these are empty."""
    numbers = images[:, 1] if images.shape[1] > 1 else torch.zeros_like(images[:, 0])
    masks = torch.stack([numbers.round() == number for number in range(1, len(REGIONS) + 1)], dim=1)
    return images[:, :1], masks.float()


def agreement(found: set, truth: set) -> dict[str, float]:
    """precision, recall and f1 of what was stated; where nothing is to be stated, all are 1 if nothing was, else 0."""
    right, same = len(found & truth), float(found == truth)
    return {
        "precision": right / len(found) if found else same,
        "recall": right / len(truth) if truth else same,
        "f1": f1(found, truth),
    }


class Writer(nn.Module):
    """A causal transformer over the words so far, which attends to tokens (B, M, width)."""

    def __init__(self, width: int, layers: int = 2):
        super().__init__()
        self.words = nn.Embedding(len(WORDS) + 1, width)
        self.places = nn.Parameter(0.02 * torch.randn(MOST + 1, width))
        layer = nn.TransformerDecoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerDecoder(layer, layers, nn.LayerNorm(width))
        self.head = nn.Linear(width, len(WORDS) + 1)

    def forward(self, words: Tensor, tokens: Tensor) -> Tensor:
        """Logits (B, L, words) float32 of the word after each of words (B, L)."""
        x = self.words(words) + self.places[: words.shape[1]]
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        return self.head(self.layers(x, tokens, tgt_mask=later)).float()

    def loss(self, reports: list[str], tokens: Tensor) -> Tensor:
        """The mean cross-entropy of the words of reports, and of where they end."""
        given, wanted = (part.to(tokens.device) for part in spelt(reports))
        return F.cross_entropy(self(given, tokens).transpose(1, 2), wanted)

    def write(self, tokens: Tensor) -> list[str]:
        """The reports, each word the most probable one after those before."""
        words = torch.full((len(tokens), 1), STOP, device=tokens.device)
        while words.shape[1] <= MOST and not (words[:, 1:] == STOP).any(1).all():
            words = torch.cat([words, self(words, tokens)[:, -1:].argmax(2)], dim=1)
        lines = [line[: line.index(STOP)] if STOP in line else line for line in words[:, 1:].tolist()]
        return [" ".join(WORDS[word] for word in line) for line in lines]


def spelt(reports: list[str]) -> tuple[Tensor, Tensor]:
    """Words given (B, L) and words wanted (B, L) after each of them, int64; -100 where a report is over."""
    lines = [[WORDS.index(word) for word in words_of(report)[:MOST]] for report in reports]
    most = 1 + max(map(len, lines))
    given = torch.tensor([[STOP, *line] + [STOP] * (most - 1 - len(line)) for line in lines])
    wanted = torch.tensor([[*line, STOP] + [-100] * (most - 1 - len(line)) for line in lines])
    return given, wanted
