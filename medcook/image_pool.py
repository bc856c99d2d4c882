"""Images to learn from before learning from labels, of one data set or several: the tasks of chapter 13."""

from dataclasses import dataclass, fields
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from medcook.data import IGNORE
from medcook.domains import with_looks
from medcook.errors import MedcookError
from medcook.preparation import PREPARATIONS, Preparation
from medcook.tasks import Samples, Task, VolumeTask, prepare, shared_dataset

PLACES = 1000
"""In how many parts `Origin.place` divides a case."""
CASES = 100_000


class Origin(NamedTuple):
    """Where images of a pool come from, (B,) each.

    set    number of the data set in the pool
    case   number of the case in its set: slices of a volume have the same
    place  of a slice in its volume, from 0 (first) to below 1; 0 for whole volumes and single images
    """

    set: Tensor
    case: Tensor
    place: Tensor


def origin(groups: Tensor) -> Origin:
    """What `Batch.groups` of a pool's images says."""
    return Origin(groups // (CASES * PLACES), groups // PLACES % CASES, groups % PLACES / PLACES)


def packed(number: int, case_of: Tensor) -> Tensor:
    """The groups (N,) int64 of samples of the pool's set `number`, in the order of their cases (N,)."""
    counts = torch.bincount(case_of)[case_of]
    first = torch.searchsorted(case_of, case_of)
    place = (torch.arange(len(case_of)) - first) * PLACES // counts
    return (number * CASES + case_of) * PLACES + place


@dataclass(frozen=True)
class PoolTask(Task):
    """Few labels of one data set, and images of it or of others to learn from first: the unlabelled samples.

    Their groups say where they come from (`origin`). Only training patients are in a pool.

    pool       names of data sets, on the grid of the task's own: images are scaled to it, volumes cut into blocks;
               `acdc, negative` is acdc as a simulated scanner of `medcook.domains` shows it.
               The task's own set brings the patients without labels, or everybody where all have labels
    most       how many images are in the pool at most (None: all), as many of each set, evenly over its patients
    annotated  other sets' labels come along as the one rater of a sample; the task's own stay hidden
    """

    pool: tuple[str, ...] = ()
    most: int | None = None
    annotated: bool = False

    @cached_property
    def unlabelled_patients(self) -> tuple[str, ...]:
        return super().unlabelled_patients or self.labelled_patients

    def samples(self, role: str) -> Samples:
        if role != "unlabelled":
            return super().samples(role)
        if not self.pool:
            raise MedcookError("A task without a pool has nothing to learn from first.", "Name data sets in `pool`.")
        share = self.most and max(1, self.most // len(self.pool))
        parts = [thinned(self._part(number, name), share) for number, name in enumerate(self.pool)]
        joined = [torch.cat([getattr(part, name) for part in parts]) for name in ("images", "raters", "groups")]
        images, raters, groups = joined
        blank = torch.full((len(images), *images.shape[2:]), IGNORE, dtype=torch.uint8)
        return Samples(images, blank, torch.arange(len(images)), raters if self.annotated else None, groups)

    def _part(self, number: int, name: str) -> Samples:
        """One set of the pool: its labels as raters, its origin as groups."""
        dataset, _, look = name.partition(", ")
        own = name == self.dataset
        data = self.data if dataset == self.dataset else shared_dataset(dataset)
        patients = self.unlabelled_patients if own else data.split.train
        plain = self.preparation if dataset == self.dataset else fitting(dataset, self.preparation.size)
        found = prepare(data, with_looks(plain, {}, look) if look else plain, patients)
        if found.images.shape[2:] != self.preparation.size:
            found = blocks(found, self.preparation.size)
        labels = torch.full_like(found.labels, IGNORE) if own else found.labels
        return Samples(found.images, labels, found.case_of, labels[:, None], packed(number, found.case_of))


@dataclass(frozen=True)
class VolumePoolTask(PoolTask, VolumeTask):
    """A pool of volumes."""


def fitting(dataset: str, size: tuple[int, ...]) -> Preparation:
    """How a data set of a pool comes onto a grid: by the book's own preparation where it is of this size."""
    own = PREPARATIONS.get(dataset)
    if own and own.size == size:
        return own
    if len(size) == 2:
        return Preparation(size=size, long_side=max(size), smooth=True)
    data = shared_dataset(dataset)
    first = data.load(data.patients[data.split.train[0]][0])
    if len(first.spatial) != len(size):
        raise MedcookError(f"{dataset} has no volumes.", "Leave it out of this pool.")
    return Preparation(size=first.spatial)


def blocks(samples: Samples, size: tuple[int, ...]) -> Samples:
    """Volumes (N, C, *whole) cut into blocks of `size`, side by side from the first corner; incomplete ones fall away.

    So do blocks without contrast, in which the standard deviation is below a tenth of the volume's.
    """
    whole = samples.images.shape[2:]
    if any(mine > there for mine, there in zip(size, whole, strict=True)):
        raise MedcookError(f"A volume of {whole} has no block of {size}.", "Leave this set out of the pool.")
    images, labels = (cut(tensor, size) for tensor in (samples.images, samples.labels[:, None]))
    case_of = samples.case_of.repeat_interleave(len(images) // len(samples))
    spread = samples.images.flatten(1).std(1)[case_of.unique(return_inverse=True)[1]]
    kept = images.flatten(1).std(1) > 0.1 * spread
    return Samples(images[kept], labels[kept, 0], case_of[kept])


def cut(volumes: Tensor, size: tuple[int, ...]) -> Tensor:
    """(N, C, *whole) to (N * blocks, C, *size), the blocks of a volume one after the other."""
    for axis, side in enumerate(size, start=2):
        volumes = volumes.unfold(axis, side, side)
    dims = len(size)
    order = (0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims))
    return volumes.permute(order).flatten(0, dims).contiguous()


def thinned(samples: Samples, most: int | None) -> Samples:
    """At most so many samples, spread evenly over all."""
    if most is None or len(samples) <= most:
        return samples
    chosen = torch.arange(most) * len(samples) // most
    kept = {part.name: getattr(samples, part.name) for part in fields(samples)}
    return Samples(**{name: None if tensor is None else tensor[chosen] for name, tensor in kept.items()})
