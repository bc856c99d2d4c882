"""Boxes and scribbles in volumes as marks, and a score of answers to them."""

import numpy as np
import torch
from scipy import ndimage
from skimage.morphology import skeletonize
from torch import Tensor

from medcook.data import Case
from medcook.interactive import BESIDE, MEANT, careful_click, click_rows, overlap, random_pixels, session
from medcook.recipes.interactive._asking import boxes


def box_around(truth: Tensor) -> Tensor:
    """(B, D, H, W) bool: the shell, one voxel thick, around the smallest box that holds each mask; none around nothing.

    A box says as much as marks beside the structure do; where it touches the border of the image its side is left out.
    """
    return boxes(truth, least=1, most=1) & ~boxes(truth)


def scribble(mask: np.ndarray, broken: bool = True) -> np.ndarray:
    """The skeleton of a mask (D, H, W), and if it is `broken`, random pieces of it; all bool, never empty in a mask."""
    line = skeletonize(mask) if mask.any() else mask
    line = line if line.any() else mask
    if broken:
        noise = ndimage.gaussian_filter(torch.randn(mask.shape).numpy(), 2.0)
        line = line & (noise > 0) if (line & (noise > 0)).any() else line
    return line


def points_or_scribbles(masks: Tensor) -> Tensor:
    """(B, D, H, W) bool: in each mask (B, D, H, W) a random voxel or, as often, a broken scribble."""
    drawn = random_pixels(masks)
    for number, mask in enumerate(masks.cpu().numpy()):
        if torch.rand(()) < 0.5:
            drawn[number] = torch.from_numpy(scribble(mask)).to(masks.device)
    return drawn


def click_and_box(marks: Tensor, answer: Tensor, truth: Tensor) -> Tensor:
    """Marks (B, 2, *size) and what a careful person says of masks (B, *size) by a click and a box."""
    marks = careful_click(marks, answer, truth)
    marks[:, BESIDE] |= box_around(truth)
    return marks


def whole_scribble(marks: Tensor, answer: Tensor, truth: Tensor) -> Tensor:
    """Marks (B, 2, *size) and a scribble along the middle of what is missing in answers (B, *size)."""
    drawn = np.stack([scribble(mask, broken=False) for mask in (truth & ~answer).numpy()])
    marks = marks.clone()
    marks[:, MEANT] |= torch.from_numpy(drawn)
    return marks


def prompt_rows(fitted, case: Case) -> list[dict]:
    """The rows of `click_rows` and Dice of the first answer to other marks.

    dice_box        a click in the middle and a box; dice_scribble: a line through the middle
    """
    rows = click_rows(fitted, case)
    images, labels = fitted.task.preparation.images(case), fitted.task.preparation.labels(case)
    values = {name: value for value, name in fitted.task.targets.items()}
    for found in rows:
        truth = labels == values[found["structure"]]
        there = truth.flatten(1).any(1)
        for name, click in {"dice_box": click_and_box, "dice_scribble": whole_scribble}.items():
            answer = session(fitted, images[there], truth[there], counts=(1,), click=click)[1]
            found[name] = overlap(answer, truth[there])
    return rows
