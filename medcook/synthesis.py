"""Pairs of an image and its labels that nobody has seen: the tasks of chapter 15, and training on what was made.

One run holds everything: a generator learns from the training patients, makes pairs, and is done; then a network
learns to segment from the real pairs and those that were made. Who makes none has as many steps with the real ones.
No generator learns from patients who are scored.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from medcook.data.transforms import warp
from medcook.image_pool import PoolTask
from medcook.methods.method import Batch, Moment, follow, own_generator
from medcook.preparation import Preparation
from medcook.pretraining import Pretrained, fresh, nothing
from medcook.tasks import Task


@dataclass(frozen=True)
class SmallTask(Task):
    """A task on slices of `side` x `side` pixels that show what the book's own preparation shows."""

    side: int = 64

    @cached_property
    def preparation(self) -> Preparation:
        return small(super().preparation, self.side)


@dataclass(frozen=True)
class SmallPoolTask(PoolTask):
    """The same, with a pool of images without labels (`medcook.image_pool`); of the task's own data set alone."""

    side: int = 64

    @cached_property
    def preparation(self) -> Preparation:
        return small(super().preparation, self.side)


def small(plain: Preparation, side: int) -> Preparation:
    """A preparation with fewer pixels that shows as much of the image."""
    long_side = side if plain.long_side is None else round(plain.long_side * side / plain.size[0])
    return replace(plain, size=(side, side), long_side=long_side, smooth=True)


class Bank(nn.Module):
    """Pairs that a generator made, kept with the networks' weights: so an interrupted run finds them again.

    images  (count, C, *size) float32;  labels (count, *size) uint8
    """

    def __init__(self):
        super().__init__()
        self.register_buffer("images", torch.zeros(0))
        self.register_buffer("labels", torch.zeros(0, dtype=torch.uint8))

    def __len__(self) -> int:
        return len(self.images)

    def put(self, images: Tensor, labels: Tensor) -> None:
        """Keep pairs (B, C, *size), (B, *size)."""
        images, labels = images.float(), labels.to(torch.uint8)
        if not len(self):
            self.images, self.labels = images, labels
            return
        self.images = torch.cat([self.images, images])
        self.labels = torch.cat([self.labels, labels])

    def draw(self, many: int) -> tuple[Tensor, Tensor]:
        """So many pairs, with replacement, by torch's own generator."""
        chosen = torch.randint(len(self), (many,), device=self.images.device)
        return self.images[chosen], self.labels[chosen]

    def _load_from_state_dict(self, state: dict, prefix: str, *others) -> None:
        """As many pairs as were saved."""
        for name in ("images", "labels"):
            saved = state[prefix + name]
            setattr(self, name, torch.empty_like(saved, device=getattr(self, name).device))
        super()._load_from_state_dict(state, prefix, *others)


@dataclass
class Synthesising(Pretrained):
    """A generator learns for `share` of the steps and makes pairs in the last of these; then real and made pairs train.

    A subclass says what the generator is (`generator`), its loss (`learn`) and what pairs it makes (`make`). What the
    generator's weights were on average over time makes the pairs: `nets["sampler"]`. Augmentation moves the real images
    alone until there is something to segment: what a generator sees has its own brightness, and no noise added.

    making  in how many steps pairs are made, a batch of them in each; 0: no generator learns, only real pairs train
    mixed   the share of made pairs in each batch that the segmenter sees
    """

    share: float = 0.6
    making: int = 16
    mixed: float = 0.5
    pretext_rate: float = 2e-3

    axes = 2

    def generator(self, inputs: int, classes: int) -> nn.Module:
        """What learns first; its parameters that need no gradient stay as they are."""
        raise NotImplementedError

    def learn(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        """The loss of nets["generator"] in a step."""
        raise NotImplementedError

    def make(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None) -> tuple[Tensor, Tensor]:
        """Images (B, C, *size) and labels (B, *size) from nets["sampler"], with the real batches of a step at hand.

        Randomness is from torch's own generator; there is no gradient here.
        """
        raise NotImplementedError

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        nets = super().build(inputs, classes, dims)
        if self.makes_pairs:
            generator = self.generator(inputs, classes)
            nets["generator"], nets["sampler"], nets["made"] = generator, fresh(generator), Bank()
        return nets

    @property
    def makes_pairs(self) -> bool:
        return bool(self.share and self.making)

    def augment(self, batch: Batch, rng: torch.Generator) -> Batch:
        """Moved with its labels; brightness stays as it is."""
        images, labels = warp(batch.images, batch.labels, self.augmentation.grid(batch.images, rng))
        return batch._replace(images=images, labels=labels)

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        is_first, then = self.phase(now)
        if not is_first:
            return self.supervised(nets, labelled, then)
        if not self.makes_pairs:
            return nothing()
        learning = max(1, then.steps - self.making)
        if then.step < learning:
            return self.learn(nets, labelled, unlabelled, Moment(then.step, learning))
        with torch.no_grad():
            nets["made"].put(*self.make(nets.eval(), labelled, unlabelled))
        nets.train()
        return nothing()

    def supervised(self, nets: nn.ModuleDict, labelled: Batch, now: Moment) -> Tensor:
        """Real and made pairs, as many as there were real ones, all with the brightness of augmentation."""
        rng = own_generator()
        images, labels = labelled.images, labelled.labels
        many = round(self.mixed * len(images)) if self.makes_pairs and len(nets["made"]) else 0
        if many:
            made = nets["made"].draw(many)
            made = warp(*made, self.augmentation.grid(made[0], rng))
            images, labels = (
                torch.cat([own[many:], new.to(own)]) for own, new in zip((images, labels), made, strict=True)
            )
        images = self.augmentation.intensity(images, rng).contiguous(memory_format=torch.channels_last)
        return super().supervised(nets, labelled._replace(images=images, labels=labels), now)

    def after_step(self, nets: nn.ModuleDict, now: Moment) -> None:
        super().after_step(nets, now)
        is_first, then = self.phase(now)
        if is_first and self.makes_pairs and then.step < then.steps - self.making:
            follow(nets["sampler"], nets["generator"], then.decay(self.average))


@dataclass
class RealOnly(Synthesising):
    """Nothing is made: the segmenter waits, and then has as many steps on real pairs as others on both kinds."""

    making: int = 0


__all__ = ["Bank", "RealOnly", "SmallPoolTask", "SmallTask", "Synthesising", "small"]
