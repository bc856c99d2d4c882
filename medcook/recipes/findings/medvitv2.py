"""MedViTV2: Medical Image Classification with KAN-Integrated Transformers and Dilated Neighborhood Attention.

Manzari, Asgariandehkordi, Koleilat, Xiao and Rivaz, Applied Soft Computing 2025 (arXiv 2502.13693). Images of other
scanners are noisier, blurred, of other contrast. Two changes to a hybrid of convolutions and transformers shall make it
robust: where it mixes channels, edges carry learnt curves in place of numbers, and where it looks around, it looks at
neighbours that are spread out.

  KAN layer   y_o = sum over i, g of w_oig b_g(norm(x)_i),   b_g(t) = 1 - tanh((t - c_g) / 0.33)^2, c = -2 ... 2 (8)
  DiNA        the attention of each place to k x k others, d places apart; at a border these lie further inside
  LFP block   local features: x + attention to neighbours, then x + convolutions of each place
  GFP block   global features: attention to everything beside grouped convolutions, then x + two KAN layers

The first version, the baseline, has grouped convolutions for DiNA and a perceptron for KAN. All tell tuberculosis in
real X-rays, corrupted as in MedMNIST-C, and clean. Looked at once, on validation patients after 300 steps with a seed
that is not scored: AUC on corrupted and clean images 0.70 and 0.83, of the first version 0.67 and 0.84.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook import evaluation, pooled
from medcook.cohorts import OutcomeTask
from medcook.data import Case
from medcook.data.transforms import Augment
from medcook.methods import Classifier
from medcook.pretraining import fresh
from medcook.recipes.findings._corruptions import KINDS, corrupted
from medcook.recipes.findings._medvit import HEAD, GlobalAttention, convolution, embedding, head_convolution, in_heads
from medcook.recipes.findings._settings import AUGMENT, scales
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.sampling import trained
from medcook.tasks import Budget

Local = Literal["dilated", "plain", "convolution"]

XRAYS = OutcomeTask("chest_xray", evaluation="test")
BRAINS = OutcomeTask("embedded", outcome="group", positive="atrophy", fold=0)
BUDGET = Budget(steps=270, batch=12, checks=0)

FARTHEST = 32
"""Places apart that dilated neighbours may be; on a smaller map as far as fits."""
BELLS, REACH, WIDTH = 8, 2.0, 0.33
KERNEL = 3
GLOBAL = 0.75
"""The share of a GFP block's channels that attend."""


def bells(x: Tensor) -> Tensor:
    """The values (..., 8) of the bell-shaped functions b_g at x (...)."""
    centres = torch.linspace(-REACH, REACH, BELLS, device=x.device)
    return 1 - torch.tanh((x[..., None] - centres) / WIDTH).square()


