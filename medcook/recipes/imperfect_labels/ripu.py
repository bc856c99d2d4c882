"""RIPU, region impurity and prediction uncertainty (Xie, Yuan, Li, Liu and Cheng, CVPR 2022).

Idea: a network that knows one hospital may ask for a few percent of the other hospital's pixels. In rounds it asks for
the small squares where its prediction is mixed and unsure. Beside these labels it learns to agree with its neighbours
along the source's borders, and what a target pixel is not. With N the square of (2k + 1)^2 pixels around a pixel:

    impurity     P = H(share of N that is predicted to be class c, over c)      H is entropy, in units of log(classes)
    uncertainty  U = mean over N of H(p)
    acquisition  A = P U; the square of largest A is asked for, then the largest that does not overlap it, and so on
    loss         CE(source) + CE(what was asked for) + a LCR + b NL
    LCR          mean over the source's border pixels of |p - mean of p over 3 x 3|_1
    NL           mean of -log(1 - p_c) over the target's pixels and classes with p_c < tau
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.data import IGNORE
from medcook.errors import MedcookError
from medcook.imperfect import PartlyLabelled, ShiftTask
from medcook.losses import find_loss
from medcook.methods import Batch, Moment
from medcook.recipes.imperfect_labels._settings import CHANNELS, scales
from medcook.recipes.recipe import Arm, Component, Recipe

LOCAL, NEGATIVE, THRESHOLD = 0.1, 1.0, 0.05
"""Weights a and b of the two regularisers, and tau, as in the official code."""


def square_mean(maps: Tensor, radius: int) -> Tensor:
    """(B, C, H, W): the mean of each map over the square around every pixel; beyond the border is nothing."""
    return F.avg_pool2d(maps, 2 * radius + 1, stride=1, padding=radius, count_include_pad=False)


def region_impurity(probabilities: Tensor, radius: int) -> Tensor:
    """P (B, H, W), 0 to 1, of class probabilities (B, classes, H, W): how mixed a square's predicted classes are."""
    classes = probabilities.shape[1]
    predicted = F.one_hot(probabilities.argmax(1), classes).movedim(-1, 1).to(probabilities)
    return torch.special.entr(square_mean(predicted, radius).clamp(0, 1)).sum(1) / math.log(classes)


def region_uncertainty(probabilities: Tensor, radius: int) -> Tensor:
    """U (B, H, W), 0 to 1, of class probabilities (B, classes, H, W): the mean entropy of a square."""
    entropy = torch.special.entr(probabilities).sum(1, keepdim=True) / math.log(probabilities.shape[1])
    return square_mean(entropy, radius)[:, 0]


def window(centres: Tensor, size: tuple[int, int], radius: int) -> Tensor:
    """(B, H, W) bool: squares around centres (B, K), which are row * W + column; negative numbers are none."""
    marked = torch.zeros(len(centres), 1 + size[0] * size[1], device=centres.device)
    marked.scatter_(1, centres.clamp_min(-1) + 1, 1.0)
    points = marked[:, 1:].view(-1, 1, *size)
    return F.max_pool2d(points, 2 * radius + 1, stride=1, padding=radius)[:, 0] > 0


def best_squares(score: Tensor, taken: Tensor, counts: Tensor, radius: int) -> Tensor:
    """The centres (B, most) of the `counts` (B,) best squares of each score (B, H, W); -1 where there are no more.

    taken  (B, K) centres of earlier rounds; no square overlaps another one, new or old
    """
    score = score.masked_fill(window(taken, score.shape[1:], 2 * radius), -torch.inf)
    chosen = torch.full((len(score), int(counts.max())), -1, device=score.device)
    for k in range(chosen.shape[1]):
        value, place = score.flatten(1).max(1)
        place = torch.where((k < counts) & (value > -torch.inf), place, -1)
        chosen[:, k] = place
        score = score.masked_fill(window(place[:, None], score.shape[1:], 2 * radius), -torch.inf)
    return chosen


class Asked(nn.Module):
    """What the oracle was asked, sample by sample: centres of squares (slots, most), -1 where none is yet."""

    def __init__(self, slots: int, most: int):
        super().__init__()
        self.register_buffer("centres", torch.full((slots, most), -1))

    def recall(self, index: Tensor) -> Tensor:
        """(B, most) centres."""
        if index.max() >= len(self.centres):
            raise MedcookError(f"There are more than {len(self.centres)} training samples.", "Raise `slots`.")
        return self.centres[index]

    def add(self, index: Tensor, chosen: Tensor) -> None:
        """Append centres (B, K) to those of the samples index (B,), which differ; negative ones are none."""
        for slot, new in zip(index.tolist(), chosen, strict=True):
            new, begin = new[new >= 0], int((self.centres[slot] >= 0).sum())
            if begin + len(new) > self.centres.shape[1]:
                raise MedcookError(f"An image may have {self.centres.shape[1]} squares at most.", "Raise `most`.")
            self.centres[slot, begin : begin + len(new)] = new


