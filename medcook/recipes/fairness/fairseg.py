"""FairSeg: fair error-bound scaling (Tian, Shi, Luo, Kouhana, Elze and Wang, ICLR 2024).

A network that minimises the mean loss over all patients serves the large groups. Here each identity group's part of
the loss is weighted by that group's own error: a group that is segmented badly counts for more. The data half of the
paper, Harvard-FairSeg, is data_manifests/fairseg.yaml.

L_a is the error bound of group a: its Dice loss, remembered from the steps that it was in. With the official code's
ratio r_a = (min_b L_b / L_a)^gamma, which is 1 for the best group and smaller for the others, there are two forms:

    weights      sum_a w_a n_a l_a / n, w_a = 1 / r_a       our reading of "reweight the loss function"
    predictions  cross-entropy + Dice loss of tanh(r_a) p   what the official code computes

The second is no weight. It shrinks what the network says of a hard group's pixels before they are compared with the
truth, and with it the pull of those pixels: down, not up (tests/recipes/fairness/test_fairseg.py). Both run here.

The experiment is controlled: one group is made rare in training, so it is known who will be served badly, and why.
"""

import random
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from medcook import evaluation
from medcook.cohorts import GroupTask, first_attributes
from medcook.data import IGNORE, Case
from medcook.errors import MedcookError
from medcook.losses import cross_entropy, find_loss
from medcook.methods import Batch, Method, Moment, Supervised
from medcook.recipes.recipe import Arm, Component, Recipe, Scale
from medcook.tasks import Budget

SMALL = (8, 16, 32, 64, 64)


@dataclass(frozen=True)
class RareGroupTask(GroupTask):
    """All training patients of the other groups, and so few of one that these are `share` of all.

    rare   the group's name; `draw` says which of its patients are kept (draw 0: the first in the split's order)
    """

    rare: str = "Shenzhen"
    share: float = 0.05

    @cached_property
    def labelled_patients(self) -> tuple[str, ...]:
        everyone = super().labelled_patients
        rare = [patient for patient in everyone if self._group(patient) == self.rare]
        count = max(1, round(self.share / (1 - self.share) * (len(everyone) - len(rare))))
        if count > len(rare):
            hint = f"It has {len(rare)} of {len(everyone)} training patients: take a smaller share."
            raise MedcookError(f"{self.dataset}: {self.rare!r} cannot be {self.share:.0%} of the patients.", hint)
        if self.draw:
            random.Random(f"rare {self.draw}").shuffle(rare)
        kept = set(rare[:count])
        return tuple(patient for patient in everyone if self._group(patient) != self.rare or patient in kept)

    def _group(self, patient: str) -> str:
        return self.group_of(first_attributes(self.data, patient))


class GroupMemory(nn.Module):
    """What is remembered of at most `groups` groups; buffers, so that a run resumes with them.

    bound (G,) moving average of each group's Dice loss, over the steps the group was in: its error bound
    loss  (G,) the same of its training loss; `odds` (G,) the log weights that GroupDRO makes of it
    seen  (G,) how many samples of each group were seen
    """

    def __init__(self, groups: int, pace: float):
        super().__init__()
        self.pace = pace
        for name in ("bound", "loss", "odds", "seen"):
            self.register_buffer(name, torch.zeros(groups))

    def remember(self, present: Tensor, errors: Tensor, losses: Tensor, sizes: Tensor) -> None:
        """(K,) numbers of the groups of a step, their Dice losses, training losses and numbers of samples."""
        first = self.seen[present] == 0
        for kept, values in ((self.bound, errors), (self.loss, losses)):
            kept[present] = torch.where(first, values, torch.lerp(kept[present], values, self.pace))
        self.seen[present] += sizes

    def even(self, weights: Tensor) -> Tensor:
        """Weights (G,) scaled so that their mean over the samples seen is 1: no arm learns faster than another."""
        return weights * self.seen.sum() / (weights * self.seen).sum()

    def ratio(self, gamma: float) -> Tensor:
        """r (G,): the smallest bound over each group's own, to the power gamma; 1 for groups not seen yet."""
        known = self.seen > 0
        bound = self.bound.clamp_min(1e-4)
        return torch.where(known, (bound[known].min() / bound) ** gamma, 1.0)


