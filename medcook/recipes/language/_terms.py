"""Terms of radiologists for the findings of `_findings`, what is known of each, and expressions made of them.

A term is implicit where it does not say what is seen: a granuloma, the apex. What is known of it does, in short true
sentences, which stand in for what a large language model tells when it is asked about the term. Some terms are never
heard in training.
"""

import re
from dataclasses import dataclass

import torch

from medcook.language import Question, one_of
from medcook.recipes.language._findings import FINDINGS, Finding, Spoken

PLAIN = {
    "nodule": "nodule",
    "cavity": "cavity",
    "patch": "patch",
    "upper": "upper field",
    "middle": "middle field",
    "lower": "lower field",
}
"""The plain terms of kinds and fields."""
IMPLICIT = {
    "nodule": ("coin lesion", "granuloma"),
    "cavity": ("cavern", "pneumatocele"),
    "patch": ("infiltrate", "haze"),
    "upper": ("apex", "summit"),
    "middle": ("hilar zone", "mantle"),
    "lower": ("base", "phrenic zone"),
}
"""Implicit terms that are heard in training."""
UNHEARD = {
    "nodule": "tuberculoma",
    "cavity": "abscess",
    "patch": "consolidation",
    "upper": "infraclavicular zone",
    "middle": "perihilar zone",
    "lower": "costophrenic zone",
}
"""Implicit terms with which scores ask, and training never does."""
KNOWN = {
    "nodule": "A round and solid spot with a sharp outline.",
    "coin lesion": "Round like a coin, solid, its edge is sharp.",
    "granuloma": "A solid knot, mostly round, with a sharp edge.",
    "tuberculoma": "A solid and round knot of tuberculosis, its outline is sharp.",
    "cavity": "A hollow in the lung: a bright wall around dark air.",
    "cavern": "A hole full of air, dark inside of a bright ring.",
    "pneumatocele": "Air in a hollow with a thin bright wall, dark inside.",
    "abscess": "Once it has drained, a hollow full of air, dark inside of a bright wall.",
    "patch": "A cloudy and uneven area, its outline is blurred.",
    "infiltrate": "Uneven like a cloud, with a blurred edge.",
    "haze": "A veil over the lung, cloudy, the edge is blurred.",
    "consolidation": "A cloudy area of filled air spaces, uneven, with a blurred outline.",
    "upper field": "The top third of the lung.",
    "apex": "The tip at the top of the lung, below the neck.",
    "summit": "The highest part of the lung, at its top.",
    "infraclavicular zone": "It lies below the collar bone, at the top of the lung.",
    "middle field": "The third of the lung at half height, beside the heart.",
    "hilar zone": "At half height, where vessels enter the lung.",
    "mantle": "The lung at half height, around the root and its vessels.",
    "perihilar zone": "It surrounds the vessels of the root at half height.",
    "lower field": "The bottom third of the lung.",
    "base": "The bottom of the lung, on the diaphragm.",
    "phrenic zone": "It touches the diaphragm at the bottom of the lung.",
    "costophrenic zone": "The bottom of the lung where ribs and diaphragm meet.",
}
"""{term: what is seen of it, or where it is}."""
_ANY = re.compile(r"\b(" + "|".join(sorted(KNOWN, key=len, reverse=True)) + r")\b")
FORMS = (
    "{size} {kind} in the {field} of the {side} lung",
    "{side} lung, {field}: {kind}, {size}",
    "there is a {size} {kind} in the {side} lung, {field}",
)
STRANGE = 100_000
"""Made-up words are numbers below it, so that any row of the table of words is met."""


def terms_in(sentence: str) -> list[str]:
    """The terms of which something is known, as they come in a sentence."""
    return _ANY.findall(sentence)


def facts_about(sentence: str) -> tuple[str, ...]:
    """What is known of the terms of a sentence."""
    return tuple(KNOWN[term] for term in terms_in(sentence))


def estranged(sentence: str, share: float) -> str:
    """The sentence with this share of its terms replaced by a made-up word each, by torch's own generator."""

    def word(found: re.Match) -> str:
        keep = float(torch.rand(())) >= share
        return found[0] if keep else str(int(torch.randint(STRANGE, ())))

    return _ANY.sub(word, sentence)


@dataclass(frozen=True)
class Terms(Spoken):
    """Every finding is told apart from all others, in plain or in implicit terms.

    implicit  how often a kind, and how often a field, is named by an implicit term
    """

    forms: tuple[str, ...] = FORMS
    several: float = 0.0
    implicit: float = 0.5

    def said(self, finding: Finding, kind: str, field: str, form: int = 0) -> str:
        """A description in which the kind and the field are named by these terms."""
        return self.forms[form].format(size=finding.size, side=finding.side, kind=kind, field=field)

    def full(self, finding: Finding, form: int) -> str:
        return self.said(finding, PLAIN[finding.kind], PLAIN[finding.field], form)

    def unheard(self, value: int) -> str:
        """A description in terms that training never uses."""
        finding = FINDINGS[value - 1]
        return self.said(finding, UNHEARD[finding.kind], UNHEARD[finding.field])

    def ask(self, there: tuple[int, ...], group: int | None, absent: bool) -> Question:
        others = tuple(value for value in range(1, len(FINDINGS) + 1) if value not in there)
        value = one_of(others if others and (absent or not there) else there)
        finding = FINDINGS[value - 1]
        words = [
            one_of(IMPLICIT[word]) if float(torch.rand(())) < self.implicit else PLAIN[word]
            for word in (finding.kind, finding.field)
        ]
        return Question(self.said(finding, *words, form=one_of(tuple(range(len(self.forms))))), (value,))
