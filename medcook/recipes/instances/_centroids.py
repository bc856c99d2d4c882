"""What instances look like from within: where the middle is, in pixels (SlideSegmenter) or in shares (HoVer-Net).

HoVer-Net (Graham et al., Medical Image Analysis 2019) divides the way to the centroid, along each axis and to each
side, by the longest there is in the instance: maps from -1 to 1, which jump where two instances touch. Its instances
are flooded from where maps do not fall steeply.
"""

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from skimage.segmentation import watershed
from torch import Tensor

from medcook.recipes.instances._parts import by_parts

STEEP = 0.4
"""Of the steepness, scaled to 0 to 1 over a mask, from where on there is a border."""


def to_centroids(sections: Tensor) -> Tensor:
    """(B, 2, H, W): how far down and right of its section's centroid each pixel of sections (B, H, W) lies; else 0."""
    height, width = sections.shape[1:]
    lines = torch.arange(height).view(-1, 1).expand(height, width), torch.arange(width).expand(height, width)
    places = torch.stack(lines).float().to(sections.device)
    found = torch.zeros(len(sections), 2, height, width, device=sections.device)
    for number in range(1, int(sections.max()) + 1):
        mine = (sections == number).float()[:, None]
        centroid = (mine * places).sum((2, 3), keepdim=True) / mine.sum((2, 3), keepdim=True).clamp_min(1)
        found += mine * (places - centroid)
    return found


def directions(sections: Tensor) -> Tensor:
    """(B, 2, H, W): `to_centroids` with each instance's longest way to each side as the unit, so from -1 to 1."""
    ways = to_centroids(sections)
    found = torch.zeros_like(ways)
    for number in range(1, int(sections.max()) + 1):
        mine = ways * (sections == number)[:, None]
        low, high = mine.amin((2, 3), keepdim=True), mine.amax((2, 3), keepdim=True)
        found += torch.where(mine < 0, mine / -low.clamp_max(-1e-3), mine / high.clamp_min(1e-3))
    return found


def slopes(maps: Tensor) -> Tensor:
    """(B, 2, H, W): how each of two maps changes along its own axis, by HoVer-Net's kernel of 5 x 5 pixels."""
    line = torch.arange(-2.0, 3.0, device=maps.device)
    down = line[:, None] / (line[:, None] ** 2 + line**2).clamp_min(1e-9)
    kernels = torch.stack([down, down.T])[:, None]
    return F.conv2d(maps, kernels, padding=2, groups=2)


def direction_loss(found: Tensor, truth: Tensor, inside: Tensor) -> Tensor:
    """8 times the squared error of maps (B, 2, H, W), 2.5 times that of their slopes inside of instances (B, H, W)."""
    inside = inside[:, None].float()
    uneven = (inside * (slopes(found) - slopes(truth)).square()).sum() / (2 * inside.sum()).clamp_min(1)
    return 8 * (found - truth).square().mean() + 2.5 * uneven


def by_directions(mask: np.ndarray, maps: np.ndarray, sigma: float = 1.5) -> np.ndarray:
    """Instances (H, W), from 1 on, of a mask (H, W) and its `directions` (2, H, W)."""
    parts = by_parts(mask)
    inside = parts > 0
    if not inside.any():
        return parts
    change = np.stack([ndimage.gaussian_filter1d(one, sigma, axis=axis, order=1) for axis, one in enumerate(maps)])
    low, high = (edge[:, None, None] for edge in (change[:, inside].min(1), change[:, inside].max(1)))
    steep = np.where(inside, ((high - change) / np.maximum(high - low, 1e-6)).max(0), 1.0)
    seeds = ndimage.binary_opening(ndimage.binary_fill_holes(inside & (steep < STEEP)), iterations=2)
    markers, count = ndimage.label(seeds)
    alone = np.setdiff1d(np.unique(parts[inside]), parts[seeds])
    for number, part in enumerate(alone, count + 1):
        markers[parts == part] = number
    return watershed(ndimage.gaussian_filter(steep, 1.0), markers, mask=inside)
