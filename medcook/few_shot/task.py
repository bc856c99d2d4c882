"""The few-shot protocol: base and novel structures, settings 1 and 2, supports by draw, chunks of slices.

Roy et al. (Squeeze and Excite guided few-shot segmentation, 2020) cut the slices that hold the structure into chunks,
in the support volume and in the query volume alike, and answer each chunk of the query with the support's slice in the
middle of the same chunk. Ouyang et al. (SSL-ALPNet, 2022) name the two settings.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from medcook.data import IGNORE, Case, Dataset
from medcook.errors import MedcookError
from medcook.preparation import Preparation, preparation_for
from medcook.tasks import Samples, Task, prepare, shared_dataset

SLICES = Preparation(size=(64, 64), long_side=64)
"""How volumes become slices where the book's other chapters take them whole."""


class Support(NamedTuple):
    """Annotated slices of one chunk: images (shots, C, H, W), masks (shots, H, W) uint8 of one structure, 0 or 1."""

    images: Tensor
    masks: Tensor


@dataclass(frozen=True)
class FewShotTask(Task):
    """Train on base structures, be scored on novel ones, of which a few annotated slices are shown after training.

    novel     label values of `dataset` that training never names; empty, with a source: all of them
    setting   1: in training a novel structure is background; 2: slices that show one are left out
    source    another data set to train on, with all its structures (cross-domain); None: `dataset` itself
    shots     patients a support is made of; each gives one slice to each chunk
    chunks    parts that the slices of a volume are cut into
    supports  how many supports, of different training patients, every test case is segmented with; `draw` is the
              number of the first. They are a source of spread of their own, and every one makes rows of its own.
    """

    novel: tuple[int, ...] = ()
    setting: Literal[1, 2] = 1
    source: str | None = None
    shots: int = 1
    chunks: int = 3
    supports: int = 3

    @cached_property
    def preparation(self) -> Preparation:
        return as_slices(self.dataset)

    @property
    def training_data(self) -> Dataset:
        """The data set that training sees."""
        return shared_dataset(self.source or self.dataset)

    @cached_property
    def base(self) -> dict[int, str]:
        """{label value in the training data: name} of what training may name."""
        structures = self.training_data.manifest.structures
        found = {value: name for value, name in structures.items() if self.source or value not in self.novel}
        if not found or not self.novel_structures:
            hint = "Choose `novel` among its label values, and leave one out, or name a `source`."
            raise MedcookError(f"{self.dataset} has no base or no novel structure with novel={self.novel}.", hint)
        return found

    @cached_property
    def novel_structures(self) -> dict[int, str]:
        """{label value in `dataset`: name} of what is scored."""
        everything = self.data.manifest.structures
        wanted = self.novel or (tuple(everything) if self.source else ())
        return {value: name for value, name in everything.items() if value in wanted}

    @property
    def classes(self) -> int:
        """Background and the base structures, which training finds numbered 1, 2, ..."""
        return 1 + len(self.base)

    @property
    def structures(self) -> dict[int, str]:
        return dict(enumerate(self.base.values(), start=1))

    def samples(self, role: str) -> Samples:
        """Training and validation slices with base structures only; those of patients without labels are none."""
        patients = getattr(self, f"{role}_patients")
        if self.source:
            patients = {"labelled": self.training_data.split.train, "val": self.training_data.split.val}[role]
        samples = prepare(self.training_data, as_slices(self.source or self.dataset), patients)
        kept = torch.ones(len(samples), dtype=torch.bool)
        if self.setting == 2 and not self.source:
            kept = ~holds(samples.labels, self.novel)
        if not kept.any():
            hint = "Take another structure, or setting 1."
            raise MedcookError(f"{self.dataset}: every slice shows a novel structure.", hint)
        labels = renumber(samples.labels[kept], tuple(self.base))
        return Samples(samples.images[kept], labels, samples.case_of[kept])

    def support_cases(self, number: int, value: int) -> list[Case]:
        """One case of each of `shots` training patients, of support 0, 1, ... of this draw; all show the structure.

        Patients are in a fixed random order and taken one after the other, so that supports share none until all
        training patients have served.
        """
        rng = random.Random(f"support of structure {value}")
        patients = sorted(self.labelled_patients)
        rng.shuffle(patients)
        if self.shots > len(patients):
            raise MedcookError(f"{self.shots} shots need as many patients.", f"Here are {len(patients)}.")
        first = (self.draw * self.supports + number) * self.shots
        order = [patients[(first + k) % len(patients)] for k in range(len(patients))]
        found = (case for patient in order if (case := self._showing(patient, value)))
        cases = [case for case, _ in zip(found, range(self.shots), strict=False)]
        if len(cases) < self.shots:
            raise MedcookError(f"{self.dataset}: too few patients show structure {value}.", "Ask for fewer shots.")
        return cases

    def _showing(self, patient: str, value: int) -> Case | None:
        """One of the patient's cases, the same every time, that shows the structure after preparation."""
        case_ids = list(self.data.patients[patient])
        random.Random(f"case of {patient}").shuffle(case_ids)
        cases = (self.data.load(case_id) for case_id in case_ids)
        return next((case for case in cases if (self.preparation.labels(case) == value).any()), None)

    def support(self, number: int, value: int) -> list[Support]:
        """The support of every chunk: the slice in its middle, of each shot."""
        shots = [list(self._middles(case, value)) for case in self.support_cases(number, value)]
        return [Support(*map(torch.cat, zip(*chunk, strict=True))) for chunk in zip(*shots, strict=True)]

    def _middles(self, case: Case, value: int) -> Iterator[tuple[Tensor, Tensor]]:
        images, masks = self.preparation.images(case), (self.preparation.labels(case) == value).to(torch.uint8)
        shown = masks.flatten(1).any(1).nonzero()[:, 0].tolist()
        for part in chunks(shown, self.chunks):
            middle = part[len(part) // 2]
            yield images[middle : middle + 1], masks[middle : middle + 1]


def as_slices(dataset: str) -> Preparation:
    """The book's preparation of a data set, or that of slices where it is of volumes."""
    usual = preparation_for(dataset)
    return usual if usual.dims == 2 else SLICES


def chunks(slices: list[int], count: int) -> list[list[int]]:
    """Slices in order, cut into `count` parts of about one size; with fewer slices than parts, some serve twice."""
    if len(slices) < count:
        return [[slices[k * len(slices) // count]] for k in range(count)]
    return [part.tolist() for part in np.array_split(slices, count)]


def extent(case: Case, value: int) -> list[int]:
    """From the first to the last slice of a case that shows a structure; empty where none does. An image is one slice.

    The literature takes it as known, of the query too: a user who marks the first and the last slice.
    """
    shown = np.flatnonzero((case.label == value).reshape(-1, *case.spatial[-2:]).any((1, 2)))
    return list(range(shown[0], shown[-1] + 1)) if len(shown) else []


def holds(labels: Tensor, values: tuple[int, ...]) -> Tensor:
    """(N,) bool: whether each of the label maps (N, *size) has one of the values anywhere."""
    found = torch.zeros(len(labels), dtype=torch.bool)
    for value in values:
        found |= (labels == value).flatten(1).any(1)
    return found


def renumber(labels: Tensor, values: tuple[int, ...]) -> Tensor:
    """The values become 1, 2, ..., everything else background; unlabelled stays so."""
    result = torch.where(labels == IGNORE, labels, torch.zeros_like(labels))
    for number, value in enumerate(values, start=1):
        result[labels == value] = number
    return result
