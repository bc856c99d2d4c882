"""The beginning of a recipe and of its test, for a paper of the ledger that has none.

A stub counts for nothing: its training step and its test fail until they are written, no component is implemented.
"""

import re
import textwrap
from pathlib import Path

from medcook import paths
from medcook.coverage import as_identifier
from medcook.errors import MedcookError
from medcook.papers import Facts, Row, requirements
from medcook.recipes import recipe_modules

RECIPE = '''"""{title}.

{idea}

{claim}

Cite the paper (authors, venue, year), and name its equations.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from medcook.errors import MedcookError
from medcook.methods import Batch, Moment, Supervised
from medcook.recipes.recipe import Arm, Component, Recipe, Scale
from medcook.tasks import Budget, Task


@dataclass
class {name}(Supervised):
    """The baseline, and what the paper adds to it.

    ingredient  False takes away what carries the claim: the ablation
    """

    ingredient: bool = True

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        """The loss of one step; the mechanism is a function of its own, above this class."""
        raise MedcookError("{paper} is not written yet.", "Write its training step.")


recipe = Recipe(
    paper="{paper}",
    title={short_title},
    claim="Say in one sentence what the comparison decides.",
    arms={{
        "baseline": Arm(Supervised()),
        "method": Arm({name}()),
        "without ingredient": Arm({name}(ingredient=False)),
    }},
    compare=("method", "baseline"),
    ablation=("method", "without ingredient"),
    scales={{
        "quick": Scale(Task("embedded"), Budget(steps=40, batch=8, checks=2), replicates=1),
        "full": Scale(Task("acdc", evaluation="test"), Budget(steps=400, batch=8, checks=4), replicates=3),
    }},
    components=(
        Component("every mechanism that the abstract names", "absent", "implemented, simplified (how) or absent (why)"),
    ),
)
'''

TEST = '''"""{paper}: a test for each implemented component, which fails without the component."""

import pytest


def test_what_carries_the_claim():
    """In its place: tests marked `@pytest.mark.component("name")`, on small arrays whose result is known."""
    pytest.fail("{paper} is not tested yet")
'''


def write_stubs(row: Row, root: Path = paths.ROOT) -> list[Path]:
    """Write a paper's recipe and test; returns their paths. MedcookError where one exists: nothing is overwritten."""
    if row.kind == "dataset":
        raise MedcookError(
            f"{row.id} is a data set, which needs no recipe.",
            "It needs a manifest (data_manifests/), a reader (medcook/data/sets/) and a fixture test (tests/data/).",
        )
    texts = {root / path: text for path, text in stubs(row).items()}
    there = [path for path in texts if path.exists()]
    if there or row.id in recipe_modules():
        what = there[0] if there else recipe_modules()[row.id]
        raise MedcookError(f"{row.id} has been begun: {what} exists.", "Nothing was written.")
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    package = root / "medcook" / "recipes" / _chapter(row) / "__init__.py"
    package.touch()
    return list(texts)


def stubs(row: Row) -> dict[str, str]:
    """{path in the repository: text} of a paper's recipe and test."""
    file = as_identifier(row.id)
    fields = {
        "paper": row.id,
        "name": class_name(row.id),
        "title": _wrapped(row.title.rstrip(".")),
        "short_title": _quoted(textwrap.shorten(row.title, 90, placeholder=" ...")),
        "idea": _wrapped(row.idea),
        "claim": _wrapped(f"Claim: {row.claim}"),
    }
    return {
        f"medcook/recipes/{_chapter(row)}/{file}.py": RECIPE.format(**fields),
        f"tests/recipes/{_chapter(row)}/test_{file}.py": TEST.format(**fields),
    }


def next_steps(row: Row) -> str:
    """What to do with the stubs, and what the paper's kind asks for until it *works*."""
    asked = "\n".join(f"  - {name}" for name in requirements(row, Facts()))
    steps = [
        f"Claim to test: {row.claim}",
        "1. Write the mechanism and its training step; what the recipes of a chapter share is in its _settings.py.",
        "2. Say in `components` what is implemented, and write a test for each, marked component(name).",
        f"3. Try it: medcook reproduce {row.id} --profile quick",
        f"4. Measure it: medcook reproduce {row.id} --profile full",
        f"`medcook papers show {row.id}` says what is missing. For it to work, a {row.kind} needs:",
        asked,
    ]
    return "\n".join(steps)


def class_name(paper: str) -> str:
    """`bi-level-x` as `BiLevelX`; a name that would begin with a digit gets an N in front."""
    name = "".join(part[:1].upper() + part[1:] for part in re.split(r"[^a-z0-9]+", paper))
    return f"N{name}" if name[0].isdigit() else name


def _chapter(row: Row) -> str:
    """The chapter's folder: its name without the number."""
    return row.chapter[3:]


def _wrapped(text: str) -> str:
    """Text inside a docstring, in lines that fit."""
    return textwrap.fill(text.replace("\\", "\\\\").replace('"""', "'''"), 115)


def _quoted(text: str) -> str:
    """A string literal, quoted as the formatter would."""
    text = text.replace("\\", "\\\\")
    return f"'{text}'" if '"' in text and "'" not in text else '"' + text.replace('"', '\\"') + '"'
