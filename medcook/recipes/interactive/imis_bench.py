"""IMIS-Bench: interactive medical image segmentation, a benchmark data set and baseline (Junlong Cheng, Fu, Ye, Guoan
Wang, Tianbin Li, Haoyu Wang, Ruoyu Li, Yao, Chen, Jingwen Li, Su, Zhu and He, CVPR 2025; arXiv 2411.12814).

Who asks for a structure may click on it, put a box around it, name it, or do several of these; then clicks correct the
answer. The benchmark measures Dice for each kind of prompt, for their combinations, and by the number of interactions.
Its baseline is one network that takes them all. It is trained on labels, which have names, and on masks which a
foundation model made of every image and which were cleaned: these have none, and are asked for by clicks and boxes.

Here an interaction is a prompt of any kind, so that a click, a box and a name count as much as three clicks.
"""

from copy import deepcopy
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

from medcook.data import Case
from medcook.evaluation import row
from medcook.interactive import MEANT, GuidedNet, careful_click, no_marks, overlap, random_pixels, session, with_click
from medcook.recipes.interactive._asking import BOX, Prompted, boxes, complete, first_then, pieces, some_kinds
from medcook.recipes.interactive._settings import BASELINE, CHANNELS, HEARTS, scales
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.sampling import trained

KINDS = ("click", "box", "name")
"""Kinds of prompts."""
SMALLEST = 0.0005
"""Share of the image below which a part of a mask is left out."""


def cleaned(mask: np.ndarray) -> np.ndarray:
    """(H, W) bool: a mask opened and closed by a cross, without its small parts; perhaps nothing."""
    smooth = ndimage.binary_closing(ndimage.binary_opening(mask))
    parts, _ = ndimage.label(smooth)
    sizes = np.bincount(parts.ravel())
    return smooth & (sizes >= SMALLEST * mask.size)[parts]


@dataclass
class Imis(Prompted):
    """A U-Net that takes clicks, the inside of a box, and the name of a structure: for each name a channel, all 0 or 1.

    kinds   what a person may say, a click among it; each image starts with a random combination of these
    jitter  by how many pixels the sides of boxes are off in training
    """

    channels: tuple[int, ...] = CHANNELS
    kinds: tuple[str, ...] = KINDS
    jitter: int = 2

    guides = 4

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        model = GuidedNet(self.backbone(inputs + self.guides + classes - 1, dims), classes)
        return nn.ModuleDict({"model": model, "average": deepcopy(model).requires_grad_(False)})

    def respond(self, net: nn.Module, state: Tensor, marks: Tensor, before: Tensor | None) -> Tensor:
        """Logits (B, 2, H, W) after marks (B, C, H, W) and the logits before; channel BOX + k says that it is k."""
        return super().respond(net, state, complete(marks, BOX + net.classes), before)

    def guidance(self, marks: Tensor, before: Tensor | None) -> Tensor:
        """(B, 3 + C - 2, H, W): dots of the clicks, the probability of the last answer, and all else that was said."""
        said = super().guidance(marks[:, :BOX], before)
        return torch.cat([said, marks[:, BOX:].to(said.dtype)], dim=1)

    def piece(self, image: Tensor) -> Tensor:
        """(H, W) bool: a random piece of an image (H, W) that is left when cleaned, from fine to coarse."""
        found = pieces(image, float(torch.randint(1, 500, ()))).numpy()
        for number in torch.randperm(int(found.max()) + 1).tolist():
            mask = cleaned(found == number)
            if mask.any():
                break
        return torch.from_numpy(mask)

    def opening(self, truth: Tensor, known: Tensor, values: list[int]) -> Tensor:
        """(B, BOX + 1 + largest value, H, W) bool: a random combination of prompts about each mask (B, H, W)."""
        marks = complete(no_marks(truth), BOX + 1 + max(values))
        for mark, mask, value in zip(marks, truth, values, strict=True):
            for kind in some_kinds(tuple(kind for kind in self.kinds if kind != "name" or value)):
                if kind == "click":
                    mark[MEANT] = random_pixels(mask[None])[0]
                elif kind == "box":
                    mark[BOX] = boxes(mask[None], -self.jitter, self.jitter)[0]
                else:
                    mark[BOX + value] = True
        return marks

    def correct(self, marks: Tensor, answer: Tensor, truth: Tensor, known: Tensor) -> Tensor:
        """Marks (B, C, H, W) and a click on what is wrong with each answer; what was said stays said."""
        return torch.cat([with_click(marks[:, :BOX], answer, truth, known), marks[:, BOX:]], dim=1)


