"""The ledger: 174 papers, what each claims, and what became of it here. The status is computed, never written by hand.

What *works* means depends on the kind of paper; a composite kind (`dataset+model`) needs each of its parts:

method, architecture,  recipe; a test for every implemented component; and evidence: at `full` or `paper`, on real data
metric, model          (simulated only where the row says why no real data is at hand), fresh, at least three
                       replicates, with an ablation
dataset                manifests, a reader, a test on a fixture, sanity facts
study, benchmark,      its protocol as a recipe over at least three methods; its conclusion tested, with evidence as
survey                 above (an ablation is not asked for)
foundation-model       a recipe; tests for the components `architecture` and `checkpoint`; evidence as of a method

A row with everything its kind asks for *works*, with a part of it it is *partial*, with nothing *missing*.
"""

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from tqdm import tqdm

from medcook import evidence, statistics
from medcook.coverage import as_identifier, component_tests, fixture_tests
from medcook.data.manifests import Manifest, first_line, load_manifest
from medcook.errors import MedcookError
from medcook.paths import MANIFESTS, PAPERS
from medcook.records import Summary

Status = Literal["works", "partial", "missing"]

METHODS = frozenset({"method", "architecture", "metric", "model"})
PROTOCOLS = frozenset({"study", "benchmark", "survey"})
KINDS = METHODS | PROTOCOLS | {"dataset", "foundation-model"}
MIN_REPLICATES = 3
MIN_METHODS = 3


class Row(BaseModel):
    """One paper. `no_real_data` says why its evidence may be simulated: no real data for it is at hand."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")
    title: str
    kind: str
    chapter: str = Field(pattern=r"^\d\d_[a-z_]+$")
    idea: str
    claim: str
    code: str | None = None
    no_real_data: str | None = None

    @field_validator("kind")
    @classmethod
    def known_kind(cls, value: str) -> str:
        if unknown := set(value.split("+")) - KINDS:
            raise ValueError(f"unknown kind {sorted(unknown)[0]!r}")
        return value

    @property
    def parts(self) -> list[str]:
        """The kinds that a composite kind is made of."""
        return self.kind.split("+")


@dataclass(frozen=True)
class Facts:
    """Everything the status depends on; gathered by `gather`, or made up in a test.

    tested      components that have a test; `fixtures` names of the data set's fixture tests
    stale       why the evidence is stale, empty while it is fresh, None where that was not checked
    """

    recipe: object | None = None
    tested: frozenset[str] = frozenset()
    summary: Summary | None = None
    stale: str | None = ""
    manifests: tuple[Manifest, ...] = ()
    fixtures: frozenset[str] = field(default_factory=frozenset)


def load_ledger(path: Path = PAPERS / "papers.yaml") -> list[Row]:
    """All rows in the file's order; MedcookError naming the row and the field that is wrong."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise MedcookError(f"{path}: {first_line(error)}.", "The ledger is a YAML list of papers.") from error
    rows = [_row(path, number, entry) for number, entry in enumerate(content or [], start=1)]
    seen: set[str] = set()
    for row in rows:
        if row.id in seen:
            raise MedcookError(f"{path}: {row.id} stands there twice.", "Every paper has one row.")
        seen.add(row.id)
    return rows


def _row(path: Path, number: int, entry) -> Row:
    try:
        return Row.model_validate(entry)
    except ValidationError as error:
        name = entry.get("id", f"row {number}") if isinstance(entry, dict) else f"row {number}"
        raise MedcookError(f"{path}: {name}: {first_line(error)}.", "Correct the ledger's field.") from error


def status(row: Row, facts: Facts) -> Status:
    """works, partial or missing, by the rule at the top of this file."""
    met = requirements(row, facts).values()
    return "works" if all(met) else "partial" if any(met) else "missing"


def requirements(row: Row, facts: Facts) -> dict[str, bool]:
    """{what the row's kind asks for: whether it is there}, over all parts of a composite kind."""
    asked: dict[str, bool] = {}
    for part in row.parts:
        if part == "dataset":
            asked |= _dataset(facts)
        elif part in PROTOCOLS:
            asked |= _protocol(row, facts)
        elif part == "foundation-model":
            asked |= _foundation_model(row, facts)
        else:
            asked |= _method(row, facts)
    return asked


def _method(row: Row, facts: Facts) -> dict[str, bool]:
    return {
        "recipe": _implemented(facts) != set(),
        "a test for every implemented component": _components_tested(facts),
        "evidence with an ablation": _evidence(row, facts, ablation=True),
    }


def _foundation_model(row: Row, facts: Facts) -> dict[str, bool]:
    return _method(row, facts) | {
        "architecture tested": "architecture" in facts.tested,
        "checkpoint loader tested": "checkpoint" in facts.tested,
    }


def _protocol(row: Row, facts: Facts) -> dict[str, bool]:
    """Methods differ in their own settings, or in a task's `settings`: how an algorithm prepares its images."""
    arms = facts.recipe.arms.values() if _implemented(facts) else ()
    methods = {repr((sorted(arm.method.settings().items()), arm.changes.get("settings"))) for arm in arms}
    return {
        f"protocol over at least {MIN_METHODS} methods": len(methods) >= MIN_METHODS,
        "evidence on its conclusion": _evidence(row, facts, ablation=False),
    }


def _dataset(facts: Facts) -> dict[str, bool]:
    from medcook.data.datasets import READERS

    there = bool(facts.manifests)
    return {
        "manifest": there,
        "reader": there and all(manifest.reader in READERS for manifest in facts.manifests),
        "fixture test": bool(facts.fixtures),
        "sanity facts": there and all(bool(m.facts.patients or m.facts.cases) for m in facts.manifests),
    }


