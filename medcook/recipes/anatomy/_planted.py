"""Tasks whose images have trees (`_trees`) drawn into them, of which a score may ask everything."""

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import ClassVar, NamedTuple
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from medcook.data import Case
from medcook.preparation import Preparation
from medcook.recipes.anatomy._trees import Tree
from medcook.synthesis import small
from medcook.tasks import Task


class Planted(NamedTuple):
    """An image (C, H, W) float32 with trees in it, its label map (H, W) uint8, and the trees by name.

    state  what else was decided when they were drawn, such as a disease
    """

    image: np.ndarray
    label: np.ndarray
    trees: dict[str, Tree]
    state: str = ""


@dataclass(frozen=True)
class PlantedTrees(Preparation):
    """A preparation after which trees are drawn into every image, in several ways, which the case's name decides.

    versions  how many of each image there are
    """

    versions: int = 1

    what: ClassVar[str] = "trees"

    def plant(self, image: np.ndarray, organ: np.ndarray, rng: np.random.Generator) -> Planted:
        """Trees in an image (H, W) of unit variance, of which `organ` (H, W) bool is labelled."""
        raise NotImplementedError(f"{type(self).__name__}.plant")

    def planted(self, case: Case) -> list[Planted]:
        """All versions of all images of a case; what the last case was given is kept."""
        key = (self, case.case_id, crc32(np.ascontiguousarray(case.image)))
        if key not in _LAST:
            _LAST.clear()
            rng = np.random.default_rng(crc32(f"{self.what} of {case.case_id}".encode()))
            pairs = zip(super().images(case)[:, 0].numpy(), super().labels(case).numpy() > 0, strict=True)
            _LAST[key] = [self.plant(image, organ, rng) for image, organ in pairs for _ in range(self.versions)]
        return _LAST[key]

    def images(self, case: Case) -> Tensor:
        """(N * versions, C, H, W), the versions of an image in a row."""
        return torch.from_numpy(np.stack([one.image for one in self.planted(case)])).float()

    def labels(self, case: Case, values: np.ndarray | None = None) -> Tensor:
        """(N * versions, H, W)."""
        return torch.from_numpy(np.stack([one.label for one in self.planted(case)]))


_LAST: dict[tuple, list[Planted]] = {}


@dataclass(frozen=True)
class TreeTask(Task):
    """Images of `side` x `side` pixels with trees drawn into them; the labels are the trees'.

    zoom  1 shows what the book's own preparation does, 2 the middle half of it

    Images and labels are on the task's own grid: `TreeTask.preparation` cannot restore them to the case's.
    """

    side: int = 128
    zoom: float = 1.0
    versions: int = 1

    painter: ClassVar[type[PlantedTrees]] = PlantedTrees
    names: ClassVar[dict[int, str]] = {1: "tree"}

    @cached_property
    def preparation(self) -> PlantedTrees:
        plain = small(super().preparation, self.side)
        plain = replace(plain, long_side=round(plain.long_side * self.zoom))
        kept = {part.name: getattr(plain, part.name) for part in fields(Preparation)}
        return self.painter(**kept, versions=self.versions)

    @property
    def classes(self) -> int:
        return 1 + max(self.names)

    @property
    def structures(self) -> dict[int, str]:
        return self.names

    @property
    def data_kind(self) -> str:
        """What evidence on it counts as."""
        return "simulated" if self.data.manifest.simulated else "real-anatomy-simulated"
