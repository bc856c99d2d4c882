"""Click, drag, ask: the small SAM on an image of any size, in the image's own pixels."""

from collections import OrderedDict
from dataclasses import dataclass, replace
from hashlib import sha256

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medcook.errors import MedcookError
from medcook.memory import keep_at_hand
from medcook.precision import resolve_precision
from medcook.sam.asking import draw_box, draw_points
from medcook.sam.model import DENSE, MOST_POINTS, PADDING, SIZE, Embedding, Prompts, SmallSam
from medcook.sam.prompts import Prompt
from medcook.sam.views import Window, agreement, click_windows, first_windows, square

KEPT = 72
"""Embeddings that a predictor remembers: all that first clicks on an image are looked at from, and some more."""
TOGETHER = 16
"""Windows that are embedded at a time; more are no faster and take more memory."""
ROOMS = (2.0, 1.5, 2.8, 4.0)
"""A zoomed window is so many times as long as the box. A box that is all that is asked is looked at in all of these and
the answers are averaged: a close view shows a wall, a wide one what it surrounds. A box and more: the first alone."""
FRAME = 640
"""Pixels a side: clicks on larger images are answered on a grid of this size, a quarter of which fills the model."""
OUTSIDE = -20.0
"""Logit of what no view shows."""

THRESHOLDS = torch.arange(-4, 2.25, 0.5)
"""Logits above which a place may count as object where a box was all that was asked."""
RELUCTANCE = 0.02
"""What a threshold must gain in the overlap of boxes for each step of 1 away from 0. Chosen on development sets."""


@dataclass(frozen=True)
class Answer:
    """Masks (K, height, width) bool, best first, their predicted IoU (K,) and their logits (K, height, width).

    A zoomed answer to clicks comes first whatever is expected of it; to a single click, three alternatives follow.
    """

    masks: np.ndarray
    iou: np.ndarray
    logits: np.ndarray

    @property
    def mask(self) -> np.ndarray:
        """The mask that the model trusts most."""
        return self.masks[0]


class Predictor:
    """Answers prompts on 2-D images; an image is embedded once, whatever is asked of it.

    zoom       look closer where a box is small, and at clicks from three distances: each window is embedded on its own
    tight      a box that is all that is asked ends where the object ends: its answer fills it (see `reaching`)
    precision  bfloat16 answers faster on some processors, and almost the same; auto takes it where it was timed so
    """

    def __init__(self, model: SmallSam, zoom: bool = True, tight: bool = True, precision: str = "float32"):
        keep_at_hand()
        if resolve_precision(precision) == "bfloat16":
            model = model.in_bfloat16()
        self.model = model.eval().to(memory_format=torch.channels_last)  # a third faster on CPUs
        self.zoom, self.tight = zoom, tight
        self.remembered: OrderedDict[str, Embedding] = OrderedDict()

    def __call__(self, image: np.ndarray, prompt: Prompt) -> Answer:
        """The answer to one prompt on an image (height, width)."""
        check_image(image)
        prompt.check(image.shape)
        if self.zoom and prompt.box is None and prompt.mask is None:
            return self._clicked(image, prompt)
        only_box = prompt.box is not None and prompt.mask is None and not (prompt.foreground or prompt.background)
        rooms = ROOMS[: len(ROOMS) if only_box else 1] if self.zoom and prompt.box else ()
        windows = {box_window(prompt.box, image.shape, room) for room in rooms} or {whole(image)}
        logits, iou = self._views(image, prompt, sorted(windows))
        logits, iou = logits.nanmean(0).nan_to_num(nan=OUTSIDE), iou.mean(0)
        if self.tight and only_box:
            logits = reaching(logits, prompt.box)
        order = iou.argsort(descending=True)
        logits = logits[order].numpy()
        return Answer(logits > 0, iou[order].numpy().clip(0, 1), logits)

    def _clicked(self, image: np.ndarray, prompt: Prompt) -> Answer:
        """The answer to clicks: what all views agree on, then, for a single click, the whole image's alternatives."""
        frame, framed = in_frame(image, prompt)
        if frame is not image:
            small = self._clicked(frame, framed)
            large = torch.from_numpy(small.logits)[None]
            logits = F.interpolate(large, image.shape, mode="bilinear", align_corners=False)[0].numpy()
            return Answer(logits > 0, small.iou, logits)
        seen, trust = self._views(image, prompt, click_windows(prompt, image.shape))
        seen = seen.nan_to_num(nan=OUTSIDE)
        first, expected = agreement(seen.flatten(0, 1), trust.flatten(), prompt)
        order = trust[0].argsort(descending=True) if len(trust[0]) > 1 else []
        logits = torch.stack([first, *seen[0, order]]).numpy()
        return Answer(logits > 0, np.array([expected, *trust[0, order]]).clip(0, 1), logits)

    @torch.no_grad()
    def _views(self, image: np.ndarray, prompt: Prompt, windows: list[Window]) -> tuple[Tensor, Tensor]:
        """Logits (W, K, height, width), NaN outside the window (left, top, right, bottom) looked at, and (W, K) IoU."""
        parts = cut(image, windows)
        embedding = together(self.embeddings(parts))
        asked = [
            encode(moved(prompt, window), SIZE / max(part.shape)) for part, window in zip(parts, windows, strict=True)
        ]
        logits, iou = self.model.decode(embedding, together(asked))
        several = len(prompt.foreground) == 1 and not prompt.background and prompt.box is None and prompt.mask is None
        chosen = slice(1, None) if several else slice(0, 1)
        fine = self.model.refine(logits[:, chosen], embedding)
        seen = torch.full((*fine.shape[:2], *image.shape), torch.nan)
        for view, part, answer, (left, top, right, bottom) in zip(seen, parts, fine, windows, strict=True):
            view[:, top:bottom, left:right] = restore(answer[None], part.shape)[0]
        return seen, iou[:, chosen]

    def look_ahead(self, image: np.ndarray, prompt: Prompt | None = None) -> None:
        """Embed what clicks will be looked at from, as where a pointer rests; without them, a first click anywhere."""
        check_image(image)
        if prompt is not None:
            prompt.check(image.shape)
        if not self.zoom:
            self.embed(image)
        elif prompt is None or (prompt.box is None and prompt.mask is None):
            frame, framed = in_frame(image, prompt or Prompt())
            windows = first_windows(frame.shape) if prompt is None else click_windows(framed, frame.shape)
            self.embeddings(cut(frame, windows))

    def embed(self, image: np.ndarray) -> Embedding:
        """The embedding of an image (height, width), computed once."""
        return self.embeddings([image])[0]

    @torch.no_grad()
    def embeddings(self, images: list[np.ndarray]) -> list[Embedding]:
        """Those of several; the ones that are not remembered are computed together, some at a time."""
        keys = [sha256(np.ascontiguousarray(image)).hexdigest() + str(image.shape) for image in images]
        images = dict(zip(keys, images, strict=True))
        known = {key: self.remembered.pop(key, None) for key in images}
        new = [key for key in known if known[key] is None]
        for start in range(0, len(new), TOGETHER):
            some = new[start : start + TOGETHER]
            rows = self.model.embed(torch.cat([fit_in(images[key]) for key in some]))
            known |= {key: rows.at(torch.tensor([k])) for k, key in enumerate(some)}
        self.remembered |= known
        while len(self.remembered) > KEPT:
            self.remembered.popitem(last=False)
        return [known[key] for key in keys]


