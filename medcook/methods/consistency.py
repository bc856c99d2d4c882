"""Weak-to-strong consistency: what is said surely of a weak view must be said of a strong one."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.methods.method import Batch, Moment
from medcook.methods.semi_supervised import SemiSupervised, strong


@dataclass
class FixMatch(SemiSupervised):
    """Sohn et al., NeurIPS 2020, for every voxel: confident pseudo-labels of the weak view teach the strong view.

    threshold  a voxel teaches where its largest probability reaches this
    """

    threshold: float = 0.95

    def view(self, images: Tensor) -> Tensor:
        return strong(images)

    def unsupervised(self, nets: nn.ModuleDict, logits: Tensor, unlabelled: Batch, now: Moment) -> Tensor:
        """Cross-entropy against the confident pseudo-labels, a mean over all voxels (eq. 4)."""
        with torch.no_grad():
            confidence, pseudo = nets["model"](unlabelled.images).float().softmax(1).max(1)
        return (F.cross_entropy(logits, pseudo, reduction="none") * (confidence >= self.threshold)).mean()
