"""One protocol for what reads reports: the same head, the same splits, learning rates chosen on validation patients."""

from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from medcook.data import IGNORE
from medcook.language import mean_words
from medcook.methods import Batch, Moment
from medcook.methods.classification import image_labels
from medcook.methods.contrastive import matched, numbered
from medcook.pooled import auc
from medcook.pretraining import Projector, TwoPhases, info_nce, nothing, one_cycle
from medcook.recipes.language._kept import Remembering
from medcook.recipes.language._reading import Reader, pairs
from medcook.recipes.language._reports import ReportTask
from medcook.tasks import Samples

MOST = 1000
"""Samples without labels that a task may have, with those that choose."""
LATE = 0.75
"""The share of the steps with labels after which candidates are looked at."""
SPREAD = 0.02
"""Standard deviation of a new head's weights, cut off at two of them."""


@dataclass(frozen=True)
class BenchTask(ReportTask):
    """A report task whose unlabelled samples bring along those of patients who choose a learning rate.

    The one rater of a sample is its outcome where the patient chooses, and `IGNORE` where not. The validation patients
    choose; where these are scored themselves, a third of the training patients without a label do, who are then not
    read.
    """

    @cached_property
    def choosing_patients(self) -> tuple[str, ...]:
        if self.select:
            return self.val_patients
        known = set() if self.labelled is None else {*self.labelled_patients}
        return tuple(patient for patient in self.unlabelled_patients if patient not in known)[::3]

    def samples(self, role: str) -> Samples:
        found = super().samples(role)
        if role != "unlabelled":
            return found
        patients, choosing = self.unlabelled_patients, {*self.choosing_patients}
        if self.select:
            found, patients = joined(found, super().samples("val")), patients + self.val_patients
        outcomes = [
            int(self.is_positive(self.data.attributes(case))) if patient in choosing else IGNORE
            for patient in patients
            for case in self.data.patients[patient]
        ]
        labels = torch.tensor(outcomes, dtype=torch.uint8)[found.case_of].view(-1, 1, 1)
        hidden = torch.full_like(found.labels, IGNORE)
        return Samples(
            found.images, hidden, found.case_of, labels.expand_as(hidden)[:, None].contiguous(), found.groups
        )


BRAINS = BenchTask("embedded", outcome="group", positive="atrophy", fold=0, labelled=4)


def joined(one: Samples, other: Samples) -> Samples:
    """The samples of both, without raters."""
    case_of = torch.cat([one.case_of, other.case_of + int(one.case_of.max()) + 1])
    parts = (torch.cat([getattr(one, name), getattr(other, name)]) for name in ("images", "labels", "groups"))
    images, labels, groups = parts
    return Samples(images, labels, case_of, None, groups)


class Candidates(nn.Module):
    """Networks that are tuned at different rates from the same start; the first one reads, the best one predicts.

    `scores` (candidates, MOST) and `outcomes` (MOST,) are of patients who choose, by sample; -1 is not known.
    """

    def __init__(self, first: Reader, count: int):
        super().__init__()
        self.tried = nn.ModuleList([first, *(deepcopy(first) for _ in range(count - 1))])
        self.width = first.width
        self.register_buffer("scores", torch.zeros(count, MOST))
        self.register_buffer("outcomes", torch.full((MOST,), -1.0))

    def maps(self, images: Tensor) -> Tensor:
        return self.tried[0].maps(images)

    def features(self, images: Tensor) -> Tensor:
        return self.tried[0].features(images)

    def start(self) -> None:
        """All encoders become what the first one learned."""
        for other in self.tried[1:]:
            other.encoder.load_state_dict(self.tried[0].encoder.state_dict())

    @torch.no_grad()
    def note(self, places: Tensor, outcomes: Tensor, scores: Tensor) -> None:
        """Remember scores (candidates, B) of samples (B,) whose outcomes (B,) are known."""
        self.scores[:, places], self.outcomes[places] = scores, outcomes.float()

    def values(self) -> list[float]:
        """The AUC of every candidate on the patients who choose; NaN where they cannot tell."""
        known = self.outcomes >= 0
        outcomes = self.outcomes[known].cpu().numpy()
        return [auc(scores[known].cpu().numpy(), outcomes) for scores in self.scores]

    def best(self) -> int:
        """The candidate with the highest AUC, the first of equals."""
        values = [value if value == value else 0.0 for value in self.values()]
        return max(range(len(values)), key=values.__getitem__)

    def forward(self, images: Tensor) -> Tensor:
        return self.tried[self.best()](images)


