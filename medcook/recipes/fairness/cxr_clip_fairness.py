"""Fairness and Robustness of CLIP-Based Models for Chest X-rays (Sourget et al., 2025).

An audit of image-text models: does the finding's AUC differ between subgroups; does it fall where a drain, which often
comes with the finding, is not in the picture; and what else can be read from the embeddings? A plot of their first two
principal components shows no groups, and yet a classifier on the whole embedding finds age and sex.

  probe       P(attribute | v) = 1 / (1 + exp(-(w v + b))), fitted on training patients' embeddings v
  two components  the same on the two numbers W (v - mean v) that a PCA plot shows
  drain       AUC of patients with the finding, who have the drain or have not, against all without the finding
"""

import random
from bisect import bisect
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from medcook import evaluation, statistics
from medcook.cohorts import OutcomeTask
from medcook.data import Case
from medcook.errors import MedcookError
from medcook.methods import Classifier
from medcook.methods.contrastive import ContrastiveImageText
from medcook.methods.frozen import FrozenImageNet
from medcook.recipes.recipe import Arm, Component, Recipe, Scale
from medcook.sampling import trained
from medcook.tasks import Budget, Samples

FINDING = ("clear", "diseased")
WORDS = {
    "site": ("Montgomery", "Shenzhen", "north", "south", "island"),
    "age": ("young", "middle-aged", "older"),
    "sex": ("woman", "man"),
}
AGES = (30, 45)
"""The first age that is middle-aged, and the first that is older."""
SEX = {"F": "woman", "M": "man"}
FIRST_SITES = ("Montgomery", "north")
SAID = ("site", "age")
"""What the captions tell beside the finding. They never tell the sex, which the comparison reads from embeddings."""


def word(attribute: str, attributes: dict) -> str:
    """How captions say an attribute of a patient; empty where it is not known."""
    value = attributes.get(attribute)
    if attribute == "age" and value is not None:
        return WORDS["age"][bisect(AGES, value)]
    return SEX.get(value, "") if attribute == "sex" else value or ""


def captions(said: tuple[str, ...]) -> tuple[str, ...]:
    """Every sentence that can be said; those with an odd number are of patients with the finding."""
    told = product(*(("", *WORDS[attribute]) for attribute in said))
    return tuple(" ".join(filter(None, (finding, *words))) for words in told for finding in FINDING)


def draw_drain(images: Tensor, name: str, width: float = 0.012, brightness: float = 2.0) -> Tensor:
    """(N, 1, H, W) images with a bright, bent tube from a side of the chest into the lung; `name` decides how it runs.

    width  half of the tube's, as a share of the image's; brightness in standard deviations of the image
    """
    rng = random.Random(f"drain of {name}")
    side = rng.choice((0, 1))
    start, bend, end = ((rng.uniform(0.6, 0.9), 0.02), (rng.uniform(0.5, 0.8), 0.3), (rng.uniform(0.25, 0.5), 0.3))
    time = torch.linspace(0, 1, 80)[:, None]
    weights = torch.cat([(1 - time) ** 2, 2 * time * (1 - time), time**2], dim=1)
    path = weights @ torch.tensor([start, bend, end])
    if side:
        path[:, 1] = 1 - path[:, 1]
    grid = torch.meshgrid(*((torch.arange(n) + 0.5) / n for n in images.shape[2:]), indexing="ij")
    distance = torch.cdist(torch.stack(grid, dim=-1).flatten(0, 1), path).amin(1).view(images.shape[2:])
    return images + brightness * torch.exp(-((distance / width) ** 2))


@dataclass(frozen=True)
class CaptionTask(OutcomeTask):
    """The label of a whole image is the number of its patient's caption, among `captions(said)`.

    said   attributes that captions tell beside the finding
    drain  share of the training patients with the finding into whose image a drain is drawn; nobody else has one
    """

    said: tuple[str, ...] = ()
    drain: float = 0.0

    @property
    def classes(self) -> int:
        return len(captions(self.said))

    def caption(self, attributes: dict) -> str:
        """What a patient's caption says."""
        told = (word(attribute, attributes) for attribute in self.said)
        return " ".join(filter(None, (FINDING[self.is_positive(attributes)], *told)))

    def samples(self, role: str) -> Samples:
        samples = super().samples(role)
        if role == "unlabelled":
            return samples
        patients, known = getattr(self, f"{role}_patients"), captions(self.said)
        for number, case_id in enumerate(case for patient in patients for case in self.data.patients[patient]):
            mine, attributes = samples.case_of == number, self.data.attributes(case_id)
            samples.labels[mine] = known.index(self.caption(attributes))
            if role == "labelled" and self.is_positive(attributes) and has_drain(case_id, self.drain):
                samples.images[mine] = draw_drain(samples.images[mine], case_id)
        return samples


