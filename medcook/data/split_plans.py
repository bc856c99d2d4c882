"""How the committed splits were made: `python -m medcook.data.split_plans` writes them again, the same to the letter."""

import json
import random
from collections.abc import Hashable
from pathlib import Path

from medcook.data.datasets import Dataset, open_dataset
from medcook.data.splits import Split
from medcook.paths import MANIFESTS

PLANS = {
    "bubil": (20, 5, 10),
    "chest_xray": (448, 102, 138),
    "embedded": (24, 6, 10),
    "hippocampus": (182, 26, 52),
    "openkbp": (7, 2, 3),
}
"""{data set: patients in train, val and test}. ACDC's split is the published one and is not made here."""

STRATA = ("site", "tuberculosis", "sex", "group")


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


def make_split(name: str, dataset: Dataset | None = None) -> Split:
    """The split of a data set by its plan, stratified by the attributes that are known without reading an image."""
    dataset = dataset or open_dataset(name)
    strata = {}
    for patient, cases in dataset.patients.items():
        known = dataset.attributes(cases[0])
        strata[patient] = tuple(known.get(key) for key in STRATA if key in known)
    by = [key for key in STRATA if key in dataset.attributes(next(iter(dataset.index())))]
    source = f"medcook.data.split_plans, by patient{', stratified by ' + ', '.join(by) if by else ''}"
    return stratified(strata, PLANS[name], seed=f"split {name}", source=source)


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