def in_frame(image: np.ndarray, prompt: Prompt) -> tuple[np.ndarray, Prompt]:
    """An image and a prompt as clicks are answered on them: no longer than `FRAME`."""
    factor = FRAME / max(image.shape)
    return (image, prompt) if factor >= 1 else (resized(image, factor), prompt.scaled(factor))


def cut(image: np.ndarray, windows: list[Window]) -> list[np.ndarray]:
    """The parts of an image that windows show."""
    return [image[top:bottom, left:right] for left, top, right, bottom in windows]


def together(rows: list):
    """One `Embedding`, or one `Prompts`, of the rows of several."""
    return type(rows[0])(*(torch.cat(each) for each in zip(*rows, strict=True)))


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


def resized(image: np.ndarray, factor: float) -> np.ndarray:
    """An image (height, width) made smaller by a factor, at least 8 pixels a side."""
    size = tuple(max(8, round(side * factor)) for side in image.shape)
    tensor = torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32))[None, None]
    return F.interpolate(tensor, size, mode="bilinear", align_corners=False, antialias=True)[0, 0].numpy()


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


def whole(image: np.ndarray) -> Window:
    """The window (left, top, right, bottom) that is the image."""
    return 0, 0, image.shape[1], image.shape[0]


def box_window(box: tuple[float, ...], shape: tuple[int, int], room: float) -> Window:
    """A square window around a box, `room` times its longer side; at most the image."""
    centre = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    return square(centre, room * max(box[2] - box[0], box[3] - box[1]), shape)


def moved(prompt: Prompt, window: Window) -> Prompt:
    """The prompt in the pixels of a window; points outside it are left out."""
    left, top, right, bottom = window
    inside = lambda points: tuple((x - left, y - top) for x, y in points if left <= x <= right and top <= y <= bottom)  # noqa: E731
    box = prompt.box and tuple(edge - start for edge, start in zip(prompt.box, (left, top, left, top), strict=True))
    mask = None if prompt.mask is None else prompt.mask[top:bottom, left:right]
    return replace(
        prompt, foreground=inside(prompt.foreground), background=inside(prompt.background), box=box, mask=mask
    )
