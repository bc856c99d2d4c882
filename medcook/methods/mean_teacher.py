"""Mean teacher and its uncertainty-aware variant: the student agrees with its own moving average."""

import contextlib
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.methods.method import Batch, Moment
from medcook.methods.semi_supervised import SemiSupervised, noisy, ramp_up


@dataclass
class MeanTeacher(SemiSupervised):
    """Tarvainen and Valpola, NeurIPS 2017: the moving average of the student teaches it on unlabelled images.

    The teacher is the network that predicts in every method of the book; what is new is that it also teaches.
    """

    def unsupervised(self, nets: nn.ModuleDict, logits: Tensor, unlabelled: Batch, now: Moment) -> Tensor:
        """Squared difference of the two probability maps, each of its own noisy view."""
        return squared_difference(logits, self.teach(nets, unlabelled.images)).mean()

    @torch.no_grad()
    def teach(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """The teacher's probabilities (B, classes, *size) of a noisy view."""
        return nets["average"](noisy(images)).float().softmax(1)


@dataclass
class UncertaintyAwareMeanTeacher(MeanTeacher):
    """Yu et al., MICCAI 2019: only where the teacher is sure does the student follow.

    votes    stochastic passes of the teacher (the paper: 8); `dropout` acts on its deepest features, in the votes alone
             (the paper: in all passes)
    The entropy of their mean must lie below a threshold that rises from 3/4 of its maximum to the maximum (eq. 3).
    """

    votes: int = 4
    dropout: float = 0.5

    def unsupervised(self, nets: nn.ModuleDict, logits: Tensor, unlabelled: Batch, now: Moment) -> Tensor:
        """Mean squared difference over the voxels on which the teacher's votes agree (eq. 4)."""
        mean, entropy = self.vote(nets, unlabelled.images)
        limit = (0.75 + 0.25 * ramp_up(now.fraction - self.start, 1 - self.start)) * math.log(mean.shape[1])
        sure = (entropy < limit)[:, None].float()
        difference = squared_difference(logits, self.teach(nets, unlabelled.images))
        return (sure * difference).sum() / (sure.sum() * logits.shape[1]).clamp_min(1)

    @torch.no_grad()
    def vote(self, nets: nn.ModuleDict, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean probabilities (B, classes, *size) of the votes, and their entropy (B, *size) in nats."""
        with dropout(nets["average"], self.dropout):
            mean = torch.stack([self.teach(nets, images) for _ in range(self.votes)]).mean(0)
        return mean, -(mean * mean.clamp_min(1e-6).log()).sum(1)


def squared_difference(logits: Tensor, target: Tensor) -> Tensor:
    """(softmax of the logits - target) squared, voxel by voxel: (B, classes, *size)."""
    return (logits.softmax(1) - target).square()


@contextlib.contextmanager
def dropout(unet: nn.Module, rate: float):
    """Inside the block, whole feature maps of the deepest level of a `UNet` are dropped at `rate`."""
    drop = F.dropout2d if unet.mode == "bilinear" else F.dropout3d
    handle = unet.down[-1].register_forward_hook(lambda module, inputs, output: drop(output, rate, training=True))
    try:
        yield
    finally:
        handle.remove()
