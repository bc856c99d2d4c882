"""A classifier as a Method: its probabilities are the same all over the image, so the one loop can train it."""

from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.data.case import IGNORE
from medcook.methods.method import Batch, Method, Moment
from medcook.networks.encoder import Encoder


@dataclass
class Classifier(Method):
    """A convolutional encoder, mean over the image, one linear layer; learns the commonest label of each image.

    dropout  share of the pooled features that is dropped in training
    """

    channels: tuple[int, ...] = (16, 32, 64, 128)
    rate: float = 2e-3
    loss: str = "cross-entropy"
    dropout: float = 0.2

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        model = nn.Sequential(
            Encoder(inputs=inputs, channels=self.channels, dims=dims),
            nn.Dropout(self.dropout),
            nn.Linear(self.channels[-1], classes),
        )
        return nn.ModuleDict({"model": model, "average": deepcopy(model).requires_grad_(False)})

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        logits = nets["model"](labelled.images).float()
        return F.cross_entropy(logits, image_labels(labelled.labels, logits.shape[1]))

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """Class probabilities (B, classes, *size), constant over each image."""
        found = nets["average"](images).float().softmax(1)
        return found.view(*found.shape, *[1] * (images.ndim - 2)).expand(*found.shape, *images.shape[2:])


def image_labels(labels: Tensor, classes: int) -> Tensor:
    """(B,) int64: the commonest label of each image (B, *size), unlabelled voxels left out.

    An outcome fills the image, but augmentation moves background (0) in at the border: any other label that covers
    a tenth of the image wins over it.
    """
    flat = labels.flatten(1).long()
    counts = torch.stack([(flat == value).sum(1) for value in range(classes)], dim=1)
    known = (flat != IGNORE).sum(1)
    best = counts[:, 1:].argmax(1) + 1
    enough = counts[:, 1:].amax(1) * 10 >= known
    return torch.where(enough & (known > 0), best, 0)
