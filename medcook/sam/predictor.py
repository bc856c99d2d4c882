"""Click, drag, ask: the small SAM on an image of any size, in the image's own pixels."""

from collections import OrderedDict
from dataclasses import dataclass, replace
from hashlib import sha256

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medcook.errors import MedcookError
from medcook.sam.asking import draw_box, draw_points
from medcook.sam.model import DENSE, MOST_POINTS, PADDING, SIZE, Embedding, Prompts, SmallSam
from medcook.sam.prompts import Prompt

KEPT = 128
"""Embeddings that a predictor remembers."""
ROOMS = (2.0, 1.5, 2.8, 4.0)
"""A zoomed window is so many times as long as the box. A box that is all that is asked is looked at in all of these and
the answers are averaged: a close view shows a wall, a wide one what it surrounds. Other prompts: the first alone."""

THRESHOLDS = torch.arange(-4, 2.25, 0.5)
"""Logits above which a place may count as object where a box was all that was asked."""
RELUCTANCE = 0.02
"""What a threshold must gain in the overlap of boxes for each step of 1 away from 0. Chosen on development sets."""


@dataclass(frozen=True)
class Answer:
    """Masks (K, height, width) bool, best first, their predicted IoU (K,) and their logits (K, height, width)."""

    masks: np.ndarray
    iou: np.ndarray
    logits: np.ndarray

    @property
    def mask(self) -> np.ndarray:
        """The mask that the model trusts most."""
        return self.masks[0]


class Predictor:
    """Answers prompts on 2-D images; an image is embedded once, whatever is asked of it.

    zoom   look closer where a box is small: the window around it is embedded on its own
    tight  a box that is all that is asked ends where the object ends: its answer fills it (see `reaching`)
    """

    def __init__(self, model: SmallSam, zoom: bool = True, tight: bool = True):
        self.model, self.zoom, self.tight = model.eval(), zoom, tight
        self.remembered: OrderedDict[str, Embedding] = OrderedDict()

    def __call__(self, image: np.ndarray, prompt: Prompt) -> Answer:
        """The answer to one prompt on an image (height, width)."""
        check_image(image)
        prompt.check(image.shape)
        only_box = prompt.box is not None and prompt.mask is None and not (prompt.foreground or prompt.background)
        rooms = ROOMS[: len(ROOMS) if only_box else 1] if self.zoom and prompt.box else ()
        windows = {box_window(prompt.box, image.shape, room) for room in rooms} or {whole(image)}
        views = [self._view(image, prompt, window) for window in sorted(windows)]
        logits = torch.stack([part for part, _ in views]).nanmean(0).nan_to_num(nan=-20.0)
        if self.tight and only_box:
            logits = reaching(logits, prompt.box)
        iou = torch.stack([part for _, part in views]).mean(0)
        order = iou.argsort(descending=True)
        logits = logits[order].numpy()
        return Answer(logits > 0, iou[order].numpy().clip(0, 1), logits)

    @torch.no_grad()
    def _view(self, image: np.ndarray, prompt: Prompt, window: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
        """Logits (K, height, width), NaN outside the window (left, top, right, bottom) looked at, and (K,) IoU."""
        left, top, right, bottom = window
        part, asked = image[top:bottom, left:right], moved(prompt, window)
        embedding = self.embed(part)
        logits, iou = self.model.decode(embedding, encode(asked, SIZE / max(part.shape)))
        several = len(prompt.foreground) == 1 and not prompt.background and prompt.box is None and prompt.mask is None
        chosen = slice(1, None) if several else slice(0, 1)
        fine = restore(self.model.refine(logits[:, chosen], embedding), part.shape)[0]
        seen = torch.full((len(fine), *image.shape), torch.nan)
        seen[:, top:bottom, left:right] = fine
        return seen, iou[0, chosen]

    @torch.no_grad()
    def embed(self, image: np.ndarray) -> Embedding:
        """The embedding of an image (height, width), computed once."""
        key = sha256(np.ascontiguousarray(image)).hexdigest() + str(image.shape)
        if key not in self.remembered:
            self.remembered[key] = self.model.embed(fit_in(image))
            if len(self.remembered) > KEPT:
                self.remembered.popitem(last=False)
        return self.remembered[key]


def reaching(logits: Tensor, box: tuple[float, ...]) -> Tensor:
    """Logits (..., height, width), shifted so that what is above 0 fills a tight box (left, top, right, bottom) best.

    A box says how far the object reaches. Of `THRESHOLDS`, that which gives the mask whose own box overlaps most; what
    lies outside the box, by more than half a pixel, is below 0.
    """
    inside = torch.ones(logits.shape[-2:], dtype=torch.bool)
    for axis, side in enumerate(inside.shape):
        middle = torch.arange(side) + 0.5
        within = (middle > box[1 - axis] - 0.5) & (middle < box[3 - axis] + 0.5)
        inside &= within[:, None] if axis == 0 else within
    each = THRESHOLDS.view(-1, *[1] * logits.ndim)
    gain = box_overlap((logits > each) & inside, torch.tensor(box)) - RELUCTANCE * each[..., 0, 0].abs()
    shifted = logits - THRESHOLDS[gain.argmax(0)][..., None, None]
    return torch.where(inside, shifted, shifted.clamp_max(-1))


def box_overlap(masks: Tensor, box: Tensor) -> Tensor:
    """(...): intersection over union of the boxes of masks (..., H, W) bool with a box (4,); 0 for an empty mask."""
    rows, columns = masks.any(-1), masks.any(-2)
    first = [found.float().argmax(-1) for found in (columns, rows)]
    last = [found.shape[-1] - found.flip(-1).float().argmax(-1) for found in (columns, rows)]
    sides = [torch.minimum(last[k], box[2 + k]) - torch.maximum(first[k], box[k]) for k in (0, 1)]
    both = sides[0].clamp_min(0) * sides[1].clamp_min(0)
    area = (last[0] - first[0]) * (last[1] - first[1]) + (box[2] - box[0]) * (box[3] - box[1])
    return torch.where(rows.any(-1), both / (area - both), 0.0)


def check_image(image: np.ndarray) -> None:
    """MedcookError where an image is not one slice of finite numbers."""
    if image.ndim != 2:
        raise MedcookError(
            f"The image has {image.ndim} dimensions.", "SAM looks at one slice (height, width) at a time."
        )
    if min(image.shape) < 8:
        raise MedcookError(
            f"The image is only {image.shape[1]} x {image.shape[0]} pixels.", "It needs at least 8 a side."
        )
    if not np.isfinite(image).all():
        raise MedcookError("The image holds NaN or infinity.", "Replace these first, for example by the background.")


def fit_in(image: np.ndarray) -> Tensor:
    """(1, 1, SIZE, SIZE): the long side resized to SIZE, zero mean and unit variance, the rest filled with its edge."""
    height, width = image.shape
    factor = SIZE / max(height, width)
    tensor = torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32))[None, None]
    tensor = (tensor - tensor.mean()) / tensor.std().clamp_min(1e-6)
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    tensor = F.interpolate(tensor, size, mode="bilinear", align_corners=False, antialias=factor < 1)
    return F.pad(tensor, (0, SIZE - size[1], 0, SIZE - size[0]), mode="replicate")


