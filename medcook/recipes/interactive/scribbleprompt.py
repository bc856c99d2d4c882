"""ScribblePrompt: fast and flexible interactive segmentation for any biomedical image (Wong, Rakic, Guttag and Dalca,
ECCV 2024; arXiv 2312.07381; its first version says "any medical image").

A network that people guide by scribbles, clicks and boxes, in any mixture, on structures that it never saw. Nobody
draws scribbles for training: three algorithms simulate them, lines through a mask, its centreline, and a contour inside
it, broken by smooth noise and warped, so that none is as clean as the mask. And so that the network learns to obey and
not organs by heart, half of the targets are no structures but random superpixels of the image.

  input = image, inside of the box, positive marks, negative marks, last answer;   a few answers are trained in turn,
  each to new scribbles or clicks on what is wrong with the one before
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from skimage.draw import line
from skimage.morphology import skeletonize
from torch import Tensor

from medcook import metrics
from medcook.data import IGNORE, Case
from medcook.evaluation import row
from medcook.imperfect import drawn_scribbles
from medcook.interactive import BESIDE, MEANT, no_marks, overlap, random_pixels, session
from medcook.recipes.interactive._asking import BOX, Prompted, boxes, complete, pieces, some_kinds
from medcook.recipes.interactive._settings import BASELINE, CHANNELS, HEARTS, scales
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.sampling import trained

LEFT_VENTRICLE = 3
"""Label value of the hearts' structure that training never shows."""
SMOOTH, FAR, BLUR, RADIUS = (4.0, 16.0), (1.0, 6.0), (5.0, 20.0), 16
"""Smoothness of noise in pixels, how far a scribble is warped, and how far a contour is blurred into its mask."""
MOST = 3
"""Clicks or lines at once."""


def uniform(low: float, high: float) -> float:
    """A random number between two."""
    return low + (high - low) * torch.rand(()).item()


def whole(low: int, high: int) -> int:
    """A random whole number from low to high, both included."""
    return int(torch.randint(low, high + 1, ()))


def smooth_noise(size: tuple[int, int], smoothing: float) -> np.ndarray:
    """(H, W) of mean about 0 and deviation 1: random values some `smoothing` pixels apart, and a smooth surface."""
    coarse = [max(2, round(side / smoothing) + 1) for side in size]
    noise = F.interpolate(torch.randn(1, 1, *coarse), size=size, mode="bicubic", align_corners=True)[0, 0]
    return (noise / noise.std().clamp_min(1e-5)).numpy()


def lines(mask: np.ndarray, count: int) -> np.ndarray:
    """(H, W) bool: `count` straight lines, each between two random pixels of the mask."""
    places, drawn = np.argwhere(mask), np.zeros_like(mask)
    for start, end in places[torch.randint(len(places), (count, 2)).numpy()]:
        drawn[line(*start, *end)] = True
    return drawn


def centreline(mask: np.ndarray) -> np.ndarray:
    """(H, W) bool: the skeleton of the mask, whose rim is cut where it meets the border of the image."""
    inside = np.pad(mask[1:-1, 1:-1], 1)
    return skeletonize(inside)


def contour(mask: np.ndarray) -> np.ndarray:
    """(H, W) bool: the rim of a random inner part of the mask, which is where its blurred outside is faint enough."""
    outside = (~mask).astype(np.float32)
    faint = np.maximum(ndimage.gaussian_filter(outside, uniform(*BLUR), radius=RADIUS, mode="reflect"), outside)
    return metrics.surface(faint <= uniform(faint.min(), faint[mask].max())) & mask


def broken(drawn: np.ndarray) -> np.ndarray:
    """(H, W) bool: the parts of a scribble where smooth noise is positive; all of it where none would be left."""
    kept = drawn & (smooth_noise(drawn.shape, uniform(*SMOOTH)) > 0)
    return kept if kept.any() else drawn


def warped(drawn: np.ndarray) -> np.ndarray:
    """(H, W) bool: a scribble moved by a smooth random field; one or two pixels wide."""
    field = np.stack([smooth_noise(drawn.shape, uniform(*SMOOTH)) for _ in range(2)]) * uniform(*FAR)
    return ndimage.map_coordinates(drawn.astype(np.float32), np.indices(drawn.shape) + field, order=1) > 0


