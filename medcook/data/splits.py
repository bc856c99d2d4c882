"""Splits by patient: committed, hashed into every result, with the test patients behind a door."""

import contextlib
import hashlib
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from medcook.errors import MedcookError


@dataclass(frozen=True)
class Split:
    """Patients of a data set in three disjoint groups; `train` is in the published order, where there is one."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]
    source: str = ""

    def __post_init__(self):
        groups = [set(self.train), set(self.val), set(self.test)]
        if sum(map(len, groups)) != len(set().union(*groups)):
            raise MedcookError("A patient stands in two parts of the split.", "Every patient belongs to one part.")

    @property
    def hash(self) -> str:
        """First 12 hex digits of the SHA-256 of the three lists."""
        text = json.dumps([self.train, self.val, self.test])
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def labelled(self, count: int | None, draw: int = 0) -> tuple[str, ...]:
        """The `count` training patients with labels: draw 0 takes the published order, others a fixed shuffle."""
        if count is None:
            return self.train
        if not 1 <= count <= len(self.train):
            raise MedcookError(
                f"labelled={count} is out of range.", f"This split has {len(self.train)} training patients."
            )
        order = list(self.train)
        if draw:
            random.Random(f"draw {draw}").shuffle(order)
        return tuple(order[:count])

    def folds(self, count: int = 5) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
        """Cross-validation over train and val: `count` pairs (train, held out); never a test patient."""
        patients = sorted(self.train + self.val)
        random.Random("folds").shuffle(patients)
        held_out = [tuple(patients[k::count]) for k in range(count)]
        return [(tuple(p for p in patients if p not in part), part) for part in held_out]


def load_split(path: Path) -> Split:
    """Read a committed split file (JSON with train, val, test and source)."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Split(*(tuple(content[part]) for part in ("train", "val", "test")), source=content.get("source", ""))
    except (OSError, ValueError, KeyError) as error:
        raise MedcookError(
            f"{path}: not a readable split file ({error}).", "It needs the lists train, val and test."
        ) from error


def split_by_hash(patients: Iterable[str], val: float = 0.15, test: float = 0.15) -> Split:
    """A split without a list: patients in the order of their names' hashes, the first to test, the next to val.

    The same patients give the same split everywhere. The smallest sets get train, then val, then test.
    """
    order = sorted(patients, key=patient_hash)
    count_test = min(max(1, round(test * len(order))), max(0, len(order) - 2))
    count_val = min(max(1, round(val * len(order))), max(0, len(order) - 1))
    parts = order[count_test + count_val :], order[count_test : count_test + count_val], order[:count_test]
    return Split(*(tuple(sorted(part)) for part in parts), source="by the hash of the patient's name")


def held_out(patients: Iterable[str], one_in: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Patients without, and of, those who are held out: one in so many, by hash; both in the order given."""
    everyone = tuple(patients)
    held = set(sorted(everyone, key=patient_hash)[: len(everyone) // one_in])
    return tuple(p for p in everyone if p not in held), tuple(p for p in everyone if p in held)


def patient_hash(patient: str) -> str:
    return hashlib.sha256(patient.encode()).hexdigest()


_open_for: list[str] = []
_reads: list[dict] = []


@contextlib.contextmanager
def open_test(reason: str):
    """Let test cases be read inside the `with` block. Only `medcook.evaluation` may call this; every read is logged."""
    _open_for.append(reason)
    try:
        yield _reads
    finally:
        _open_for.pop()


def guard_test(dataset: str, case_id: str) -> None:
    """Refuse a test case outside `open_test`, and log it inside."""
    if not _open_for:
        raise MedcookError(
            f"{case_id} of {dataset} is a test case.",
            "Develop on train and val; medcook.evaluation opens the test set once.",
        )
    _reads.append({"dataset": dataset, "case": case_id, "reason": _open_for[-1]})
