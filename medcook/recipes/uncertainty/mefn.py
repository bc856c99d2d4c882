"""MEFN: fusing modalities by their evidence (Qi et al., arXiv:2406.18327).

Every modality says for each voxel how much evidence it has for each class, and so how much it does not know. Features
are exchanged in proportion to what is known (the calibrator), and the opinions are fused by Dempster's rule, in which a
modality that knows nothing has no say.

    alpha_k = e_k + 1,  S = sum_k alpha_k,  b_k = e_k / S,  u = K / S,  so that sum_k b_k + u = 1                   (1)
    b_k = (b1_k b2_k + b1_k u2 + b2_k u1) / (1 - C),  u = u1 u2 / (1 - C),  C = sum_(i != j) b1_i b2_j              (2)
    p_k = alpha_k / S                                                                                               (3)
    L = E_Dir(alpha)[cross-entropy] = psi(S) - psi(alpha_y),  weighted by 1 + u: what is uncertain counts more      (4)
    + rising weight * KL(Dir(alpha with the true class's evidence removed) || Dir(1)) + soft Dice of p

PET/CT is not at hand: the two modalities are the two contrasts of the embedded cohort (simulated), and every patient is
seen three times, once with both contrasts good and once with each of them spoilt.
"""

from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook import evaluation, metrics
from medcook.data import IGNORE, Case
from medcook.losses import cross_entropy_and_dice, soft_dice
from medcook.methods import Batch, Method, Moment, Supervised
from medcook.networks import UNet
from medcook.recipes.recipe import Arm, Component, Recipe, Scale
from medcook.recipes.uncertainty._contrasts import ContrastTask
from medcook.tasks import Budget

NARROW = (8, 16, 32, 64, 64)


