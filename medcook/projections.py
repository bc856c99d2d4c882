"""X-rays of which the truth is known: CT volumes, projected with their bones and without (chapter 15).

A ray loses intensity by the attenuation mu = 1 + HU / 1000 (of water, never below 0) that it passes:

    p = sum of mu along the ray, times the length of a voxel            x = 1 - exp(-p / 15 cm), so that dense is bright

Without bones every voxel above `hard` counts as soft tissue; with them it stands out more than in CT. The anatomy is
real, the rays are simulated: parallel, of one energy, without scatter. What a dual-energy machine measures in two
exposures is known exactly here.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from monai.metrics.regression import SSIMMetric
from torch import Tensor, nn

from medcook import evaluation
from medcook.data import Case
from medcook.data.transforms import Augment, warp
from medcook.errors import MedcookError
from medcook.methods.method import Batch, Method
from medcook.precision import autocast
from medcook.preparation import Preparation, sampled
from medcook.sampling import trained
from medcook.tasks import Task

SOFT = 1.05
"""Attenuation of soft tissue, relative to water."""
DEPTH = 150.0
"""Millimetres of water that leave 1 / e of the intensity."""
EXCESS = 1.7
"""How much more bone stands out from soft tissue at 50 keV, an X-ray machine's energy, than at a CT's 70 keV; with
NIST's coefficients of cortical bone and water (3.6 - 1) / (2.5 - 1)."""
BONE = 5.0
"""Millimetres of bone from which on a pixel's label says so."""


@dataclass(frozen=True)
class Beam:
    """How volumes of a data set are projected.

    axes   of the volume: along the body (head first), across it, and along the ray
    pixel  millimetres of a pixel of the X-ray
    hard   Hounsfield units above which a voxel is bone; None: no CT, and label `bone` is what is taken away
    """

    axes: tuple[int, int, int]
    pixel: float = 3.0
    hard: float | None = 200.0
    bone: int = 0


BEAMS = {"openkbp": Beam((2, 1, 0)), "embedded": Beam((0, 2, 1), hard=None, bone=3)}
"""By data set. The embedded brains lose their ventricles: it shows that code runs, and no more."""


