"""Dual-path co-training for zones that touch (Das, Ghosh and Stober, 2023, arXiv 2309.12970).

One path of the network for each group of connected structures. Where groups overlap, two paths name the same class:
in a second stage of training an unsupervised loss penalises that their predictions of it differ, on images with and
without labels. Each path also learns a second task, here the signed distance to the border of its structures.

The paper's zones are the prostate's; this recipe runs on the heart, where the right ventricle touches the myocardium
and the myocardium the left ventricle.
"""

from copy import deepcopy
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.data import IGNORE
from medcook.errors import MedcookError
from medcook.losses import find_loss
from medcook.methods import Batch, Method, Moment
from medcook.methods.semi_supervised import NARROW, forgetful
from medcook.networks import UNet
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.recipes.semi_supervised._settings import FULL, QUICK, SUPERVISED


class DualPath(nn.Module):
    """A U-Net with one encoder and, for each entry of `outputs`, a decoder and a head with so many outputs."""

    def __init__(self, *, inputs: int, outputs: list[int], channels: tuple[int, ...], dims: int):
        super().__init__()
        paths = [UNet(inputs=inputs, classes=count, channels=channels, dims=dims) for count in outputs]
        self.encoder, self.pool, self.mode = paths[0].down, paths[0].pool, paths[0].mode
        self.decoders = nn.ModuleList(path.up for path in paths)
        self.heads = nn.ModuleList(path.head for path in paths)

    def forward(self, image: Tensor) -> list[Tensor]:
        """The outputs (B, outputs, *size) of every path."""
        skips = [self.encoder[0](image)]
        for block in self.encoder[1:]:
            skips.append(block(self.pool(skips[-1], 2)))
        return [head(self.decode(blocks, skips)) for blocks, head in zip(self.decoders, self.heads, strict=True)]

    def decode(self, blocks: nn.ModuleList, skips: list[Tensor]) -> Tensor:
        """The last feature map of one path."""
        x = skips[-1]
        for block, skip in zip(reversed(blocks), reversed(skips[:-1]), strict=True):
            x = F.interpolate(x, size=skip.shape[2:], mode=self.mode, align_corners=False)
            x = block(torch.cat([skip, x], dim=1))
        return x


def own_labels(labels: Tensor, group: tuple[int, ...]) -> Tensor:
    """Labels (B, *size) as a path sees them: 1, 2, ... for its structures, 0 for the rest; IGNORE stays."""
    seen = torch.where(labels == IGNORE, IGNORE, 0).to(labels.dtype)
    for place, value in enumerate(group, start=1):
        seen[labels == value] = place
    return seen


def disagreement(one: Tensor, other: Tensor) -> Tensor:
    """Squared difference of two probability maps of a class (B, *size), as a share of their squares: 0 to 1."""
    return (one - other).square().sum() / (one.square() + other.square()).sum().clamp_min(1e-3)


def co_training(logits: list[Tensor], groups: tuple[tuple[int, ...], ...]) -> Tensor:
    """The mean disagreement over all pairs of paths that name the same structure."""
    soft = [one.softmax(1) for one in logits]
    named = [{value: soft[path][:, place] for place, value in enumerate(group, 1)} for path, group in enumerate(groups)]
    pairs = [(a[value], b[value]) for i, a in enumerate(named) for b in named[i + 1 :] for value in a.keys() & b.keys()]
    return torch.stack([disagreement(*pair) for pair in pairs]).mean()


def fuse(logits: list[Tensor], groups: tuple[tuple[int, ...], ...], classes: int) -> Tensor:
    """Logits (B, classes, *size): of each structure, the mean over its paths of its log-odds against the rest."""
    odds = [[] for _ in range(classes)]
    for one, group in zip(logits, groups, strict=True):
        for place, value in enumerate(group, start=1):
            odds[value].append(one[:, place] - one[:, 0])
    rest = torch.zeros_like(logits[0][:, 0])
    return torch.stack([rest, *(torch.stack(several).mean(0) for several in odds[1:])], dim=1)


def signed_distance(labels: Tensor, classes: int, reach: int) -> Tensor:
    """(B, classes - 1, *size) distance of every voxel from the border of each structure, -1 outside to 1 inside.

    In chessboard steps, as a share of `reach`; farther counts the same. The edge of the image is no border.
    """
    pool = F.max_pool2d if labels.ndim == 3 else F.max_pool3d
    inside = torch.stack([labels == value for value in range(1, classes)], dim=1).float()
    total = torch.zeros_like(inside)
    for sign, near in ((1, 1 - inside), (-1, inside)):
        for _ in range(reach):
            total += sign * (1 - near)
            near = pool(near, 3, stride=1, padding=1)
    return total / reach