def has_drain(name: str, share: float) -> bool:
    """Whether a patient is among the `share` who have a drain; always the same ones."""
    return random.Random(f"has {name} a drain").random() < share


@dataclass
class Probed:
    """What is read from a method's embeddings; a method with `embed(nets, images)` inherits it.

    components  how many principal components the probes see; 0: the whole embedding
    """

    components: int = 0

    def probe(self, vectors: np.ndarray, facts: np.ndarray):
        """A logistic regression from vectors (N, D) to facts (N,) bool; its strength is chosen on these by folds."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import GridSearchCV
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        if (rarer := np.bincount(facts, minlength=2).min()) < 2:
            raise MedcookError("Too few patients differ for a probe.", "Take more labelled patients.")
        seen = [principal(self.components)] if self.components else []
        line = make_pipeline(*seen, StandardScaler(), LogisticRegression(max_iter=1000))
        strengths = {"logisticregression__C": [1e-3, 1e-2, 1e-1, 1.0, 10.0]}
        return GridSearchCV(line, strengths, scoring="roc_auc", cv=min(5, rarer)).fit(vectors, facts)


def principal(components: int):
    """The first principal components of what it is fitted on, as in a PCA plot."""
    from sklearn.decomposition import PCA

    return PCA(components, random_state=0)


@dataclass
class ProbedContrastive(Probed, ContrastiveImageText):
    """The contrastive image-text model; its embedding is the unit vector that captions are compared with."""


@dataclass
class ProbedClassifier(Probed, Classifier):
    """The classifier of the finding; its embedding is what its last layer sees."""

    channels: tuple[int, ...] = (8, 16, 32, 64, 64)

    def embed(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """(B, channels[-1])."""
        return nets["average"][0](images)


@dataclass
class ProbedImageNet(Probed, FrozenImageNet):
    """SqueezeNet as ImageNet left it; its embedding is the mean of its last features."""


def facts_of(attributes: dict) -> dict[str, bool] | None:
    """What the probes look for; None where sex or age is not known."""
    if not (word("sex", attributes) and word("age", attributes)):
        return None
    return {
        "sex": word("sex", attributes) == "man",
        "age": word("age", attributes) == "older",
        "site": attributes["site"] in FIRST_SITES,
    }


def embedding(fitted, case: Case) -> np.ndarray:
    """(D,) of a case; of a volume the mean over its slices. The networks are those of the last checkpoint."""
    with torch.no_grad():
        return fitted.method.embed(fitted.nets, fitted.task.preparation.images(case)).float().mean(0).numpy()


def finding(fitted, images: Tensor) -> float:
    """How probable the finding is: of all captions together that tell it."""
    with torch.no_grad():
        return float(fitted.method.predict(fitted.nets, images)[:, 1::2].flatten(2)[..., 0].sum(1).mean())


def probes_of(fitted) -> dict:
    """One probe a fact and the `plane` of a PCA plot, fitted on the training patients alone, when first asked for."""
    kept = vars(fitted)
    if "probes" not in kept:
        trained(fitted)
        known = [(case, facts) for case in fitted.task.cases("labelled") if (facts := facts_of(case.attributes))]
        vectors, facts = np.stack([embedding(fitted, case) for case, _ in known]), pd.DataFrame([f for _, f in known])
        found = {name: fitted.method.probe(vectors, facts[name].to_numpy()) for name in facts}
        kept["probes"] = found | {"plane": principal(2).fit(vectors)}
    return kept["probes"]


def audit(fitted, case: Case) -> list[dict]:
    """A row of a patient whose sex and age are known; none of others.

    score, outcome        what the probe says of the sex (1: a man), and what it is; `age_...` and `site_...` likewise
    finding_score         of the image as it is; `drained_score` of the same image with a simulated drain
    group                 the patient's words, for subgroups; `first`, `second` the coordinates in a PCA plot
    """
    facts = facts_of(case.attributes)
    if facts is None:
        return []
    probes, images = probes_of(fitted), fitted.task.preparation.images(case)
    vector = embedding(fitted, case)[None]
    said = {name: float(probes[name].predict_proba(vector)[0, 1]) for name in facts}
    first, second = map(float, probes["plane"].transform(vector)[0])
    values = {
        "score": said["sex"],
        "outcome": float(facts["sex"]),
        "age_score": said["age"],
        "age_outcome": float(facts["age"]),
        "site_score": said["site"],
        "site_outcome": float(facts["site"]),
        "finding_score": finding(fitted, images),
        "finding_outcome": float(fitted.task.is_positive(case.attributes)),
        "drained_score": finding(fitted, draw_drain(images, case.case_id)),
        "first": first,
        "second": second,
        "group": " ".join(word(attribute, case.attributes) for attribute in WORDS),
    }
    return [evaluation.row(case, "sex", **values)]


def by_subgroup(frame: pd.DataFrame, resamples: int = statistics.RESAMPLES) -> pd.DataFrame:
    """The finding's AUC in every subgroup, with its interval: columns subgroup, patients, diseased, auc, low, high.

    Subgroups are small here: a gap between two of them says little unless their intervals are apart.
    """
    found = frame.assign(score=frame["finding_score"], outcome=frame["finding_outcome"])
    said = found["group"].str.split()
    members = {name: found[[name in words for words in said]] for names in WORDS.values() for name in names}
    parts = {"all": found} | {name: part for name, part in members.items() if len(part)}
    return pd.DataFrame([_subgroup(name, part, resamples) for name, part in parts.items()])


def _subgroup(name: str, part: pd.DataFrame, resamples: int) -> dict:
    persons = part.drop_duplicates("patient_id")
    auc = statistics.interval(part, "auc", resamples) if persons["outcome"].nunique() == 2 else None
    bounds = (auc.mean, auc.low, auc.high) if auc else (np.nan,) * 3
    counts = {"subgroup": name, "patients": len(persons), "diseased": int(persons["outcome"].sum())}
    return counts | dict(zip(("auc", "low", "high"), bounds, strict=True))


def with_and_without_drain(frame: pd.DataFrame) -> dict[str, statistics.Estimate]:
    """The finding's AUC where those with the finding have a drain, where they have none, and what the drain makes.

    Those without the finding never have one, as in the study; so the first AUC rewards seeing drains.
    """
    ill = frame["finding_outcome"] == 1
    plain = frame.assign(score=frame["finding_score"], outcome=frame["finding_outcome"])
    drained = plain.assign(score=plain["score"].where(~ill, frame["drained_score"]))
    return {
        "with": statistics.interval(drained, "auc"),
        "without": statistics.interval(plain, "auc"),
        "difference": statistics.difference(drained, plain, "auc"),
    }


CONTRASTIVE = ProbedContrastive(captions=captions(SAID))
DRAINED = {"drain": 0.8}
ARMS = {
    "contrastive, probe": Arm(CONTRASTIVE, {"said": SAID}),
    "contrastive, two components": Arm(replace(CONTRASTIVE, components=2), {"said": SAID}),
    "classifier, probe": Arm(ProbedClassifier()),
    "ImageNet, probe": Arm(ProbedImageNet()),
    "contrastive, simulated drain": Arm(CONTRASTIVE, {"said": SAID} | DRAINED),
    "classifier, simulated drain": Arm(ProbedClassifier(), DRAINED),
    "ImageNet, simulated drain": Arm(ProbedImageNet(), DRAINED),
}

recipe = Recipe(
    paper="cxr-clip-fairness",
    title="Fairness and robustness of image-text models",
    claim="A linear probe reads the sex, which no caption names, from the image embeddings of a contrastive model, and "
    "reads less of it from their first two principal components.",
    arms=ARMS,
    compare=("contrastive, probe", "contrastive, two components"),
    scales={
        "quick": Scale(
            CaptionTask("embedded", outcome="group", positive="atrophy"),
            Budget(steps=40, batch=8, checks=1),
            replicates=1,
            arms=tuple(name for name in ARMS if "ImageNet" not in name),  # its weights need the network
        ),
        "full": Scale(
            CaptionTask("chest_xray", evaluation="test"),
            Budget(steps=150, checks=1),
            arms=tuple(name for name in ARMS if "ImageNet" not in name),
        ),
    },
    metric="auc",
    score=audit,
    components=(
        Component(
            "subgroup performance",
            "implemented",
            "AUC of tuberculosis by sex, age and site with intervals; sites stand for the race that these sets do not "
            "record; 105 test patients make every gap uncertain",
        ),
        Component(
            "robustness to a shortcut",
            "implemented",
            "here the drain is simulated, drawn into training images of 80% of those with tuberculosis, so that the "
            "same patient is seen with and without it; real drains for pneumothorax are not at hand",
        ),
        Component(
            "attributes from embeddings",
            "implemented",
            "a linear probe of sex, age and site, its strength chosen by folds of the training patients; the official "
            "code also tries a multi-layer perceptron and nearest neighbours",
        ),
        Component(
            "PCA of embeddings",
            "implemented",
            "as a measurement: the same probe on the plot's two coordinates; these are a part of what the other probe "
            "sees, so that less is found there is no surprise, and how much less is the question",
        ),
        Component(
            "six CLIP-based models",
            "simplified",
            "none of their weights are at hand: one small contrastive model trained here on captions of finding, site "
            "and age, a classifier, and SqueezeNet's frozen ImageNet features",
        ),
        Component(
            "MIMIC-CXR, NIH-CXR14 and NEATX",
            "absent",
            "need credentials or hundreds of gigabytes; tuberculosis is the one finding of the sets at hand",
        ),
    ),
)