@dataclass
class Benched(Remembering):
    """The protocol: mixed in before what says how reports are read.

    rates          of heads, one for each candidate;   encoder_share  of it that the encoder gets
    standardised   the head normalises features, and starts with small weights
    """

    share: float = 0.7
    rates: tuple[float, ...] = (1e-3, 5e-3)
    encoder_share: float = 0.1
    standardised: bool = True

    trial = BRAINS

    def model(self, inputs: int, classes: int, dims: int) -> Candidates:
        first = super().model(inputs, classes, dims)
        if self.standardised:
            nn.init.trunc_normal_(first.head.weight, std=SPREAD, a=-2 * SPREAD, b=2 * SPREAD)
            nn.init.zeros_(first.head.bias)
            first.head = nn.Sequential(nn.LayerNorm(first.width), first.head)
        return Candidates(first, len(self.rates))

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        nets = super().build(inputs, classes, dims)
        for rate, reader in zip(self.rates, nets["model"].tried, strict=True):
            for name, weight in reader.named_parameters():
                weight.tuned_at = rate * (1 if name.startswith("head") else self.encoder_share)
        return nets

    def optimise(self, trained: list[nn.Parameter], steps: int) -> tuple[Optimizer, LRScheduler]:
        """As ever while reading; with labels, each weight has the rate of its candidate."""
        groups: dict[float, list[nn.Parameter]] = {}
        for weight in trained:
            groups.setdefault(getattr(weight, "tuned_at", 0.0), []).append(weight)
        optimiser = AdamW([{"params": found} for found in groups.values()], lr=1.0, weight_decay=self.decay, fused=True)
        schedules = [lambda step, rate=rate: self.pace(Moment(step, steps), rate) for rate in groups]
        return optimiser, TwoPhases(optimiser, schedules, self.first(steps))

    def pace(self, now: Moment, rate: float) -> float:
        """The learning rate of a step for weights that are tuned at `rate`."""
        is_pretext, then = self.phase(now)
        return (self.pretext_rate if is_pretext else rate) * one_cycle(*then)

    def pretext(self, nets: nn.ModuleDict, images: Batch, now: Moment) -> Tensor:
        """Patients who choose are not read."""
        if images.raters is not None:
            read = (images.raters == IGNORE).flatten(1).all(1)
            if not read.any():
                return nothing()
            images = Batch(images.images[read], images.labels[read], groups=images.groups[read])
        return super().pretext(nets, images, now)

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        loss = super().training_step(nets, labelled, unlabelled, now)
        is_pretext, then = self.phase(now)
        if not is_pretext and then.fraction >= LATE and unlabelled is not None and unlabelled.raters is not None:
            self.look(nets, unlabelled)
        return loss

    def supervised(self, nets: nn.ModuleDict, labelled: Batch, now: Moment) -> Tensor:
        """Every candidate learns from the same images; the losses have no weight in common."""
        if now.step == 0:
            nets["model"].start()
        logits = [reader(labelled.images).float() for reader in nets["model"].tried]
        labels = image_labels(labelled.labels, logits[0].shape[1])
        return torch.stack([F.cross_entropy(found, labels) for found in logits]).sum()

    @torch.no_grad()
    def look(self, nets: nn.ModuleDict, images: Batch) -> None:
        """What the candidates' averages say of those images of a batch whose patients choose."""
        there = (images.raters != IGNORE).flatten(1).all(1)
        if not there.any():
            return
        average = nets["average"].eval()
        scores = torch.stack([reader(images.images[there]).float().softmax(1)[:, 1] for reader in average.tried])
        nets["model"].note(images.index[there], images.raters[there].flatten(1)[:, 0], scores)
        average.train()


@dataclass
class GLoRIA(Remembering):
    """Whole reports, and their words with the places that they look at (Huang et al., ICCV 2021).

    sharp, between, over   temperatures 1 to 3 of the official code
    """

    sharp: float = 4.0
    between: float = 5.0
    over: float = 10.0

    def pretext_parts(self, model: nn.Module, inputs: int, dims: int) -> nn.Module:
        parts = super().pretext_parts(model, inputs, dims)
        parts["place"], parts["word"] = nn.Linear(model.width, self.width), nn.Linear(self.width, self.width)
        return parts

    def reading(self, nets: nn.ModuleDict, images: Tensor, reports: tuple[str, ...], now: Moment) -> Tensor:
        parts, maps = nets["pretext"], nets["model"].maps(images)
        words, empty = parts["text"].tokens(reports)
        whole = parts["see"](maps.flatten(2).float().mean(2)), parts["hear"](mean_words(words, empty))
        places = parts["place"](maps.flatten(2).transpose(1, 2).float()).float()
        words = parts["word"](words).float()
        with torch.autocast(images.device.type, enabled=False):
            similar = self.over * word_similarity(places, words, empty, self.sharp, self.between)
            numbers = numbered(reports).to(similar.device)
            return matched(similar, numbers) + pairs(*whole, reports, 1 / self.over, 0.5)


def word_similarity(places: Tensor, words: Tensor, empty: Tensor, sharp: float, between: float) -> Tensor:
    """(B, T): how well images with places (B, N, D) fit texts with words (T, L, D), of which some are empty (T, L).

    Places share themselves out among a text's words; a word then looks at the places that it has most of, and is
    compared with the mean of what it sees there. The similarity is log(sum over words of exp(between * cosine)).
    """
    affinity = torch.einsum("bnd,tld->btnl", places, words).masked_fill(empty[None, :, None], -torch.inf)
    looks = (sharp * affinity.softmax(3)).softmax(2)
    seen = torch.einsum("btnl,bnd->btld", looks, places)
    cosine = F.cosine_similarity(seen, words[None], dim=3)
    return (between * cosine).masked_fill(empty[None], -torch.inf).logsumexp(2)


@dataclass
class SimCLR(Remembering):
    """Two views of an image belong together; no report is read (Chen et al., ICML 2020)."""

    heat: float = 0.1

    def pretext_parts(self, model: nn.Module, inputs: int, dims: int) -> nn.Module:
        return nn.ModuleDict({"see": Projector(model.width, model.width, self.width)})

    def pretext(self, nets: nn.ModuleDict, images: Batch, now: Moment) -> Tensor:
        one, other = (self.seen(nets, self.view(images.images)) for _ in range(2))
        with torch.autocast(one.device.type, enabled=False):
            return info_nce(one, other, self.heat)
