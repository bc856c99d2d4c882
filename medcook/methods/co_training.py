"""Cross pseudo supervision: two networks from different random starts teach each other."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.losses import find_loss
from medcook.methods.method import Batch, Moment
from medcook.methods.semi_supervised import SemiSupervised
from medcook.networks import build_network


@dataclass
class CrossPseudoSupervision(SemiSupervised):
    """Chen et al., CVPR 2021: the hard label of one network is the target of the other, both ways.

    The first network's moving average predicts, so that two networks are not counted as an ensemble.
    """

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        """As always, and `second`: the same architecture from another random start."""
        nets = super().build(inputs, classes, dims)
        nets["second"] = build_network(self.network, inputs=inputs, classes=classes, channels=self.channels, dims=dims)
        return nets

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        """Both networks learn the labels, and each learns what the other says of the unlabelled images (eq. 1 to 3)."""
        if now.fraction < self.start:
            unlabelled = None
        count = len(labelled.images)
        images = labelled.images if unlabelled is None else torch.cat([labelled.images, unlabelled.images])
        first, second = (nets[name](images).float() for name in ("model", "second"))
        loss = find_loss(self.loss)
        supervised = loss(first[:count], labelled.labels) + loss(second[:count], labelled.labels)
        if unlabelled is None:
            return supervised
        return supervised + self.rising(now) * cross_supervision(first[count:], second[count:])


def cross_supervision(first: Tensor, second: Tensor) -> Tensor:
    """Cross-entropy of each network's logits (B, classes, *size) against the other's hard labels (eq. 2)."""
    return F.cross_entropy(first, second.argmax(1)) + F.cross_entropy(second, first.argmax(1))
