"""Frechet Radiomic Distance (Konz, Osuala, Verma, Chen, Gu, Dong, Chen, Marshall, Garrucho, Kushibar, Lang, Kim, Grimm,
Lewin, Duncan, Schnabel, Diaz, Lekadir and Mazurowski, Medical Image Analysis 2026; arXiv 2412.01496).

How far apart are two sets of images? FID asks a network that knows photographs. FRD asks for radiomic features, which
were defined for medical images: of grey values and of textures, of the image and of filtered versions of it, each in
units of its standard deviation over the reference set. With a and b the features of two sets, m and C their mean and
covariance, and mean and deviation from a,

    standardised  f' = (f - mean) / deviation
    distance      d^2 = |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))             FRD = log d    (eq. 3)
    one image     score = |f' - m_a|, with an alarm above mean + 1.645 deviations of the score in the reference set

Here the reference are X-rays of one hospital, and the question is whether one is of another. The frame of an X-ray, its
black margins and markers, would give the hospital away: we look at the inner five eighths of the sides. The task and
how strong the corruptions are were chosen on patients of fold 4, which is not scored. No training is needed; the loop
takes a few steps of a centre of features that no score looks at, so that a change of the features changes a loss.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import NamedTuple
from zlib import crc32

import numpy as np
import torch
from torch import Tensor, nn

from medcook import evaluation
from medcook.cohorts import CohortTask, meets
from medcook.data import Case
from medcook.data.transforms import NONE, Augment
from medcook.domains import Look, shown
from medcook.errors import MedcookError
from medcook.methods import Batch, Moment
from medcook.pooled import auc
from medcook.preparation import Preparation
from medcook.recipes.domain_shift._radiomics import Describing
from medcook.recipes.recipe import Arm, Component, Recipe, Scale
from medcook.sampling import once
from medcook.tasks import Budget

NORMAL_95 = 1.6449
"""Where 95% of a normal distribution lie below."""

CORRUPTED = MappingProxyType({"noisy": Look(noise=0.05), "blurred": Look(blur=0.5), "shaded": Look(shade=0.1)})


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Frechet distance of Gaussians fitted to features a (N, D) and b (M, D).

    The trace of the root of C_a C_b is the sum of the singular values of A B', where A' A = C_a and B' B = C_b: exact
    also where there are fewer images than features.
    """
    roots = [(x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b)]
    shared = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    apart = np.square(a.mean(0) - b.mean(0)).sum()
    return float(apart + sum(np.square(root).sum() for root in roots) - 2 * shared)


class Reference(NamedTuple):
    """Mean and deviation (D,) of the features of a set of images; a deviation of 0 marks a feature without a say."""

    mean: np.ndarray
    deviation: np.ndarray

    def standardised(self, features: np.ndarray) -> np.ndarray:
        """(N, D'), in deviations from the mean; what is constant in the reference is left out."""
        kept = self.deviation > 0
        return (features[:, kept] - self.mean[kept]) / self.deviation[kept]

    def scores(self, features: np.ndarray) -> np.ndarray:
        """(N,) Euclidean distances from the reference's mean."""
        return np.linalg.norm(self.standardised(features), axis=1)


def reference_of(features: np.ndarray, standardise: bool = True) -> Reference:
    """Of features (N, D); without standardisation every deviation counts as 1."""
    mean, deviation = features.mean(0), features.std(0)
    deviation[deviation <= 1e-6 * np.maximum(1, abs(mean))] = 0
    return Reference(mean, deviation if standardise else np.ones_like(deviation))


def frd(reference: np.ndarray, others: np.ndarray, standardise: bool = True) -> float:
    """log d of features (N, D) and (M, D); minus infinity where the sets are the same."""
    standard = reference_of(reference, standardise).standardised
    squared = frechet(standard(reference), standard(others))
    return 0.5 * float(np.log(squared)) if squared > 1e-9 else -np.inf


