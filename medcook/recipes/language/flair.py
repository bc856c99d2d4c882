"""FLAIR: a foundation language-image model of the retina, encoding expert knowledge in text supervision.

Silva-Rodríguez, Chakor, Kobbi, Dolz and Ben Ayed, Medical Image Analysis 99, 103357, 2025 (arXiv 2308.07898, 2023).
Most images come with a category and no report. A text encoder learns little from names; so a category is said in the
words of an expert, by what it looks like. With v an image's and t a text's unit vector, and G the images of a batch
that have the same category, G_ij = 1, made to sum to 1 in each row,

  text          "a photograph of" and, drawn anew each time, the category's name or one of its descriptions
  contrast      the mean of cross-entropy(s v t', G) and cross-entropy(s t v', G), s learned
  zero-shot     s v w_c', w_c the mean text over all descriptions of category c
  linear probe  the encoder stands still; one layer on its features, before the projection, learns from few labels

Architecture and reader of the published checkpoint are in `medcook.networks.flair`; the weights themselves are not at
hand. The claim is tested in miniature, on chest X-rays: categories are the signs that radiologists' reports state. On
validation patients, with a draw of labels that is not scored, the AUC was 0.85, and 0.74 of the network that was
trained in full; nothing else was looked at.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.cohorts import outcome_rows
from medcook.data import Case
from medcook.language import TextEncoder, one_of
from medcook.methods import Batch, Moment
from medcook.methods.classification import image_labels
from medcook.methods.contrastive import HIGHEST_SCALE, contrast
from medcook.networks.flair import Projection
from medcook.precision import autocast
from medcook.recipes.language._expert import DESCRIPTIONS, NAMES
from medcook.recipes.language._kept import READING, Remembering, longer_scales
from medcook.recipes.language._reading import Reader, Unread
from medcook.recipes.language._reports import facts_of
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.sampling import once, trained

CAPTION = "a chest X-ray of {}"
CATEGORIES = tuple(NAMES)
SHOTS = 20
"""Labelled patients: ten with tuberculosis, ten without."""
HEAT = 0.07
"""The temperature at the start."""


def category_of(report: str) -> str:
    """One of the signs that a report states, by torch's own generator; `normal` where it states none."""
    return one_of(tuple(sorted(facts_of(report).signs)) or ("normal",))


def described(category: str, names: bool) -> str:
    """The caption of a category: its name, or at random its name or one of its descriptions."""
    return CAPTION.format(NAMES[category] if names else one_of((NAMES[category], *DESCRIPTIONS[category])))


class Scale(nn.Module):
    """What similarities are multiplied by: one over the temperature; it is learned."""

    def __init__(self):
        super().__init__()
        self.log = nn.Parameter(torch.tensor(-math.log(HEAT)))

    def forward(self) -> Tensor:
        return self.log.exp().clamp(1, HIGHEST_SCALE)


@dataclass
class Flair(Remembering):
    """Categories said in words, then few labels.

    names  a category is said by its name alone
    probe  the encoder stands still while a linear layer on its standardised features learns from labels
    """

    rate: float = 1e-2
    share: float = READING
    names: bool = False
    probe: bool = True

    def model(self, inputs: int, classes: int, dims: int) -> Reader:
        model = super().model(inputs, classes, dims)
        if self.probe:
            model.head = nn.Sequential(nn.BatchNorm1d(model.width, affine=False), model.head)
        return model

    def pretext_parts(self, model: nn.Module, inputs: int, dims: int) -> nn.Module:
        parts = {"see": Projection(model.width, self.width), "hear": Projection(self.width, self.width)}
        return nn.ModuleDict(parts | {"text": TextEncoder(self.width), "scale": Scale()})

    def heard(self, nets: nn.ModuleDict, sentences: tuple[str, ...]) -> Tensor:
        return nets["pretext"]["hear"](nets["pretext"]["text"](sentences))

    def reading(self, nets: nn.ModuleDict, images: Tensor, reports: tuple[str, ...], now: Moment) -> Tensor:
        categories = [category_of(report) for report in reports]
        vectors = self.seen(nets, images)
        texts = self.heard(nets, tuple(described(category, self.names) for category in categories))
        numbers = torch.tensor([CATEGORIES.index(category) for category in categories], device=images.device)
        with torch.autocast(images.device.type, enabled=False):
            return contrast(vectors.float(), texts.float(), numbers, nets["pretext"]["scale"]())

    def supervised(self, nets: nn.ModuleDict, labelled: Batch, now: Moment) -> Tensor:
        if not self.probe:
            return super().supervised(nets, labelled, now)
        with torch.no_grad():
            features = nets["model"].features(labelled.images)
        logits = nets["model"].head(features).float()
        return F.cross_entropy(logits, image_labels(labelled.labels, logits.shape[1]))

    def category(self, reader: nn.ModuleDict, category: str) -> Tensor:
        """(width,): the mean text of a category, over its name and its descriptions."""
        said = (NAMES[category],) if self.names else (NAMES[category], *DESCRIPTIONS[category])
        return self.heard(reader, tuple(CAPTION.format(words) for words in said)).float().mean(0)

    def zero_shot(self, reader: nn.ModuleDict, images: Tensor, categories: tuple[str, ...]) -> Tensor:
        """(B, len(categories)): how probable each is, against the others."""
        texts = torch.stack([self.category(reader, category) for category in categories])
        return (reader["pretext"]["scale"]() * self.seen(reader, images).float() @ texts.T).softmax(1)


