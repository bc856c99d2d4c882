"""Refining Focus in AI for Lung Cancer: lesion-centric or chest-region (Tushar, arXiv 2411.16823, 2024).

Does a classifier of cancer see more in a patch around the lesion, or in the whole region of the chest? Two networks of
one kind are trained at one hospital and tested there and elsewhere. Their AUCs are compared by DeLong's test, over all
and in subgroups. For scores x of m malignant and y of n benign nodules, ties counting half,

    AUC  =  mean over i, j of [x_i > y_j]
    V_i  =  mean over j of [x_i > y_j]      W_j  =  mean over i of [x_i > y_j]
    var  =  S_VV / m + S_WW / n             S: covariance, also between the scores of two networks

Two nodules of one patient are not independent: V and W are summed over a patient first (Obuchowski, Biometrics 1997),
which is DeLong's where everybody has one. Here nodules are drawn into real X-rays; Shenzhen's patients train, and
Montgomery is the other hospital. Both networks are SqueezeNets that start from ImageNet and see 96 x 96 pixels: of the
whole image, or of a third of it around the lesion, enlarged. On validation patients, one run each (seed 7), AUCs
were 0.68 and 0.92; nothing else was looked at.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.stats import norm
from torch import Tensor, nn

from medcook.cohorts import CohortTask
from medcook.data import Case
from medcook.recipes.findings._lesions import lesions
from medcook.recipes.findings._nodules import NoduleTask, bodies, has_nodule
from medcook.recipes.findings._settings import TellingNodules, diagnosis_rows, scales
from medcook.recipes.language._reading import Start
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.sampling import trained
from medcook.tasks import Budget

HOME = (("site", "Shenzhen"),)
BUDGET = Budget(steps=400, batch=16, checks=0)
OLD = 40
"""The first age that counts as old; about half of the patients are."""
SEXES = {"F": "women", "M": "men"}


def elsewhere(labels: Tensor) -> Tensor:
    """Label maps (B, H, W), moved to the other lung, and by a third of the image down (upper half) or up (lower half).

    A patch around what is there does not show the nodule, whose rays end 15 pixels of 96 from its middle.
    """
    height = labels.shape[1]
    moved = torch.zeros_like(labels)
    for new, label in zip(moved, labels.flip(2), strict=True):
        rows = bodies(label).any(1).nonzero()
        middle = float(rows.float().mean()) if len(rows) else height
        new.copy_(label.roll(round(height / 3) * (1 if middle < height / 2 else -1), 0))
    return moved


@dataclass(frozen=True)
class HomeTask(NoduleTask):
    """Only those who meet `keep` train, and everybody is scored."""

    @cached_property
    def val_patients(self) -> tuple[str, ...]:
        return super(CohortTask, self).val_patients


@dataclass
class Centred(TellingNodules):
    """One network and as many pixels for each: the whole image, the patch around the lesion, or one elsewhere."""

    rate: float = 5e-4
    start: Start = "imagenet"
    where: Literal["whole", "lesion", "elsewhere"] = "lesion"

    def view(self, images: Tensor, labels: Tensor) -> Tensor:
        if self.where == "whole":
            return images
        return lesions(images, labels if self.where == "lesion" else elsewhere(labels), images.shape[2])

    def attention(self, nets: nn.ModuleDict, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(N,) the share of the Grad-CAM that lies in the nodule, and (N,) the nodule's share of what is seen."""
        seen = self.view(images, labels)
        inside = self.view(bodies(labels)[:, None].float(), labels) > 0.5
        heat = grad_cam(nets["average"], seen)
        found = (heat * inside).flatten(1).sum(1) / heat.flatten(1).sum(1)
        return found, inside.float().flatten(1).mean(1)


