"""CancerUniT: a unified model that detects, segments and diagnoses tumours of many organs (Chen, Xia, Yao, Yan, Zhang,
Lu et al., ICCV 2023; arXiv 2301.12291).

Readers look at everything; most networks at one organ. A mask transformer has queries of three groups, for organs, for
tumours in each organ (detection) and for each kind of tumour (diagnosis), and each group starts from what the group
above has found. With the decoder D, pixel features P, learnt queries q and the query p above each,

    o = D(q_organ),   d = D(q_detection + o_p),   c = D(q_diagnosis + d_p),   mask = sigmoid(P . w(query)).

Here the organs are the right and the left lung of chest X-rays, and nodules, cavities and patches are drawn into them.
The baseline is an assembly: an expert for each lung, which is told of that lung's findings alone. What was looked at,
once, in a seed that is not scored and on validation images: F1 0.86 of one network, 0.80 of the experts, with 0.6 and
1.0 false positives per image. Kinds were hardly told apart by either (0.41 and 0.40 right, of three).
"""

from copy import deepcopy
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from medcook import evaluation, metrics
from medcook.data import IGNORE, Case
from medcook.data.transforms import Augment
from medcook.language import mask_loss
from medcook.methods import Batch, Method, Moment
from medcook.methods.semi_supervised import NARROW
from medcook.recipes.findings._settings import AUGMENT, scales
from medcook.recipes.language._boxes import detections, matched
from medcook.recipes.language._findings import (
    FINDINGS,
    KINDS,
    SIDES,
    FindingsTask,
    Painted,
    Spoken,
    box_of,
    fields_of,
    matching,
)
from medcook.recipes.language._queries import QueriedUNet, dotted
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.sampling import trained
from medcook.tasks import Budget

LUNGS = {side: len(FINDINGS) + 1 + number for number, side in enumerate(SIDES)}
"""{side: label value} of what of a lung is no finding."""
BUDGET = Budget(steps=450, batch=12, checks=0)
REPORTED, OVERLAP = 0.5, 0.3
"""A connected part of a detection mask above this probability is reported; it is right if its box overlaps that of a
finding of the same lung by such a share of their union."""


