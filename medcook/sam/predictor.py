"""Click, drag, ask: the small SAM on an image of any size, in the image's own pixels."""

from collections import OrderedDict
from dataclasses import dataclass, replace
from hashlib import sha256

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medcook.errors import MedcookError
from medcook.sam.model import DENSE, FINE, MOST_POINTS, PADDING, SIZE, Embedding, Prompts, SmallSam
from medcook.sam.pretraining import draw_box, draw_points
from medcook.sam.prompts import Prompt

KEPT = 64
"""Embeddings that a predictor remembers."""
ROOM = 2.0
"""A zoomed window is at least so many times as long as the box; boxes that fill more of the image are not zoomed."""

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

    zoom  look closer where a box is small: the window around it is embedded on its own
    """

    def __init__(self, model: SmallSam, zoom: bool = True):
        self.model, self.zoom = model.eval(), zoom
        self.remembered: OrderedDict[str, Embedding] = OrderedDict()

    def __call__(self, image: np.ndarray, prompt: Prompt) -> Answer:
        """The answer to one prompt on an image (height, width)."""
        check_image(image)
        prompt.check(image.shape)
        window = box_window(prompt.box, image.shape) if self.zoom and prompt.box else None
        if window is None:
            return self._answer(image, prompt)
        left, top, right, bottom = window
        part = self._answer(image[top:bottom, left:right], moved(prompt, window))
        logits = np.full((len(part.iou), *image.shape), -20.0, np.float32)
        logits[:, top:bottom, left:right] = part.logits
        return Answer(logits > 0, part.iou, logits)

    @torch.no_grad()
    def _answer(self, image: np.ndarray, prompt: Prompt) -> Answer:
        factor = SIZE / max(image.shape)
        embedding = self.embed(image)
        logits, iou = self.model.decode(embedding, encode(prompt, factor))
        several = len(prompt.foreground) == 1 and not prompt.background and prompt.box is None and prompt.mask is None
        chosen = slice(1, None) if several else slice(0, 1)
        fine = self.model.refine(logits[:, chosen], embedding)
        if prompt.box is not None and prompt.mask is None and not (prompt.foreground or prompt.background):
            fine = reaching(fine, [edge * factor * FINE / SIZE for edge in prompt.box])
        order = iou[0, chosen].argsort(descending=True)
        fine, iou = restore(fine[:, order], image.shape)[0].numpy(), iou[0, chosen][order].numpy()
        return Answer(fine > 0, iou.clip(0, 1), fine)

    @torch.no_grad()
    def embed(self, image: np.ndarray) -> Embedding:
        """The embedding of an image (height, width), computed once."""
        key = sha256(np.ascontiguousarray(image)).hexdigest() + str(image.shape)
        if key not in self.remembered:
            self.remembered[key] = self.model.embed(fit_in(image))
            if len(self.remembered) > KEPT:
                self.remembered.popitem(last=False)
        return self.remembered[key]


def reaching(logits: Tensor, box: list[float]) -> Tensor:
    """Logits (1, K, S, S), shifted so that what is above 0 fills a tight box (left, top, right, bottom, in cells) best.

    A box says how far the object reaches. Of `THRESHOLDS`, that which gives the mask whose own box overlaps most; what
    lies outside the box, by more than half a cell, is below 0.
    """
    cells = torch.arange(logits.shape[-1], device=logits.device) + 0.5
    columns, rows = ((cells > box[k] - 0.5) & (cells < box[2 + k] + 0.5) for k in (0, 1))
    inside = rows[:, None] & columns
    masks = (logits > THRESHOLDS.view(-1, 1, 1, 1).to(logits)) & inside
    gain = box_overlap(masks, torch.tensor(box, device=logits.device)) - RELUCTANCE * THRESHOLDS.abs()[:, None].to(
        logits
    )
    shifted = logits - THRESHOLDS.to(logits)[gain.argmax(0)][None, :, None, None]
    return torch.where(inside, shifted, shifted.clamp_max(-1))


def box_overlap(masks: Tensor, box: Tensor) -> Tensor:
    """(...): intersection over union of the boxes of masks (..., S, S) bool with a box (4,); 0 for an empty mask."""
    rows, columns, side = masks.any(-1), masks.any(-2), masks.shape[-1]
    first = [found.float().argmax(-1) for found in (columns, rows)]
    last = [side - found.flip(-1).float().argmax(-1) for found in (columns, rows)]
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


def box_window(box: tuple[float, ...], shape: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """A square window (left, top, right, bottom) around a box, ROOM times its longer side; None where that is all."""
    height, width = shape
    side = round(max(16.0, ROOM * max(box[2] - box[0], box[3] - box[1])))
    if side >= max(height, width):
        return None
    corner = [(box[0] + box[2] - side) / 2, (box[1] + box[3] - side) / 2]
    left, top = (int(min(max(0, at), max(0, room - side))) for at, room in zip(corner, (width, height), strict=True))
    return left, top, min(width, left + side), min(height, top + side)


def moved(prompt: Prompt, window: tuple[int, int, int, int]) -> Prompt:
    """The prompt in the pixels of a window; points outside it are left out."""
    left, top, right, bottom = window
    inside = lambda points: tuple((x - left, y - top) for x, y in points if left <= x <= right and top <= y <= bottom)  # noqa: E731
    box = (prompt.box[0] - left, prompt.box[1] - top, prompt.box[2] - left, prompt.box[3] - top)
    mask = None if prompt.mask is None else prompt.mask[top:bottom, left:right]
    return replace(
        prompt, foreground=inside(prompt.foreground), background=inside(prompt.background), box=box, mask=mask
    )
