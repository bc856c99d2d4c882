"""MRSegmentator (Häntze, Xu, Dorfner, Donle, Adams, Bressem and others, arXiv 2405.06463, 2024).

Idea: one network for whatever sequence an MR scanner was set to, and for CT. What is missing is labels, so a network
that knows CT makes the first ones of MR; people correct what is wrong; the network learns from both and labels the next
scans, until all are annotated. The architecture is an nnU-Net's and is not what is new.

In miniature: four simulated sequences of hearts, each patient seen in one. The first stands for CT, has half of the
patients and labels from the start. The others' slices are annotated in rounds. In a round a copy A of the network
labels them, an expert looks at each structure k, and corrects it where Dice_k(A(x), y) falls short of what he accepts:

    label(x) = y at pixels where A(x) or y is a structure that falls short, now or in an earlier round, else A(x)

One loss, cross-entropy and Dice, on all labels of a step. Counted is the share of structures that had to be drawn.
"""

from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook import evaluation
from medcook.data import IGNORE, Case
from medcook.domains import LOOKS, PLAIN, LooksTask, as_shown
from medcook.errors import MedcookError
from medcook.losses import find_loss
from medcook.methods import Batch, Moment, Supervised
from medcook.recipes.domain_shift._settings import BASELINE, CHANNELS, scales
from medcook.recipes.imperfect_labels._adversarial import structures
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.tasks import Samples

BLOCK = 10
"""Slices in a row that have their first round together: about a case."""

CT = PLAIN
"""The look that stands for CT."""

TURNS = tuple(name for look in LOOKS if look != CT for name in (CT, look))
"""Every other patient is seen in CT, as is about half of the paper's training data, and the others in turn."""


@dataclass(frozen=True)
class SequencesTask(LooksTask):
    """Patients of several sequences; a training sample's group is 0 for CT, else the place of its look in `LOOKS`."""

    looks: tuple[str, ...] = TURNS

    def samples(self, role: str) -> Samples:
        samples = super().samples(role)
        if role != "labelled":
            return samples
        look = dict(self.preparation.looks)
        cases = [look[patient] for patient in self.labelled_patients for _ in self.data.patients[patient]]
        groups = torch.tensor([list(LOOKS).index(name) for name in cases])[samples.case_of]
        return Samples(samples.images, samples.labels, samples.case_of, samples.raters, groups)


