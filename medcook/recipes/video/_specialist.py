"""A network that was trained on what it is asked for, beside those that are prompted; see sam2-robotic."""

from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from medcook.data.transforms import Augment
from medcook.losses import find_loss
from medcook.methods import Batch, Method, Moment
from medcook.recipes.video import _following as following
from medcook.recipes.video._settings import AUGMENT, UNSEEN_QUICK
from medcook.recipes.video._tracker import drawn_clip
from medcook.recipes.volumes._slices import SliceUNet


class Asked(NamedTuple):
    """What is asked about a flight (its number): a structure (its label), shown from a frame on by prompts
    (T, 3, H, W), which are zeros where there is none."""

    flight: int
    value: int
    first: int
    prompts: Tensor


@dataclass
class Specialist(Method):
    """A U-Net on single frames, trained on what is asked for; no prompt is heard. As many frames in a step."""

    channels: tuple[int, ...] = (12, 24, 48)
    augmentation: Augment = field(default_factory=lambda: AUGMENT)

    axes = 3
    trial = replace(UNSEEN_QUICK, seen=True)

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        model = SliceUNet(inputs=inputs, classes=classes, channels=self.channels)
        return nn.ModuleDict({"model": model, "average": deepcopy(model).requires_grad_(False)})

    def augment(self, batch: Batch, rng: torch.Generator) -> Batch:
        return following.augmented(batch, self.augmentation, rng)

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        clip = drawn_clip((labelled.labels > 0).flatten(2).any(2)).every()
        frames = following.taken(labelled.images.movedim(2, 1), clip).movedim(1, 2)
        return find_loss(self.loss)(nets["model"](frames).float(), following.taken(labelled.labels, clip))

    @torch.no_grad()
    def answers(self, nets: nn.ModuleDict, flights: Tensor, asked: list[Asked]) -> Tensor:
        """Masks (R, T, H, W) bool of R questions about flights (V, T, H, W)."""
        found = nets["average"](flights[:, None]).argmax(1)
        return torch.stack([found[one.flight] == one.value for one in asked])
