"""MeDSLIP: Medical Dual-Stream Language-Image Pre-training for Fine-grained Alignment.

Fan, Suvon, Zhou, Liu, Alabed, Osmani, Swift, Chen and Lu, arXiv 2403.10635, 2024. A report says what is seen
(pathology) and where (anatomy). An image is divided accordingly: of every patch x, a share m(x) goes to the pathology
stream and the rest to the anatomy stream. In each stream the texts of a book (signs; places) attend to its patches and
come back as answers p_s and a_r, from which three things are learnt that a report states or denies:

  presence  each answer alone: is there sign s, is place r affected?
  ICL       p_s and a_r of one image: is sign s at place r? Binary cross-entropy of <p_s, a_r>
  ProtoCL   p_s against the mean text of the places where it is, and the texts of those where it is not; likewise a_r
            against the texts of signs

Where a stream's attention lies is the grounding. It is measured on real reports: the map of the signs of a report that
names one side (the side is not told) is compared between both lungs. The score is the map's mean in the right lung
minus that in the left, and the AUC says how well it tells which side the radiologist wrote.

The comparison is with ConVIRT, which takes reports whole; its map is the similarity of every patch to the sentence. On
24 validation patients the AUC was 0.92 (ConVIRT 0.89), on 106 training patients, whose reports had been read, 0.67
(0.64). Nothing else was looked at, but for a first score, the share of patients in whom the named side was the higher
one: it measures mostly to which side a map leans in everybody.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook import evaluation
from medcook.data import Case
from medcook.methods import Moment
from medcook.precision import autocast
from medcook.recipes.language._findings import fields_of
from medcook.recipes.language._kept import READING, Remembering
from medcook.recipes.language._reading import FEW, scales
from medcook.recipes.language._reports import Facts, facts_of, reports_of
from medcook.recipes.language._streams import (
    PATHOLOGIES,
    Stated,
    TwoStreams,
    known_entropy,
    prototype_loss,
    stated,
)
from medcook.recipes.language.convirt import ConVIRT
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.sampling import trained
from medcook.tasks import Budget

HEAT = 0.1
LITTLE_LABELS = 0.9
"""The share of the steps that read: the score asks for what was read, the labels are hardly needed."""


@dataclass
class MeDSLIP(Remembering):
    """Reports as signs and places, in two streams.

    together      both are asked of one stream, which sees everything
    proto, intra  whether there are ProtoCL and ICL
    """

    share: float = READING
    together: bool = False
    proto: bool = True
    intra: bool = True

    def pretext_parts(self, model: nn.Module, inputs: int, dims: int) -> nn.Module:
        return nn.ModuleDict({"streams": TwoStreams(model.width, self.width, self.together)})

    def reading(self, nets: nn.ModuleDict, images: Tensor, reports: tuple[str, ...], now: Moment) -> Tensor:
        maps, streams = nets["model"].maps(images), nets["pretext"]["streams"]
        return sum(self.losses(streams, maps, Stated(*(part.to(maps.device) for part in stated(reports)))).values())

    def losses(self, streams: TwoStreams, maps: Tensor, truth: Stated) -> dict[str, Tensor]:
        """Each loss of feature maps (B, C, h, w) and of what their reports state."""
        found = streams(maps)
        with torch.autocast(maps.device.type, enabled=False):
            (what, _, signs), (where, _, places) = found["pathology"], found["anatomy"]
            losses = {
                "signs": known_entropy(streams.pathology.there(what)[..., 0], truth.signs),
                "places": known_entropy(streams.anatomy.there(where)[..., 0], truth.places),
            }
            if self.intra:
                agree = what @ where.transpose(1, 2) / what.shape[2] ** 0.5
                losses["intra"] = known_entropy(agree, truth.pairs)
            if self.proto:
                back = truth.pairs.transpose(1, 2)
                losses["sign prototypes"] = prototype_loss(streams.pathology.speak(what), truth.pairs, places, HEAT)
                losses["place prototypes"] = prototype_loss(streams.anatomy.speak(where), back, signs, HEAT)
            return losses


def sign_map(method: Remembering, reader: nn.ModuleDict, images: Tensor, signs: frozenset[str]) -> Tensor:
    """(B, h, w): where signs are, by what was read. Attention in the pathology stream, the mean over the signs; of
    another method the similarity of every patch to the signs' names."""
    maps = reader["model"].maps(images)
    if isinstance(method, MeDSLIP):
        where = reader["pretext"]["streams"](maps)["pathology"][1]
        return where[:, [PATHOLOGIES.index(sign) for sign in sorted(signs)]].mean(1)
    patches = reader["pretext"]["see"](maps.float().flatten(2).transpose(1, 2)).float()
    text = method.heard(reader, (" ".join(sorted(signs)),)).float()
    return (F.normalize(patches, dim=2) @ F.normalize(text, dim=1).T)[..., 0].unflatten(1, maps.shape[2:])


def lean(found: np.ndarray, lungs: np.ndarray) -> float:
    """The mean of a map (H, W) in the right lung minus that in the left, in the map's standard deviations over both."""
    regions = fields_of(lungs)
    right, left = (
        np.any([mask for (name, _), mask in regions.items() if name == side], axis=0) for side in ("right", "left")
    )
    if not right.any() or not left.any():
        return 0.0
    return float((found[right].mean() - found[left].mean()) / (found[right | left].std() + 1e-6))


