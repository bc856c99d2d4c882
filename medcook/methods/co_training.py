"""Cross pseudo supervision: two networks from different random starts teach each other."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from medcook.losses import find_loss
from medcook.methods.method import Batch, Moment
from medcook.methods.semi_supervised import SemiSupervised, forgetful
from medcook.networks import build_network


@dataclass
class CrossPseudoSupervision(SemiSupervised):
    """Chen et al., CVPR 2021: the hard label of one network is the target of the other, both ways.

    They do so on unlabelled images; the official code has them do it on labelled ones too. The first network's moving
    average predicts, so that two networks are not counted as an ensemble.
    """

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        """As always, and `second`: the same architecture from another random start."""
        nets = super().build(inputs, classes, dims)
        nets["second"] = build_network(self.network, inputs=inputs, classes=classes, channels=self.channels, dims=dims)
        return nets

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        """Both networks learn the labels, and each learns what the other says of the unlabelled images (eq. 1 to 3)."""
        first, second, loss = nets["model"], nets["second"], find_loss(self.loss)
        supervised = sum(loss(net(labelled.images).float(), labelled.labels) for net in (first, second))
        if unlabelled is None or now.fraction < self.start:
            return supervised
        with forgetful(first), forgetful(second):
            views = (self.view(unlabelled.images), self.view(unlabelled.images))
            answers = (net(view).float() for net, view in zip((first, second), views, strict=True))
            return supervised + self.rising(now) * cross_supervision(*answers)

    def view(self, images: Tensor) -> Tensor:
        """Both networks see the images as they are: what differs is where they started."""
        return images


def cross_supervision(first: Tensor, second: Tensor) -> Tensor:
    """Cross-entropy of each network's logits (B, classes, *size) against the other's hard labels (eq. 2)."""
    return F.cross_entropy(first, second.argmax(1)) + F.cross_entropy(second, first.argmax(1))
