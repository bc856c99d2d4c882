"""A Method: what a paper changes against supervised training, and nothing else.

The loop in `medcook.training` owns batches, precision and checkpoints. A method says which networks there are,
how a batch is augmented, what the loss is, what happens after a step and how to predict; all share one optimiser
and schedule, unless a published setting asks for its own. Its dataclass fields are its settings: they are hashed
into every run.
"""

from copy import deepcopy
from dataclasses import asdict, dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from medcook.data.transforms import Augment, warp
from medcook.losses import find_loss
from medcook.networks import build_network


class Moment(NamedTuple):
    """Where a training stands: step 0, 1, ... of `steps`."""

    step: int
    steps: int

    @property
    def fraction(self) -> float:
        """The share of the training that is over, 0 <= fraction < 1."""
        return self.step / self.steps

    def decay(self, most: float) -> float:
        """Of a moving average per step: less in the first steps, so that it forgets its random start."""
        return min(most, (self.step + 1) / (self.step + 10))


class Batch(NamedTuple):
    """images (B, C, *size) float32 and labels (B, *size) uint8, on the training device.

    index  (B,) int64: which of the task's samples these are, for methods that remember something about each
    grid   (B, *size, dims): where augmentation took each voxel from; kept by methods that ask for it
    raters (B, R, *size) uint8, every rater's annotation, where the task hands these out
    groups (B,) int64, the group of patients that each image is of, where the task hands these out
    """

    images: Tensor
    labels: Tensor
    index: Tensor | None = None
    grid: Tensor | None = None
    raters: Tensor | None = None
    groups: Tensor | None = None


@dataclass
class Method:
    """Supervised training of one network, averaged over time: the base of every other method.

    network, channels   see `medcook.networks.build_network`
    rate, decay         peak learning rate and weight decay of AdamW; one-cycle schedule (Smith 2018)
    average             decay per step of the moving average of the weights that predicts
    loss                a name in `medcook.losses`
    """

    network: str = "unet"
    channels: tuple[int, ...] = (16, 32, 64, 128, 128)
    rate: float = 3e-3
    decay: float = 1e-2
    average: float = 0.99
    loss: str = "both"
    augmentation: Augment = field(default_factory=Augment)

    uses_unlabelled = False
    """Whether a step also gets unlabelled images; a class attribute, set by semi-supervised methods."""

    axes: ClassVar[int | None] = None
    """Axes of the images that it is for, 2 or 3; None: either."""

    trial: ClassVar[object | None] = None
    """A small task on the embedded cohort that hands out what the method needs (raters, groups), where a plain one does
    not: on it `medcook.fingerprints` finds out how the method behaves."""

    trial_tolerance: ClassVar[float] = 1e-3
    """By how much its fingerprint may differ and be the same: more where rounding grows fast, as processors differ."""

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        """The networks: `model` is trained, `average` follows it and predicts."""
        model = build_network(self.network, inputs=inputs, classes=classes, channels=self.channels, dims=dims)
        return nn.ModuleDict({"model": model, "average": deepcopy(model).requires_grad_(False)})

    def optimise(self, trained: list[nn.Parameter], steps: int) -> tuple[Optimizer, LRScheduler]:
        """The optimiser of what is trained, and its schedule over the steps of the run."""
        optimiser = AdamW(trained, lr=self.rate, weight_decay=self.decay, fused=True)
        return optimiser, OneCycleLR(optimiser, self.rate, total_steps=steps, pct_start=0.2)

    def augment(self, batch: Batch, rng: torch.Generator) -> Batch:
        """A fresh view of a batch; labels and raters move with the images."""
        if batch.raters is None:
            images, labels = self.augmentation(batch.images, batch.labels, rng)
            return batch._replace(images=images, labels=labels)
        grid = self.augmentation.grid(batch.images, rng)
        images, labels = warp(batch.images, batch.labels, grid)
        raters = [warp(batch.images[:, :0], annotation, grid)[1] for annotation in batch.raters.unbind(1)]
        images = self.augmentation.intensity(images, rng)
        return batch._replace(images=images, labels=labels, raters=torch.stack(raters, dim=1))

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        """The loss of one step; `unlabelled` is None where every patient has labels."""
        return find_loss(self.loss)(nets["model"](labelled.images).float(), labelled.labels)

    def after_step(self, nets: nn.ModuleDict, now: Moment) -> None:
        """Move the average towards the model."""
        follow(nets["average"], nets["model"], now.decay(self.average))

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """Class probabilities (B, classes, *size) of prepared images."""
        return nets["average"](images).float().softmax(1)

    def settings(self) -> dict:
        """JSON-able identity of the method."""
        return {"method": type(self).__name__, **asdict(self)}


class Supervised(Method):
    """The book's baseline: labelled batches only."""


def own_generator() -> torch.Generator:
    """A generator for what asks for one inside of a step; torch's own generator, which the loop seeds, seeds it."""
    return torch.Generator().manual_seed(int(torch.randint(2**62, ())))


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average = decay * average + (1 - decay) * model, parameter by parameter; running statistics are copied."""
    if parameters := list(average.parameters()):
        torch._foreach_lerp_(parameters, list(model.parameters()), 1 - decay)
    for mine, theirs in zip(average.buffers(), model.buffers(), strict=True):
        mine.copy_(theirs)
