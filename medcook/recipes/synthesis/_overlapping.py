"""X-rays from CT on which the structures are known, one mask each: they lie behind each other, so masks overlap."""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from medcook.data import IGNORE, Case
from medcook.methods import Batch
from medcook.preparation import Preparation, sampled
from medcook.projections import ProjectionPreparation, ProjectionTask, attenuation, plane, turned
from medcook.tasks import Samples, Task

THICK = 2.0
"""Millimetres of a structure on a ray from which on the pixel is its."""


@dataclass(frozen=True)
class OverlappingPreparation(ProjectionPreparation):
    """X-rays with bones, and the structures `values` of a volume on the same rays."""

    values: tuple[int, ...] = ()

    def images(self, case: Case) -> Tensor:
        """(N, 1, H, W), mean 0 and variance 1."""
        return super().images(case)[:, :1]

    def shadows(self, case: Case) -> tuple[Tensor, Tensor]:
        """Millimetres of each structure on each ray, and how many voxels from the front the middle of these lies;
        (N, K, H, W) each, on the pixels of `medcook.projections.plane`."""
        mu, _ = attenuation(case, self.beam)
        pixels, length = plane(mu, case.spacing, self.beam, self.size), case.spacing[self.beam.axes[2]]
        label = torch.from_numpy(case.label).permute(self.beam.axes)
        solid = torch.stack([(label == value).float() for value in self.values]).flatten(0, 1)
        filled = solid.flatten(1).any(1).index_fill(0, torch.tensor([0]), True)  # other slices stay empty when turned
        depth = torch.arange(mu.shape[2]).float()
        sums = torch.zeros(len(self.angles), 2, *solid.shape[:2])
        for sum_, angle in zip(sums, self.angles, strict=True):
            part = turned(solid[filled], angle)
            sum_[0, filled], sum_[1, filled] = part.sum(2), part @ depth
        stack = sums.unflatten(2, (len(self.values), -1)).flatten(0, 1)
        voxels, moment = sampled(stack, pixels, "bilinear", "zeros").unflatten(0, (-1, 2)).unbind(1)
        return voxels * length, moment / voxels.clamp_min(1e-6)

    def masks(self, case: Case) -> Tensor:
        """(N, K, H, W) uint8: 1 where the ray passes a structure; `IGNORE` of structures that nobody drew."""
        masks = (self.shadows(case)[0] > THICK).to(torch.uint8)
        drawn = case.attributes.get("annotated", self.values)
        masks[:, [value not in drawn for value in self.values]] = IGNORE
        return masks

    def labels(self, case: Case, values=None) -> Tensor:
        """(N, H, W) uint8, one label a pixel: the structure that lies in front."""
        millimetres, depth = self.shadows(case)
        front = depth.masked_fill(millimetres <= THICK, torch.inf).min(1)
        return torch.where(front.values.isinf(), 0, torch.tensor(self.values)[front.indices]).to(torch.uint8)


@dataclass(frozen=True)
class OverlappingTask(ProjectionTask):
    """Images (B, 1, H, W), one label a pixel (B, H, W), and as raters the masks (B, K, H, W) of all structures."""

    classes, structures = Task.classes, Task.structures

    @cached_property
    def preparation(self) -> Preparation:
        plain = super().preparation
        return OverlappingPreparation(plain.size, beam=plain.beam, angles=self.angles, values=tuple(self.structures))

    def samples(self, role: str) -> Samples:
        samples = super().samples(role)
        if role != "unlabelled":
            samples.raters = torch.cat([self.preparation.masks(case) for case in self.cases(role)])
        return samples


def masks_of(batch: Batch, classes: int) -> tuple[Tensor, Tensor]:
    """Masks (B, K, H, W) float of a batch, and which of them were drawn (B, K) bool; without raters, of its labels."""
    if batch.raters is None:
        masks = F.one_hot(batch.labels.long().clamp_max(classes), classes + 1)[..., 1:classes].movedim(-1, 1)
        return masks.float(), torch.ones(masks.shape[:2], dtype=torch.bool, device=masks.device)
    return (batch.raters == 1).float(), ~(batch.raters == IGNORE).flatten(2).any(2)
