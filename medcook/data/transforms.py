"""Augmentation of a whole batch at once: one grid_sample moves images and labels together."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Augment:
    """Random affine maps and intensity changes, drawn anew for every image of a batch.

    rotate  degrees, about each axis, on a square or cubic window (on another one it shears a little)
    scale, gamma  half-widths of a log-uniform factor
    shift   fraction of the half image; `flip` mirrors the last axis with probability 1/2
    contrast, brightness, noise  in units of the image's standard deviation (images are z-scored)
    """

    rotate: float = 30.0
    scale: float = 0.25
    shift: float = 0.15
    gamma: float = 0.4
    contrast: float = 0.35
    brightness: float = 0.3
    noise: float = 0.15
    flip: bool = False

    def __call__(self, images: Tensor, labels: Tensor | None, rng: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """images (B, C, *size) float32, labels (B, *size) uint8 or None; both come back in the same shape."""
        images, labels = warp(images, labels, self.grid(images, rng))
        return self.intensity(images, rng), labels

    def grid(self, images: Tensor, rng: torch.Generator) -> Tensor:
        """(B, *size, dims) where each output voxel looks in the input, -1 to 1, last axis first (see grid_sample)."""
        matrix = self.affine(len(images), images.ndim - 2, rng)
        return F.affine_grid(matrix, list(images.shape), align_corners=False).to(images.device)

    def affine(self, batch: int, dims: int, rng: torch.Generator) -> Tensor:
        """(batch, dims, dims + 1) random maps from output to input coordinates."""
        matrix = torch.eye(dims).expand(batch, dims, dims).clone()
        for first, second in [(0, 1)] if dims == 2 else [(0, 1), (0, 2), (1, 2)]:
            matrix = matrix @ _rotation(_uniform(batch, self.rotate, rng) * math.pi / 180, dims, first, second)
        matrix = matrix * torch.exp(_uniform(batch, self.scale, rng)).view(-1, 1, 1)
        if self.flip:
            mirror = torch.randint(0, 2, (batch, 1), generator=rng) * 2.0 - 1
            matrix[:, :, 0] = matrix[:, :, 0] * mirror
        shift = torch.stack([_uniform(batch, self.shift, rng) for _ in range(dims)], dim=1)
        return torch.cat([matrix, shift[:, :, None]], dim=2)

    def intensity(self, images: Tensor, rng: torch.Generator) -> Tensor:
        """Contrast, brightness, gamma and noise; each image its own."""
        per_image = (-1, *[1] * (images.ndim - 1))
        draw = lambda width: _uniform(len(images), width, rng).view(per_image).to(images.device)  # noqa: E731
        images = images * torch.exp(draw(self.contrast)) + draw(self.brightness)
        low, high = images.flatten(1).aminmax(dim=1)
        low, span = low.view(per_image), (high - low).view(per_image) + 1e-5
        images = ((images - low) / span).pow(torch.exp(draw(self.gamma))) * span + low
        level = torch.rand(len(images), generator=rng).view(per_image).to(images.device) * self.noise
        return images + torch.randn(images.shape, generator=rng).to(images.device) * level


def warp(images: Tensor, labels: Tensor | None, grid: Tensor) -> tuple[Tensor, Tensor | None]:
    """Images and labels on a grid of `Augment.grid`; what lies outside repeats the border, and has label 0."""
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    if labels is not None:
        labels = F.grid_sample(labels[:, None].float(), grid, mode="nearest", align_corners=False)[:, 0]
        labels = labels.to(torch.uint8)
    return moved, labels


def _uniform(count: int, half_width: float, rng: torch.Generator) -> Tensor:
    return (torch.rand(count, generator=rng) * 2 - 1) * half_width


def _rotation(angles: Tensor, dims: int, first: int, second: int) -> Tensor:
    """(B, dims, dims) rotations by `angles` (radians) in the plane of two axes."""
    matrix = torch.eye(dims).expand(len(angles), dims, dims).clone()
    matrix[:, first, first] = matrix[:, second, second] = torch.cos(angles)
    matrix[:, first, second], matrix[:, second, first] = -torch.sin(angles), torch.sin(angles)
    return matrix


NONE = Augment(rotate=0, scale=0, shift=0, gamma=0, contrast=0, brightness=0, noise=0)
"""Leaves everything as it is."""
