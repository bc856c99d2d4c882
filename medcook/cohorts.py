"""Tasks on part of a data set, on several annotations of it, on groups or on what is known of its patients."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from medcook import evaluation
from medcook.data import IGNORE, Case, Dataset
from medcook.errors import MedcookError
from medcook.tasks import Samples, Task

Condition = tuple[str, object]
"""(attribute, value): what a patient's first case must have among its attributes."""


def having(dataset: Dataset, patients: tuple[str, ...], conditions: tuple[Condition, ...]) -> tuple[str, ...]:
    """The patients that meet every condition, in order; the value `None` asks for any known value."""
    return tuple(patient for patient in patients if meets(first_attributes(dataset, patient), conditions))


def meets(attributes: dict, conditions: tuple[Condition, ...]) -> bool:
    """Whether attributes meet every condition."""
    known = ((attributes.get(name), value) for name, value in conditions)
    return all(found is not None if value is None else found == value for found, value in known)


def first_attributes(dataset: Dataset, patient: str) -> dict:
    """What is known of a patient without reading an image, also of a test patient."""
    return dataset.attributes(dataset.patients[patient][0])


def need(dataset: Dataset, patients: tuple[str, ...], attribute: str, value: object) -> tuple[str, ...]:
    """The patients of whom `attribute` is `value`; an error where there is none."""
    if found := having(dataset, patients, ((attribute, value),)):
        return found
    raise MedcookError(
        f"{dataset.manifest.name}: no patient has {attribute} {value!r} here.", "See `medcook data show`."
    )


@dataclass(frozen=True)
class CohortTask(Task):
    """Only patients that meet `keep` train and validate; whom to score is the recipe's score's to say.

    keep  (attribute, value) pairs, for example (("site", "Montgomery"),)
    """

    keep: tuple[Condition, ...] = ()

    @cached_property
    def labelled_patients(self) -> tuple[str, ...]:
        return self._kept(super().labelled_patients)

    @cached_property
    def unlabelled_patients(self) -> tuple[str, ...]:
        return having(self.data, super().unlabelled_patients, self.keep)

    @cached_property
    def val_patients(self) -> tuple[str, ...]:
        return self._kept(super().val_patients)

    def _kept(self, patients: tuple[str, ...]) -> tuple[str, ...]:
        if found := having(self.data, patients, self.keep):
            return found
        raise MedcookError(f"{self.dataset}: no patient has {dict(self.keep)}.", "See `medcook data show`.")


@dataclass(frozen=True)
class RaterTask(CohortTask):
    """Training samples come with every rater's annotation; a missing rater is `IGNORE` throughout."""

    def samples(self, role: str) -> Samples:
        samples = super().samples(role)
        if role == "unlabelled":
            return samples
        cases = list(self.cases(role))
        most = max(0 if case.raters is None else len(case.raters) for case in cases)
        if not most:
            raise MedcookError(f"{self.dataset} has one annotation an image.", "Take a data set with raters.")
        raters = torch.cat([self._raters(case, most) for case in cases])
        return Samples(samples.images, samples.labels, samples.case_of, raters)

    def _raters(self, case: Case, most: int) -> Tensor:
        """(slices, most, *size) uint8 of one case."""
        there = [self.preparation.labels(case, values=annotation) for annotation in case.raters]
        missing = [torch.full_like(there[0], IGNORE)] * (most - len(there))
        return torch.stack(there + missing, dim=1)


@dataclass(frozen=True)
class GroupTask(CohortTask):
    """Training samples come with their group: the number of the patient's `attribute` in `group_names`.

    Patients of whom it is not known make a group of their own, the last.
    """

    attribute: str = "site"

    @cached_property
    def group_names(self) -> tuple[str, ...]:
        """The values of the attribute among the training patients, sorted; what is unknown is named the empty text."""
        names = {self.group_of(first_attributes(self.data, patient)) for patient in self.data.split.train}
        return (*sorted(names - {""}), "")

    def group_of(self, attributes: dict) -> str:
        """The name of the group that attributes belong to; empty where the attribute is not known."""
        value = attributes.get(self.attribute)
        return "" if value is None else str(value)

    def samples(self, role: str) -> Samples:
        samples = super().samples(role)
        patients = getattr(self, f"{role}_patients")
        named = [
            self.group_of(self.data.attributes(case)) for patient in patients for case in self.data.patients[patient]
        ]
        known = [name if name in self.group_names else "" for name in named]
        numbers = torch.tensor([self.group_names.index(name) for name in known])
        return Samples(samples.images, samples.labels, samples.case_of, samples.raters, numbers[samples.case_of])


@dataclass(frozen=True)
class OutcomeTask(CohortTask):
    """Predict a fact about the patient: every voxel of the label is 1 where `outcome` has the value `positive`, else 0.

    So a classifier is a Method whose probabilities are the same all over the image, and the one loop trains it.
    Patients of whom the fact is not known take no part.
    """

    outcome: str = "tuberculosis"
    positive: object = True

    def _kept(self, patients: tuple[str, ...]) -> tuple[str, ...]:
        return super()._kept(having(self.data, patients, ((self.outcome, None),)))

    @property
    def classes(self) -> int:
        return 2

    @property
    def structures(self) -> dict[int, str]:
        return {1: self.outcome}

    def samples(self, role: str) -> Samples:
        samples = super().samples(role)
        if role == "unlabelled":
            return samples
        facts = torch.tensor([self.is_positive(case.attributes) for case in self.cases(role)], dtype=torch.uint8)
        labels = facts[samples.case_of].view(-1, *[1] * (samples.labels.ndim - 1)).expand_as(samples.labels)
        return Samples(samples.images, labels.contiguous(), samples.case_of)

    def is_positive(self, attributes: dict) -> bool:
        return attributes[self.outcome] == self.positive


def outcome_rows(fitted, case: Case, group: str | None = None) -> list[dict]:
    """score (0 to 1), outcome (0 or 1) and group (an attribute as text) of a case; no row where the fact is unknown."""
    task = fitted.task
    if case.attributes.get(task.outcome) is None:
        return []
    values = {
        "score": float(fitted.probabilities(case)[1].mean()),
        "outcome": float(task.is_positive(case.attributes)),
        "group": str(case.attributes.get(group) or "") if group else "",
    }
    return [evaluation.row(case, task.outcome, **values)]