class KANLayer(nn.Module):
    """(..., inputs) to (..., outputs): on every edge from an input to an output a curve of its own, a sum of bells."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm = nn.LayerNorm(inputs)
        self.curves = nn.Linear(inputs * BELLS, outputs, bias=False)
        nn.init.xavier_uniform_(self.curves.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.curves(bells(self.norm(x).float()).flatten(-2))


def mixer(width: int, kan: bool) -> nn.Sequential:
    """Two KAN layers, (..., width) to the same, or a perceptron with about as many weights."""
    if kan:
        return nn.Sequential(KANLayer(width, 2 * width), KANLayer(2 * width, width))
    hidden = 2 * BELLS * width
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, width))


def neighbours(length: int, kernel: int, dilation: int) -> Tensor:
    """(length, kernel) int64: to which places of a line each one attends.

    These lie multiples of `dilation` apart, itself in the middle; at a border they move inside. On a short line kernel
    and dilation become what fits.
    """
    kernel = min(kernel, length)
    dilation = min(dilation, length // kernel)
    places = torch.arange(length)
    group, rank = places % dilation, places // dilation
    last = (length - 1 - group) // dilation + 1 - kernel
    start = torch.minimum((rank - kernel // 2).clamp_min(0), last)
    return group[:, None] + (start[:, None] + torch.arange(kernel)) * dilation


@lru_cache(maxsize=32)
def neighbourhood(height: int, width: int, kernel: int, dilation: int) -> tuple[Tensor, Tensor]:
    """Of each place, row by row, the numbers of its K = kernel^2 neighbours (N, K), and of their relative positions,
    counted in dilations, 0 to (2 kernel - 1)^2 - 1."""
    rows, columns = (neighbours(length, kernel, dilation) for length in (height, width))
    steps = [
        (line - torch.arange(len(line))[:, None]) // min(dilation, len(line) // line.shape[1])
        for line in (rows, columns)
    ]
    down, across = (step + kernel - 1 for step in steps)
    places = rows[:, None, :, None] * width + columns[None, :, None, :]
    numbers = down[:, None, :, None] * (2 * kernel - 1) + across[None, :, None, :]
    return places.flatten(2).flatten(0, 1), numbers.flatten(2).flatten(0, 1)


class NeighbourhoodAttention(nn.Module):
    """Maps (B, width, H, W) to the same: each place attends to its neighbours, with a learnt bias by their position."""

    def __init__(self, width: int, dilation: int, kernel: int = KERNEL):
        super().__init__()
        self.kernel, self.dilation = kernel, dilation
        self.asked = nn.Conv2d(width, 3 * width, 1)
        self.out = nn.Conv2d(width, width, 1)
        self.bias = nn.Parameter(torch.zeros((2 * kernel - 1) ** 2, width // HEAD))

    def forward(self, x: Tensor) -> Tensor:
        places, numbers = (t.to(x.device) for t in neighbourhood(*x.shape[2:], self.kernel, self.dilation))
        query, key, value = self.asked(x).float().flatten(2).movedim(2, 0).chunk(3, dim=2)  # (N, B, width)
        near_key, near_value = (
            in_heads(F.embedding(places, t.flatten(1)).unflatten(2, (len(x), -1))) for t in (key, value)
        )
        scores = (in_heads(query)[:, None] * near_key).sum(4) / HEAD**0.5 + self.bias[numbers][:, :, None]
        found = (scores.softmax(1)[..., None] * near_value).sum(1)  # (N, B, heads, HEAD)
        return self.out(found.flatten(2).movedim(0, 2).reshape(x.shape))


class LFP(nn.Module):
    """Local feature perception, (B, inputs, H, W) to (B, outputs, h, w); `second` blocks of a stage are dilated."""

    def __init__(self, inputs: int, outputs: int, shrink: bool, local: Local, second: bool):
        super().__init__()
        self.embed = embedding(inputs, outputs, shrink)
        self.norms = nn.ModuleList(nn.BatchNorm2d(outputs) for _ in range(2))
        dilation = FARTHEST if second and local == "dilated" else 1  # as far apart as fits
        self.look = head_convolution(outputs) if local == "convolution" else NeighbourhoodAttention(outputs, dilation)
        wide = 3 * outputs
        parts = convolution(outputs, wide), nn.Hardswish(), convolution(wide, wide, 3, groups=wide), nn.Hardswish()
        self.feed = nn.Sequential(*parts, convolution(wide, outputs))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.look(self.norms[0](x))
        return x + self.feed(self.norms[1](x))


class GFP(nn.Module):
    """Global feature perception, (B, inputs, H, W) to (B, outputs, h, w)."""

    def __init__(self, inputs: int, outputs: int, shrink: bool, kan: bool, fewer: int):
        super().__init__()
        attends = int(GLOBAL * outputs) // HEAD * HEAD
        self.embed, self.norm = embedding(inputs, attends, shrink), nn.BatchNorm2d(attends)
        self.look = GlobalAttention(attends, fewer)
        self.project = convolution(attends, outputs - attends)
        self.near = head_convolution(outputs - attends)
        self.mixed, self.mix = nn.BatchNorm2d(outputs), mixer(outputs, kan)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.look(self.norm(x))
        beside = self.project(x)
        x = torch.cat([x, beside + self.near(beside)], dim=1)
        return x + self.mix(self.mixed(x).movedim(1, -1)).movedim(-1, 1)


class MedViT(nn.Module):
    """Images (B, inputs, H, W) to logits (B, classes): stages of blocks, each at half the resolution of the last."""

    def __init__(self, inputs: int, classes: int, widths: tuple[int, int, int], kan: bool, local: Local):
        super().__init__()
        first, second, third = widths
        half = first // 2
        steps = (inputs, half, 2), (half, half, 1), (half, first, 2)
        self.stem = nn.Sequential()
        for given, wanted, stride in steps:
            self.stem.extend([convolution(given, wanted, 3, stride), nn.ReLU(inplace=True)])
        self.blocks = nn.Sequential(
            LFP(first, first, False, local, second=False),
            LFP(first, first, False, local, second=True),
            LFP(first, second, True, local, second=False),
            GFP(second, second, False, kan, fewer=2),
            GFP(second, third, True, kan, fewer=1),
        )
        self.norm, self.head = nn.BatchNorm2d(third), nn.Linear(third, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.stem(images))).mean((2, 3)))


@dataclass
class TellingByMedViT(Classifier):
    """Tells an outcome from a whole image.

    kan    a GFP block mixes channels by KAN layers, or by a perceptron
    local  how an LFP block looks around: at neighbours, `dilated` in every second block of a stage, or `convolution`
    """

    channels: tuple[int, ...] = (24, 48, 96)
    rate: float = 1e-3
    augmentation: Augment = field(default_factory=lambda: AUGMENT)
    kan: bool = True
    local: Local = "dilated"

    axes = 2
    trial = BRAINS

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        model = MedViT(inputs, classes, self.channels, self.kan, self.local)
        return nn.ModuleDict({"model": model, "average": fresh(model)})


@torch.no_grad()
def corruption_rows(fitted, case: Case) -> list[dict]:
    """A row for every kind of corruption, none where the outcome is not known; the hospital is the group.

    score, score_clean      how probable the outcome is in the corrupted and in the clean image
    correct, correct_clean  whether that is above one half exactly where the outcome is positive
    """
    task, net, images = fitted.task, trained(fitted)["average"], fitted.task.preparation.images(case)
    if case.attributes.get(task.outcome) is None:
        return []
    looks = torch.cat([images, *(corrupted(images, kind, case.case_id) for kind in KINDS)])
    clean, *scores = net(looks).float().softmax(1)[:, 1].view(1 + len(KINDS), -1).mean(1).tolist()
    outcome, rows = float(task.is_positive(case.attributes)), []
    for kind, score in zip(KINDS, scores, strict=True):
        right = {"correct": float((score > 0.5) == outcome), "correct_clean": float((clean > 0.5) == outcome)}
        values = {"score": score, "score_clean": clean, "outcome": outcome}
        rows.append(evaluation.row(case, kind, **values, **right, group=str(case.attributes.get("site") or "")))
    return rows


def by_corruption(frame: pd.DataFrame) -> pd.Series:
    """AUC of one arm's `corruption_rows`: on clean images, on each kind of corruption alone, and on all together."""
    one = frame[frame["structure"] == KINDS[0]]
    found = {"clean": pooled.value(one.assign(score=one["score_clean"]), "auc")}
    found |= {kind: pooled.value(frame[frame["structure"] == kind], "auc") for kind in KINDS}
    return pd.Series(found | {"all": pooled.value(frame, "auc")}, name="auc")


