"""Looking at clicks from several distances, and one answer from what is seen.

A click does not say how large the object is. From each distance the model sees another candidate or three; the answer
is the mask that is expected to overlap most with whichever of them is right.
"""

import torch
from torch import Tensor

from medcook.sam.prompts import Prompt

Window = tuple[int, int, int, int]
"""left, top, right, bottom, in pixels of an image."""

SHARES = (1.0, 0.5, 0.25)
"""Windows around clicks: the image, half of it, a quarter of it."""
SMALLEST, SMALLEST_OF_CLICKS = 16, 32
"""Pixels a side: any window, and a window around clicks, is no smaller."""
AROUND = 1.6
"""A window is at least so many times as long as the clicks lie apart."""
COARSE, FINE = 2, 8
"""Windows move in steps of a half of their side, so that the few there are can all be embedded with the image; of an
eighth where clicks lie so far apart, a quarter of the side or more, that they would come close to the border."""
CUTS = torch.arange(0.1, 0.91, 0.05)
"""Thresholds of the mean probability among which the answer is looked for."""
FINEST = 256
"""Overlaps are counted on at most so many pixels a side."""


def square(centre: tuple[float, float], side: float, shape: tuple[int, int]) -> Window:
    """The square window around (x, y), moved into the image (height, width) where it would reach out of it."""
    side, (height, width) = round(max(SMALLEST, side)), shape
    if side >= max(height, width):
        return 0, 0, width, height
    left, top = (
        int(min(max(0, at - side / 2), max(0, end - side))) for at, end in zip(centre, (width, height), strict=True)
    )
    return left, top, min(width, left + side), min(height, top + side)


def click_windows(prompt: Prompt, shape: tuple[int, int]) -> list[Window]:
    """The windows from which clicks are looked at, the image first; each holds all of the clicks.

    They move in steps, so that a click nearby finds most of them embedded.
    """
    points = torch.tensor(prompt.foreground + prompt.background)
    low, high = points.amin(0), points.amax(0)
    apart, found = float((high - low).max()), []
    for share in SHARES:
        side = max(share * max(shape), AROUND * apart, SMALLEST_OF_CLICKS)
        step = side / (COARSE if apart < side / 4 else FINE)
        centre = tuple(round(at / step) * step for at in ((low + high) / 2).tolist())
        found.append(square(centre, side, shape))
    return sorted(set(found), key=found.index)


def first_windows(shape: tuple[int, int]) -> list[Window]:
    """All windows from which a first click, wherever it is, is looked at.

    The image, 9 windows of half its side and 49 of a quarter; fewer where it is not square, or so small that a quarter
    of it is less than a window may be.
    """
    found = []
    for side in (max(share * max(shape), SMALLEST_OF_CLICKS) for share in SHARES):
        step = side / COARSE
        down, across = (range(round(end / step) + 1) for end in shape)
        found += [square((column * step, row * step), side, shape) for row in down for column in across]
    return sorted(set(found), key=found.index)


def agreement(logits: Tensor, iou: Tensor, prompt: Prompt) -> tuple[Tensor, Tensor]:
    """Logits (height, width) of the mask that overlaps most with the candidates, and its expected overlap with them.

    Of the masks above some threshold of the candidates' mean probability, that with the largest expected Dice; its
    logits are the mean's, moved so that this threshold lies at 0. A candidate counts as much as the model trusts it and
    as far as it does what the clicks say. Its expected overlap is the mean IoU with the candidates, weighted alike.

    logits (K, height, width) and iou (K,), the overlap that the model expects of each candidate
    """
    chances = logits.sigmoid()
    weights = iou.clamp(0.01, 1) * obedience(chances, prompt)
    weights = weights / weights.sum()
    mean = torch.einsum("k,khw->hw", weights, chances)
    step = max(1, max(mean.shape) // FINEST)
    small = mean[::step, ::step].flatten()
    offered = (small > CUTS[:, None]).float()
    candidates = (logits[:, ::step, ::step] > 0).float().flatten(1)
    both = offered @ candidates.T
    total = offered.sum(1)[:, None] + candidates.sum(1)
    best = int((2 * both / total.clamp_min(1) @ weights).argmax())
    overlap = (both[best] / (total[best] - both[best]).clamp_min(1)) @ weights
    return mean.clamp(1e-6, 1 - 1e-6).logit() - CUTS[best].logit(), overlap


def obedience(chances: Tensor, prompt: Prompt) -> Tensor:
    """(K,) in 0 to 1: the product over clicks of the chance (K, height, width) that a candidate gives what they say."""
    found = torch.ones(len(chances))
    height, width = chances.shape[1:]
    for points, value in ((prompt.foreground, 1.0), (prompt.background, 0.0)):
        for x, y in points:
            there = chances[:, min(int(y), height - 1), min(int(x), width - 1)]
            found = found * (1 - (there - value).abs())
    return found.clamp_min(1e-3)
