"""What recipes share that learn from X-rays and their reports first, and then tell an outcome from few labels."""

from dataclasses import dataclass, field
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from medcook.cohorts import outcome_rows
from medcook.data.transforms import Augment
from medcook.errors import MedcookError
from medcook.language import TextEncoder
from medcook.methods import Batch, Moment
from medcook.methods.classification import image_labels
from medcook.methods.contrastive import matched, numbered
from medcook.methods.frozen import PHOTOGRAPH
from medcook.networks.encoder import Encoder
from medcook.networks.squeezenet import FEATURES, load_squeezenet
from medcook.pretraining import FromScratch, OptionalPretext, Projector
from medcook.recipes.language._reports import ReportTask, said
from medcook.recipes.recipe import Scale
from medcook.tasks import Budget

Start = Literal["imagenet", "random"]

AUGMENT = Augment(rotate=10, scale=0.1, shift=0.05, gamma=0.2, contrast=0.2, brightness=0.2, noise=0.05)
"""Right and left stay what reports call them: nothing is mirrored."""

XRAYS = ReportTask("chest_xray", evaluation="test")
BRAINS = ReportTask("embedded", outcome="group", positive="atrophy", fold=0)
FEW = 36
"""Patients with a label: a tenth of the training patients who have a report."""
BUDGET = Budget(steps=360, batch=12, checks=0)
"""Half of the steps read reports."""


class Reader(nn.Module):
    """An image encoder and a linear head: images (B, C, H, W) to logits (B, classes).

    start  `imagenet`: SqueezeNet with what photographs taught it; `random`: a small encoder that knows nothing
    """

    def __init__(self, start: Start, inputs: int, classes: int, channels: tuple[int, ...]):
        super().__init__()
        self.start = start
        self.encoder = load_squeezenet() if start == "imagenet" else Encoder(inputs=inputs, channels=channels)
        self.width = FEATURES if start == "imagenet" else channels[-1]
        self.head = nn.Linear(self.width, classes)

    def maps(self, images: Tensor) -> Tensor:
        """Feature maps (B, width, h, w) of z-scored images."""
        if self.start == "imagenet":
            return self.encoder.features(PHOTOGRAPH * images[:, :1].expand(-1, 3, -1, -1))
        return self.encoder.maps(images)

    def features(self, images: Tensor) -> Tensor:
        """(B, width) float32: the mean over the maps."""
        return self.maps(images).flatten(2).float().mean(2)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


@dataclass
class ReportPretrained(OptionalPretext):
    """Reports first, then an outcome. A subclass says what is learnt from `batch` images and their reports (`reading`).

    start  what the image encoder knows before;   width  of the space in which images and texts meet
    """

    channels: tuple[int, ...] = (16, 32, 64, 128)
    rate: float = 5e-4
    pretext_rate: float = 5e-4
    augmentation: Augment = field(default_factory=lambda: AUGMENT)
    start: Start = "imagenet"
    width: int = 64

    axes = 2
    trial = BRAINS

    def model(self, inputs: int, classes: int, dims: int) -> Reader:
        if dims != 2:
            raise MedcookError("These encoders see images, not volumes.", "Take a task of slices.")
        return Reader(self.start, inputs, classes, self.channels)

    def pretext_parts(self, model: nn.Module, inputs: int, dims: int) -> nn.Module:
        """A text encoder, and what brings images and texts into one space."""
        parts = {
            "text": TextEncoder(self.width),
            "see": Projector(model.width, model.width, self.width),
            "hear": Projector(self.width, self.width, self.width),
        }
        return nn.ModuleDict(parts)

    def reading(self, nets: nn.ModuleDict, images: Tensor, reports: tuple[str, ...], now: Moment) -> Tensor:
        """The loss of images (B, C, H, W), augmented, and their reports."""
        raise NotImplementedError

    def pretext(self, nets: nn.ModuleDict, images: Batch, now: Moment) -> Tensor:
        """Without reports at hand (a task that hands out none) there is nothing to read."""
        if images.groups is None:
            return 0.0 * nets["model"](images.images).float().sum()
        return self.reading(nets, self.view(images.images), said(images.groups), now)

    def supervised(self, nets: nn.ModuleDict, labelled: Batch, now: Moment) -> Tensor:
        logits = nets["model"](labelled.images).float()
        return F.cross_entropy(logits, image_labels(labelled.labels, logits.shape[1]))

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """Class probabilities (B, classes, H, W), constant over each image."""
        found = nets["average"](images).float().softmax(1)
        return found[:, :, None, None].expand(*found.shape, *images.shape[2:])


@dataclass
class Unread(ReportPretrained):
    """No reports are read: the network waits for the labels, and starts from what it knew before."""

    waits: bool = True


def pairs(images: Tensor, texts: Tensor, reports: tuple[str, ...], heat: float = 0.1, image_weight: float = 0.5):
    """The two-way contrastive loss of images and texts (B, D) each, row b of one belongs to row b of the other.

    Cross-entropy over the batch's texts for each image, weighted by `image_weight`, and over its images for each text,
    by the rest (ConVIRT, equations 2 to 4). Images with the very same report share their probability: none of them is
    the others' negative, as half of these reports are "normal".
    """
    similarity = F.normalize(images.float(), dim=1) @ F.normalize(texts.float(), dim=1).T / heat
    return matched(similarity, numbered(reports).to(similarity.device), image_weight)


def scales(*arms: str, full: ReportTask = XRAYS, quick_arms: tuple[str, ...] | None = None) -> dict[str, Scale]:
    """{profile: Scale}; `full` has three replicates, and runs these arms alone if any are named.

    quick_arms  those that start from random weights: ImageNet's need the network
    """
    little = Budget(steps=30, batch=6, precision="float32", checks=0)
    return {
        "quick": Scale(BRAINS, little, replicates=1, arms=quick_arms),
        "full": Scale(full, BUDGET, arms=arms or None),
    }


__all__ = ["AUGMENT", "BRAINS", "BUDGET", "FEW", "XRAYS", "FromScratch", "Reader", "ReportPretrained", "Start"]
__all__ += ["Unread", "outcome_rows", "pairs", "scales"]
