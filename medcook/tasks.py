"""A Task: which patients train, which validate, which are scored, and how their cases become tensors."""

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from hashlib import sha256
from typing import Literal

import torch
from torch import Tensor

from medcook.data import IGNORE, Case, Dataset, open_dataset
from medcook.errors import MedcookError
from medcook.preparation import Preparation, preparation_for
from medcook.spool import Spool


@dataclass(frozen=True)
class Budget:
    """What one training run may use. Steps, not seconds: seconds are reported.

    batch      labelled images a step; methods that use unlabelled images get as many of those on top
    precision  `auto` takes bfloat16 only where it was timed to be faster on this machine
    checks     how often the validation cases are looked at during training
    """

    steps: int
    batch: int = 16
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    checks: int = 5


@dataclass
class Samples:
    """Prepared cases: images (N, C, *size) float32, labels (N, *size) uint8, case_of (N,) number of the case.

    raters  (N, R, *size) uint8, every rater's annotation, for tasks that hand these out
    groups  (N,) int64, the number of each sample's group of patients, for tasks that hand these out
    """

    images: Tensor
    labels: Tensor
    case_of: Tensor
    raters: Tensor | None = None
    groups: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def hash(self) -> str:
        """12 hex digits over every value; part of a run's key, so that changed data retrains."""
        digest = sha256()
        for tensor in filter(lambda tensor: tensor is not None, (self.images, self.labels, self.raters, self.groups)):
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()[:12]


@dataclass(frozen=True)
class Task:
    """A data set, its patients by role, and what is scored.

    labelled    how many training patients have labels (None: all); `draw` says which
    fold        k of `folds`-fold cross-validation over train and val; None: the committed split
    evaluation  `val` scores the validation (or held-out) patients, `test` opens the test set
    """

    dataset: str
    labelled: int | None = None
    draw: int = 0
    fold: int | None = None
    folds: int = 5
    evaluation: Literal["val", "test"] = "val"

    @property
    def data(self) -> Dataset:
        """The open data set; the same object for every task of a process."""
        return shared_dataset(self.dataset)

    @cached_property
    def preparation(self) -> Preparation:
        return preparation_for(self.dataset)

    @property
    def classes(self) -> int:
        """Number of classes with the background; label values are 0 .. classes - 1."""
        return max(self.data.manifest.classes) + 1

    @property
    def structures(self) -> dict[int, str]:
        """{label value: name} without the background."""
        return self.data.manifest.structures

    @property
    def select(self) -> bool:
        """Whether a val-selected checkpoint is kept: only where the scored patients are not those that select."""
        return self.evaluation == "test"

    @cached_property
    def labelled_patients(self) -> tuple[str, ...]:
        """Training patients whose labels may be used."""
        if self.fold is None:
            return self.data.split.labelled(self.labelled, self.draw)
        if self.labelled is not None:
            raise MedcookError("A task has either `fold` or `labelled`.", "Leave one out.")
        return self.data.split.folds(self.folds)[self.fold][0]

    @cached_property
    def unlabelled_patients(self) -> tuple[str, ...]:
        """Training patients without labels: the rest of train."""
        if self.labelled is None:
            return ()
        return tuple(p for p in self.data.split.train if p not in self.labelled_patients)

    @cached_property
    def val_patients(self) -> tuple[str, ...]:
        return self.data.split.val if self.fold is None else self.data.split.folds(self.folds)[self.fold][1]

    def cases(self, role: Literal["labelled", "unlabelled", "val"]) -> Iterator[Case]:
        """The cases of one role. Test cases are reached by `medcook.evaluation` alone."""
        return self.data.cases(getattr(self, f"{role}_patients"))

    def samples(self, role: Literal["labelled", "unlabelled", "val"]) -> Samples:
        """The prepared tensors of one role; labels of unlabelled cases are blanked, so nothing can learn from them."""
        samples = prepare(self.data, self.preparation, getattr(self, f"{role}_patients"))
        if role == "unlabelled":
            samples = Samples(samples.images, torch.full_like(samples.labels, IGNORE), samples.case_of)
        return samples

    def describe(self) -> dict:
        """JSON-able identity: part of a run's key and of its evidence."""
        return {"kind": type(self).__name__, **asdict(self)}


@dataclass(frozen=True)
class VolumeTask(Task):
    """Cases as volumes, also those of the embedded cohort, which the book prepares as slices."""

    @cached_property
    def preparation(self) -> Preparation:
        return Preparation(size=(8, 64, 64)) if self.dataset == "embedded" else preparation_for(self.dataset)


def own_data(folder: str) -> Task:
    """A task on your own folder of image and label pairs (see `medcook data show FOLDER`)."""
    return Task(f"folder:{folder}")


@lru_cache(maxsize=8)
def shared_dataset(name: str) -> Dataset:
    """`open_dataset`, once a process."""
    return open_dataset(name)


class Prepared:
    """The cases of a data set as tensors, each read and prepared once and then kept in files."""

    def __init__(self, data: Dataset, preparation: Preparation):
        self.data, self.preparation = data, preparation
        self.images, self.labels, self.places = Spool(), Spool(), {}

    def __call__(self, case_id: str) -> tuple[Tensor, Tensor]:
        """Images (N, C, *size) and labels (N, *size) of a case."""
        if case_id not in self.places:
            case = self.data.load(case_id)
            found = self.preparation.images(case), self.preparation.labels(case)
            self.places[case_id] = self.images.append(found[0]), self.labels.append(found[1])
            return found
        images, labels = self.places[case_id]
        return self.images.read(images), self.labels.read(labels)


@lru_cache(maxsize=8)
def _prepared(data: Dataset, preparation: Preparation, process: int) -> Prepared:
    """One a process: another that was forked from it must not write into the same files."""
    return Prepared(data, preparation)


def prepare(data: Dataset, preparation: Preparation, patients: tuple[str, ...]) -> Samples:
    """All cases of `patients` as tensors, which lie in files (see `Spool`); each case is read once a process."""
    case_ids = [case_id for patient in patients for case_id in data.patients[patient]]
    if not case_ids:
        raise MedcookError(f"{data.manifest.name}: no cases for these patients.", "Check the split and `labelled`.")
    case, images, labels, counts = _prepared(data, preparation, os.getpid()), Spool(), Spool(), []
    for case_id in case_ids:
        image, label = case(case_id)
        images.append(image), labels.append(label), counts.append(len(image))
    case_of = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return Samples(images.mapped(), labels.mapped(), case_of)
