"""Which stage of a procedure every frame of a flight belongs to, as in REAL-Colon's annotations of colonoscopies.

There nine: outside, insertion, caecum, ileum, ascending, transverse, descending, sigmoid, rectum. Until the caecum is
reached, everything within the body is insertion; on the way back, the part of the colon counts. Here alike: outside,
insertion, far end, and on the way back the structure that a slice shows (by the real label; of two the larger one).
So the same slice has two names, and which one holds is not to be seen in it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from medcook.recipes.video._flights import Flight, FlightTask, Flown, centre_of

OUTSIDE, INSERTION, FAR_END = 0, 1, 2
STAGES = ("outside", "insertion", "far end")
"""Those that have the same name whatever is flown through."""
Protocol = Literal["5-fold", "4-fold"]
SHARES = (3, 1)
"""Of 15 videos of a cohort, how many are tested and how many validate in a fold of the 5-fold protocol."""
COHORTS = (((0, 1), 2, 3), ((0, 3), 1, 2), ((2, 3), 0, 1), ((1, 2), 3, 0))
"""Cohorts that train, validate and are tested in each fold of the 4-fold protocol, as in the official configuration."""


class Fold(NamedTuple):
    """Who trains, validates and is tested."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]


def regions(labels: Tensor, values: Sequence[int]) -> np.ndarray:
    """(S,) of label maps (S, H, W): `OUTSIDE` before the first structure, `FAR_END` after the last, else the place of
    the largest structure among `values`, plus 3; a slice between them that shows nothing is like the one before."""
    counts = np.stack([(labels == value).flatten(1).sum(1).numpy() for value in values], 1)
    found, there = len(STAGES) + counts.argmax(1), np.flatnonzero(counts.any(1))
    if not len(there):
        return np.full(len(labels), OUTSIDE)
    for number in range(there[0], there[-1] + 1):
        if not counts[number].any():
            found[number] = found[number - 1]
    found[: there[0]], found[there[-1] + 1 :] = OUTSIDE, FAR_END
    return found


def stages(slices: np.ndarray, of_slice: np.ndarray) -> np.ndarray:
    """The stage (T,) of frames that show these slices (T,), each in a region `of_slice` (S,)."""
    found = of_slice[slices]
    reached = np.flatnonzero(found == FAR_END)
    first = reached[0] if len(reached) else len(found)
    return np.where((np.arange(len(found)) < first) & (found > FAR_END), INSERTION, found)


def five_folds(cohorts: Mapping[int, Sequence[str]], count: int = 5) -> list[Fold]:
    """The first protocol: each fold tests a fifth of every cohort's videos, and a fifteenth validates.

    Everybody is tested once; those who validate in a fold are the first ones tested in the next.
    """
    parts: list[list[list[str]]] = [[[], [], []] for _ in range(count)]
    for cohort, videos in sorted(cohorts.items()):
        order = sorted(videos)
        Random(f"cohort {cohort}").shuffle(order)
        tested = [order[k::count] for k in range(count)]
        many = max(1, round(len(order) * SHARES[1] / (count * SHARES[0])))
        for k in range(count):
            val = tested[(k + 1) % count][:many]
            train = [video for video in order if video not in {*tested[k], *val}]
            for part, names in zip(parts[k], (train, val, tested[k]), strict=True):
                part += names
    return [Fold(*map(tuple, found)) for found in parts]


def four_folds(cohorts: Mapping[int, Sequence[str]]) -> list[Fold]:
    """The second protocol: two cohorts train, one validates, and one is tested, of which nothing was ever seen."""
    named = lambda *numbers: tuple(video for number in numbers for video in sorted(cohorts[number]))  # noqa: E731
    return [Fold(named(*train), named(val), named(test)) for train, val, test in COHORTS]


@dataclass(frozen=True)
class Staged(Flown):
    """Flights whose labels are the stage of each frame, all over it."""

    values: tuple[int, ...] = ()

    def flight(self, images: Tensor, labels: Tensor, patient: str, rng: np.random.Generator) -> Flight:
        flown = super().flight(images, labels, patient, rng)
        found = torch.from_numpy(stages(flown.slices, regions(labels, self.values))).to(torch.uint8)
        return flown._replace(labels=found[:, None, None].expand_as(flown.labels).contiguous())


@dataclass(frozen=True)
class ProcedureTask(FlightTask):
    """Every frame's stage, all over the frame: 0 `outside`, 1 `insertion`, 2 `far end`, then the structures.

    fold  one of the five of the first protocol (0 to 4), or of the four of the second (5 to 8): the patients of train
          and val in folds, by the centre that films them. Those who validate there are left aside here, since nothing
          is selected
    """

    frames: int = 192
    centres: bool = True

    preparer: ClassVar[type[Flown]] = Staged

    @property
    def settings(self) -> dict:
        return super().settings | {"values": tuple(self.data.manifest.structures)}

    @property
    def classes(self) -> int:
        return len(STAGES) + len(self.data.manifest.structures)

    @property
    def structures(self) -> dict[int, str]:
        return dict(enumerate((*STAGES, *self.data.manifest.structures.values())))

    @property
    def protocol(self) -> Fold | None:
        """Who takes which part; None where the committed split says it."""
        if self.fold is None:
            return None
        everyone = self.data.split.train + self.data.split.val
        cohorts = {number: [p for p in everyone if centre_of(p) == number] for number in range(4)}
        return [*five_folds(cohorts), *four_folds(cohorts)][self.fold]

    @property
    def labelled_patients(self) -> tuple[str, ...]:
        return self.protocol.train if self.protocol else super().labelled_patients

    @property
    def val_patients(self) -> tuple[str, ...]:
        """The patients that are scored."""
        return self.protocol.test if self.protocol else super().val_patients


def stages_of(labels: Tensor) -> Tensor:
    """(B, T) int64: the stage of every frame, of labels (B, T, H, W) as a `ProcedureTask` hands them out."""
    return labels[..., labels.shape[-2] // 2, labels.shape[-1] // 2].long()


def frame_measures(found: np.ndarray, truth: np.ndarray, classes: int) -> dict[str, float]:
    """The benchmark's measures of stages found (T,) and true (T,).

    accuracy                    the share of frames that are right
    macro_f1, jaccard           means over the stages that are there, in truth or in the answer
    weighted_f1, weighted_jaccard  means over the stages, weighted by how many frames truly have them
    withdrawal                  the difference of frames counted as withdrawal, as a share of the true ones
    """
    every = np.arange(classes)[:, None]
    mine, true = found == every, truth == every
    both, either, sizes = (mine & true).sum(1), (mine | true).sum(1), true.sum(1)
    there = either > 0
    f1 = 2 * both / np.maximum(both + either, 1)
    jaccard = both / np.maximum(either, 1)
    back, wanted = (np.sum(part >= FAR_END) for part in (found, truth))
    return {
        "accuracy": float((found == truth).mean()),
        "macro_f1": float(f1[there].mean()),
        "weighted_f1": float((f1 * sizes).sum() / sizes.sum()),
        "jaccard": float(jaccard[there].mean()),
        "weighted_jaccard": float((jaccard * sizes).sum() / sizes.sum()),
        "withdrawal": float(abs(back - wanted) / max(wanted, 1)),
    }
