"""Level sets: contours as the zeros of a function, what lies inside and outside, and differences on the grid."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from medcook.errors import MedcookError

STARTS = {
    "middle": [(0.0, 0.0, 0.5)],
    "small": [(0.0, 0.0, 0.2)],
    "large": [(0.0, 0.0, 0.9)],
    "corner": [(-0.5, -0.5, 0.3)],
    "many": [(y / 2, x / 2, 0.15) for y in (-1, 0, 1) for x in (-1, 0, 1)],
}
"""Initial contours: discs (y, x, radius) in half images."""
TINY = 1e-6


def initial(start: str, size: tuple[int, int], height: float = 2.0) -> Tensor:
    """A level set (*size) that is `height` inside an initial contour and -height outside."""
    if start not in STARTS:
        raise MedcookError(f"Unknown initial contour {start!r}.", f"Known: {', '.join(STARTS)}.")
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, side) for side in size), indexing="ij")
    inside = [(y - v).square() + (x - u).square() < radius**2 for v, u, radius in STARTS[start]]
    return height * (2 * torch.stack(inside).any(0).float() - 1)


def step_up(f: Tensor, width: float) -> Tensor:
    """H: 0 far outside, 1/2 on the contour, 1 far inside."""
    return 0.5 + torch.atan(f / width) / torch.pi


def impulse(f: Tensor, width: float) -> Tensor:
    """d, the derivative of H: largest on the contour, and nowhere 0, so that new contours can appear anywhere."""
    return width / torch.pi / (width**2 + f.square())


@lru_cache(maxsize=32)
def gaussian(side: int, sigma: float) -> Tensor:
    """(side, side): a Gaussian, cut off at 2 sigma, over a line of pixels that is mirrored at its ends."""
    offsets = torch.arange(-round(2 * sigma), round(2 * sigma) + 1)
    kernel = torch.exp(-offsets.square() / (2 * sigma**2))
    period = max(1, 2 * side - 2)
    places = (torch.arange(side)[:, None] + offsets) % period
    places = torch.where(places < side, places, period - places)
    return torch.zeros(side, side).scatter_add_(1, places, (kernel / kernel.sum()).expand(side, -1))


def blurred(maps: Tensor, sigma: float) -> Tensor:
    """A Gaussian over maps (B, C, H, W)."""
    down, right = (gaussian(side, sigma).to(maps.device) for side in maps.shape[2:])
    return down @ maps @ right.T


def standard(maps: Tensor) -> Tensor:
    """Maps (B, C, H, W) with zero mean and unit variance each."""
    centred = maps - maps.mean((2, 3), keepdim=True)
    return centred / centred.square().mean((2, 3), keepdim=True).sqrt().clamp_min(TINY)


def means(values: Tensor, inside: Tensor, window: float | None) -> tuple[Tensor, Tensor]:
    """m1 and m2 of values (B, C, H, W) inside (B, 1, H, W) and outside: around each pixel, or of all (no window)."""
    over = (lambda maps: blurred(maps, window)) if window else (lambda maps: maps.mean((2, 3), keepdim=True))
    area, part, whole = over(inside), over(inside * values), over(values)
    return part / area.clamp_min(TINY), (whole - part) / (1 - area).clamp_min(TINY)


def slope(maps: Tensor) -> Tensor:
    """Differences (2, *maps) to the next pixel along both axes; 0 at the far border."""
    return torch.stack([F.pad(maps.diff(dim=-2), (0, 0, 0, 1)), F.pad(maps.diff(dim=-1), (0, 1))])


def divergence(field: Tensor) -> Tensor:
    """Of a field (2, ...) with zeros at the far border: minus the transpose of `slope`."""
    down, right = field
    return torch.cat([down[..., :1, :], down.diff(dim=-2)], -2) + torch.cat([right[..., :1], right.diff(dim=-1)], -1)


def steepness(field: Tensor) -> Tensor:
    """|grad| of a field (2, ...), a little above 0."""
    return (field.square().sum(0) + TINY).sqrt()