@dataclass(frozen=True)
class PaintedLungs(Painted):
    """The same findings in the same images; the label map has the lungs around them, too."""

    def paint(self, image: np.ndarray, lungs: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        image, label = super().paint(image, lungs, rng)
        for (side, _), place in fields_of(lungs).items():
            label[place & (label == 0)] = LUNGS[side]
        return image, label


@dataclass(frozen=True)
class LungsTask(FindingsTask):
    """Findings, and the lungs that they are in."""

    painter: ClassVar[type[Painted]] = PaintedLungs

    @property
    def classes(self) -> int:
        return super().classes + len(LUNGS)

    @property
    def structures(self) -> dict[int, str]:
        named = {value: Spoken().name(value) for value in range(1, len(FINDINGS) + 1)}
        return named | {value: f"{side} lung" for side, value in LUNGS.items()}


TASK = LungsTask("chest_xray", evaluation="test")
QUICK = LungsTask("embedded", versions=1)


def asked(sides: tuple[str, ...]) -> tuple[list[tuple[int, ...]], ...]:
    """The label values that each query means, for organs, detection and diagnosis of these lungs.

    The query above number k of a group is number k // (its size / the size of the group above).
    """
    return (
        [(LUNGS[side], *matching(side=side)) for side in sides],
        [matching(side=side) for side in sides],
        [matching(side=side, kind=kind) for side in sides for kind in KINDS],
    )


class HierarchicalUNet(QueriedUNet):
    """Images (B, C, H, W) to logits of masks (B, 5 lungs, H, W) in the order of `asked`; queries are learnt.

    hierarchy  a group of queries starts from what the group above has found; without, all start from themselves
    """

    def __init__(self, inputs: int, channels: tuple[int, ...], width: int, lungs: int, hierarchy: bool):
        super().__init__(inputs, channels, width, layers=1)
        del self.text
        self.hierarchy = hierarchy
        self.queries = nn.ParameterList(torch.randn(count * lungs, width) for count in (1, 1, len(KINDS)))

    def forward(self, images: Tensor) -> Tensor:
        maps = self.encode(images)
        found: list[Tensor] = []
        for queries in self.queries:
            started = queries.expand(len(images), -1, -1)
            if found and self.hierarchy:
                above = found[-1]
                started = started + above.repeat_interleave(len(queries) // above.shape[1], dim=1)
            nobody = torch.zeros(started.shape[:2], dtype=torch.bool, device=images.device)
            found.append(self.ask(maps, started, nobody))
        return dotted(self.pixels(maps), self.mask(torch.cat(found, 1)))


class Assembly(nn.Module):
    """A network for each lung; the answers of all are put in the order of `asked`."""

    def __init__(self, experts: list[HierarchicalUNet]):
        super().__init__()
        self.experts = nn.ModuleList(experts)

    def forward(self, images: Tensor) -> Tensor:
        apart = [expert(images).split([len(queries) for queries in expert.queries], 1) for expert in self.experts]
        return torch.cat([masks for group in zip(*apart, strict=True) for masks in group], 1)


def masks_of(labels: Tensor, groups: tuple[list[tuple[int, ...]], ...]) -> Tensor:
    """(B, S, H, W) uint8: 1 where label maps (B, H, W) have a value that a query means, `IGNORE` where they say
    nothing."""
    meant = [torch.tensor(values, dtype=labels.dtype, device=labels.device) for group in groups for values in group]
    found = torch.stack([torch.isin(labels, values) for values in meant], 1)
    return found.byte().masked_fill((labels == IGNORE)[:, None], IGNORE)


def query_loss(logits: Tensor, labels: Tensor, sides: tuple[str, ...]) -> Tensor:
    """Cross-entropy and Dice of every mask (B, S, H, W); the three groups of queries count alike."""
    groups = asked(sides)
    sizes = [len(group) for group in groups]
    pairs = zip(logits.split(sizes, 1), masks_of(labels, groups).split(sizes, 1), strict=True)
    return sum(mask_loss(found.flatten(0, 1), true.flatten(0, 1), each=True) for found, true in pairs) / len(groups)


@dataclass
class UniT(Method):
    """One network for both lungs, or an assembly of experts, one of which learns in each step.

    width      of queries;   hierarchy  see `HierarchicalUNet`
    assembled  an expert for each lung: as many steps in all, and each is told of the findings of its lung alone
    """

    channels: tuple[int, ...] = NARROW
    augmentation: Augment = field(default_factory=lambda: AUGMENT)
    width: int = 64
    hierarchy: bool = True
    assembled: bool = False

    axes = 2
    trial = QUICK

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        alone = [1] * len(SIDES) if self.assembled else [len(SIDES)]
        nets = [HierarchicalUNet(inputs, self.channels, self.width, lungs, self.hierarchy) for lungs in alone]
        model = Assembly(nets) if self.assembled else nets[0]
        model.classes = classes
        return nn.ModuleDict({"model": model, "average": deepcopy(model).requires_grad_(False)})

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        if not self.assembled:
            return query_loss(nets["model"](labelled.images), labelled.labels, SIDES)
        turn = now.step % len(SIDES)
        return query_loss(nets["model"].experts[turn](labelled.images), labelled.labels, SIDES[turn : turn + 1])

    def answer(self, nets: nn.ModuleDict, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Probabilities of masks: organs (B, lungs, H, W), findings (B, lungs, H, W), kinds (B, lungs, kinds, H, W)."""
        found = nets["average"](images).sigmoid()
        organs, detected, diagnosed = found.split([len(group) for group in asked(SIDES)], 1)
        return organs, detected, diagnosed.unflatten(1, (len(SIDES), len(KINDS)))

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """Class probabilities (B, classes, H, W): of a finding, that it is there and of its kind, shared by its values;
        of a lung, that nothing is there. What is left is background."""
        organs, detected, diagnosed = self.answer(nets, images)
        kinds = detected[:, :, None] * diagnosed / diagnosed.sum(2, keepdim=True).clamp_min(1e-6)
        share = len(KINDS) * len(SIDES) / len(FINDINGS)
        found = [share * kinds[:, SIDES.index(each.side), KINDS.index(each.kind)] for each in FINDINGS]
        found += [(organs * (1 - detected))[:, number] for number in range(len(SIDES))]
        scores = torch.stack(found, 1)[:, : nets["average"].classes - 1]
        total = scores.sum(1, keepdim=True)
        return torch.cat([(1 - total).clamp_min(0), scores], 1) / total.clamp_min(1)


def reported(probability: np.ndarray, label: np.ndarray, side: str) -> list[int]:
    """Of one lung's detection mask (H, W): how many findings are rightly reported, wrongly reported, and missed."""
    true = [box_of(label == value) for value in matching(side=side) if (label == value).any()]
    right = [is_right for _, is_right in matched(detections(probability, REPORTED), true, OVERLAP)]
    return [sum(right), len(right) - sum(right), len(true) - sum(right)]


def share(part: float, whole: float) -> float:
    """NaN of nothing."""
    return float(part / whole) if whole else float("nan")


def dice(found: np.ndarray, truth: np.ndarray) -> float:
    """Of masks; NaN where both are empty."""
    return metrics.dice(found, truth) if found.any() or truth.any() else float("nan")


@torch.no_grad()
def unit_rows(fitted, case: Case) -> list[dict]:
    """One row for all images of a patient and both lungs of each:

    f1, precision, sensitivity, false_positives  of what is reported; the last per image
    diagnosed  the share of true findings in whose mask the kind with the highest mean probability is the right one
    dice, dice_lungs  of detection masks and of lungs, findings included, above a probability of one half
    """
    nets, nan = trained(fitted), float("nan")
    images, labels = fitted.task.preparation.both(case)
    organs, detected, diagnosed = (part.float().numpy() for part in fitted.method.answer(nets, images))
    truth = masks_of(labels, asked(SIDES)).numpy() == 1
    counts, named, overlaps = np.zeros(3), [], {"dice": [], "dice_lungs": []}
    for number, label in enumerate(labels.numpy()):
        for k, side in enumerate(SIDES):
            counts += reported(detected[number, k], label, side)
            overlaps["dice_lungs"].append(dice(organs[number, k] > 0.5, truth[number, k]))
            overlaps["dice"].append(dice(detected[number, k] > 0.5, truth[number, len(SIDES) + k]))
            for value in matching(side=side):
                if (label == value).any():
                    kind = diagnosed[number, k][:, label == value].mean(1).argmax()
                    named.append(KINDS[kind] == FINDINGS[value - 1].kind)
    right, wrong, missed = counts
    values = {
        "f1": share(2 * right, 2 * right + wrong + missed),
        "precision": share(right, right + wrong),
        "sensitivity": share(right, right + missed),
        "false_positives": float(wrong / len(labels)),
        "diagnosed": share(sum(named), len(named)),
    }
    values |= {name: float(np.nanmean(each)) if np.isfinite(each).any() else nan for name, each in overlaps.items()}
    return [evaluation.row(case, "findings", **values)]


recipe = Recipe(
    paper="unit",
    title="CancerUniT: organs, what is in them and what it is, asked in this order",
    claim="One network for both lungs detects findings at a higher F1 than an assembly of an expert for each lung.",
    arms={
        "experts": Arm(UniT(assembled=True)),
        "unit": Arm(UniT()),
        "flat queries": Arm(UniT(hierarchy=False)),
    },
    compare=("unit", "experts"),
    ablation=("unit", "flat queries"),
    metric="f1",
    score=unit_rows,
    scales=scales(QUICK, TASK, budget=BUDGET),
    source="abstract, arXiv 2301.12291",
    components=(
        Component(
            "queries for organs, detection and diagnosis",
            "implemented",
            "for each lung one for the organ, one for its findings and three for kinds. A query has one meaning from "
            "the start; the paper's loss was not at hand, and here it is cross-entropy and Dice of each mask",
        ),
        Component(
            "hierarchy of queries",
            "implemented",
            "what a query has found is added to the start of those below it. Known from the abstract: the paper's own "
            "formula was not at hand. The ablation adds nothing, with the same weights and steps",
        ),
        Component(
            "masks as products of queries and pixels",
            "implemented",
            "a U-Net's pixel features, a transformer decoder of one layer over its features of every scale",
        ),
        Component(
            "assembly of single-organ experts",
            "simplified",
            "the same network with the queries of one lung, where the paper has a network of another kind for each of "
            "eight organs. Experts take turns: as many steps in all, so each has half of them, and twice the weights",
        ),
        Component(
            "fewer false positives",
            "implemented",
            "metric f1, since fewer reports alone would be fewer false ones; columns false_positives, precision and "
            "sensitivity. What overlaps a finding's box by 0.3 of their union is right, in every arm",
        ),
        Component("organs beside findings", "implemented", "the label map also has the lungs, as drawn by people"),
        Component(
            "eight cancers in 10,042 CTs",
            "absent",
            "not at hand: two lungs in chest X-rays, with findings of three kinds, drawn, in both: images, not volumes",
        ),
    ),
)