def restore(logits: Tensor, shape: tuple[int, int]) -> Tensor:
    """(B, K, side, side) logits of the padded square to (B, K, height, width) of the image."""
    longest = max(shape)
    square = F.interpolate(logits.float(), (longest, longest), mode="bilinear", align_corners=False)
    return square[..., : shape[0], : shape[1]]


def encode(prompt: Prompt, factor: float) -> Prompts:
    """A prompt as the model takes it; `factor` brings image pixels to input pixels."""
    points = torch.zeros(1, MOST_POINTS, 2)
    labels = torch.full((1, MOST_POINTS), PADDING)
    dense = torch.zeros(1, 3, DENSE, DENSE)
    small = prompt.scaled(factor)
    given = [(point, 1) for point in small.foreground] + [(point, 0) for point in small.background]
    for k, (point, label) in enumerate(thinned(given)):
        points[0, k], labels[0, k] = torch.tensor(point), label
    boxes = torch.tensor([small.box or (torch.nan,) * 4], dtype=torch.float32)
    draw_box(dense, boxes)
    everything = torch.tensor([[point for point, _ in given] or [(0.0, 0.0)]])
    draw_points(dense, everything, torch.tensor([[label for _, label in given] or [PADDING]]))
    if prompt.mask is not None:
        rough = prompt.mask * 16.0 - 8 if prompt.mask.dtype == bool else prompt.mask
        square = np.full((max(rough.shape),) * 2, -8.0, np.float32)
        square[: rough.shape[0], : rough.shape[1]] = rough
        soft = F.interpolate(torch.from_numpy(square)[None, None], (DENSE, DENSE), mode="area")
        dense[:, 0] = (soft[0] / 8).clamp(-1, 1)
    return Prompts(points, labels, boxes, dense)


def thinned(points: list) -> list:
    """At most MOST_POINTS of a list, evenly spread, the last one among them."""
    if len(points) <= MOST_POINTS:
        return points
    return [points[round(k)] for k in np.linspace(0, len(points) - 1, MOST_POINTS)]


def whole(image: np.ndarray) -> tuple[int, int, int, int]:
    """The window (left, top, right, bottom) that is the image."""
    return 0, 0, image.shape[1], image.shape[0]


def box_window(box: tuple[float, ...], shape: tuple[int, int], room: float) -> tuple[int, int, int, int]:
    """A square window (left, top, right, bottom) around a box, `room` times its longer side; at most the image."""
    height, width = shape
    side = round(max(16.0, room * max(box[2] - box[0], box[3] - box[1])))
    if side >= max(height, width):
        return 0, 0, width, height
    corner = [(box[0] + box[2] - side) / 2, (box[1] + box[3] - side) / 2]
    left, top = (int(min(max(0, at), max(0, end - side))) for at, end in zip(corner, (width, height), strict=True))
    return left, top, min(width, left + side), min(height, top + side)


def moved(prompt: Prompt, window: tuple[int, int, int, int]) -> Prompt:
    """The prompt in the pixels of a window; points outside it are left out."""
    left, top, right, bottom = window
    inside = lambda points: tuple((x - left, y - top) for x, y in points if left <= x <= right and top <= y <= bottom)  # noqa: E731
    box = prompt.box and tuple(edge - start for edge, start in zip(prompt.box, (left, top, left, top), strict=True))
    mask = None if prompt.mask is None else prompt.mask[top:bottom, left:right]
    return replace(
        prompt, foreground=inside(prompt.foreground), background=inside(prompt.background), box=box, mask=mask
    )
