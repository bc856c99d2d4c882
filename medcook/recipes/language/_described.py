"""Categories of the findings of `_findings`, a third of them held out of training, and how each is described."""

from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch

from medcook.language import Question, one_of
from medcook.recipes.language._findings import FIELDS, FINDINGS, KINDS, SIZES, Spoken, matching


class Category(NamedTuple):
    """What is detected: findings of a kind and a size in a field of either lung."""

    kind: str
    size: str
    field: str


CATEGORIES = tuple(Category(*words) for words in product(KINDS, SIZES, FIELDS))
HELD_OUT = tuple(
    each for each in CATEGORIES if (KINDS.index(each.kind) + SIZES.index(each.size) + FIELDS.index(each.field)) % 3 == 0
)
"""A third of all; of every two words of them, some other category has both."""
TITLES = (
    *("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota"),
    *("kappa", "lambda", "mu", "nu", "xi", "omicron", "pi", "rho", "sigma"),
)
"""Names of the categories, which tell nothing."""
LOOKS = {
    "nodule": ("round and solid with a sharp edge", "a solid disc, sharp in outline"),
    "cavity": ("a bright ring around dark air", "hollow, a dark middle in a bright wall"),
    "patch": ("cloudy and uneven with a blurred edge", "an uneven cloud, blurred in outline"),
    "small": ("small", "of little width"),
    "large": ("large", "of great width"),
    "upper": ("at the top of the lung", "in the upper third of the lung"),
    "middle": ("at half height of the lung", "in the middle third of the lung"),
    "lower": ("at the bottom of the lung", "in the lower third of the lung"),
}
"""How each word is described, in two ways; scores use the first."""
STRANGE = 100_000
"""Made-up names are numbers below it."""


def described(category: Category, title: str, ways: tuple[int, int, int] = (0, 0, 0)) -> str:
    """`finding alpha: round and solid with a sharp edge, small, at the top of the lung`."""
    looks = ", ".join(LOOKS[word][way] for word, way in zip(category, ways, strict=True))
    return f"finding {title}: {looks}"


def category_of(value: int) -> Category:
    """Of a label value; both sides are one category."""
    finding = FINDINGS[value - 1]
    return Category(finding.kind, finding.size, finding.field)


@dataclass(frozen=True)
class Categories(Spoken):
    """Categories are asked for by name and description; nobody asks for those that are held out.

    strange  how often training's name is made up, so that descriptions must be listened to
    """

    strange: float = 0.5

    def say(self, category: Category) -> str:
        """As scores ask."""
        return described(category, TITLES[CATEGORIES.index(category)])

    def name(self, value: int) -> str:
        return self.say(category_of(value))

    def ask(self, there: tuple[int, ...], group: int | None, absent: bool) -> Question:
        shown = {category_of(value) for value in there}
        known = [each for each in CATEGORIES if each not in HELD_OUT]
        others = [each for each in known if each not in shown]
        fitting = [each for each in known if each in shown]
        category = one_of(tuple(others if others and (absent or not fitting) else fitting))
        title = TITLES[CATEGORIES.index(category)]
        if float(torch.rand(())) < self.strange:
            title = str(int(torch.randint(STRANGE, ())))
        ways = tuple(int(way) for way in torch.randint(2, (3,)))
        return Question(described(category, title, ways), matching(**category._asdict()))