def structure_dice(found: Tensor, truth: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Dice of every structure of two label maps (B, H, W), and whether either shows it at all; both (B, classes - 1).

    The Dice of a structure that neither shows is 1.
    """
    one, other = (structures(labels, classes).flatten(2) for labels in (found, truth))
    size = one.sum(2) + other.sum(2)
    return torch.where(size > 0, 2 * (one * other).sum(2) / size.clamp_min(1), 1.0), size > 0


def corrected(proposed: Tensor, truth: Tensor, wrong: Tensor) -> Tensor:
    """Label maps (B, H, W) in which the structures `wrong` (B, classes - 1) bool were drawn anew.

    Everything that was such a structure, or should have been, becomes what it is; the rest stays as it was proposed.
    """
    wrong = F.pad(wrong, (1, 0))
    there = [wrong.gather(1, labels.flatten(1).long()).view_as(labels) for labels in (proposed, truth)]
    return torch.where(there[0] | there[1], truth, proposed)


def with_label(labels: Tensor) -> Tensor:
    """(B,) places in a batch: those of its label maps (B, H, W) that say anything, over and over; else all of them."""
    there = (labels != IGNORE).flatten(1).any(1).nonzero().flatten()
    places = torch.arange(len(labels), device=labels.device)
    return there[places % len(there)] if len(there) else places


class Annotations(nn.Module):
    """What the expert did, sample by sample: which structures he saw, and which of these he drew himself."""

    def __init__(self, slots: int, structures: int):
        super().__init__()
        self.register_buffer("seen", torch.zeros(slots, structures, dtype=torch.bool))
        self.register_buffer("drawn", torch.zeros(slots, structures, dtype=torch.bool))

    def known(self, index: Tensor) -> Tensor:
        """(B, structures) bool: what he has drawn of the samples `index` (B,)."""
        if index.max() >= len(self.drawn):
            raise MedcookError(f"There are more than {len(self.drawn)} training samples.", "Raise `slots`.")
        return self.drawn[index]

    def note(self, index: Tensor, shown: Tensor, wrong: Tensor) -> None:
        """Of the samples `index` (B,) he saw the structures `shown` and drew `wrong`, both (B, structures) bool."""
        self.seen[index] |= shown
        self.drawn[index] |= wrong

    def share(self) -> float:
        """How many of the structures that he saw he had to draw, 0 to 1."""
        return (self.drawn.sum() / self.seen.sum().clamp_min(1)).item()


@dataclass
class InTheLoop(Supervised):
    """Training on the first sequence's labels, and on those that network and expert make of the others in rounds.

    rounds    shares of the training after which rounds begin; each adds as many slices of the other sequences
    enough    the Dice from which the expert accepts a structure of a slice
    corrects  False: every label is accepted as the network made it
    transfers False: the first sequence comes without labels, too, and takes part in the rounds
    slots     the most samples that can be remembered
    """

    channels: tuple[int, ...] = CHANNELS
    rounds: tuple[float, ...] = (0.3, 0.5, 0.7)
    enough: float = 0.7
    corrects: bool = True
    transfers: bool = True
    slots: int = 2048

    axes = 2
    trial = SequencesTask("embedded", labelled=4)

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        """With the network that labels in a round, and what the expert made of its labels."""
        nets = super().build(inputs, classes, dims)
        nets["annotator"] = deepcopy(nets["average"])
        nets["annotations"] = Annotations(self.slots, classes - 1)
        return nets

    def augment(self, batch: Batch, rng: torch.Generator) -> Batch:
        """Nothing yet: a slice is labelled as it is, and `training_step` augments afterwards."""
        return batch

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        """The loss on slices that have a label by now; in place of the others there are second views of these."""
        rng = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        labels = self.labels(nets, labelled, now)
        chosen = with_label(labels)
        with torch.autocast(labels.device.type, enabled=False):
            view = super().augment(Batch(labelled.images[chosen], labels[chosen]), rng)
        view = view if (labels[chosen] != IGNORE).any() else view._replace(labels=labels)
        logits = nets["model"](view.images.contiguous(memory_format=torch.channels_last)).float()
        return find_loss(self.loss)(logits, view.labels)

    def labels(self, nets: nn.ModuleDict, batch: Batch, now: Moment) -> Tensor:
        """(B, H, W) uint8: what each slice is labelled by now; of one that waits for its round, nothing."""
        if batch.groups is None:
            return batch.labels
        given = (batch.groups == 0) & self.transfers
        due = ~given & (self.round_of(batch.index) < self.begun(now))
        labels = torch.where((given | due)[:, None, None], batch.labels, IGNORE)
        if due.any():
            labels[due] = self.annotate(nets, batch.images[due], batch.labels[due], batch.index[due])
        return labels

    @torch.no_grad()
    def annotate(self, nets: nn.ModuleDict, images: Tensor, truth: Tensor, index: Tensor) -> Tensor:
        """(B, H, W) uint8: the network's labels of slices whose truth is known, as the expert leaves them."""
        logits = nets["annotator"].eval()(images)
        proposed = logits.argmax(1).to(truth.dtype)
        dice, shown = structure_dice(proposed, truth, logits.shape[1])
        wrong = nets["annotations"].known(index) | (dice < (self.enough if self.corrects else 0.0))
        nets["annotations"].note(index, shown, wrong)
        return corrected(proposed, truth, wrong)

    def round_of(self, index: Tensor) -> Tensor:
        """(B,) the number of the round in which samples are first annotated."""
        return index // BLOCK % len(self.rounds)

    def begun(self, now: Moment) -> int:
        """How many rounds have begun."""
        return sum(now.fraction >= start for start in self.rounds)

    def after_step(self, nets: nn.ModuleDict, now: Moment) -> None:
        """Where a round begins with the next step, it is annotated by what predicts now."""
        super().after_step(nets, now)
        if self.begun(Moment(now.step + 1, now.steps)) > self.begun(now):
            nets["annotator"].load_state_dict(nets["average"].state_dict())


def over_sequences(fitted, case: Case) -> list[dict]:
    """Dice and HD95 of every structure as each scanner shows the case, and what share of structures was drawn by hand.

    A row's structure is named `structure, sequence`.
    """
    rows, kept = [], ("dice", "hd95", "missed", "false_alarm")
    for look in LOOKS:
        found = evaluation.score_case(fitted.predict(as_shown(case, look)), case, fitted.task.structures)
        for row in found:
            values = {name: row[name] for name in kept}
            rows.append(evaluation.row(case, f"{row['structure']}, {look}", drawn=drawn(fitted), **values))
    return rows


def drawn(fitted) -> float:
    """Of what was not labelled to begin with, the share of structures that an expert drew; 1 where he drew all."""
    return fitted.nets["annotations"].share() if "annotations" in fitted.nets else 1.0


recipe = Recipe(
    paper="mrsegmentator",
    title="One network for many sequences, annotated in a loop",
    claim="Over four simulated sequences, one network that learns from all of them, labelled in a loop of network and "
    "expert, gives a higher Dice than a network that learns from one sequence, with labels of as many patients.",
    arms={
        "one sequence": Arm(BASELINE, {"looks": (CT,)}),
        "mrsegmentator": Arm(InTheLoop()),
        "without corrections": Arm(InTheLoop(corrects=False)),
        "all drawn by hand": Arm(BASELINE),
        "without transfer": Arm(InTheLoop(transfers=False)),
    },
    compare=("mrsegmentator", "one sequence"),
    ablation=("mrsegmentator", "without corrections"),
    replicate="fold",
    scales=scales(
        SequencesTask("embedded"),
        SequencesTask("acdc"),
        "one sequence",
        "mrsegmentator",
        "without corrections",
        "all drawn by hand",
    ),
    score=over_sequences,
    published={
        "lungs, Dice": 0.97,
        "heart, Dice": 0.95,
        "left adrenal gland, Dice": 0.65,
        "right adrenal gland, Dice": 0.61,
        "portal and splenic veins, Dice": 0.54,
    },
    source="abstract of arXiv 2405.06463; its version 3 has 0.96 (lungs), 0.94 (heart), 0.69 (glands), 0.64 (veins)",
    components=(
        Component(
            "one network for many sequences",
            "implemented",
            "four simulated ones, each patient seen in one, half of them in the first; everyone who is scored is shown "
            "in all four. The network of one sequence has as many patients, all of them in the first. That each "
            "sequence's own specialist is not better is not tested, nor a sequence that was in no training",
        ),
        Component(
            "cross-modality transfer",
            "simplified",
            "hearts as they are stand for CT and are labelled from the start: the first 30% of the steps learn from "
            "these alone, and their network makes the first labels of the others. There an existing CT model does, and "
            "CTs stay in the training, as here. `without transfer`, which `full` does not run, starts without labels",
        ),
        Component(
            "human-in-the-loop annotation",
            "simplified",
            "the expert is the data set's label: he accepts a structure of a slice from a Dice of 0.7 on, and else "
            "draws it anew, whatever is wrong about it. Three rounds, at 30%, 50% and 70% of the steps; a slice is "
            "looked at when it is in a batch, and batches are filled with what has a label. The share of structures "
            "that had to be drawn is in the column `drawn`. Without the expert all labels are the network's own. When "
            "rounds begin, what is accepted and that half of the patients are of the first sequence was decided on "
            "training patients of fold 4, which is not scored, after a first version had learnt nothing there",
        ),
        Component(
            "Dice and Hausdorff distance of each structure",
            "implemented",
            "of every structure under every sequence, as rows of their own; HD95 in the column `hd95`. Small and "
            "complex structures are represented by the thin myocardium",
        ),
        Component("nnU-Net", "simplified", "the book's U-Net on slices, in every arm"),
        Component("40 structures", "simplified", "three of the heart"),
        Component(
            "UK Biobank, NAKO and AMOS22", "absent", "not at hand; the sequences are simulated from one data set's MR"
        ),
        Component("open-source model", "absent", "their program is used as it is, `pip install mrsegmentator`"),
    ),
)
