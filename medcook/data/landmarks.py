"""Two structures, left and right, as landmarks along their outlines, and back."""

import numpy as np
import torch
from scipy import ndimage
from skimage.draw import polygon2mask
from skimage.measure import find_contours
from torch import Tensor

from medcook.data.case import IGNORE

SMALLEST = 0.002  # share of the image that a structure covers at least


def landmarks(labels: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
    """Outlines of label maps (B, H, W): points (B, 2 nodes, 2) as (x, y) in -1 to 1, and known (B,) bool.

    Whatever is labelled counts: first the structure on the image's left, clockwise from its topmost point at equal
    distances, then the other. Where two structures cannot be told, the image is not known and its points are 0.
    """
    found = [sides(label) for label in ((labels > 0) & (labels != IGNORE)).cpu().numpy()]
    points = [
        np.zeros((2 * nodes, 2)) if pair is None else np.concatenate([ring(m, nodes) for m in pair]) for pair in found
    ]
    known = torch.tensor([pair is not None for pair in found])
    return torch.from_numpy(np.stack(points)).float().to(labels.device), known.to(labels.device)


def sides(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """The two largest parts of a mask (H, W), left first; None where there are no two.

    A part in the middle of the image without a second a tenth its size is two that touch: it is cut at its middle.
    """
    parts, count = ndimage.label(mask)
    sizes = np.bincount(parts.ravel(), minlength=count + 1)[1:]
    order = np.argsort(-sizes, kind="stable")
    if not count or sizes[order[0]] < SMALLEST * mask.size:
        return None
    if count > 1 and sizes[order[1]] > 0.1 * sizes[order[0]]:
        pair = [parts == 1 + number for number in order[:2]]
        return tuple(sorted(pair, key=lambda part: np.nonzero(part)[1].mean()))
    whole, columns = parts == 1 + order[0], np.arange(mask.shape[1])
    middle = np.nonzero(whole)[1].mean()
    if abs(middle / mask.shape[1] - 0.5) > 0.1:
        return None
    left, right = whole & (columns <= middle), whole & (columns > middle)
    return (left, right) if right.any() else None


def ring(mask: np.ndarray, nodes: int) -> np.ndarray:
    """(nodes, 2) points (x, y) in -1 to 1, at equal distances clockwise along a mask's (H, W) outline from its top."""
    outline = max(find_contours(np.pad(mask, 1).astype(float), 0.5), key=len)[:-1, ::-1] - 1
    x, y = outline.T
    if (x * np.roll(y, -1) - y * np.roll(x, -1)).sum() < 0:  # the signed area: rows count downwards
        outline = outline[::-1]
    outline = np.roll(outline, -np.argmin(outline[:, 1]), axis=0)
    closed = np.concatenate([outline, outline[:1]])
    along = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(closed, axis=0).T))])
    wanted = np.arange(nodes) * along[-1] / nodes
    places = np.stack([np.interp(wanted, along, closed[:, axis]) for axis in (0, 1)], axis=1)
    return (2 * places + 1) / np.array(mask.shape[::-1]) - 1


def filled(points: Tensor, size: tuple[int, int]) -> Tensor:
    """The other way: the inside of both rings (B, 2 nodes, 2) as masks (B, *size) bool."""
    pixels = ((points.cpu().numpy() + 1) * np.array(size[::-1]) - 1) / 2
    rings = pixels[..., ::-1].reshape(len(points), 2, -1, 2)
    masks = [polygon2mask(size, left) | polygon2mask(size, right) for left, right in rings]
    return torch.from_numpy(np.stack(masks)).to(points.device)