def scribble(mask: np.ndarray, count: int) -> np.ndarray:
    """(H, W) bool: a simulated scribble in a mask (H, W), of one of three sorts; nothing in an empty one."""
    if not mask.any() or not count:
        return np.zeros_like(mask)
    sort = (lines, centreline, contour)[whole(0, 2)]
    drawn = lines(mask, count) if sort is lines else broken(sort(mask))
    for found in (warped(drawn) & mask, drawn & mask, mask):
        if found.any():
            return found


@dataclass
class ScribblePrompt(Prompted):
    """A U-Net that sees scribbles and clicks, the inside of a box, and its last answer.

    kinds     what a simulated person may say: each image starts with a random combination of these
    invented  the share of synthetic labels, random superpixels; `jitter`: boxes are at most this many pixels too wide
    """

    channels: tuple[int, ...] = CHANNELS
    kinds: tuple[str, ...] = ("click", "scribble", "box")
    jitter: int = 19

    guides = 4

    def guidance(self, marks: Tensor, before: Tensor | None) -> Tensor:
        """(B, 4, H, W): soft dots of the marks, the probability that the last answer gave, the inside of a box."""
        marks = complete(marks, BOX + 1)
        said = super().guidance(marks[:, :BOX], before)
        return torch.cat([said, marks[:, [BOX]].to(said.dtype)], dim=1)

    def piece(self, image: Tensor) -> Tensor:
        """(H, W) bool: a random superpixel of an image (H, W), from fine to coarse."""
        found = pieces(image, uniform(1, 500))
        return found == whole(0, int(found.max()))

    def opening(self, truth: Tensor, known: Tensor, values: list[int]) -> Tensor:
        """(B, 3, H, W) bool: one to three clicks or lines in each mask (B, H, W), up to three beside it, a box."""
        marks = complete(no_marks(truth), BOX + 1)
        for mark, mask, sure in zip(marks, truth, known, strict=True):
            for kind in some_kinds(self.kinds):
                if kind == "box":
                    mark[BOX] = boxes(mask[None], 0, self.jitter)[0]
                else:
                    mark[MEANT] |= self.made(kind, mask, whole(1, MOST))
                    mark[BESIDE] |= self.made(kind, ~mask & sure, whole(0, MOST))
        return marks

    def made(self, kind: str, mask: Tensor, count: int) -> Tensor:
        """(H, W) bool: clicks or a scribble in a mask (H, W)."""
        if kind == "click":
            return random_pixels(mask[None], count)[0] if count else torch.zeros_like(mask)
        return torch.from_numpy(scribble(mask.cpu().numpy(), count)).to(mask.device)

    def correct(self, marks: Tensor, answer: Tensor, truth: Tensor, known: Tensor) -> Tensor:
        """Marks (B, 3, H, W) and one to three clicks or lines on what is wrong with each answer (B, H, W) bool.

        Scribbles are shared out between what is missing and what is too much, at random.
        """
        marks, wrong = marks.clone(), (answer != truth) & known
        for mark, error, mask in zip(marks, wrong, truth, strict=True):
            count = whole(1, MOST)
            if "scribble" in self.kinds and torch.rand(()).item() < 0.5:
                more = whole(0, count)
                mark[MEANT] |= self.made("scribble", error & mask, more)
                mark[BESIDE] |= self.made("scribble", error & ~mask, count - more)
            else:
                clicks = self.made("click", error, count)
                mark[MEANT] |= clicks & mask
                mark[BESIDE] |= clicks & ~mask
        return marks


def peoples_scribbles(task, case: Case) -> Tensor:
    """(N, H, W) uint8: 0 where nobody scribbled, 1 on the background, 1 + label value on a structure.

    Scribbles that came with the data; where there are none, skeletons of the structures.
    """
    if "scribble" not in case.extras:
        drawn = drawn_scribbles(task.preparation.labels(case).numpy())
        return torch.from_numpy(np.where(drawn == IGNORE, 0, drawn + 1).astype(np.uint8))
    drawn = case.extras["scribble"]
    return task.preparation.labels(case, values=np.where(drawn == IGNORE, 0, drawn + 1).astype(np.uint8))


