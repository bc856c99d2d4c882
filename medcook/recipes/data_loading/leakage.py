"""What leakage does: splitting by slice instead of by patient.

Neighbouring slices of a heart, and the same slice at end-diastole and end-systole, are near copies of each
other. A split that shuffles slices puts some of them in training and some in the test, and the score then
measures memory as well as skill. Both arms here are scored on the very same slices (half of those of the
held-out patients) and train on the same number of slices; only where the training slices come from differs.
"""

import random
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

from medcook.data import IGNORE, Case, Dataset
from medcook.methods import Supervised
from medcook.recipes.recipe import Arm, Recipe, Scale
from medcook.tasks import Budget, Samples, Task, prepare, shared_dataset


class HalfOfEverySlice(Dataset):
    """A data set of volumes, half of the slices of each hidden behind `IGNORE`, chosen by case and side."""

    def __init__(self, whole: Dataset, side: int):
        super().__init__(whole.manifest)
        self.whole, self.side = whole, side

    def index(self) -> dict[str, str]:
        return self.whole.index()

    def load(self, case_id: str) -> Case:
        case = self.whole.load(case_id)
        label = case.label.copy()
        label[half_of(case_id, len(label), 1 - self.side)] = IGNORE
        return replace(case, label=label)


def half_of(case_id: str, slices: int, side: int) -> list[int]:
    """One of two random, disjoint halves of the slice numbers of a case; always the same ones."""
    order = list(range(slices))
    random.Random(case_id).shuffle(order)
    return order[side::2]


@dataclass(frozen=True)
class SliceTask(Task):
    """Half of the slices of the held-out patients are scored.

    leak      False: training slices come from other patients. True: the other half of the held-out patients'
              slices is among them, as in a split that shuffles slices
    patients  how many other patients there are; in both arms training sees as many slices as these have
    """

    leak: bool = False
    patients: int = 16

    @property
    def data(self) -> Dataset:
        return _halved(self.dataset, 0)

    def samples(self, role: str) -> Samples:
        if role != "labelled":
            return super().samples(role)
        others = prepare(shared_dataset(self.dataset), self.preparation, self.labelled_patients[: self.patients])
        if not self.leak:
            return others
        leaked = prepare(_halved(self.dataset, 1), self.preparation, self.val_patients)
        visible = ~(leaked.labels == IGNORE).flatten(1).any(1)
        pool = Samples(
            torch.cat([leaked.images[visible], others.images]),
            torch.cat([leaked.labels[visible], others.labels]),
            torch.cat([leaked.case_of[visible], others.case_of + 1000]),
        )
        kept = np.sort(np.random.default_rng(0).choice(len(pool), min(len(others), len(pool)), replace=False))
        return Samples(pool.images[kept], pool.labels[kept], pool.case_of[kept])


@lru_cache(maxsize=8)
def _halved(dataset: str, side: int) -> Dataset:
    return HalfOfEverySlice(shared_dataset(dataset), side)


recipe = Recipe(
    paper="leakage",
    title="Splitting by slice instead of by patient",
    claim="Splitting by slice instead of by patient inflates Dice.",
    arms={
        "by slice": Arm(Supervised(), {"leak": True}),
        "by patient": Arm(Supervised(), {"leak": False}),
    },
    compare=("by slice", "by patient"),
    replicate="fold",
    scales={
        "quick": Scale(SliceTask("embedded", patients=4), Budget(steps=40, batch=8, checks=2), replicates=1),
        "full": Scale(SliceTask("acdc"), Budget(steps=160)),
    },
)
