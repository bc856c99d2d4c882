"""Learning from images before learning from labels: the tasks and the two phases of chapter 13.

One run holds both phases: a share of its steps goes to a pretext, for which no label of the task is needed, and the
rest trains the same network on the few labels there are. A network that starts from nothing has as many steps with
labels, or, where it is asked what else the time of the pretext could have bought, all of them.
"""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, fields
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from medcook.data import IGNORE
from medcook.domains import with_looks
from medcook.errors import MedcookError
from medcook.methods.method import Batch, Method, Moment, follow, own_generator
from medcook.methods.semi_supervised import NARROW
from medcook.networks import build_network
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


def one_cycle(step: int, steps: int, warm: float = 0.2) -> float:
    """The learning rate of a one-cycle schedule (Smith 2018), as a share of its peak: up along a cosine, then down."""
    top = warm * steps - 1
    if step <= top:
        return bent(step / top, 1 / 25, 1) if top else 1.0
    return bent((step - top) / max(steps - 1 - top, 1), 1, 4e-6)


def bent(fraction: float, start: float, end: float) -> float:
    """From start to end along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * fraction)) / 2


class TwoPhases(LambdaLR):
    """A schedule at whose step `first` the optimiser forgets everything: what is tuned has an optimiser of its own.

    Adam's second moments would last for a thousand steps, so that the pretext's gradients set the pace with labels.
    """

    def __init__(self, optimiser: Optimizer, rate: Callable[[int], float] | list[Callable[[int], float]], first: int):
        self.first = first
        super().__init__(optimiser, rate)

    def step(self) -> None:
        super().step()
        if self.last_epoch == self.first:
            self.optimizer.state.clear()


@dataclass
class Pretrained(Method):
    """A pretext on images for `share` of the steps, then training on labels; a subclass says what the pretext is.

    Each phase has its own one-cycle schedule. `augment` leaves images without any label as they are, since most
    pretexts make views of their own (`view`).

    share         of the steps that the pretext gets; 0: the network starts from nothing
    pretext_rate  peak learning rate of the pretext; `rate` is that of the training on labels
    """

    channels: tuple[int, ...] = NARROW
    share: float = 0.5
    pretext_rate: float = 3e-3

    uses_unlabelled = True

    has_pretext = True
    """False: the network starts from nothing, and waits while others are at their pretext."""

    def model(self, inputs: int, classes: int, dims: int) -> nn.Module:
        """The network that is prepared and then trained on labels."""
        return build_network(self.network, inputs=inputs, classes=classes, channels=self.channels, dims=dims)

    def pretext_parts(self, model: nn.Module, inputs: int, dims: int) -> nn.Module | None:
        """What only the pretext of a network needs (heads, a teacher, ...): it becomes nets["pretext"]."""
        return None

    def pretext(self, nets: nn.ModuleDict, images: Batch, now: Moment) -> Tensor:
        """The loss of a step before there are labels; `now` counts the steps of the pretext."""
        raise NotImplementedError

    def after_pretext(self, nets: nn.ModuleDict, now: Moment) -> None:
        """What follows a step of the pretext, beside the average: a teacher moves, for example."""

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        model = self.model(inputs, classes, dims)
        nets = nn.ModuleDict({"model": model, "average": fresh(model)})
        if self.share and self.has_pretext and (parts := self.pretext_parts(model, inputs, dims)) is not None:
            nets["pretext"] = parts
        return nets

    def first(self, steps: int) -> int:
        """How many of the steps of a run are the pretext's."""
        return round(self.share * steps)

    def phase(self, now: Moment) -> tuple[bool, Moment]:
        """Whether a step is the pretext's, and where its phase stands."""
        first = self.first(now.steps)
        if now.step < first:
            return True, Moment(now.step, first)
        return False, Moment(now.step - first, now.steps - first)

    def optimise(self, trained: list[nn.Parameter], steps: int) -> tuple[Optimizer, LRScheduler]:
        """AdamW, anew in each phase; the rate goes up and down once in each."""
        optimiser = AdamW(trained, lr=1.0, weight_decay=self.decay, fused=True)
        return optimiser, TwoPhases(optimiser, lambda step: self.rate_at(Moment(step, steps)), self.first(steps))

    def rate_at(self, now: Moment) -> float:
        """The learning rate of a step."""
        is_pretext, then = self.phase(now)
        return (self.pretext_rate if is_pretext else self.rate) * one_cycle(*then)

    def augment(self, batch: Batch, rng: torch.Generator) -> Batch:
        """As ever, where there is a label."""
        return batch if (batch.labels == IGNORE).all() else super().augment(batch, rng)

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        is_pretext, then = self.phase(now)
        if not is_pretext:
            return self.supervised(nets, labelled, then)
        if not self.has_pretext:
            return nothing()
        return self.pretext(nets, labelled if unlabelled is None else unlabelled, then)

    def supervised(self, nets: nn.ModuleDict, labelled: Batch, now: Moment) -> Tensor:
        """The loss of a step with labels; `now` counts the steps of this phase."""
        return super().training_step(nets, labelled, None, now)

    def after_step(self, nets: nn.ModuleDict, now: Moment) -> None:
        """The average starts anew with the second phase: it moves fast in the first steps of each."""
        is_pretext, then = self.phase(now)
        super().after_step(nets, then)
        if is_pretext and self.has_pretext:
            self.after_pretext(nets, then)

    def view(self, images: Tensor) -> Tensor:
        """Another augmented view of images, from torch's own generator."""
        rng = own_generator()
        return self.augmentation(images, None, rng)[0]