def interaction_rows(fitted, case: Case) -> list[dict]:
    """A row a structure: Dice over the case, on the network's grid, on slices in which people scribbled on it.

    dice           the mean of the next and of dice_5
    dice_scribble  the first answer to what people scribbled, on the structure and on all else
    dice_1, dice_5 after one and five clicks, each in the middle of the largest error
    """
    trained(fitted)
    images, labels = fitted.task.preparation.images(case), fitted.task.preparation.labels(case)
    drawn, rows = peoples_scribbles(fitted.task, case), []
    for value, name in fitted.task.targets.items():
        there = ((labels == value).flatten(1).any(1)) & (drawn == 1 + value).flatten(1).any(1)
        if there.any():
            truth, said = labels[there] == value, drawn[there]
            marks = torch.stack([said == 1 + value, (said != 0) & (said != 1 + value)], dim=1)
            answers = session(fitted, images[there], truth, (1, 5))
            found = {f"dice_{count}": overlap(answer, truth) for count, answer in answers.items()}
            answer = session(fitted, images[there], truth, (1,), lambda *_, marks=marks: marks)[1]
            found["dice_scribble"] = overlap(answer, truth)
            rows.append(row(case, name, dice=(found["dice_scribble"] + found["dice_5"]) / 2, **found))
    return rows


recipe = Recipe(
    paper="scribbleprompt",
    title="ScribblePrompt: simulated scribbles and synthetic labels",
    claim="On left ventricles, which it never saw, a network trained on simulated scribbles, clicks, boxes and "
    "synthetic labels reaches a higher Dice than one trained on clicks alone: in the mean of its first answer to "
    "scribbles that people drew and its answer to five clicks.",
    arms={
        "unet": Arm(BASELINE),
        "scribbleprompt": Arm(ScribblePrompt()),
        "without synthetic labels": Arm(ScribblePrompt(invented=0.0)),
        "without scribbles": Arm(ScribblePrompt(kinds=("click", "box"))),
    },
    compare=("scribbleprompt", "unet"),
    ablation=("scribbleprompt", "without synthetic labels"),
    replicate="fold",
    score=interaction_rows,
    scales=scales(
        replace(HEARTS, hidden=(LEFT_VENTRICLE,), asked="hidden"),
        "unet",
        "scribbleprompt",
        "without synthetic labels",
    ),
    source="the abstract; scribbles, prompts, superpixels and channels follow the official code, "
    "github.com/halleewong/ScribblePrompt",
    components=(
        Component(
            "simulated scribbles",
            "implemented",
            "lines, centrelines and contours, broken by smooth noise (lines are not) and warped by a smooth field, cut "
            "to the mask; smoothness, reach and blur as in the code's settings, for images of 128 x 128. Noise "
            "is smooth between random values on a coarse grid; the code's is a library's. Marks are True or False "
            "where the code's are shaded after the warp",
        ),
        Component(
            "scribbles, clicks and bounding boxes",
            "implemented",
            "every combination to begin with, one to three marks inside, up to three beside; then scribbles or clicks "
            "on what is wrong. Clicks on random pixels, where the code also clicks middles and rims. Marks are soft "
            "dots as in the whole chapter, the code's are single pixels. Two answers a step, the code trains five. "
            "Boxes are trained, but not scored: the other arm takes none",
        ),
        Component(
            "synthetic labels",
            "implemented",
            "half of the targets are random superpixels of Felzenszwalb and Huttenlocher, with the code's settings. "
            "Runs of 100 steps on fold 9, which is not scored, by which nothing was chosen: Dice 0.78 with them, 0.82 "
            "without, 0.57 of clicks alone (five cases, one seed)",
        ),
        Component(
            "unseen structures",
            "implemented",
            "left ventricles are unlabelled in training, neither a target nor background to another structure, and are "
            "alone asked for; the paper's test sets are of other organs and modalities altogether",
        ),
        Component(
            "manually collected scribbles",
            "implemented",
            "the expert scribbles that come with these hearts, on the structure and on all else; the paper's are "
            "another collection. The click-only arm gets them as so many clicks",
        ),
        Component("simulated interactions", "implemented", "one to five clicks in the middle of the largest error"),
        Component("a diverse collection of 65 datasets", "absent", "hearts alone are trained on"),
        Component("multiple network architectures", "absent", "the U-Net alone, no SAM; narrow, the chapter's loss"),
        Component(
            "real time on a single CPU",
            "absent",
            "seconds are recorded with every run, on one core; the claim here is about Dice",
        ),
        Component("user study", "absent", "no person takes part"),
    ),
)
