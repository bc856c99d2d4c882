"""C3S3: Complementary Competition and Contrastive Selection (He, Lin, Chen, Xu and Zheng, ICME 2025).

Two sub-networks learn from the same labels. In every step they compete: the one that is better on the labelled images
teaches the other on the unlabelled ones, and learns nothing from it. And what they say selects what is contrasted:
where both find a structure, or both do not, their features must match; where they differ, mostly at boundaries,
their features are the negatives of both. Equations are those of the algorithm and the losses of the official code.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.losses import cross_entropy, find_loss, soft_dice
from medcook.methods import Batch, CrossPseudoSupervision, MeanTeacher, Moment
from medcook.methods.mean_teacher import squared_difference
from medcook.methods.semi_supervised import forgetful, noisy
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.recipes.semi_supervised._settings import scales


@dataclass
class C3S3(CrossPseudoSupervision):
    """Two networks of which the better one teaches, with contrast between where they agree and where they differ.

    alpha        share of cross-entropy in the loss that decides a competition; the rest is Dice (the paper: 0.8 on MR)
    sharpness    temperature of the winner's pseudo-labels
    compete      False: both teach each other in every step, whoever is better
    contrast     weight of the contrastive loss; 0 takes it away
    temperature  of the contrastive loss; `samples` how many anchors and how many negatives each space has
    """

    alpha: float = 0.8
    sharpness: float = 0.1
    compete: bool = True
    contrast: float = 0.1
    temperature: float = 0.1
    samples: int = 256

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        """Two networks, and a projector of the last features of each."""
        nets = super().build(inputs, classes, dims)
        width = self.channels[0]
        heads = [nn.Sequential(nn.Linear(width, width), nn.PReLU(), nn.Linear(width, 64)) for _ in range(2)]
        nets["projectors"] = nn.ModuleList(heads)
        return nets

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        """Each network sees its own noisy view of the unlabelled images."""
        if unlabelled is None or now.fraction < self.start:
            return super().training_step(nets, labelled, None, now)
        features, logits, known, free = [], [], [], []
        for net in (nets["model"], nets["second"]):
            seen = net.features(labelled.images)
            known.append(net.head(seen).float())
            with forgetful(net):
                unseen = net.features(noisy(unlabelled.images))
            free.append(net.head(unseen).float())
            features.append(torch.cat([seen, unseen]))
            logits.append(torch.cat([known[-1], free[-1]]))
        loss = find_loss(self.loss)
        supervised = loss(known[0], labelled.labels) + loss(known[1], labelled.labels)
        unsupervised = self.competition(known, labelled.labels, free) + consistency(*free)
        if self.contrast:
            unsupervised = unsupervised + self.contrast * self.selection(nets["projectors"], features, logits)
        return supervised + self.rising(now) * unsupervised

    def competition(self, known: list[Tensor], labels: Tensor, free: list[Tensor]) -> Tensor:
        """The loser's loss: logits on labelled images decide which network that is, those on unlabelled ones teach."""
        first, second = free
        if not self.compete:
            return teach(first, second, self.sharpness) + teach(second, first, self.sharpness)
        mine, theirs = (rivalry(each, labels, self.alpha) for each in known)
        winner, loser = (first, second) if mine < theirs else (second, first)
        return teach(winner, loser, self.sharpness)

    def selection(self, projectors: nn.ModuleList, features: list[Tensor], logits: list[Tensor]) -> Tensor:
        """Features (B, channels, *size) of both networks, contrasted where their predictions say so."""
        said = [each.argmax(1).flatten() for each in logits]
        spaces = select(*said, logits[0].shape[1], self.samples)
        if not spaces:
            return logits[0].new_zeros(())
        anchors, negatives = (torch.stack(places) for places in zip(*spaces, strict=True))
        first, second = (each.movedim(1, -1).flatten(0, -2) for each in features)
        mine = F.normalize(projectors[0](first[anchors]).float(), dim=-1)
        theirs = F.normalize(projectors[1](second[torch.cat([anchors, negatives], 1)]).float(), dim=-1)
        return info_nce(mine, *theirs.chunk(2, dim=1), self.temperature)


def rivalry(logits: Tensor, labels: Tensor, alpha: float) -> Tensor:
    """What a network is judged by on labelled images: alpha * cross-entropy + (1 - alpha) * Dice; lower wins."""
    return alpha * cross_entropy(logits, labels) + (1 - alpha) * soft_dice(logits, labels)


