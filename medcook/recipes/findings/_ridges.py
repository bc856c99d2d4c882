"""Bright and dark lines in images, by the curvature of their brightness; sizes scale with the image."""

import torch
import torch.nn.functional as F
from torch import Tensor

SIGMAS = (1.0, 1.5)
"""Half-widths of ridges in pixels, of an image of 96 rows."""


def kernels(sigma: float) -> list[Tensor]:
    """A Gaussian and its first two derivatives, (size,) each; of what is constant both derivatives are zero."""
    reach = int(4 * sigma + 0.5)
    places = torch.arange(-reach, reach + 1, dtype=torch.float32)
    bell = torch.exp(-(places**2) / (2 * sigma**2))
    bell = bell / bell.sum()
    second = (places**2 / sigma**4 - 1 / sigma**2) * bell
    return [bell, -places / sigma**2 * bell, second - second.sum() * bell]


def filtered(images: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """Images (B, H, W) through one kernel along columns and one along rows; borders repeat."""
    reach = len(down) // 2
    padded = F.pad(images[:, None], [reach] * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, down.flip(0).view(1, 1, -1, 1)), across.flip(0).view(1, 1, 1, -1))[:, 0]


def ridges(images: Tensor, bright: bool) -> Tensor:
    """(B, H, W), how much each pixel of images (B, H, W) lies on a bright, or dark, line (Sato et al., 1998).

    The larger curvature across the line, from the eigenvalues of the Hessian, times sigma squared; the best sigma.
    """
    sign, scale, best = -1.0 if bright else 1.0, images.shape[1] / 96, torch.zeros_like(images)
    for sigma in SIGMAS:
        bell, first, second = kernels(sigma * scale)
        yy, xx, xy = (filtered(images, *pair) for pair in ((second, bell), (bell, second), (first, first)))
        mean, half = sign * (yy + xx) / 2, torch.sqrt((yy - xx) ** 2 / 4 + xy**2)
        best = torch.maximum(best, (sigma * scale) ** 2 * (mean + half))
    return best


def without(images: Tensor, covered: Tensor) -> Tensor:
    """Images (B, H, W) in which what is covered (B, H, W) bool is as bright as what is around it."""
    bell, known = kernels(3.0 * images.shape[1] / 96)[0], (~covered).float()
    around = filtered(images * known, bell, bell) / filtered(known, bell, bell).clamp_min(1e-6)
    return torch.where(covered, around, images)
