"""How the committed splits were made: `python -m medcook.data.split_plans` writes them again, letter by letter."""

import json
import random
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path

from medcook.data.datasets import open_dataset
from medcook.data.splits import Split
from medcook.paths import MANIFESTS


@dataclass(frozen=True)
class Plan:
    """Numbers of patients in train, val and test, and the attributes that are spread evenly over them."""

    counts: tuple[int, int, int]
    strata: tuple[str, ...] = ()


PLANS = {
    "bubil": Plan((20, 5, 10)),
    "chest_xray": Plan((448, 102, 138), ("site", "tuberculosis", "sex")),
    "embedded": Plan((24, 6, 10), ("site", "sex", "group")),
    "hippocampus": Plan((182, 26, 52)),
    "kits21": Plan((210, 30, 60)),
    "openkbp": Plan((7, 2, 3)),
}
"""By data set. ACDC's split is the published one and is not made here."""


def stratified(strata: dict[str, Hashable], counts: tuple[int, int, int], seed: str, source: str) -> Split:
    """Deal patients {patient: stratum} to train, val and test of the given sizes so that each stratum is spread evenly.

    Patients are shuffled, sorted by stratum and dealt one by one to the part that is furthest behind its share.
    """
    rng = random.Random(seed)
    patients = sorted(strata)
    rng.shuffle(patients)
    patients.sort(key=lambda patient: repr(strata[patient]))
    parts = [[], [], []]
    for dealt, patient in enumerate(patients, start=1):
        behind = [dealt * count / len(patients) - len(part) for count, part in zip(counts, parts, strict=True)]
        parts[behind.index(max(behind))].append(patient)
    for part in parts:
        part.sort()
        rng.shuffle(part)
    return Split(*map(tuple, parts), source=source)


def make_split(name: str) -> Split:
    """The split of a data set by its plan."""
    plan, dataset = PLANS[name], open_dataset(name)
    strata = {}
    for patient, cases in dataset.patients.items():
        known = dataset.attributes(cases[0]) if plan.strata else {}
        strata[patient] = tuple(known[key] for key in plan.strata)
    by = f", stratified by {', '.join(plan.strata)}" if plan.strata else ""
    return stratified(strata, plan.counts, seed=f"split {name}", source=f"medcook.data.split_plans, by patient{by}")


def split_text(split: Split) -> str:
    """The text of a split file."""
    parts = {"source": split.source, "train": split.train, "val": split.val, "test": split.test}
    return json.dumps(parts, indent=1) + "\n"


def write_splits(folder: Path = MANIFESTS / "splits") -> None:
    """Write the split file of every plan."""
    for name in PLANS:
        (folder / f"{name}.json").write_text(split_text(make_split(name)), encoding="utf-8")


if __name__ == "__main__":
    write_splits()