def grad_cam(net: nn.Module, seen: Tensor) -> Tensor:
    """(N, 1, H, W) where a Reader finds what speaks for malignancy (Selvaraju et al., ICCV 2017).

    The gradient of the log odds by a map, averaged, is its weight in the last layer over the map's size: the
    derivative is known.
    """
    maps = net.maps(seen).float()
    weight = net.head.weight[1] - net.head.weight[0]
    heat = torch.einsum("nchw,c->nhw", maps, weight).relu()[:, None]
    return F.interpolate(heat, seen.shape[2:], mode="bilinear", align_corners=False)


@torch.no_grad()
def lesion_rows(fitted, case: Case) -> list[dict]:
    """`nodule_rows`, and what is known of patient and network.

    sex, age      of the patient; empty, or NaN, where not known
    inside, area  of the heat map the share inside the nodule, and the share that the nodule has of what is seen
    """
    rows = diagnosis_rows(fitted, case)
    images, labels = fitted.task.preparation.both(case)
    there = has_nodule(labels)
    if not rows:
        return []
    shares = zip(*fitted.method.attention(trained(fitted), images[there], labels[there]), strict=True)
    age, sex = case.attributes.get("age"), case.attributes.get("sex")
    known = {"sex": SEXES.get(sex, ""), "age": float("nan") if age is None else float(age)}
    return [
        row | known | {"inside": float(inside), "area": float(area)}
        for row, (inside, area) in zip(rows, shares, strict=True)
    ]


