"""The numbers of a pre-training, and the scenes that its steps see. Everything drawn is a function of (seed, step)."""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from medcook.sam.appearance import appearance, close_up, cut_off
from medcook.sam.scenes import SMALLEST, Scene, scene


@dataclass(frozen=True)
class Plan:
    """Every number of a pre-training.

    images, objects   scenes a step, and targets in each
    rounds            answers to a prompt: the first, and those after a correcting click
    bank              scenes that are built and kept; their appearance is drawn anew at every use
    close             share of the images that are close-ups of a target, as the predictor looks at a small box
    plain             share of the answers that go without the mixer, so that SAM's own parts learn to do without it
    rate, warmup, cooldown   learning rate: up over the first steps, constant, down to zero over the last share
    average           decay per step of the moving average of the weights, which is what is kept
    """

    steps: int = 2600
    images: int = 8
    objects: int = 4
    rounds: int = 2
    bank: int = 4000
    close: float = 0.5
    plain: float = 0.2
    rate: float = 1e-3
    decay: float = 0.02
    warmup: int = 150
    cooldown: float = 0.3
    average: float = 0.998
    seed: int = 0

    def rate_at(self, step: int) -> float:
        """Learning rate of a step."""
        left = (self.steps - step) / (self.cooldown * self.steps)
        return self.rate * min(1.0, (step + 1) / self.warmup, left)


PLANS = {
    "laptop": Plan(),
    "gpu": Plan(steps=2578, images=48, objects=5, rounds=3, bank=10_000, warmup=322, cooldown=0.4, average=0.999),
}
"""`laptop` takes about an hour of two cores; of `gpu` the shipped weights are made, in minutes of a large GPU."""

BANK: dict[int, Scene] = {}
"""Scenes that were built."""


def remembered(seed: int) -> Scene:
    """A scene of the bank, built when it is first asked for."""
    if seed not in BANK:
        BANK[seed] = scene(seed)
    return BANK[seed]


def build(plan: Plan, workers: int) -> None:
    """Build the whole bank, by so many processes."""
    missing = [seed for seed in range(plan.bank) if seed not in BANK]
    with ProcessPoolExecutor(workers) as pool:
        BANK.update(zip(missing, pool.map(scene, missing, chunksize=32), strict=True))


def draw(plan: Plan, step: int) -> tuple[Tensor, Tensor]:
    """The scenes of a step: images (B, 1, SIZE, SIZE) and targets (B, objects, SIZE, SIZE) bool."""
    drawn = [draw_one(plan, np.random.default_rng([plan.seed, step, k])) for k in range(plan.images)]
    images, targets = (torch.from_numpy(np.stack(part)) for part in zip(*drawn, strict=True))
    return images[:, None], targets


def draw_one(plan: Plan, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One image (SIZE, SIZE) and `plan.objects` targets in it (objects, SIZE, SIZE) bool, some perhaps twice."""
    found = remembered(int(rng.integers(plan.bank)))
    image = appearance(found.seen, rng)
    masks = np.stack([found.mask(number) for number in range(len(found.targets))])
    if rng.random() < plan.close:
        image, masks = close_up(image, masks, rng)
    turns, mirrored = int(rng.integers(4)), rng.random() < 0.5
    image, masks = (np.rot90(part, turns, axes=(-2, -1)) for part in (image, masks))
    if mirrored:
        image, masks = image[..., ::-1], masks[..., ::-1]
    if rng.random() < 0.2:
        image, masks = cut_off(image, masks, rng)
    areas = masks.sum((1, 2))
    kept = np.flatnonzero(areas >= min(SMALLEST, areas.max()))
    chosen = rng.choice(kept, plan.objects, replace=len(kept) < plan.objects)
    return np.ascontiguousarray(image), np.ascontiguousarray(masks[chosen])


@dataclass(frozen=True)
class Drawn(Dataset):
    """Scenes by step, so that other processes can draw ahead."""

    plan: Plan

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        return draw(self.plan, step)


def drawing(plan: Plan, first: int, workers: int) -> DataLoader:
    """The scenes of steps from `first` on, in turn, drawn ahead by so many processes (0: when they are asked for)."""
    if workers:
        build(plan, workers)
    ahead = {"prefetch_factor": 4, "multiprocessing_context": "fork"} if workers else {}
    return DataLoader(Drawn(plan), None, sampler=range(first, plan.steps), num_workers=workers, **ahead)