def borders(labels: Tensor) -> Tensor:
    """(B, H, W) bool: pixels with another class among their eight neighbours."""
    maps = labels[:, None].float()
    highest = F.max_pool2d(maps, 3, stride=1, padding=1)
    lowest = -F.max_pool2d(-maps, 3, stride=1, padding=1)
    return (highest != lowest)[:, 0] & (labels != IGNORE)


def local_consistency(probabilities: Tensor, labels: Tensor) -> Tensor:
    """LCR of probabilities (B, classes, H, W) along the borders of labels (B, H, W); 0 where there are none."""
    around = F.avg_pool2d(F.pad(probabilities, [1, 1, 1, 1], mode="replicate"), 3, stride=1)
    where = borders(labels)
    return ((probabilities - around).abs().sum(1) * where).sum() / where.sum().clamp_min(1)


def negative_learning(probabilities: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """NL of probabilities (B, classes, H, W): classes below the threshold are what a pixel is not."""
    isnt = probabilities.detach() < threshold
    return (-torch.log1p(-probabilities.masked_fill(~isnt, 0)) * isnt).sum() / isnt.sum().clamp_min(1)


@dataclass
class Ripu(PartlyLabelled):
    """Training on the source's labels and on the squares that were asked for in the target's images.

    select    `ripu`: by impurity times uncertainty; `uncertainty`, `impurity`: by one of them; `random`: anywhere;
              `images`: whole images, every 1/budget-th; `everything`, `nothing`: all labels, or none
    budget    share of each target image's pixels that may be asked for, never more
    radius    k: squares have (2k + 1)^2 pixels; 0: single pixels
    rounds    shares of the training after which an image's next round is due; it takes place at the image's next visit
    local, negative  weights of the two regularisers
    slots, most      the most samples, and squares of a sample, that can be remembered
    """

    channels: tuple[int, ...] = CHANNELS
    select: Literal["ripu", "uncertainty", "impurity", "random", "images", "everything", "nothing"] = "ripu"
    budget: float = 0.022
    radius: int = 1
    rounds: tuple[float, ...] = (0.25, 0.3, 0.35, 0.4, 0.45)
    local: float = LOCAL
    negative: float = NEGATIVE
    slots: int = 1024
    most: int = 64

    trial = ShiftTask("embedded", source="north", target="island", labelled=12)

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        nets = super().build(inputs, classes, dims)
        nets["asked"] = Asked(self.slots, self.most)
        return nets

    def augment(self, batch: Batch, rng: torch.Generator) -> Batch:
        """Nothing yet: squares are chosen in the image as it is, and `training_step` augments afterwards."""
        return batch

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        """The loss of the module's docstring, after the images whose next round is due have asked for it."""
        rng = torch.Generator().manual_seed(int(torch.randint(2**62, ())))  # the same view, whatever is asked
        images, labels = labelled.images, labelled.labels.clone()
        groups = torch.zeros(len(images)) if labelled.groups is None else labelled.groups
        target = (groups == 1).to(images.device)
        with torch.autocast(images.device.type, enabled=False):
            if target.any():
                oracle = Batch(images[target], labelled.raters[target, 0], labelled.index[target])
                labels[target] = self.answers(nets, oracle, now)
            view = super().augment(Batch(images, labels), rng)
        logits = nets["model"](view.images.contiguous(memory_format=torch.channels_last)).float()
        loss, probabilities = find_loss(self.loss), logits.softmax(1)
        total = loss(logits[~target], view.labels[~target]) + loss(logits[target], view.labels[target])
        if self.local:
            total = total + self.local * local_consistency(probabilities[~target], view.labels[~target])
        if self.negative:
            total = total + self.negative * negative_learning(probabilities[target])
        return total

    def answers(self, nets: nn.ModuleDict, target: Batch, now: Moment) -> Tensor:
        """Labels (B, H, W) of target images, whose oracle is in `labels`: what was asked for by now, else `IGNORE`."""
        size = tuple(target.labels.shape[1:])
        if self.select in ("everything", "nothing"):
            known = torch.full_like(target.labels, self.select == "everything", dtype=torch.bool)
        elif self.select == "images":
            wanted = (target.index * self.budget) % 1 < self.budget
            known = (wanted & (now.fraction >= self.rounds[0])).view(-1, 1, 1).expand_as(target.labels)
        else:
            self.ask(nets, target, now)
            known = window(nets["asked"].recall(target.index), size, self.radius)
        return torch.where(known, target.labels, IGNORE)

    @torch.no_grad()
    def ask(self, nets: nn.ModuleDict, target: Batch, now: Moment) -> None:
        """The next squares of images that have fewer than are due by now."""
        taken = nets["asked"].recall(target.index)
        missing = self.due(target.labels[0].numel(), now) - (taken >= 0).sum(1)
        some = first_visits(target.index) & (missing > 0)
        if some.any():
            score = self.score(nets, target.images[some])
            chosen = best_squares(score, taken[some], missing[some], self.radius)
            nets["asked"].add(target.index[some], chosen)

    def due(self, pixels: int, now: Moment) -> int:
        """How many squares an image of so many pixels has asked for after the rounds up to now."""
        squares = int(self.budget * pixels / (2 * self.radius + 1) ** 2)
        begun = sum(now.fraction >= start for start in self.rounds)
        return squares * begun // len(self.rounds)

    def score(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """A (B, H, W) of images, by the average network; where all is equal, chance decides."""
        score = torch.zeros_like(images[:, 0])
        if self.select != "random":
            nets["average"].eval()
            probabilities = self.predict(nets, images)
            nets["average"].train()
            impurity, uncertainty = (
                measure(probabilities, self.radius) for measure in (region_impurity, region_uncertainty)
            )
            score = {"ripu": impurity * uncertainty, "impurity": impurity, "uncertainty": uncertainty}[self.select]
        return score + 1e-6 * torch.rand(score.shape).to(score)


def first_visits(index: Tensor) -> Tensor:
    """(B,) bool: not the second time that a sample is in a batch, which happens where an epoch ends."""
    return torch.tensor([value not in index[:k] for k, value in enumerate(index)], device=index.device)


recipe = Recipe(
    paper="ripu",
    title="Regions chosen by impurity and uncertainty for the other hospital",
    claim="From Montgomery to Shenzhen with 2.2% of the target's pixels labelled, regions chosen by impurity and "
    "uncertainty give a higher Dice than random regions.",
    arms={
        "random regions": Arm(Ripu(select="random")),
        "ripu": Arm(Ripu()),
        "without impurity": Arm(Ripu(select="uncertainty")),
        "all target labels": Arm(Ripu(select="everything")),
        "without uncertainty": Arm(Ripu(select="impurity")),
        "single pixels": Arm(Ripu(radius=0, most=512)),
        "whole images": Arm(Ripu(select="images")),
        "without regularisers": Arm(Ripu(local=0.0, negative=0.0)),
        "source only": Arm(Ripu(select="nothing")),
    },
    compare=("ripu", "random regions"),
    ablation=("ripu", "without impurity"),
    replicate="fold",
    scales=scales(
        ShiftTask("embedded", source="north", target="island"),
        ShiftTask("chest_xray", source="Montgomery", target="Shenzhen"),
        "random regions",
        "ripu",
        "without impurity",
        "all target labels",
    ),
    source="official code, github.com/BIT-DA/RIPU; figures: its README, mIoU",
    published={
        "GTAV to Cityscapes, 2.2%, DeepLabv2": 0.696,
        "GTAV to Cityscapes, 5%, DeepLabv3+": 0.712,
    },
    components=(
        Component(
            "region impurity and prediction uncertainty",
            "implemented",
            "squares of 3 x 3 pixels, 2.2% of each image, five rounds at a quarter to 45% of the training, as in the "
            "official code. There a round scans all target images at once; here an image has its round at its next "
            "visit, by what the network is then. The moving average is asked, in evaluation mode; ties fall by chance. "
            "The number of squares is rounded down, where the code rounds up, so the budget is never exceeded",
        ),
        Component(
            "region-based selection",
            "implemented",
            "squares do not overlap. Random squares of the same budget and rounds are compared; single pixels and "
            "whole images (random ones) are arms that `full` does not run",
        ),
        Component(
            "local prediction consistency",
            "implemented",
            "on the source's borders alone, as in the official code, whose border filter misses a pixel between two "
            "classes where these cancel; weight 0.1",
        ),
        Component("negative learning loss", "implemented", "threshold 0.05 and weight 1 as in the official code"),
        Component(
            "self-training with pseudo labels",
            "absent",
            "what the abstract sets itself apart from; its own target loss is on queried pixels and on what is not",
        ),
        Component(
            "GTAV and SYNTHIA to Cityscapes",
            "absent",
            "two hospitals' chest X-rays and a small U-Net from a random start for streets and a pre-trained DeepLab. "
            "The loss is cross-entropy alone, in every arm",
        ),
    ),
)