def squared_dice(logits: Tensor, labels: Tensor, factors: Tensor | None = None, smooth: float = 1e-5) -> Tensor:
    """One minus the mean over all classes of 2 sum(s t) / (sum s^2 + sum t^2), the official code's Dice loss.

    logits (B, classes, *size), labels (B, *size); s is the probability, times factors (B,) where these are given; sums
    are over batch and pixels. Squares make unsure predictions cost less than in `soft_dice`: it is nearer to the error
    of the label map.
    """
    known = (labels != IGNORE)[:, None]
    truth = torch.stack([labels == value for value in range(logits.shape[1])], dim=1).float() * known
    said = logits.softmax(1) * known
    if factors is not None:
        said = said * factors.view(-1, *[1] * (logits.ndim - 1))
    axes = (0, *range(2, logits.ndim))
    overlap, size = (said * truth).sum(axes), (said**2).sum(axes) + truth.sum(axes)
    return 1 - ((2 * overlap + smooth) / (size + smooth)).mean()


def group_losses(loss, logits: Tensor, labels: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(K,) numbers of the groups in a batch, the loss of each over all its samples together, samples in each."""
    present, sizes = groups.unique(return_counts=True)
    return present, torch.stack([loss(logits[groups == group], labels[groups == group]) for group in present]), sizes


@dataclass
class GroupWeighted(Method):
    """Supervised training whose loss is a weighted sum of the groups' losses; all groups equal here.

    groups  the most groups there can be; a batch without groups is one group
    pace    how fast the remembered error of a group follows, 0 to 1
    """

    channels: tuple[int, ...] = SMALL
    groups: int = 8
    pace: float = 0.1

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        nets = super().build(inputs, classes, dims)
        nets["memory"] = GroupMemory(self.groups, self.pace)
        return nets

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        logits = nets["model"](labelled.images).float()
        groups = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        groups = groups if labelled.groups is None else labelled.groups
        if groups.max() >= self.groups:
            raise MedcookError(
                f"Group {groups.max()} came, but there is room for {self.groups} groups.", "Raise `groups`."
            )
        present, losses, sizes = group_losses(find_loss(self.loss), logits, labelled.labels, groups)
        errors = group_losses(squared_dice, logits.detach(), labelled.labels, groups)[1]
        nets["memory"].remember(present, errors, losses.detach(), sizes)
        said = Batch(logits, labelled.labels, groups=groups)
        return self.total(nets["memory"], present, losses, sizes / sizes.sum(), said)

    def total(self, memory: GroupMemory, present: Tensor, losses: Tensor, shares: Tensor, batch: Batch) -> Tensor:
        """The loss of a step. present, losses, shares (K,): its groups; batch holds the logits in place of images."""
        return (self.weights(memory)[present] * shares * losses).sum()

    def weights(self, memory: GroupMemory) -> Tensor:
        """(G,) the weight of a sample of each group; their mean over the samples seen is 1."""
        return memory.even(torch.ones_like(memory.bound))


@dataclass
class FairErrorBoundScaling(GroupWeighted):
    """A group's weight is its error bound over the best group's, to the power gamma; gamma = 0 makes all equal."""

    gamma: float = 1.0

    def weights(self, memory: GroupMemory) -> Tensor:
        return memory.even(1 / memory.ratio(self.gamma))


@dataclass
class ScaledPredictions(GroupWeighted):
    """Cross-entropy, and the Dice loss of predictions scaled by tanh(r) of their group: as in the official code."""

    gamma: float = 1.0

    def total(self, memory: GroupMemory, present: Tensor, losses: Tensor, shares: Tensor, batch: Batch) -> Tensor:
        factors = torch.tanh(memory.ratio(self.gamma))[batch.groups]
        return cross_entropy(batch.images, batch.labels) + squared_dice(batch.images, batch.labels, factors)


@dataclass
class InverseFrequency(GroupWeighted):
    """Every group weighs the same in sum, however few its samples: a weight that knows the sizes, not the errors."""

    def weights(self, memory: GroupMemory) -> Tensor:
        return memory.even(1 / memory.seen.clamp_min(1))


@dataclass
class GroupDRO(GroupWeighted):
    """Sagawa et al., ICLR 2020, algorithm 1: the loss is sum_g q_g L_g, and q_g grows with exp(climb * L_g).

    The algorithm draws groups evenly. Batches here do not: in every step all groups grow, those that are not in it by
    the loss that is remembered of them, or q would forget the rare ones.
    """

    climb: float = 0.1

    def total(self, memory: GroupMemory, present: Tensor, losses: Tensor, shares: Tensor, batch: Batch) -> Tensor:
        memory.odds += self.climb * memory.loss
        q = memory.odds.masked_fill(memory.seen == 0, -torch.inf).softmax(0)
        return (q[present] * losses).sum()


def group_rows(fitted, case: Case) -> list[dict]:
    """Dice of every structure of a case, and the name of the patient's group."""
    task, rows = fitted.task, evaluation.score_case(fitted.predict(case), case, fitted.task.structures)
    kept = ("dice", "missed", "false_alarm")
    group = task.group_of(case.attributes)
    return [evaluation.row(case, row["structure"], group=group, **{name: row[name] for name in kept}) for row in rows]


recipe = Recipe(
    paper="fairseg",
    title="Fair error-bound scaling",
    claim="With one hospital's patients rare in training (5%), weighting each group's loss by its error bound gives a "
    "higher equity-scaled Dice than empirical risk minimisation.",
    arms={
        "ERM": Arm(Supervised(channels=SMALL)),
        "fair error-bound scaling": Arm(FairErrorBoundScaling()),
        "equal weights": Arm(FairErrorBoundScaling(gamma=0.0)),
        "scaled predictions": Arm(ScaledPredictions()),
        "inverse frequency": Arm(InverseFrequency()),
        "GroupDRO": Arm(GroupDRO()),
        "ERM, 1%": Arm(Supervised(channels=SMALL), {"share": 0.01}),
        "fair error-bound scaling, 1%": Arm(FairErrorBoundScaling(), {"share": 0.01}),
        "ERM, 20%": Arm(Supervised(channels=SMALL), {"share": 0.2}),
        "fair error-bound scaling, 20%": Arm(FairErrorBoundScaling(), {"share": 0.2}),
    },
    compare=("fair error-bound scaling", "ERM"),
    ablation=("fair error-bound scaling", "equal weights"),
    replicate="draw",
    scales={
        "quick": Scale(
            RareGroupTask("embedded", rare="island"),
            Budget(steps=30, batch=8, checks=2),
            replicates=1,
            arms=("ERM", "fair error-bound scaling", "equal weights", "GroupDRO"),
        ),
        "full": Scale(
            RareGroupTask("chest_xray", rare="Shenzhen", evaluation="test"),
            Budget(steps=250, batch=8),
            arms=("ERM", "fair error-bound scaling", "equal weights", "GroupDRO"),
        ),
    },
    metric="equity_scaled_dice",
    score=group_rows,
    source="official code, github.com/Harvard-Ophthalmology-AI-Lab/FairSeg",
    components=(
        Component(
            "fair error-bound scaling",
            "implemented",
            "the abstract's words: each group's loss weighted by its error bound over the best group's, gamma 1 as in "
            "the official code. The bound is the group's Dice loss, remembered over steps: a rare group is missing in "
            "most batches, where the official code, which takes it from the batch, would find a minimum of 0",
        ),
        Component(
            "scaling of predictions",
            "implemented",
            "the official code's form, as an arm of its own: tanh of the ratio times the predictions inside the Dice "
            "loss; here with the remembered losses, and from scratch, where the code fine-tunes a trained network",
        ),
        Component(
            "equity-scaled segmentation metric",
            "implemented",
            "medcook.measures.equity: the sum formula of the published version is compared, that with the standard "
            "deviation of the first preprint stands beside it",
        ),
        Component(
            "fairness dataset",
            "implemented",
            "Harvard-FairSeg: manifest and reader in the published layout, tested on a fixture; its images are not "
            "at hand, so that hospitals of chest X-rays stand for identity groups",
        ),
        Component("segment anything model", "absent", "a small U-Net from scratch for every arm"),
        Component("comparison with fairness learning", "simplified", "GroupDRO and inverse-frequency weights"),
    ),
)
