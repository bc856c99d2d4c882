"""Two streams of an image, one for where and one for what, that are asked with words; and what reports say of both."""

import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.language import TextEncoder
from medcook.recipes.language._expert import DESCRIPTIONS
from medcook.recipes.language._reports import SIGNS, facts_of

SIDES, FIELDS = ("right", "left"), ("upper", "middle", "lower")
PLACES = SIDES + FIELDS
PATHOLOGIES = tuple(SIGNS)
ANATOMY_BOOK = (*(f"it is in the {side} lung" for side in SIDES), *(f"it is in the {field} field" for field in FIELDS))
PATHOLOGY_BOOK = tuple(f"{sign}: {', '.join(DESCRIPTIONS[sign])}" for sign in PATHOLOGIES)
UNKNOWN = -1


class Stated(NamedTuple):
    """What reports say: 1 yes, 0 no, -1 unknown. `places` (B, 5), `signs` (B, 8), and `pairs` (B, 8, 5) of a sign with
    a place."""

    places: Tensor
    signs: Tensor
    pairs: Tensor


def parts_of(report: str) -> list[tuple[frozenset[str], frozenset[str]]]:
    """(signs, places) of each part of a report between commas, semicolons and full stops.

    A part that names no place speaks of the place that was named last.
    """
    found, place = [], frozenset()
    for part in re.split("[,;.]", report):
        sides, fields, signs = facts_of(part)
        place = sides | fields or place
        if signs:
            found.append((signs, place))
    return found


def stated(reports: tuple[str, ...]) -> Stated:
    """What reports say of every sign and place.

    Where no sign is stated, there is none anywhere. Else signs that are not stated are unknown; of a stated one the
    other side is free where a side is named, and so are the other fields where one is named.
    """
    signs = torch.full((len(reports), len(PATHOLOGIES)), UNKNOWN)
    pairs = torch.full((*signs.shape, len(PLACES)), UNKNOWN)
    for number, report in enumerate(reports):
        parts = parts_of(report)
        if not parts:
            signs[number], pairs[number] = 0, 0
        for named, places in parts:
            rows = [PATHOLOGIES.index(sign) for sign in named]
            signs[number, rows] = 1
            pairs[number, rows] = torch.maximum(pairs[number, rows], marks(places))
    return Stated(pairs.amax(1), signs, pairs)


def marks(places: frozenset[str]) -> Tensor:
    """(5,): 1 for named places, 0 for the others of a group of which one is named, else -1."""
    found = []
    for group in (SIDES, FIELDS):
        found += [int(name in places) if places & set(group) else UNKNOWN for name in group]
    return torch.tensor(found)


class Stream(nn.Module):
    """One stream: its projection of an image's patches, and its queries, which attend to them."""

    def __init__(self, inputs: int, width: int, heads: int = 4):
        super().__init__()
        self.project = nn.Sequential(
            nn.Linear(inputs, inputs), nn.ReLU(), nn.Linear(inputs, width), nn.LayerNorm(width)
        )
        self.attend = nn.MultiheadAttention(width, heads, batch_first=True)
        self.asked, self.mixed = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
        self.there = nn.Linear(width, 1)
        self.speak = nn.Linear(width, width)

    def forward(self, patches: Tensor, book: Tensor) -> tuple[Tensor, Tensor]:
        """Patches (B, N, inputs) and a book of texts (Q, width) to an answer to each (B, Q, width), and where it came
        from (B, Q, N), which sums to 1."""
        keys = self.project(patches)
        queries = book[None].expand(len(patches), -1, -1)
        found, where = self.attend(self.asked(queries), keys, keys)
        answers = queries + found
        return answers + self.mix(self.mixed(answers)), where


class TwoStreams(nn.Module):
    """Feature maps (B, C, h, w) to answers of the anatomy stream and the pathology stream; see `forward`.

    together  both kinds of questions go to one stream, which sees everything
    """

    def __init__(self, inputs: int, width: int, together: bool = False):
        super().__init__()
        self.text = TextEncoder(width)
        self.gate = None if together else nn.Linear(inputs, inputs)
        self.pathology = Stream(inputs, width)
        self.anatomy = self.pathology if together else Stream(inputs, width)

    def halves(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, C) as the sum of what is for pathology and what is for anatomy."""
        if self.gate is None:
            return patches, patches
        share = self.gate(patches).sigmoid()
        return share * patches, (1 - share) * patches

    def forward(self, maps: Tensor) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """{stream: (answers (B, Q, width), where (B, Q, h, w), its book (Q, width))}, all float32."""
        with torch.autocast(maps.device.type, enabled=False):
            parts = dict(
                zip(("pathology", "anatomy"), self.halves(maps.float().flatten(2).transpose(1, 2)), strict=True)
            )
            books = {"pathology": self.text(PATHOLOGY_BOOK), "anatomy": self.text(ANATOMY_BOOK)}
            found = {}
            for name, patches in parts.items():
                answers, where = getattr(self, name)(patches, books[name])
                found[name] = answers, where.unflatten(2, maps.shape[2:]), books[name]
            return found


def known_entropy(logits: Tensor, truth: Tensor) -> Tensor:
    """Binary cross-entropy of logits where the truth is 0 or 1; 0 where nothing is known."""
    known = truth != UNKNOWN
    if not known.any():
        return 0 * logits.sum()
    return F.binary_cross_entropy_with_logits(logits[known], truth[known].float())


def prototype_loss(answers: Tensor, pairs: Tensor, book: Tensor, heat: float) -> Tensor:
    """Answers (B, Q, D) of one stream are told from what they do not go with, in the other stream's book (R, D).

    The prototype of an answer is the mean text of what it is paired with (pairs (B, Q, R) is 1); it competes with the
    texts of what it is certainly not paired with (0). Answers without a pair have no part.
    """
    paired = (pairs == 1).to(book.dtype)
    own = paired.sum(2) > 0
    if not own.any():
        return 0 * answers.sum()
    prototypes = F.normalize((paired[own] @ book) / paired[own].sum(1, keepdim=True), dim=1)
    vectors = F.normalize(answers[own], dim=1)
    good = (vectors * prototypes).sum(1, keepdim=True)
    bad = (vectors @ F.normalize(book, dim=1).T).masked_fill(pairs[own] != 0, -torch.inf)
    logits = torch.cat([good, bad], dim=1) / heat
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))
