"""Slides as a task: images, classes and sections of slides that are composed of a patient's slices (`_glass`).

A label map tells class and section at once, so that a data set is composed only once: value = class + 4 * section.
"""

from dataclasses import dataclass, fields
from functools import cached_property
from typing import ClassVar
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from medcook.data import IGNORE, Case
from medcook.preparation import Preparation, zscore
from medcook.recipes.instances._glass import CROWDED, Manner, Slide, composed, pieces
from medcook.synthesis import small
from medcook.tasks import Samples, Task, prepare

TISSUE, PEN, BOTH = 1, 2, 3
CLASSES = 4
STRUCTURES = {TISSUE: "tissue", PEN: "pen marking", BOTH: "pen marking on tissue"}


@dataclass(frozen=True)
class SlidePreparation(Preparation):
    """A preparation that makes `versions` slides of each case, which the case's name decides.

    side      of the slide, pixels; `size` is that of a piece, from which sections are cut
    anatomy   whether labels tell the real structures in place of tissue and pen
    """

    side: int = 96
    versions: int = 1
    manner: Manner = Manner()
    anatomy: bool = False

    def slides(self, case: Case) -> list[Slide]:
        """The slides of a case; none where its organ is too small."""
        found = pieces(super().images(case)[:, 0].numpy(), super().labels(case).numpy())
        seeds = [crc32(f"slide {number} of {case.case_id}".encode()) for number in range(self.versions if found else 0)]
        return [composed(found, self.manner, self.side, np.random.default_rng(seed)) for seed in seeds]

    def images(self, case: Case) -> Tensor:
        """(N, 3, side, side) float32, zero mean and unit variance over each slide."""
        light = [zscore(torch.from_numpy(slide.light)) for slide in self.slides(case)]
        return torch.stack(light) if light else torch.zeros(0, 3, self.side, self.side)

    def labels(self, case: Case, values: np.ndarray | None = None) -> Tensor:
        """(N, side, side) uint8: the class, plus `CLASSES` times the number of the section (see `apart`)."""
        maps = [CLASSES * slide.sections + self.kinds(slide) for slide in self.slides(case)]
        return torch.from_numpy(np.stack(maps)) if maps else torch.zeros(0, self.side, self.side, dtype=torch.uint8)

    def kinds(self, slide: Slide) -> np.ndarray:
        """(H, W) uint8: the class of each pixel."""
        return slide.structures if self.anatomy else TISSUE * (slide.sections > 0) + PEN * slide.pen


def apart(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Classes and sections, uint8 of the same shape, of a `SlidePreparation`'s labels."""
    return labels % CLASSES, labels // CLASSES


@dataclass(frozen=True)
class SlideTask(Task):
    """Tissue and pen markings on slides of `side` x `side` pixels; no two patients share one.

    Training samples come with their sections: the number of each pixel's, 0 beside tissue, in the first rater.
    piece  pixels of the square from which a section is cut: it shows as much as the book's own preparation
    """

    side: int = 96
    piece: int = 48
    versions: int = 3
    manner: Manner = Manner()
    anatomy: ClassVar[bool] = False

    @cached_property
    def preparation(self) -> SlidePreparation:
        plain = small(super().preparation, self.piece)
        kept = {part.name: getattr(plain, part.name) for part in fields(Preparation)}
        return SlidePreparation(
            **kept, side=self.side, versions=self.versions, manner=self.manner, anatomy=self.anatomy
        )

    @property
    def classes(self) -> int:
        return CLASSES

    @property
    def structures(self) -> dict[int, str]:
        return STRUCTURES

    @property
    def data_kind(self) -> str:
        """What evidence on it counts as."""
        return "simulated" if self.data.manifest.simulated else "real-anatomy-simulated"

    def samples(self, role: str) -> Samples:
        found = prepare(self.data, self.preparation, getattr(self, f"{role}_patients"))
        kinds, sections = apart(found.labels)
        if role == "unlabelled":
            kinds, sections = (torch.full_like(part, IGNORE) for part in (kinds, sections))
        return Samples(found.images, kinds, found.case_of, sections[:, None])


@dataclass(frozen=True)
class CrowdTask(SlideTask):
    """Crowded slides whose classes are the data set's own structures, three of them; sections are its instances."""

    manner: Manner = CROWDED
    anatomy: ClassVar[bool] = True

    @property
    def structures(self) -> dict[int, str]:
        return self.data.manifest.structures