def said(kinds: tuple[str, ...], truth: Tensor, value: int) -> Tensor:
    """(B, C, H, W) bool: a click in the middle of each mask (B, H, W), a tight box around it, and its name, `value`.

    C is 2 where nothing but a click is said.
    """
    marks = no_marks(truth)
    if "click" in kinds:
        marks = careful_click(marks, truth & False, truth)
    if kinds != ("click",):
        marks = complete(marks, BOX + 1 + value)
    if "box" in kinds:
        marks[:, BOX] = boxes(truth)
    if "name" in kinds:
        marks[:, BOX + value] = True
    return marks


def asked(fitted, images: Tensor, truth: Tensor, value: int, kinds: tuple[str, ...], counts: dict[str, int]) -> dict:
    """{column: Dice after so many answers} about masks (B, H, W): to prompts of these kinds, then to corrections."""
    person = first_then(said(kinds, truth, value), careful_click)
    answers = session(fitted, images, truth, tuple(counts.values()), person)
    return {column: overlap(answers[count], truth) for column, count in counts.items()}


def protocol_rows(fitted, case: Case) -> list[dict]:
    """A row a structure: Dice over the case, on the network's grid, on the slices that show it.

    dice            after one click
    dice_3, dice_5  after three and five interactions: first all kinds of prompts at once that the method takes, then
                    clicks in the middle of the largest error
    dice_box, dice_name, dice_click_box, ...  the first answer to other prompts and combinations that it takes
    """
    trained(fitted)
    images, labels = fitted.task.preparation.images(case), fitted.task.preparation.labels(case)
    kinds, rows = getattr(fitted.method, "kinds", ("click",)), []
    fewer = [some for count in range(1, len(kinds)) for some in combinations(kinds, count)]
    for value, name in fitted.task.targets.items():
        truth = labels == value
        there = truth.flatten(1).any(1)
        if there.any():
            about = fitted, images[there], truth[there], value
            found = asked(*about, kinds, {f"dice_{count}": count - len(kinds) + 1 for count in (3, 5)})
            found |= {"dice": asked(*about, ("click",), {"dice": 1})["dice"]}
            for some in fewer:
                if some != ("click",):
                    found |= asked(*about, some, {"_".join(("dice", *some)): 1})
            rows.append(row(case, name, **found))
    return rows


recipe = Recipe(
    paper="imis-bench",
    title="IMIS-Bench: Dice by kind of prompt and number of interactions",
    claim="After three interactions, a click, a box and the name of the structure, a network that takes them all "
    "reaches a higher Dice than one that takes clicks alone does after three clicks.",
    arms={
        "unet": Arm(BASELINE),
        "imis": Arm(Imis()),
        "without names": Arm(Imis(kinds=("click", "box"))),
        "without dense masks": Arm(Imis(invented=0.0)),
    },
    compare=("imis", "unet"),
    ablation=("imis", "without names"),
    replicate="fold",
    metric="dice_3",
    score=protocol_rows,
    scales=scales(HEARTS),
    source="the abstract; prompts, interactions and the cleaning of masks follow the official code, "
    "github.com/uni-medical/IMIS-Bench, as extended in github.com/tuhlnaa/IMIS-Bench-Extended",
    components=(
        Component(
            "clicks, bounding boxes, text prompts, and their combinations",
            "simplified",
            "the network sees clicks as in the whole chapter, the inside of a box, and a name as a constant channel, "
            "of which the first convolution learns what it means; the paper has CLIP's embedding of a sentence with "
            "the name, and tokens for SAM's decoder. A random combination to begin with, where the code has one "
            "kind; then one click on the larger error, as in all arms (the code: up to seven, and sometimes the name)",
        ),
        Component(
            "evaluation from multiple perspectives",
            "implemented",
            "Dice of each kind of prompt and of all combinations, and after three and five interactions; one "
            "is a prompt of any kind. Clicks in the middle of the largest error, boxes tight",
        ),
        Component(
            "dense interactive masks",
            "simplified",
            "pieces of the image by Felzenszwalb and Huttenlocher stand in for the masks of a foundation model; half "
            "of the targets are such, where the code trains both on every image. They have no name",
        ),
        Component(
            "quality control and granularity",
            "implemented",
            "masks are opened and closed, and parts under 0.05% of the image left out, as in the code; how fine the "
            "pieces are is drawn at random for every image",
        ),
        Component(
            "IMIS baseline network",
            "simplified",
            "the chapter's narrow U-Net; the paper's has SAM's image encoder, which runs once an image",
        ),
        Component("scalability", "absent", "one small network on one data set"),
        Component(
            "superior accuracy to existing interactive models",
            "simplified",
            "one rival, the chapter's click-only U-Net, trained here; no SAM, SAM 2 or MedSAM",
        ),
        Component("IMed-361M", "absent", "6.4 million images of 14 modalities are not at hand: MR of hearts alone"),
    ),
)