def told_of(task, case: Case) -> Facts | None:
    """What the case's report states, if it names signs and one side; None if not.

    In the embedded cohort no report names a side; there a group stands for it, so that something can be measured.
    """
    if task.data.manifest.simulated:
        side = "right" if task.is_positive(case.attributes) else "left"
        return Facts(frozenset({side}), frozenset(), frozenset({"scars"}))
    facts = facts_of(reports_of(task.data).get(case.case_id, ""))
    return facts if len(facts.sides) == 1 and facts.signs else None


@torch.no_grad()
def side_rows(fitted, case: Case) -> list[dict]:
    """score (`lean` of the map of the signs that the case's report names), outcome (1: it names the right side) and
    pointed (whether the map's highest place within the lungs is on the named side)."""
    facts = told_of(fitted.task, case)
    if facts is None:
        return []
    reader, preparation = trained(fitted)["reader"], fitted.task.preparation
    images, lungs = preparation.images(case), preparation.labels(case).numpy() > 0
    with autocast(fitted.cost):
        maps = sign_map(fitted.method, reader, images, facts.signs).float()
    maps = F.interpolate(maps[:, None], images.shape[2:], mode="bilinear", align_corners=False)[:, 0].numpy()
    right = float("right" in facts.sides)
    pointed = [points_right(*pair) == bool(right) for pair in zip(maps, lungs, strict=True)]
    values = {"score": float(np.mean([lean(*pair) for pair in zip(maps, lungs, strict=True)])), "outcome": right}
    return [evaluation.row(case, "side", **values, pointed=float(np.mean(pointed)))]


def points_right(found: np.ndarray, lungs: np.ndarray) -> bool:
    """Whether the highest place of a map (H, W) within lungs (H, W) is in the right one."""
    inside = np.where(lungs, found, -np.inf)
    place = np.unravel_index(inside.argmax(), inside.shape)
    return any(mask[place] for (side, _), mask in fields_of(lungs).items() if side == "right")


def arms(start: str, suffix: str = "") -> dict[str, Arm]:
    """The arms with encoders that start from `imagenet` or `random`."""
    given = {"start": start, "share": LITTLE_LABELS}
    method = MeDSLIP(**given)
    found = {
        "two streams": method,
        "whole reports (ConVIRT)": ConVIRT(**given),
        "one stream": replace(method, together=True),
        "two streams, presence alone": replace(method, proto=False, intra=False),
    }
    return {name + suffix: Arm(each) for name, each in found.items()}


LARGE, SMALL = arms("imagenet"), arms("random", ", small encoder")
SCALES = scales(*LARGE, quick_arms=tuple(SMALL))
SCALES["full"] = replace(
    SCALES["full"], task=replace(SCALES["full"].task, labelled=FEW), budget=Budget(steps=400, batch=12, checks=0)
)

recipe = Recipe(
    paper="medslip",
    title="MeDSLIP: a report's signs and places, in two streams",
    claim="Where a report names one side, a map of its signs tells which it is better after reading signs and places "
    "in two streams than after reading whole reports (ConVIRT), by AUC.",
    arms=LARGE | SMALL,
    compare=("two streams", "whole reports (ConVIRT)"),
    ablation=("two streams", "one stream"),
    replicate="draw",
    metric="auc",
    score=side_rows,
    scales=SCALES,
    source="abstract; official code, github.com/Shef-AIRE/MeDSLIP",
    components=(
        Component(
            "anatomy-relevant and pathology-relevant streams",
            "implemented",
            "a learned share of every feature for each, a projection and a book of texts of its own. The share is "
            "between 0 and 1 here; in the official code it is any number. The ablation asks both books of one stream "
            "with all features, and keeps every loss",
        ),
        Component(
            "concepts from reports",
            "simplified",
            "8 signs, 2 sides and 3 fields, found by words; theirs are 75 and 51, found by RadGraph. What belongs "
            "together is what a report says between two commas. Where a report states no sign, none is there; signs "
            "that others leave out are unknown, as in the official code",
        ),
        Component(
            "texts attend to patches",
            "simplified",
            "one layer of attention for four, without attention among texts; texts are short descriptions of our own, "
            "read by a transformer block from random weights, for those of a knowledge base and a clinical BERT. An "
            "X-ray is about 7 x 7 patches of SqueezeNet",
        ),
        Component(
            "prototypical contrastive learning (ProtoCL)",
            "implemented",
            "as in the code, between streams: the answer of a sign meets the texts of its places, and that of a place "
            "those of its signs. Vectors are normalised, at a temperature of 0.1; all places that a sign is not at "
            "are negatives, in the code seven of 50",
        ),
        Component(
            "intra-image contrastive learning (ICL)",
            "implemented",
            "binary cross-entropy of all pairs that a report states or denies; products are divided by the root of "
            "their length",
        ),
        Component(
            "grounding",
            "implemented",
            "the attention map of a report's signs, scored by the side that the radiologist wrote, which the map is "
            "not told. Theirs is scored by boxes, which are not at hand. A reader is tried as reading left it, so "
            "the few steps with labels play no part",
        ),
        Component("fine-tuned classification", "absent", "it is measured in `benchx`, where MeDSLIP is an arm"),
        Component("zero-shot classification", "absent", "presence is learnt here, but not scored"),
        Component("segmentation, three public data sets", "absent", "they are not at hand"),
        Component("six other models", "absent", "ConVIRT alone"),
    ),
)