recipe = Recipe(
    paper="medvitv2",
    title="MedViTV2: curves on the edges, and neighbours that are spread out",
    claim="From corrupted X-rays a small MedViT with KAN layers and dilated neighbourhood attention tells tuberculosis "
    "better than one with the blocks of the first version, by AUC.",
    arms={
        "medvit v2": Arm(TellingByMedViT()),
        "medvit v1": Arm(TellingByMedViT(kan=False, local="convolution")),
        "without kan": Arm(TellingByMedViT(kan=False)),
        "without dilation": Arm(TellingByMedViT(local="plain")),
    },
    compare=("medvit v2", "medvit v1"),
    ablation=("medvit v2", "without kan"),
    metric="auc",
    score=corruption_rows,
    scales=scales(BRAINS, XRAYS, "medvit v2", "medvit v1", "without kan", budget=BUDGET),
    source="abstract, arXiv 2502.13693; official code, github.com/Omid-Nejati/MedViTV2 (MedViT.py, fasterkan.py), read "
    "in a copy",
    components=(
        Component(
            "Kolmogorov-Arnold layers in a transformer",
            "implemented",
            "with the bells of the official code, which stand in for the B-splines of KAN and cost less; two layers, "
            "twice as wide between. The ablation has a perceptron with as many weights in their place",
        ),
        Component(
            "dilated neighborhood attention",
            "implemented",
            "3 x 3 neighbours, one or ten places apart on 32 x 32 places, with a bias by relative position; in the "
            "code 7 x 7, by a fused kernel, without dilation. `without dilation` is an arm that `full` does not run",
        ),
        Component(
            "hierarchical hybrid of local and global feature perception",
            "simplified",
            "two LFP blocks, then LFP and GFP, then GFP, half a million weights; in the code 11 to 12 "
            "blocks in four stages. No squeeze-and-excitation, no dropped paths, no pre-training. The code reshapes "
            "maps to rows of channels without moving the channels' axis; here channels stay channels",
        ),
        Component(
            "corrupted medical images",
            "implemented",
            "12 of the 13 kinds that MedMNIST-C has for chest X-rays, each in one of five strengths, on test images "
            "alone; all of them together make one AUC, so a network whose scores move with the corruption loses, too. "
            "MedMNIST-C takes the mean of balanced errors, relative to AlexNet's",
        ),
        Component(
            "17 data sets of images",
            "simplified",
            "one: real X-rays of two hospitals, 128 x 128, with and without tuberculosis. Theirs are MedMNIST's and "
            "others, at 224 x 224",
        ),
        Component("computational complexity", "absent", "at this size it is not that of either version"),
    ),
)