def teach(teacher: Tensor, student: Tensor, sharpness: float) -> Tensor:
    """Squared difference of the student's probabilities to p^(1/T) / sum p^(1/T) of the teacher; both are logits."""
    return squared_difference(student, (teacher.detach() / sharpness).softmax(1)).mean()


def consistency(first: Tensor, second: Tensor) -> Tensor:
    """One minus the mean cosine similarity of two logit maps (B, classes, *size), voxel by voxel."""
    return 1 - F.cosine_similarity(first, second, dim=1).mean()


def select(first: Tensor, second: Tensor, classes: int, samples: int) -> list[tuple[Tensor, Tensor]]:
    """Positions of (anchors, negatives), `samples` of each, in the two spaces of every structure.

    first, second  (N,) the class which each network says of N voxels
    Intersection: anchors lie where both say the structure, negatives where not both do. Union: anchors lie where
    neither says it, negatives where one or both do. Half of the negatives lie where the two differ.
    """
    spaces = []
    for structure in range(1, classes):
        mine, theirs = first == structure, second == structure
        inside, outside, differ = mine & theirs, ~(mine | theirs), mine ^ theirs
        for alike, other in ((inside, outside), (outside, inside)):
            against = [mask for mask in (differ, other) if mask.any()]
            if against and alike.any():
                negatives = torch.cat([draw(mask, samples // len(against)) for mask in against])
                spaces.append((draw(alike, samples), negatives))
    return spaces


def draw(mask: Tensor, count: int) -> Tensor:
    """`count` random positions at which `mask` (N,) is True, with replacement."""
    places = mask.nonzero()[:, 0]
    return places[torch.randint(len(places), (count,)).to(places.device)]


def info_nce(anchor: Tensor, positive: Tensor, negative: Tensor, temperature: float) -> Tensor:
    """-log exp(a p / T) / (exp(a p / T) + sum of exp(a n / T)), mean over anchors; unit vectors (spaces, samples, D).

    Every anchor has its own positive, and all the negatives of its space.
    """
    alike = (anchor * positive).sum(-1, keepdim=True)
    similarity = torch.cat([alike, (anchor @ negative.transpose(1, 2)).float()], dim=2) / temperature
    return (similarity.logsumexp(2) - similarity[..., 0]).mean()


recipe = Recipe(
    paper="c3s3",
    title="Complementary competition and contrastive selection",
    claim="With three labelled patients, competition and contrast of two sub-networks lower HD95 against cross pseudo "
    "supervision.",
    arms={
        "mean teacher": Arm(MeanTeacher()),
        "cross pseudo": Arm(CrossPseudoSupervision()),
        "c3s3": Arm(C3S3()),
        "without contrast": Arm(C3S3(contrast=0.0)),
        "without competition": Arm(C3S3(compete=False)),
    },
    compare=("c3s3", "cross pseudo"),
    ablation=("c3s3", "without contrast"),
    replicate="draw",
    scales=scales("mean teacher", "cross pseudo", "c3s3", "without contrast"),
    metric="hd95",
    published={
        "left atrium, 16 of 80 labelled, HD95 in voxels": 5.14,
        "left atrium, without contrast, HD95 in voxels": 6.27,
        "left atrium, TraCoCo, HD95 in voxels": 5.63,
        "pancreas, 12 of 62 labelled, HD95 in voxels": 6.96,
        "pancreas, TraCoCo, HD95 in voxels": 7.34,
    },
    source="README of github.com/Y-TARL/C3S3: tables of results and of the ablation",
    components=(
        Component(
            "dynamic complementary competition",
            "implemented",
            "as in the official code: the lower 0.8 CE + 0.2 Dice on the step's labelled images wins, and the winner's "
            "sharpened probabilities teach the loser alone; once a step, not region by region",
        ),
        Component(
            "outcome-driven contrastive learning",
            "implemented",
            "intersection and union spaces of the two predictions, here one pair for each structure; 256 anchors and "
            "negatives are drawn instead of all voxels, half of the negatives where the networks differ (our choice)",
        ),
        Component(
            "two sub-networks",
            "simplified",
            "one U-Net from two random starts, for the paper's V-Net and residual V-Net; the first one's moving "
            "average predicts, not both",
        ),
        Component(
            "consistency of views",
            "simplified",
            "cosine similarity between the networks, each with its own view; the paper's two views through each "
            "network would double the cost",
        ),
    ),
)