def nothing() -> Tensor:
    """The loss of a step in which no weight shall move: there is nothing that a gradient could come from."""
    return torch.zeros((), requires_grad=True)


@dataclass
class FromScratch(Pretrained):
    """No pretext: the network waits for the labels, and has as many steps with them as one that does not.

    With `share` 0 it does not wait: all steps train on labels.
    """

    has_pretext = False


@dataclass
class OptionalPretext(Pretrained):
    """A pretext that may be left out: so a recipe's own network also starts from nothing.

    waits  there is no pretext, and nothing happens in its place
    """

    waits: bool = False

    @property
    def has_pretext(self) -> bool:
        return not self.waits


def encoded(net: nn.Module, images: Tensor) -> Tensor:
    """The deepest feature map (B, channels[-1], *small) of a U-Net, without its way up."""
    return net.descend(images)[-1]


def pooled(maps: Tensor) -> Tensor:
    """The mean (B, C) float32 over feature maps (B, C, *size)."""
    return maps.flatten(2).float().mean(2)


class Projector(nn.Sequential):
    """(B, inputs) to (B, outputs): two layers with a ReLU between, as in SimCLR (Chen et al., ICML 2020)."""

    def __init__(self, inputs: int, hidden: int, outputs: int):
        super().__init__(nn.Linear(inputs, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, outputs))


def info_nce(first: Tensor, second: Tensor, heat: float = 0.1) -> Tensor:
    """InfoNCE of two views (B, D): row b of one belongs to row b of the other, all else is negative.

    SimCLR's loss: each of the 2 B vectors finds its partner among the other 2 B - 1. Under autocast the similarities
    have its precision, a few hundredths at a temperature of 0.1.
    """
    vectors = F.normalize(torch.cat([first, second]).float(), dim=1)
    similarity = vectors @ vectors.T / heat
    similarity.fill_diagonal_(-math.inf)
    partner = torch.arange(len(vectors), device=vectors.device).roll(len(first))
    return F.cross_entropy(similarity, partner)


def fresh(module: nn.Module) -> nn.Module:
    """A copy that does not learn: a teacher, moved by `follow`."""
    return deepcopy(module).requires_grad_(False)


__all__ = [
    "FromScratch",
    "OptionalPretext",
    "Origin",
    "PoolTask",
    "Pretrained",
    "Projector",
    "TwoPhases",
    "VolumePoolTask",
    "encoded",
    "follow",
    "fresh",
    "info_nce",
    "nothing",
    "one_cycle",
    "origin",
    "packed",
    "pooled",
]
