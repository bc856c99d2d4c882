"""A recipe whose training is faked: squares, and methods that lose rows of them."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np

from medcook import evaluation, evidence
from medcook.data.case import Case
from medcook.data.splits import Split, guard_test
from medcook.recipes.recipe import Arm, Recipe, Scale
from medcook.tasks import Budget


class Toy:
    """A data set of squares: eight train and val patients, two test patients."""

    manifest = SimpleNamespace(name="toy", structures={1: "square"}, simulated=False)
    split = Split(tuple("abcd"), tuple("efgh"), ("t", "u"))
    hash = "toyhash"

    def cases(self, patients):
        for patient in patients:
            if patient in self.split.test:
                guard_test("toy", patient)
            label = np.zeros((12, 12), np.uint8)
            label[2:8, 2 : 6 + ord(patient) % 4] = 1
            yield Case(label[None].astype(np.float32), label, f"{patient}-1", patient)


@dataclass(frozen=True)
class ToyTask:
    evaluation: str = "val"
    fold: int | None = None

    data = Toy()

    @property
    def val_patients(self):
        return self.data.split.val if self.fold is None else self.data.split.folds(5)[self.fold][1]

    def describe(self):
        return {"kind": "ToyTask", "evaluation": self.evaluation, "fold": self.fold}


@dataclass(frozen=True)
class ToyMethod:
    """Predicts the square, without its first `loses` rows."""

    loses: int = 0

    trial_tolerance = 1e-3

    def settings(self):
        return {"method": "ToyMethod", "loses": self.loses}


@dataclass
class ToyFitted:
    method: ToyMethod
    seed: int
    weights: dict = field(default_factory=lambda: {"last": {}})
    key: str = "key"
    cost: dict = field(default_factory=lambda: {"steps": 3, "seconds": 1.5, "device": "cpu"})
    history: dict = field(default_factory=lambda: {"loss": [1.0] * 100, "val_step": [50], "val_dice": [0.5]})

    def predict(self, case, checkpoint="last"):
        guess = case.label.copy()
        guess[: 2 + self.method.loses + self.seed % 2] = 0
        return guess


def make_recipe(**changes):
    values = {
        "paper": "toy-paper",
        "title": "Toy",
        "claim": "More rows are better.",
        "arms": {"whole": Arm(ToyMethod()), "cut": Arm(ToyMethod(2)), "no rows": Arm(ToyMethod(6))},
        "compare": ("whole", "cut"),
        "ablation": ("whole", "no rows"),
        "scales": {name: Scale(ToyTask(), Budget(steps=3)) for name in ("quick", "full")},
    }
    return Recipe(**(values | changes))


def reproduce(recipe, profile="full", **options):
    return evidence.reproduce(recipe, profile, progress=False, **options)


def brightness(fitted, case):
    """A recipe's own score: an uncertainty, an error and a name for every case but one."""
    if case.case_id == "e-1":
        return []
    values = {
        "uncertainty": ord(case.patient_id) / 200 * (1 - fitted.method.loses),
        "error": ord(case.patient_id) / 300,
    }
    return [evaluation.row(case, "all", group="FM"[fitted.seed % 2], **values)]