def _components_tested(facts: Facts) -> bool:
    """Whether there are implemented components, and each has a test."""
    return bool(_implemented(facts)) and _implemented(facts) <= facts.tested


def _implemented(facts: Facts) -> set[str]:
    """Names of the implemented components; a recipe without any is the beginning of one."""
    components = facts.recipe.components if facts.recipe else ()
    return {component.name for component in components if component.status == "implemented"}


def _evidence(row: Row, facts: Facts, ablation: bool) -> bool:
    """Whether there is evidence that counts: fresh, at full or paper, real (or excused), enough replicates."""
    found = facts.summary
    return (
        found is not None
        and facts.recipe is not None
        and not facts.stale
        and found.profile in ("full", "paper")
        and (found.data == "real" or bool(row.no_real_data))
        and len(found.seeds) >= MIN_REPLICATES
        and found.comparison is not None
        and (found.ablation is not None or not ablation)
    )


def gather(row: Row, check: bool = True) -> Facts:
    """Look up everything about a row; `check` recomputes fingerprints where there is evidence (seconds an arm)."""
    from medcook.recipes import find_recipe

    recipe, summary = find_recipe(row.id), evidence.load_summary(row.id)
    return Facts(
        recipe=recipe,
        tested=frozenset(component_tests(row.id)),
        summary=summary,
        stale=stale_state(recipe, summary, check),
        manifests=_manifests(row.id) if "dataset" in row.parts else (),
        fixtures=frozenset(fixture_tests(row.id)) if "dataset" in row.parts else frozenset(),
    )


def stale_state(recipe, summary: Summary | None, check: bool) -> str | None:
    """Why evidence is stale, empty while it is fresh or absent, None where freshness was not or cannot be checked."""
    if summary is None:
        return ""
    if recipe is None:
        return "its recipe is gone"
    try:
        return evidence.stale_because(recipe, summary) if check else None
    except MedcookError:  # what an arm needs, such as pre-trained weights, is not to be had on this machine
        return None


def recompute(papers: list[str]) -> None:
    """The fingerprints of these papers' recipes, a process a core: kept on disk, so that asking for freshness is quick.

    A method is trained for 20 steps to get one; this is what `medcook papers` spends its minutes on.
    """
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        for _ in tqdm(pool.map(_freshness, papers), total=len(papers), desc="fingerprints", leave=False):
            pass


def _freshness(paper: str) -> str | None:
    from medcook.recipes import find_recipe

    return stale_state(find_recipe(paper), evidence.load_summary(paper), check=True)


@cache
def _manifests(dataset: str) -> tuple[Manifest, ...]:
    """The manifest of a data set, or those of all its tasks (data_manifests/<id>/*.yaml)."""
    name = as_identifier(dataset)
    tasks = sorted(path.stem for path in (MANIFESTS / name).glob("*.yaml"))
    if (MANIFESTS / f"{name}.yaml").exists():
        return (load_manifest(name),)
    return tuple(load_manifest(task, MANIFESTS / name) for task in tasks)


def overview(rows: list[Row] | None = None, check: bool = True) -> list[dict]:
    """One JSON-able entry per row of the ledger, with p adjusted over all of them."""
    entries = []
    for row in rows or load_ledger():
        facts = gather(row, check)
        identity = {"id": row.id, "chapter": row.chapter, "kind": row.kind, "title": row.title}
        entries.append(identity | {"status": status(row, facts)} | findings(facts.summary, facts.stale))
    return adjust(entries)


def own_claims(check: bool = True) -> list[dict]:
    """The book's own claims: recipes that belong to no paper of the ledger. They have no status, only findings."""
    from medcook.recipes import find_recipe, recipe_modules

    ledger = {row.id for row in load_ledger()}
    entries = []
    for name, module in recipe_modules().items():
        if name not in ledger:
            recipe, summary = find_recipe(name), evidence.load_summary(name)
            identity = {"id": name, "chapter": module.split(".")[-2], "kind": "own claim", "title": recipe.title}
            entries.append(identity | findings(summary, stale_state(recipe, summary, check)))
    return adjust(entries)


def findings(summary: Summary | None, stale: str | None) -> dict:
    """What was measured, as plain JSON; None (0 seeds) where nothing was."""
    compared = summary.comparison if summary else None
    measured = compared is not None and compared.low is not None
    return {
        "verdict": summary.verdict if summary else None,
        "profile": summary.profile if summary else None,
        "dataset": summary.dataset if summary else None,
        "data": summary.data if summary else None,
        "seeds": len(summary.seeds) if summary else 0,
        "metric": summary.metric if summary else None,
        "effect": compared.effect if compared else None,
        "interval": [compared.low, compared.high] if measured else None,
        "smallest_effect": compared.smallest_effect if compared else None,
        "p": compared.p if compared else None,
        "stale": (None if stale is None else bool(stale)) if summary else None,
        "arms": {name: arm.mean for name, arm in summary.arms.items()} if summary else {},
    }


def adjust(entries: list[dict]) -> list[dict]:
    """Add `p_holm`: p adjusted over all entries judged at full or paper."""
    tests = [e["p"] if e["p"] is not None and e["profile"] != "quick" else float("nan") for e in entries]
    adjusted = statistics.holm(tests).tolist()
    return [entry | {"p_holm": p if p == p else None} for entry, p in zip(entries, adjusted, strict=True)]


def find_row(paper: str) -> Row | None:
    """The row with this id, or None."""
    return next((row for row in load_ledger() if row.id == paper), None)