@torch.no_grad()
def probe_rows(fitted, case: Case) -> list[dict]:
    """As `outcome_rows`; where there was a pretext, `zero_shot` says whether the words for tuberculosis or for normal
    lungs, without any label, are right."""
    found, right = outcome_rows(fitted, case), float("nan")
    if found and getattr(fitted.method, "has_pretext", False):
        reader, images = once(fitted, "reader", lambda: trained(fitted)["reader"]), fitted.task.preparation.images(case)
        with autocast(fitted.cost):
            chance = fitted.method.zero_shot(reader, images, ("normal", "tuberculosis")).mean(0)[1]
        right = float((chance > 0.5) == (found[0]["outcome"] == 1))
    return [row | {"zero_shot": right} for row in found]


def arms(method: Flair, shots: int, suffix: str = "") -> dict[str, Arm]:
    """The arms that start from what the method starts from."""
    found = {
        "descriptions, probed": method,
        "trained in full": Unread(start=method.start, share=method.share),
        "names, probed": replace(method, names=True),
        "no pretext, probed": replace(method, waits=True),
        "descriptions, tuned": replace(method, probe=False, rate=Unread.rate),
    }
    return {name + suffix: Arm(each, {"labelled": shots}) for name, each in found.items()}


LARGE, SMALL = arms(Flair(), SHOTS), arms(Flair(start="random"), 4, ", small encoder")
FULL_ARMS = tuple(LARGE)[:4]

recipe = Recipe(
    paper="flair",
    title="FLAIR: categories in an expert's words, and a linear probe",
    claim="Of 20 labelled patients, a linear probe on an encoder that learned categories by their descriptions tells "
    "tuberculosis better than a network that is trained in full, by AUC.",
    arms=LARGE | SMALL,
    compare=FULL_ARMS[:2],
    ablation=(FULL_ARMS[0], FULL_ARMS[2]),
    replicate="draw",
    metric="auc",
    score=probe_rows,
    scales=longer_scales(*FULL_ARMS, quick_arms=tuple(SMALL)),
    source="abstract; official code, github.com/jusiro/FLAIR",
    components=(
        Component(
            "architecture",
            "implemented",
            "ResNet-50, Bio_ClinicalBERT's architecture and both projections, in `medcook.networks.flair`, tested "
            "against an implementation of its own. In the comparison SqueezeNet with ImageNet weights takes the "
            "ResNet's place, and one transformer block from random weights the BERT's; the projections are the same",
        ),
        Component(
            "checkpoint",
            "implemented",
            "both published forms are read offline and tested on a small one; the published weights are not at hand, "
            "so none of their figures is tested here",
        ),
        Component(
            "expert knowledge in text",
            "simplified",
            "two or three descriptions for each of eight signs and for normal lungs, in our own words; theirs are of "
            "97 conditions, from the literature. Hierarchies of conditions are not told. The ablation says names",
        ),
        Component(
            "contrast by category",
            "implemented",
            "`medcook.methods.contrastive.contrast`, the loss of the official code; the temperature starts at 0.07. Of "
            "a report with several signs one is drawn",
        ),
        Component(
            "37 categorical data sets",
            "simplified",
            "340 X-rays of two hospitals; their categories are found in radiologists' reports by words. One is "
            "tuberculosis itself, the outcome of the few labelled patients: a seen category, as most of theirs are",
        ),
        Component(
            "linear probe",
            "simplified",
            "on features before the projection, as in the official script; there logistic regression finds the layer, "
            "here steps on augmented images, and features are standardised. `no pretext, probed` asks what ImageNet's "
            "features give; `descriptions, tuned`, an arm that `full` does not run, what tuning gives",
        ),
        Component(
            "zero-shot by descriptions",
            "implemented",
            "column `zero_shot`: how often the words for tuberculosis or for normal lungs are right",
        ),
        Component("domain shift, unseen categories", "absent", "probe and pretext see the same two hospitals"),
        Component("generalist image-language models", "absent", "no weights of one are at hand"),
    ),
)
