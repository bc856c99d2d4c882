"""What the chapter's recipes on volumes share: the network of chapter 09, its mild augmentation, and the baselines."""

from dataclasses import dataclass, field

from medcook.data.transforms import Augment
from medcook.pretraining import FromScratch, Pretrained
from medcook.recipes.baseline.unet_hippocampus import MILD
from medcook.recipes.pretraining._settings import VOLUME_CHANNELS

SHARE = 1 / 3
"""The share of the steps that a pretext gets."""

VOLUME_BASELINE = FromScratch(channels=VOLUME_CHANNELS, augmentation=MILD, share=SHARE)
"""The same 3D network from random weights, with as many steps on the labels as those that a pretext prepared."""

VOLUME_LONGER = FromScratch(channels=VOLUME_CHANNELS, augmentation=MILD, share=0.0)
"""The same, with the pretext's steps on the labels, too."""


@dataclass
class PretrainedOnVolumes(Pretrained):
    """A pretext on volumes; what a recipe's subclass does with them is its own."""

    channels: tuple[int, ...] = VOLUME_CHANNELS
    share: float = SHARE
    augmentation: Augment = field(default_factory=lambda: MILD)

    axes = 3
