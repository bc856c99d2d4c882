"""Several segmentation tasks for algorithms that are retrained on each of them, without a change by hand.

How an image of a task becomes the grid that a network sees is part of the algorithm: it follows from the data's
fingerprint, or it is what was right for hearts, or the same for everything.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from medcook.data import IGNORE, Case
from medcook.preparation import Preparation, preparation_for
from medcook.recipes.sam_adaptation._modalities import EachItsOwn, ModalitiesTask
from medcook.synthesis import small

SIDE = 64
MARGIN = 1.1
"""What a window shows, in units of what the farthest labelled pixel asks for."""


def extent(cases: Iterable[Case]) -> float:
    """The fingerprint of training cases (C, *spatial), whose last two axes are the slice's.

    Twice the largest distance of a labelled pixel from the image's middle along an axis, in image sides (of the longer
    one): the share of the image in whose middle everything lies that was ever labelled. 0 where nothing was.
    """
    found = [0.0]
    for case in cases:
        labelled = ((case.label > 0) & (case.label != IGNORE)).reshape(-1, *case.spatial[-2:]).any(0)
        if labelled.any():
            shape = np.array(labelled.shape)
            found.append(2 * np.abs(np.argwhere(labelled) - (shape - 1) / 2).max() / shape.max())
    return float(max(found))


def configured(found: float, side: int = SIDE) -> Preparation:
    """A window about all that was ever labelled, by the extent that was found, with a margin: what else an image shows
    takes no pixels."""
    shown = min(1.0, found * MARGIN) or 1.0
    return Preparation((side, side), long_side=round(side / shown), smooth=True)


def whole(side: int = SIDE) -> Preparation:
    """The whole image in one size."""
    return Preparation((side, side), long_side=side, smooth=True)


def for_hearts(name: str, side: int = SIDE) -> Preparation:
    """Half of the image's side, about what moves; where nothing moves, about the middle."""
    hearts = small(preparation_for("acdc"), side)
    return hearts if name == "acdc" else replace(hearts, centre="image")


@dataclass(frozen=True)
class Planned(EachItsOwn):
    """A preparation for each set: pairs of its name and what it is."""

    plans: tuple[tuple[str, Preparation], ...] = ()

    def own(self, case: Case) -> Preparation:
        return dict(self.plans)[case.attributes["set"]]


@dataclass(frozen=True)
class DecathlonTask(ModalitiesTask):
    """Several sets, each a task of its own, in slices of `SIDE` x `SIDE` pixels; samples have their task as group.

    settings  `fingerprint`: each task's own, from its training cases;  `hearts`: those of hearts;  `whole`: one size
    """

    settings: str = "fingerprint"

    @cached_property
    def preparation(self) -> Planned:
        return Planned((SIDE, SIDE), plans=tuple((name, self._plan(name)) for name in self.data.sets))

    def _plan(self, name: str) -> Preparation:
        if self.settings == "whole":
            return whole()
        if self.settings == "hearts":
            return for_hearts(name)
        mine = [patient for patient in self.labelled_patients if patient.startswith(f"{name}:")]
        return configured(extent(self.data.cases(mine)))