def nfrd(reference: np.ndarray, others: np.ndarray) -> float:
    """How far a set is out of the domain, 0 to 1: 2 |AUC - 1/2| of the scores of single images."""
    known = reference_of(reference)
    scores = np.concatenate([known.scores(features) for features in (reference, others)])
    return 2 * abs(auc(scores, np.repeat([0, 1], [len(reference), len(others)])) - 0.5)


def stability(
    reference: np.ndarray, others: np.ndarray, counts: Sequence[int], draws: int = 10, seed: int = 0
) -> dict[int, tuple[float, float]]:
    """{n: (mean, deviation) of the FRD between n images of each set, drawn anew `draws` times}."""
    rng = np.random.default_rng(seed)
    pick = lambda features, n: features[rng.choice(len(features), n, replace=False)]  # noqa: E731
    found = {n: [frd(pick(reference, n), pick(others, n)) for _ in range(draws)] for n in counts}
    return {n: (float(np.mean(values)), float(np.std(values))) for n, values in found.items()}


@dataclass(frozen=True)
class InDomainTask(CohortTask):
    """Only those who meet `keep` are the reference, and everybody is scored; images are cut to `side` pixels."""

    side: int = 80

    @cached_property
    def preparation(self) -> Preparation:
        return replace(super().preparation, size=(self.side, self.side))

    @cached_property
    def val_patients(self) -> tuple[str, ...]:
        return super(CohortTask, self).val_patients


class Centre(nn.Module):
    """A point (D,) among features."""

    def __init__(self, size: int, classes: int):
        super().__init__()
        self.point = nn.Parameter(torch.zeros(size))
        self.classes = classes


@dataclass
class Domain(Describing):
    """A reference set in a space of features.

    standardised  whether features are in units of their deviation over the reference
    """

    standardised: bool = True
    augmentation: Augment = NONE

    axes = 2

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        if dims != 2:
            raise MedcookError("Domain describes images, not volumes.", "Choose a task on slices.")
        model = Centre(self.size(), classes)
        return nn.ModuleDict({"model": model, "average": deepcopy(model).requires_grad_(False)})

    def augment(self, batch: Batch, rng: torch.Generator) -> Batch:
        """Images are described as they are."""
        return batch

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        """The squared distance of the centre; no score looks at it."""
        return self.away(nets["model"], labelled.images).mean()

    def away(self, centre: Centre, images: Tensor) -> Tensor:
        """(B,) mean squared differences, of features on a scale that is logarithmic far from zero."""
        point = centre.point.float()
        return (torch.from_numpy(self.describe(images)).to(point).arcsinh() - point).square().mean(1)

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """(B, classes, H, W): the second class is all that is far from the centre, the same all over an image."""
        centre = nets["average"]
        far = 1 - (-self.away(centre, images)).exp()
        found = torch.zeros(len(images), centre.classes, device=images.device)
        found[:, 0], found[:, 1] = 1 - far, far
        return found[:, :, None, None].expand(-1, -1, *images.shape[2:])


def domain_rows(fitted, case: Case) -> list[dict]:
    """The case's score, whether it is of another hospital (`outcome`), and whether the score raises an `alarm`.

    noisy, blurred, shaded  of the reference's hospital: whether the image raises an alarm after it was corrupted
    frd_in, frd_out         of the run: log d of the reference and of who is held out, from this hospital and others
    """
    task, method = fitted.task, fitted.method
    reference, alarm, distances = once(fitted, "reference", lambda: prepared(fitted))
    images, out = task.preparation.images(case), not meets(case.attributes, task.keep)
    score = lambda seen: float(reference.scores(method.describe(seen)).mean())  # noqa: E731
    values = {"score": score(images), "outcome": float(out), "alarm": float(score(images) > alarm)}
    for name, look in CORRUPTED.items():
        rng = np.random.default_rng(crc32(f"{case.case_id} {name}".encode()))
        values[name] = float("nan") if out else float(score(shown(images, look, rng)) > alarm)
    return [evaluation.row(case, "image", **values, **distances)]