def opinion(evidence: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 1: beliefs (B, K, *size) and uncertainty (B, 1, *size) of evidence (B, K, *size), which is not negative."""
    strength = (evidence + 1).sum(1, keepdim=True)
    return evidence / strength, evidence.shape[1] / strength


def dempster(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Eq. 2: the fused opinion; masses stand on single classes and on the whole frame alone."""
    (b1, u1), (b2, u2) = first, second
    agreement = b1 * b2
    conflict = b1.sum(1, keepdim=True) * b2.sum(1, keepdim=True) - agreement.sum(1, keepdim=True)
    left = (1 - conflict).clamp_min(1e-6)
    return (agreement + b1 * u2 + b2 * u1) / left, u1 * u2 / left


def evidence_of(belief: Tensor, uncertainty: Tensor) -> Tensor:
    """The inverse of eq. 1: S = K / u, e_k = b_k S."""
    return belief * belief.shape[1] / uncertainty.clamp_min(1e-6)


def fused(evidences: list[Tensor], rule: str = "dempster") -> Tensor:
    """Evidence (B, K, *size) of all modalities together: by Dempster's rule, or their `mean`."""
    if rule == "mean":
        return torch.stack(evidences).mean(0)
    joint = opinion(evidences[0])
    for evidence in evidences[1:]:
        joint = dempster(joint, opinion(evidence))
    return evidence_of(*joint)


def evidential_loss(evidence: Tensor, labels: Tensor, strictness: float) -> Tensor:
    """Eq. 4 without Dice: evidence (B, K, *size), labels (B, *size); `strictness` weighs the KL divergence."""
    known = (labels != IGNORE)[:, None]
    truth = F.one_hot(torch.where(known[:, 0], labels, 0).long(), evidence.shape[1]).movedim(-1, 1)
    alpha = evidence + 1
    total = alpha.sum(1, keepdim=True)
    surprise = total.digamma() - (truth * alpha).sum(1, keepdim=True).digamma()
    attention = 1 + evidence.shape[1] / total.detach()
    wrong = kl_from_uniform(truth + (1 - truth) * alpha)
    each = attention * surprise + strictness * wrong
    return (each * known).sum() / known.sum().clamp_min(1)


def kl_from_uniform(alpha: Tensor) -> Tensor:
    """KL(Dir(alpha) || Dir(1)) over the classes: alpha (B, K, *size) gives (B, 1, *size)."""
    total = alpha.sum(1, keepdim=True)
    normaliser = total.lgamma() - alpha.lgamma().sum(1, keepdim=True) - torch.tensor(float(alpha.shape[1])).lgamma()
    return normaliser + ((alpha - 1) * (alpha.digamma() - total.digamma())).sum(1, keepdim=True)


def one_in_four(evidence: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Every other voxel along the last two axes, from a random start: digamma is slow, and neighbours say the same."""
    row, column = torch.randint(2, (2,)).tolist()
    return evidence[..., row::2, column::2], labels[..., row::2, column::2]


class Calibrator(nn.Module):
    """What each modality's features become once the others have been heard, each as far as it knows something.

    Our reading of the dual-attention calibrator: features are weighed by 1 - u, and a learned gate over channels and
    voxels says where a modality takes what another one offers.
    """

    def __init__(self, channels: int, dims: int):
        super().__init__()
        conv = nn.Conv2d if dims == 2 else nn.Conv3d
        self.gate, self.offer = conv(2 * channels, channels, 1), conv(channels, channels, 1)

    def forward(self, features: list[Tensor], uncertainties: list[Tensor]) -> list[Tensor]:
        trusted = [feature * (1 - u) for feature, u in zip(features, uncertainties, strict=True)]
        return [mine + sum(self.taken(mine, theirs) for theirs in trusted if theirs is not mine) for mine in trusted]

    def taken(self, mine: Tensor, theirs: Tensor) -> Tensor:
        """What one modality takes of another's features."""
        return self.gate(torch.cat([mine, theirs], dim=1)).sigmoid() * self.offer(theirs)


class EvidentialNetwork(nn.Module):
    """A U-Net for every input channel; its own evidence first, then that after the calibrator."""

    def __init__(self, *, inputs: int, classes: int, channels: tuple[int, ...], dims: int):
        super().__init__()
        conv = nn.Conv2d if dims == 2 else nn.Conv3d
        self.branches = nn.ModuleList(UNet(classes=classes, channels=channels, dims=dims) for _ in range(inputs))
        self.calibrator = Calibrator(channels[0], dims)
        self.heads = nn.ModuleList(conv(channels[0], classes, 1) for _ in range(inputs))

    def forward(self, images: Tensor, calibrate: bool = True) -> tuple[list[Tensor], list[Tensor]]:
        """(B, inputs, *size) to the evidence (B, classes, *size) of each modality, alone and calibrated."""
        features = [b.features(x) for b, x in zip(self.branches, images.split(1, 1), strict=True)]
        alone = [evidence(b.head(f)) for b, f in zip(self.branches, features, strict=True)]
        if not calibrate:
            return alone, alone
        heard = self.calibrator(features, [opinion(e)[1].detach() for e in alone])
        return alone, [evidence(head(f)) for head, f in zip(self.heads, heard, strict=True)]


def evidence(logits: Tensor) -> Tensor:
    """Evidence is never negative: exp, which learns in fewer steps than softplus."""
    return logits.float().clamp(-8, 8).exp()


class Doubting:
    """Methods that can say how uncertain each voxel of their prediction is."""

    @torch.no_grad()
    def doubt(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """(B, *size): entropy of the probabilities over its largest value, unless a method knows better."""
        probabilities = self.predict(nets, images)
        return -torch.special.xlogy(probabilities, probabilities).sum(1) / np.log(probabilities.shape[1])


@dataclass
class EarlyFusion(Doubting, Supervised):
    """One U-Net that gets all contrasts as channels."""

    channels: tuple[int, ...] = NARROW


@dataclass
class MeanOfTwo(Doubting, Method):
    """A U-Net for each contrast, trained apart; the mean of their probabilities."""

    channels: tuple[int, ...] = NARROW

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        model = nn.ModuleList(UNet(classes=classes, channels=self.channels, dims=dims) for _ in range(inputs))
        return nn.ModuleDict({"model": model, "average": deepcopy(model).requires_grad_(False)})

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        logits = [branch(x).float() for branch, x in zip(nets["model"], labelled.images.split(1, 1), strict=True)]
        return sum(cross_entropy_and_dice(each, labelled.labels) for each in logits)

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        parts = zip(nets["average"], images.split(1, 1), strict=True)
        return torch.stack([branch(x).float().softmax(1) for branch, x in parts]).mean(0)


@dataclass
class MEFN(Doubting, Method):
    """rule: `dempster` or `mean`; calibrate: whether features are exchanged by trust; strictness: weight of KL."""

    channels: tuple[int, ...] = NARROW
    rule: str = "dempster"
    calibrate: bool = True
    strictness: float = 0.02

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        model = EvidentialNetwork(inputs=inputs, classes=classes, channels=self.channels, dims=dims)
        return nn.ModuleDict({"model": model, "average": deepcopy(model).requires_grad_(False)})

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        """The loss of the fused opinion, and of each modality's own, so that its uncertainty means something."""
        alone, heard = nets["model"](labelled.images, self.calibrate)
        return self.loss_of(fused(heard, self.rule), labelled.labels, now) + sum(
            self.loss_of(each, labelled.labels, now) for each in alone
        ) / len(alone)

    def loss_of(self, evidence: Tensor, labels: Tensor, now: Moment) -> Tensor:
        """Eq. 4 with Dice; log p as logits, so that their softmax is p."""
        alpha = evidence + 1
        dice = soft_dice((alpha / alpha.sum(1, keepdim=True)).log(), labels)
        return evidential_loss(*one_in_four(evidence, labels), self.strictness * now.fraction) + dice

    def evidence(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """Fused evidence (B, classes, *size)."""
        return fused(nets["average"](images, self.calibrate)[1], self.rule)

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """Eq. 3."""
        alpha = self.evidence(nets, images) + 1
        return alpha / alpha.sum(1, keepdim=True)

    @torch.no_grad()
    def doubt(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """u of the fused opinion."""
        return opinion(self.evidence(nets, images))[1][:, 0]


def credibility(fitted, case: Case) -> list[dict]:
    """Mean Dice of the structures, error (1 - Dice), mean uncertainty; the row's structure is the case's state."""
    guess = fitted.predict(case)
    dice = np.mean([metrics.dice(guess == value, case.label == value) for value in fitted.task.structures])
    uncertainty = fitted.method.doubt(fitted.nets, fitted.task.preparation.images(case)).mean()
    values = {"dice": float(dice), "error": 1 - float(dice), "uncertainty": float(uncertainty)}
    return [evaluation.row(case, case.attributes["spoilt"], **values)]


recipe = Recipe(
    paper="mefn",
    title="Multi-modal evidential fusion",
    claim="Where either of two contrasts may be spoilt, fusing their evidence by Dempster's rule raises Dice against "
    "giving both to one U-Net.",
    arms={
        "early fusion": Arm(EarlyFusion()),
        "early fusion, as many weights": Arm(EarlyFusion(channels=(12, 24, 48, 96, 96))),
        "mean of two": Arm(MeanOfTwo()),
        "mefn": Arm(MEFN()),
        "without dempster": Arm(MEFN(rule="mean")),
        "without calibrator": Arm(MEFN(calibrate=False)),
    },
    compare=("mefn", "early fusion"),
    ablation=("mefn", "without dempster"),
    scales={
        "quick": Scale(
            ContrastTask("embedded"),
            Budget(steps=60, batch=8, checks=1),
            replicates=1,
            arms=("early fusion", "mefn", "without dempster"),
        ),
        "full": Scale(
            ContrastTask("embedded", evaluation="test"),
            Budget(steps=500, batch=8, checks=2),
            arms=("early fusion", "early fusion, as many weights", "mefn", "without dempster"),
        ),
    },
    score=credibility,
    published={"AutoPET, gain in Dice": 0.0215, "Hecktor, gain in Dice": 0.0323},
    source="abstract of arXiv:2406.18327v1 (v2 says 0.0310 for AutoPET); the official repository holds no code",
    components=(
        Component(
            "evidence of each modality",
            "implemented",
            "a U-Net for each contrast; exp gives the evidence, in the literature mostly softplus",
        ),
        Component("Dempster-Shafer fusion", "implemented", "the rule on opinions over single classes and the frame"),
        Component(
            "uncertainty calibrator",
            "implemented",
            "our reading of the abstract: features times 1 - u before they are exchanged; u is not trained by that",
        ),
        Component(
            "mutual attention",
            "simplified",
            "one gate over channels and voxels from both modalities' features at full resolution, not at every scale",
        ),
        Component(
            "uncertainty perceptual loss",
            "implemented",
            "our reading: the evidential cross-entropy times 1 + u, with KL divergence and Dice; on a quarter of the "
            "voxels a step, for speed",
        ),
        Component(
            "cross-modal feature learning",
            "absent",
            "it translates PET to CT and back, to bridge their gap; two contrasts of one simulated scan have none",
        ),
    ),
)