class Views(NamedTuple):
    """X-rays (N, H, W) float32 of a volume: as taken, without bones, and millimetres of bone on each ray."""

    xray: Tensor
    soft: Tensor
    bone: Tensor

    def units(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the X-rays as taken."""
        return self.xray.mean(), self.xray.std().clamp_min(1e-6)


def attenuation(case: Case, beam: Beam) -> tuple[Tensor, Tensor]:
    """(along the body, across, along the ray): float32 relative to water, and 1 where there is bone, else 0."""
    image = torch.from_numpy(case.image[0]).float()
    if beam.hard is None:
        mu = (image - image.min()) / (image.max() - image.min()).clamp_min(1e-6)
        bone = torch.from_numpy(case.label) == beam.bone
    else:
        mu, bone = (1 + image / 1000).clamp_min(0), image > beam.hard
    return mu.permute(beam.axes), bone.float().permute(beam.axes)


def turned(volume: Tensor, degrees: float) -> Tensor:
    """A volume (body, across, along) turned about its long axis; nothing comes in from outside."""
    angle = torch.tensor(degrees).deg2rad()
    matrix = torch.tensor([[angle.cos(), -angle.sin(), 0.0], [angle.sin(), angle.cos(), 0.0]])
    grid = F.affine_grid(matrix[None], [1, 1, *volume.shape[1:]], align_corners=False)
    return F.grid_sample(volume[None], grid, align_corners=False)[0]


def plane(mu: Tensor, spacing: tuple[float, ...], beam: Beam, size: tuple[int, int]) -> list[Tensor]:
    """Where the X-ray's rows and columns lie among the voxels of a volume (body, across, along the ray): two vectors.

    The first row is the first slice with a body in it; the columns are around the middle.
    """
    along, across, _ = (spacing[axis] for axis in beam.axes)
    there = (mu > 0.5).float().flatten(1).mean(1) > 0.01
    top = float(there.int().argmax()) if there.any() else 0.0
    middle, half = (mu.shape[1] - 1) / 2, (size[1] - 1) / 2
    rows, columns = torch.arange(size[0]), torch.arange(size[1]) - half
    return [top + rows * beam.pixel / along, middle + columns * beam.pixel / across]


def views(case: Case, beam: Beam, angles: tuple[float, ...], size: tuple[int, int]) -> Views:
    """The X-rays of a volume from several sides, on the pixels of `plane`."""
    mu, bone = attenuation(case, beam)
    pixels, length = plane(mu, case.spacing, beam, size), case.spacing[beam.axes[2]]
    soft = mu.clamp(max=SOFT) if beam.hard is not None else torch.zeros_like(mu)
    soft = torch.where(bone > 0, soft, mu)
    mu = soft + EXCESS * (mu - soft)
    stack = torch.stack([turned(part, angle).sum(2) for angle in angles for part in (mu, soft, bone)]) * length
    seen = sampled(stack[:, None], pixels, "bilinear", "zeros")[:, 0].unflatten(0, (-1, 3)).unbind(1)
    return Views(1 - torch.exp(-seen[0] / DEPTH), 1 - torch.exp(-seen[1] / DEPTH), seen[2])


@dataclass(frozen=True)
class ProjectionPreparation(Preparation):
    """A volume becomes X-rays, one for each of `angles` (degrees about the long axis)."""

    beam: Beam = BEAMS["openkbp"]
    angles: tuple[float, ...] = (0.0,)

    def views(self, case: Case) -> Views:
        return views(case, self.beam, self.angles, self.size)

    def images(self, case: Case) -> Tensor:
        """(N, 2, H, W): with and without bones, both in units of the first: its mean is 0 and its variance 1."""
        found = self.views(case)
        mean, spread = found.units()
        return (torch.stack([found.xray, found.soft], dim=1) - mean) / spread

    def labels(self, case: Case, values=None) -> Tensor:
        """(N, H, W) uint8: 1 where the ray passes bone. There are no other values."""
        return (self.views(case).bone > BONE).to(torch.uint8)

    def restore(self, probabilities: Tensor, case: Case) -> Tensor:
        raise MedcookError(
            f"{case.case_id}: an X-ray's pixels do not say where in the volume they are.", "Score X-rays."
        )


@dataclass(frozen=True)
class ProjectionTask(Task):
    """X-rays of a data set of volumes: images (B, 2, H, W) with and without bones, labels where there is bone."""

    angles: tuple[float, ...] = (-40.0, -30.0, -20.0, -10.0, 0.0, 10.0, 20.0, 30.0, 40.0)
    side: int = 64

    data_kind = "real-anatomy-simulated"

    @cached_property
    def preparation(self) -> Preparation:
        if self.dataset not in BEAMS:
            raise MedcookError(f"It is not known how {self.dataset} is projected.", f"Known: {', '.join(BEAMS)}.")
        return ProjectionPreparation((self.side, self.side), beam=BEAMS[self.dataset], angles=self.angles)

    @property
    def classes(self) -> int:
        return 2

    @property
    def structures(self) -> dict[int, str]:
        return {1: "bone"}


@dataclass
class Suppression(Method):
    """Takes the bones off X-rays. A subclass trains on (B, 2, H, W) images, and says how to `suppress`.

    The truth, the second channel, is cut off before anything is predicted. An X-ray alone is its own truth.
    """

    augmentation: Augment = Augment(rotate=10, scale=0.1, shift=0.1, flip=True)

    axes = 2
    trial = ProjectionTask("embedded", labelled=2)

    def augment(self, batch: Batch, rng: torch.Generator) -> Batch:
        """Both X-rays move in the same way; their brightness is what is to be learnt."""
        images, labels = warp(batch.images, batch.labels, self.augmentation.grid(batch.images, rng))
        return batch._replace(images=images, labels=labels)

    def pair(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """X-rays with and without bones, (B, 1, H, W) each."""
        return images[:, :1], images[:, -1:]

    def suppress(self, nets: nn.ModuleDict, xrays: Tensor) -> Tensor:
        """(B, 1, H, W) X-rays to the same without bones; deterministic."""
        raise NotImplementedError

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """Where bones were: (B, 2, H, W) probabilities, one half where a tenth of the X-ray's deviation was taken."""
        xrays = images[:, :1]
        taken = xrays.float() - self.suppress(nets, xrays).float()
        bone = torch.sigmoid(20 * (taken - 0.1))
        return torch.cat([1 - bone, bone], dim=1)


@torch.no_grad()
def suppression_rows(fitted, case: Case) -> list[dict]:
    """One row a patient, means over the views, of X-rays between 0 and 1.

    psnr         10 log10 (1 / mean squared error), decibels
    ssim         structural similarity in a Gaussian window of 11 pixels (Wang et al. 2004; MONAI)
    suppression  1 - |truth - predicted|^2 / |truth - X-ray|^2: 1 is perfect, 0 is the X-ray itself
    detail       the same of the gradients: what is left of texture
    dice         of where bones were taken and where there are any
    """
    method, raw = fitted.method, fitted.task.preparation.views(case)
    mean, spread = raw.units()
    trained(fitted)
    with autocast(fitted.cost):
        given = method.suppress(fitted.nets, (raw.xray[:, None] - mean) / spread).float()
    given = (given * spread + mean).clamp(0, 1)
    values = compared(given, raw.soft[:, None], raw.xray[:, None])
    return [evaluation.row(case, "soft tissue", **values, dice=overlap(raw.xray[:, None] - given, raw, spread))]


def compared(given: Tensor, truth: Tensor, xray: Tensor) -> dict[str, float]:
    """The measures of `suppression_rows` of images (N, 1, H, W) between 0 and 1."""
    error = (given - truth).square().flatten(1).mean(1)
    similar = SSIMMetric(2, data_range=1.0)(given, truth)
    kept = 1 - error / (xray - truth).square().flatten(1).mean(1).clamp_min(1e-9)
    edges = [
        torch.cat([image.diff(dim=2).flatten(1), image.diff(dim=3).flatten(1)], 1) for image in (given, truth, xray)
    ]
    detail = 1 - (edges[0] - edges[1]).square().sum(1) / (edges[2] - edges[1]).square().sum(1).clamp_min(1e-9)
    psnr = -10 * error.clamp_min(1e-10).log10()
    named = {"psnr": psnr, "ssim": similar, "suppression": kept, "detail": detail}
    return {name: float(value.mean()) for name, value in named.items()}


def overlap(taken: Tensor, raw: Views, spread: Tensor) -> float:
    """Dice, over all views, of pixels from which more than a tenth of a deviation was taken and those on bone."""
    found, truth = taken[:, 0] > 0.1 * spread, raw.bone > BONE
    size = int(found.sum() + truth.sum())
    return 2 * int((found & truth).sum()) / size if size else 1.0
