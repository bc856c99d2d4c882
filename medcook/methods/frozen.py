"""A pre-trained network that stays as it is; one linear layer on its features learns."""

from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.errors import MedcookError
from medcook.methods.classification import image_labels
from medcook.methods.method import Batch, Method, Moment
from medcook.networks.squeezenet import FEATURES, load_squeezenet

PHOTOGRAPH = 58.0
"""About the standard deviation of photographs on the scale from 0 to 255, which networks of ImageNet are used to."""


@dataclass
class FrozenImageNet(Method):
    """SqueezeNet as ImageNet left it; a linear layer on the mean of its last features learns each image's label."""

    rate: float = 1e-2

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        if dims != 2:
            raise MedcookError("SqueezeNet sees images, not volumes.", "Take a data set that is prepared as slices.")
        head = nn.Sequential(nn.BatchNorm1d(FEATURES, affine=False), nn.Linear(FEATURES, classes))
        frozen = load_squeezenet().requires_grad_(False)
        return nn.ModuleDict({"encoder": frozen, "model": head, "average": deepcopy(head).requires_grad_(False)})

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        logits = nets["model"](self.embed(nets, labelled.images)).float()
        return F.cross_entropy(logits, image_labels(labelled.labels, logits.shape[1]))

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """Class probabilities (B, classes, *size), constant over each image."""
        found = nets["average"](self.embed(nets, images)).float().softmax(1)
        return found[:, :, None, None].expand(*found.shape, *images.shape[2:])

    @torch.no_grad()
    def embed(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """(B, 512) of z-scored grey images (B, C, H, W): the first channel, three times, as bright as a photograph."""
        return nets["encoder"].features(PHOTOGRAPH * images[:, :1].expand(-1, 3, -1, -1)).mean((2, 3))
