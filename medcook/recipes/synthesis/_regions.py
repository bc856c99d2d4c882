"""Regions of an X-ray: of masks, and proposed by segmentations that know no anatomy."""

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from skimage.segmentation import felzenszwalb
from torch import Tensor

SCALES = (5.0, 10.0, 20.0, 40.0, 80.0)
"""Of the segmentations whose regions are proposed: the larger, the larger the regions."""

LEAST = 8
"""Pixels of a region, at least."""


def boxes_of(masks: Tensor) -> Tensor:
    """(..., 4) first row, first column, last row + 1, last column + 1 of masks (..., H, W); zeros where these are
    empty."""
    sides = []
    for axis in (-1, -2):
        line = (masks > 0).any(axis).float()
        sides.append((line.argmax(-1), line.shape[-1] - line.flip(-1).argmax(-1)))
    (top, bottom), (left, right) = sides
    return torch.stack([top, left, bottom, right], -1).float() * (masks > 0).flatten(-2).any(-1)[..., None]


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """(...) intersection over union of boxes (..., 4)."""
    area = lambda box: (box[..., 2:] - box[..., :2]).clamp_min(0).prod(-1)  # noqa: E731
    both = area(torch.cat([torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])], -1))
    return both / (area(a) + area(b) - both).clamp_min(1e-6)


def proposals(image: np.ndarray) -> Tensor:
    """(R, 4) boxes of an X-ray (H, W): the regions of segmentations at several scales, and every two neighbours."""
    image = (image - image.min()) / max(float(np.ptp(image)), 1e-6)
    found = []
    for scale in SCALES:
        regions = felzenszwalb(image, scale, sigma=0.5, min_size=LEAST, channel_axis=None)
        parts = [[s.start for s in place] + [s.stop for s in place] for place in ndimage.find_objects(regions + 1)]
        across, down = (np.stack([regions[:, :-1], regions[:, 1:]], -1), np.stack([regions[:-1], regions[1:]], -1))
        pairs = np.unique(np.concatenate([across.reshape(-1, 2), down.reshape(-1, 2)]), axis=0)
        one, two = np.array(parts)[pairs].swapaxes(0, 1)  # a region is its own neighbour
        found.append(np.concatenate([np.minimum(one, two)[:, :2], np.maximum(one, two)[:, 2:]], 1))
    return torch.from_numpy(np.unique(np.concatenate(found), axis=0)).float()


def described(maps: Tensor, boxes: Tensor) -> Tensor:
    """(B, R, 4 + 2 C) what is known of boxes (B, R, 4) on feature maps (B, C, H, W): middle, log sides, the mean of
    each map inside, and how much higher it is than with a quarter around."""
    size = torch.tensor(maps.shape[2:], device=maps.device)
    sums = F.pad(maps.double().cumsum(2).cumsum(3), (1, 0, 1, 0)).movedim(1, -1)
    image = torch.arange(len(maps), device=maps.device)[:, None]

    def mean(corner: Tensor, end: Tensor) -> Tensor:
        (top, left), (bottom, right) = corner.long().unbind(-1), end.long().unbind(-1)
        below, above = sums[image, bottom, right] - sums[image, bottom, left], sums[image, top, right]
        return ((below - above + sums[image, top, left]) / (end - corner).prod(-1, keepdim=True)).float()

    corner, end = boxes[..., :2], boxes[..., 2:]
    margin = ((end - corner) / 4).ceil()
    inside, wide = mean(corner, end), mean((corner - margin).clamp_min(0), torch.minimum(end + margin, size))
    return torch.cat([(corner + end) / size - 1, ((end - corner) / size).log(), inside, inside - wide], -1)


def region(found: np.ndarray) -> np.ndarray:
    """The parts of a mask (H, W) bool that are at least a quarter as large as the largest."""
    parts, _ = ndimage.label(found)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return (sizes >= max(sizes.max() / 4, 1))[parts]
