"""What the volume networks of chapter 09 share: hippocampi, a budget, and a method that trains a recipe's network."""

from dataclasses import dataclass, field

from medcook.data.transforms import Augment
from medcook.methods import Supervised
from medcook.recipes.architectures._settings import Architecture
from medcook.recipes.baseline.unet_hippocampus import MILD
from medcook.recipes.recipe import Scale
from medcook.tasks import Budget, VolumeTask

CHANNELS = (8, 16, 32, 64)
"""Half the widths of the book's 3D baseline, so that all networks of the chapter fit into an afternoon of two cores."""

BASELINE = Supervised(channels=CHANNELS, augmentation=MILD)

BUDGET = Budget(steps=150, batch=4, checks=2)
"""Nearly a minute for the U-Net on one core; every network gets as many steps, whatever a step of it costs."""

QUICK = Scale(VolumeTask("embedded"), Budget(steps=30, batch=4, precision="float32", checks=2), replicates=1)
"""Volumes of 8 x 64 x 64 of the simulated brains that ship with the book.

In float32: with bfloat16 on a CPU, the weight gradient of a 3 x 3 x 3 convolution reads memory that nobody has written
where the volume is two slices deep (PyTorch 2.13), as it is after two poolings.
"""


@dataclass
class VolumeNetwork(Architecture):
    """The book's 3D baseline with another network; `model` of a recipe's subclass says which."""

    channels: tuple[int, ...] = CHANNELS
    augmentation: Augment = field(default_factory=lambda: MILD)

    axes = 3


def scales(*arms: str) -> dict[str, Scale]:
    """{profile: Scale}; at `full` three folds of the hippocampi, and `arms` if any are named."""
    return {"quick": QUICK, "full": Scale(VolumeTask("hippocampus"), BUDGET, arms=arms or None)}