def prepared(fitted) -> tuple[Reference, float, dict[str, float]]:
    """The reference, the score from which on there is an alarm, and the distances of both kinds of held-out images."""
    task, method = fitted.task, fitted.method
    features = method.describe(task.samples("labelled").images)
    reference = reference_of(features, method.standardised)
    scores = reference.scores(features)
    held = {"frd_in": [], "frd_out": []}
    for case in task.cases("val"):
        side = "frd_in" if meets(case.attributes, task.keep) else "frd_out"
        held[side].append(method.describe(task.preparation.images(case)))
    distances = {
        side: frd(features, np.concatenate(found), method.standardised) if sum(map(len, found)) > 1 else float("nan")
        for side, found in held.items()
    }
    return reference, float(scores.mean() + NORMAL_95 * scores.std()), distances


recipe = Recipe(
    paper="frd",
    title="Radiomic features tell domains apart",
    claim="The distance from a hospital's X-rays in standardised radiomic features tells those of another hospital "
    "better than the distance in the ImageNet features of FID.",
    arms={
        "ImageNet features": Arm(Domain(features="imagenet", standardised=False)),
        "radiomics": Arm(Domain()),
        "without standardisation": Arm(Domain(standardised=False)),
        "without filters": Arm(Domain(filtered=False)),
        "standardised ImageNet features": Arm(Domain(features="imagenet")),
        "random features": Arm(Domain(features="random", standardised=False)),
    },
    compare=("radiomics", "ImageNet features"),
    ablation=("radiomics", "without standardisation"),
    replicate="fold",
    metric="auc",
    score=domain_rows,
    scales={
        "quick": Scale(
            InDomainTask("embedded", keep=(("site", "north"),)),
            Budget(steps=2, batch=4, checks=0),
            replicates=1,
            arms=("random features", "radiomics", "without standardisation"),
        ),
        "full": Scale(
            InDomainTask("chest_xray", keep=(("site", "Shenzhen"),)),
            Budget(steps=4, batch=8, checks=0),
            arms=("ImageNet features", "radiomics", "without standardisation", "without filters"),
        ),
    },
    source="the official code, github.com/RichardObi/frd-score, with its documentation, and the abstract",
    components=(
        Component(
            "standardised radiomic features",
            "implemented",
            "first order, GLCM, GLRLM, GLSZM and NGTDM as PyRadiomics defines them, 76 an image (total energy is "
            "energy here), over all pixels, whose grey levels are a tenth of a standard deviation wide (in the "
            "official code a twentieth) and at most 128. In deviations over the reference set, as there; the ablation "
            "takes the deviations away",
        ),
        Component(
            "filtered versions of the image",
            "implemented",
            "as in the official code the four bands of an undecimated `coif1` transform, and Laplacians of Gaussians, "
            "here two widths (2 and 4 pixels) of the four. On fold 4 hospitals were told apart about as well without "
            "them, but little of the blur was noticed",
        ),
        Component(
            "Frechet distance",
            "implemented",
            "log d as in the paper's third equation, by singular values, so that sets with fewer images than features "
            "need no correction; columns `frd_in` and `frd_out`",
        ),
        Component(
            "out-of-domain detection",
            "implemented",
            "of images as in the official code: distance from the reference's mean, alarms above 95% of a normal "
            "distribution; of whole sets as `nfrd`. One pair of hospitals, where the paper has many data sets",
        ),
        Component(
            "comparison with FID",
            "simplified",
            "FID with SqueezeNet's features in place of Inception's: the ImageNet weights at hand. Images of 80 pixels "
            "are seen as they are. As in FID the features are not standardised; an arm that `full` does not run does",
        ),
        Component("stability at low sample sizes", "implemented", "`stability`, for the chapter's figure"),
        Component(
            "sensitivity to image corruptions",
            "implemented",
            "columns `noisy`, `blurred` and `shaded`: how often a mild one raises an alarm (on fold 4 the blur did); "
            "no adversarial attacks",
        ),
        Component(
            "evaluation of image translation and generation",
            "absent",
            "no set of trained generators is at hand; the same goes for what radiologists think of images",
        ),
    ),
)