@dataclass
class DualPathCoTraining(Method):
    """One path for each group of connected structures; from `start` on, paths that name the same one must agree.

    groups    the structures of each path; together they name all
    start     share of the training after which the second stage begins
    weight    of the disagreement; 0 takes the second stage away
    distance  weight of the second task; 0 takes it away
    reach     distances are cut off at so many voxels
    """

    channels: tuple[int, ...] = NARROW
    groups: tuple[tuple[int, ...], ...] = ((1, 2), (2, 3))
    start: float = 0.5
    weight: float = 1.0
    distance: float = 1.0
    reach: int = 8

    uses_unlabelled = True

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        """`model` gives, for each path, logits of the rest and its structures, then a distance for each of them."""
        if {value for group in self.groups for value in group} != set(range(1, classes)):
            raise MedcookError(
                f"The groups {self.groups} must name the structures 1 to {classes - 1}.", "Set `groups`."
            )
        outputs = [2 * len(group) + 1 for group in self.groups]
        model = DualPath(inputs=inputs, outputs=outputs, channels=self.channels, dims=dims)
        return nn.ModuleDict({"model": model, "average": deepcopy(model).requires_grad_(False)})

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        """Both tasks of every path on labelled images; in the second stage, agreement of the paths on all images."""
        logits, distances = self.split(nets["model"](labelled.images))
        loss = self.supervised(logits, distances, labelled.labels)
        if now.fraction < self.start:
            return loss
        if unlabelled is not None:
            with forgetful(nets["model"]):
                unseen, _ = self.split(nets["model"](unlabelled.images))
            logits = [torch.cat(pair) for pair in zip(logits, unseen, strict=True)]
        return loss + self.weight * co_training(logits, self.groups)

    def split(self, outputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Logits and distances of every path."""
        parts = [one.float().split([len(g) + 1, len(g)], dim=1) for one, g in zip(outputs, self.groups, strict=True)]
        return [logits for logits, _ in parts], [distances for _, distances in parts]

    def supervised(self, logits: list[Tensor], distances: list[Tensor], labels: Tensor) -> Tensor:
        """The sum over the paths of the segmentation loss and the squared error of the distances."""
        known = (labels != IGNORE)[:, None]
        classes = 1 + max(value for group in self.groups for value in group)
        truth = signed_distance(labels, classes, self.reach)
        total = sum(
            find_loss(self.loss)(one, own_labels(labels, g)) for one, g in zip(logits, self.groups, strict=True)
        )
        for one, group in zip(distances, self.groups, strict=True):
            error = (one - truth[:, [value - 1 for value in group]]).square() * known
            total = total + self.distance * error.sum() / (known.sum() * len(group)).clamp_min(1)
        return total

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """Class probabilities of the paths' fused logits."""
        logits, _ = self.split(nets["average"](images))
        return fuse(logits, self.groups, 1 + max(value for group in self.groups for value in group)).softmax(1)


recipe = Recipe(
    paper="pirads-zones",
    title="Co-training motivated multi-task dual-path network",
    claim="With all labels, two paths for connected structures, fine-tuned to agree on the one that they share, have a "
    "lower average symmetric surface distance than a single path.",
    arms={
        "single path": Arm(SUPERVISED),
        "dual-path": Arm(DualPathCoTraining()),
        "without co-training": Arm(DualPathCoTraining(weight=0.0)),
        "without second task": Arm(DualPathCoTraining(distance=0.0)),
    },
    compare=("dual-path", "single path"),
    ablation=("dual-path", "without co-training"),
    replicate="draw",
    metric="assd",
    scales={
        "quick": QUICK,
        "full": replace(
            FULL,
            task=replace(FULL.task, labelled=70),
            arms=("single path", "dual-path", "without co-training"),
        ),
    },
    components=(
        Component(
            "a path for each group of connected zones",
            "implemented",
            "One decoder for each group on a shared encoder; a path knows its own structures and the rest. Of the "
            "prostate's zones no data is at hand: right ventricle and myocardium, myocardium and left ventricle.",
        ),
        Component(
            "unsupervised fine-tuning on disagreement",
            "implemented",
            "Squared difference of both paths' probabilities of the shared structure, as a share of their squares, in "
            "the second half of the training, beside the supervised loss (our reading). The rest is not compared: "
            "it holds other structures in each path.",
        ),
        Component(
            "one prediction from both paths",
            "implemented",
            "Log-odds of a structure against the path's rest, averaged over the paths that know it (our choice).",
        ),
        Component(
            "multi-task learning",
            "simplified",
            "The abstract does not name the second task and the text was not at hand; here each path regresses the "
            "signed distance to the border of its structures.",
        ),
        Component(
            "prostate zones after PI-RADS v2",
            "absent",
            "No prostate images are at hand; the mechanism is run on hearts.",
        ),
    ),
    published={
        "surface distance, improvement over the baseline in %, peripheral zone": 7.56,
        "transition zone, %": 11.00,
        "distal prostatic urethra, %": 58.43,
        "anterior fibromuscular stroma, %": 19.67,
    },
    source="abstract, arXiv 2309.12970",
)
