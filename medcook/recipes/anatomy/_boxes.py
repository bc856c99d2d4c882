"""An object in a window around it: what methods are shown that are told roughly where to look."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from medcook.data import IGNORE, Case
from medcook.preparation import Preparation, Window
from medcook.tasks import Samples, Task


@dataclass(frozen=True)
class BoxPreparation(Preparation):
    """A square window around an object of the case's label: as if someone had drawn a box around it.

    structure  its value in the label; 0: all that is labelled
    margin     side of the window, in longer sides of the box
    """

    structure: int = 0
    margin: float = 2.0

    def object(self, case: Case) -> np.ndarray:
        """(*spatial) bool."""
        return case.label == self.structure if self.structure else (case.label > 0) & (case.label != IGNORE)

    def window(self, case: Case) -> Window:
        shown = np.argwhere(self.object(case))[:, -self.dims :]
        if not len(shown):
            return super().window(case)
        low, high = shown.min(0), shown.max(0)
        scale = min(self.size) / (self.margin * float((high - low + 1).max()))
        return Window(tuple(((low + high) / 2).tolist()), scale, self.size)


@dataclass(frozen=True)
class BoxTask(Task):
    """One structure (0: all of them together) to be outlined in a window around it."""

    structure: int = 0

    @cached_property
    def preparation(self) -> BoxPreparation:
        return BoxPreparation(size=(64, 64), smooth=True, structure=self.structure)

    @property
    def classes(self) -> int:
        return 2

    @property
    def structures(self) -> dict[int, str]:
        return {1: super().structures.get(self.structure, "object")}

    def samples(self, role: str) -> Samples:
        found = super().samples(role)
        chosen = found.labels == self.structure if self.structure else (found.labels > 0) & (found.labels != IGNORE)
        return replace(found, labels=chosen.to(torch.uint8))