def delong(scores: np.ndarray, outcome: np.ndarray, patient: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUCs (K,) of scores (K, N), and their covariance (K, K) over patients; outcome (N,) bool, patient (N,).

    NaN throughout where there are fewer than two patients with either outcome.
    """
    ill, well = scores[:, outcome], scores[:, ~outcome]
    (who_ill, who_well), (m, n) = (patient[outcome], patient[~outcome]), (ill.shape[1], well.shape[1])
    count_ill, count_well, count = (len(np.unique(who)) for who in (who_ill, who_well, patient))
    if min(count_ill, count_well) < 2:
        return np.full(len(scores), np.nan), np.full((len(scores),) * 2, np.nan)
    won = (ill[:, :, None] > well[:, None]) + 0.5 * (ill[:, :, None] == well[:, None])
    auc = won.mean((1, 2))
    member = patient == np.unique(patient)[:, None]
    a = (won.mean(2) - auc[:, None]) @ member[:, outcome].T
    b = (won.mean(1) - auc[:, None]) @ member[:, ~outcome].T
    both = a @ b.T * count / (count - 1) / (m * n)
    alone = a @ a.T * count_ill / (count_ill - 1) / m**2 + b @ b.T * count_well / (count_well - 1) / n**2
    return auc, alone + both + both.T


def subgroups(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """{name: (N,) bool} of a table of `lesion_rows`: hospitals, sizes, and of whom it is known sexes and ages."""
    small = table["radius"] < table["radius"].median()
    found = {"all": np.ones(len(table), bool)} | {site: table["group"] == site for site in sorted(set(table["group"]))}
    found |= {"small": small, "large": ~small} | {name: table["sex"] == name for name in SEXES.values()}
    found |= {f"younger than {OLD}": table["age"] < OLD, f"{OLD} and older": table["age"] >= OLD}
    return {name: np.asarray(mask) for name, mask in found.items() if mask.any()}


def compared(one: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """A row for each subgroup: nodules, malignant, auc of both, difference with interval (low, high), p by DeLong.

    one, other  tables of two arms; of several replicates the mean AUC is compared, the networks taken as given
    """
    keys = ["patient_id", "case_id", "structure"]
    facts = one.drop_duplicates(keys).set_index(keys).sort_index()
    scores = []
    for table in (one, other):
        numbered = table if "replicate" in table else table.assign(replicate=0)
        scores.append(numbered.pivot(index=keys, columns="replicate", values="score").loc[facts.index].to_numpy().T)
    facts = facts.reset_index()
    weight = np.repeat([1, -1], [len(part) for part in scores]) / len(scores[0])
    rows = []
    for name, mask in subgroups(facts).items():
        outcome = facts["outcome"].to_numpy(float)[mask] == 1
        auc, covariance = delong(np.concatenate(scores)[:, mask], outcome, facts["patient_id"].to_numpy()[mask])
        effect, error = weight @ auc, np.sqrt(max(weight @ covariance @ weight, 0))
        rows.append(
            {
                "subgroup": name,
                "nodules": len(outcome),
                "malignant": int(outcome.sum()),
                "auc": auc[weight > 0].mean(),
                "other_auc": auc[weight < 0].mean(),
                "difference": effect,
                "low": effect - norm.ppf(0.975) * error,
                "high": effect + norm.ppf(0.975) * error,
                "p": 2 * norm.sf(abs(effect) / error) if error > 0 else 1.0 if effect == 0 else np.nan,
            }
        )
    return pd.DataFrame(rows)


def arms(start: Start, suffix: str = "") -> dict[str, Arm]:
    """The three arms; networks start from ImageNet or, where there is no network to fetch it, from nothing."""
    places = {"lesion patch": "lesion", "whole image": "whole", "patch elsewhere": "elsewhere"}
    return {f"{name}{suffix}": Arm(Centred(start=start, where=where)) for name, where in places.items()}


FULL, QUICK = arms("imagenet"), arms("random", ", from nothing")

recipe = Recipe(
    paper="lesion-centric",
    title="A patch around the nodule against the whole X-ray",
    claim="Trained at one hospital, a classifier that sees the patch around a nodule tells malignant from benign ones "
    "at this and another hospital with a higher AUC than the same classifier that sees the whole X-ray.",
    arms=FULL | QUICK,
    compare=("lesion patch", "whole image"),
    ablation=("lesion patch", "patch elsewhere"),
    scales=scales(
        HomeTask("embedded", side=48, versions=1, keep=(("site", "north"),), fold=0),
        HomeTask("chest_xray", keep=HOME, evaluation="test"),
        *FULL,
        budget=BUDGET,
        quick_arms=tuple(QUICK),
    ),
    metric="auc",
    score=lesion_rows,
    source="abstract, arXiv 2411.16823; the author's code of a later benchmark on the same data, "
    "github.com/fitushar/AI-in-Lung-Health-Benchmarking-Detection-and-Diagnostic-Models-Across-Multiple-CT-Scan-Datasets",
    components=(
        Component(
            "lesion-centric classifier",
            "implemented",
            "of 32 x 32 pixels, enlarged to the image's 96 x 96; there of 64 x 64 x 64 voxels of CT. The place of the "
            "lesion is given, at test too, as there. Nodules are drawn into real X-rays of 688 patients; only so is "
            "it known which are malignant",
        ),
        Component(
            "chest-region classifier",
            "simplified",
            "the whole X-ray, 96 x 96; there a slab of 512 x 512 x 8 voxels around the lesion, so that its height "
            "tells where to look. Same network, start, steps and number of pixels as the patch",
        ),
        Component(
            "internal and external validation",
            "implemented",
            "trained on Shenzhen's patients; column `group` tells their hospital's test patients (110) from "
            "Montgomery's (28). What is drawn follows the same rules at both, so that only the X-rays shift",
        ),
        Component(
            "subgroup analyses",
            "simplified",
            "hospital, size, and where known sex and age; neither histology nor makers of scanners are known",
        ),
        Component(
            "DeLong's test",
            "implemented",
            "`compared`, with nodules of one patient put together, and over the mean AUC of the replicates; no "
            "adjustment for the number of subgroups. The verdict comes of the book's own bootstrap",
        ),
        Component(
            "gradient-based visualization",
            "implemented",
            "Grad-CAM of the log odds; columns `inside` and `area` say how much of it lies in the nodule, and how much "
            "would by chance",
        ),
        Component(
            "probability distributions",
            "simplified",
            "column `score` holds each nodule's probability, from which the chapter can draw them",
        ),
    ),
)
