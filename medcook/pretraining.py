"""Learning from images before learning from labels: the two phases of chapter 13. Its tasks are in `image_pool`.

One run holds both phases: a share of its steps goes to a pretext, for which no label of the task is needed, and the
rest trains the same network on the few labels there are. A network that starts from nothing has as many steps with
labels, or, where it is asked what else the time of the pretext could have bought, all of them.
"""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from medcook.data import IGNORE
from medcook.methods.method import Batch, Method, Moment, follow, own_generator
from medcook.methods.semi_supervised import NARROW
from medcook.networks import build_network


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
    "Pretrained",
    "Projector",
    "TwoPhases",
    "encoded",
    "follow",
    "fresh",
    "info_nce",
    "nothing",
    "one_cycle",
    "pooled",
]
