"""CADS: a comprehensive anatomical dataset and segmentation for whole-body anatomy in CT (Xu et al., 2025).

arXiv 2507.22953. Collections of images differ in what they annotate, and how they name and number it. CADS brings forty
of them to one list of 167 structures, completes what each leaves out by the predictions of networks, and trains on the
result. The data half is data_manifests/cads.yaml and medcook/data/sets/cads.py.

In miniature: three sources of hearts, each of which draws one of three structures. What else is there is unknown, not
background. A voxel has a set of candidates, and the loss of it is that of their sum (Shi et al., Marginal loss and
exclusion loss for partially supervised multi-organ segmentation, Medical Image Analysis 2021):

    cross-entropy  - log sum_{c in candidates} p_c
    Dice           of a structure, over the voxels where it is the only candidate or none

Then the network's own moving average completes the annotations: where it is sure which of the candidates it is, the
voxel has that one alone. What an expert drew stays.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from medcook.data import IGNORE
from medcook.data.splits import patient_hash
from medcook.methods import Batch, Moment, Supervised
from medcook.recipes.architectures._settings import BASELINE, BUDGET, CHANNELS
from medcook.recipes.recipe import Arm, Component, Recipe, Scale
from medcook.tasks import Budget, Samples, Task


def words(name: str) -> tuple[str, ...]:
    """The words of a structure's name in alphabetical order: `right kidney` and `Kidney_Right` have the same."""
    return tuple(sorted(name.lower().replace("_", " ").split()))


def harmonise(label: Tensor, own: dict[int, str], shared: dict[int, str], synonyms: dict[str, str]) -> Tensor:
    """A source's label map (*size) uint8 in the numbers of the shared list; what the list lacks becomes `IGNORE`.

    own, shared  {number: name}; names agree if their words do, or if `synonyms` {own name: shared name} says so
    """
    numbers = {words(name): value for value, name in shared.items()}
    table = torch.full((256,), IGNORE, dtype=torch.uint8)
    table[0] = 0
    for value, name in own.items():
        table[value] = numbers.get(words(synonyms.get(name, name)), IGNORE)
    return table[label.long()]


@dataclass(frozen=True)
class SourcesTask(Task):
    """Training patients come from as many sources as there are structures, and source k draws the k-th alone.

    `groups` of the samples are the sources 0, 1, ...; a patient is of the same source in every fold.
    hidden  False: every source draws everything
    """

    hidden: bool = True

    @cached_property
    def sources(self) -> dict[str, int]:
        """{patient: source}: patients dealt in turn, in the order of their names' hashes."""
        patients = sorted(self.data.split.train + self.data.split.val, key=patient_hash)
        return {patient: number % len(self.structures) for number, patient in enumerate(patients)}

    def samples(self, role: str) -> Samples:
        samples = super().samples(role)
        if role != "labelled":
            return samples
        cases = [self.sources[patient] for patient in self.labelled_patients for _ in self.data.patients[patient]]
        groups = torch.tensor(cases)[samples.case_of]
        labels = samples.labels
        if self.hidden:
            labels = torch.stack([self.published(*pair) for pair in zip(labels, groups.tolist(), strict=True)])
        return Samples(samples.images, labels, samples.case_of, samples.raters, groups)

    def published(self, label: Tensor, source: int) -> Tensor:
        """What a source says of an image, in the numbers of the task; its own structure is its number 1."""
        value, name = list(self.structures.items())[source]
        drawn = torch.where(label == IGNORE, IGNORE, (label == value).byte())
        return harmonise(drawn, {1: name}, self.structures, {})


def candidates(labels: Tensor, drawn: Tensor) -> Tensor:
    """(B, classes, *size) bool: what each voxel may be, given labels (B, *size) and drawn (B, classes) bool.

    drawn says which structures the source of an image draws. A voxel of one of these is that; every other voxel is
    background or one of those that the source does not draw; `IGNORE` may be anything.
    """
    shape = (*drawn.shape, *[1] * (labels.ndim - 1))
    drawn = drawn.clone()
    drawn[:, 0] = False
    drawn = drawn.view(shape)
    said = labels[:, None] == torch.arange(shape[1], device=labels.device).view(1, *shape[1:])
    said &= drawn
    return torch.where(said.any(1, keepdim=True), said, ~drawn) | (labels == IGNORE)[:, None]


def completed(known: Tensor, probabilities: Tensor, threshold: float) -> Tensor:
    """`known` (B, classes, *size) with one candidate alone where it has at least `threshold` of their probability."""
    among = probabilities * known
    sure, which = (among / among.sum(1, keepdim=True).clamp_min(1e-6)).max(1, keepdim=True)
    values = torch.arange(known.shape[1], device=known.device).view(1, -1, *[1] * (known.ndim - 2))
    return torch.where(sure >= threshold, which == values, known)


def marginal_cross_entropy(logits: Tensor, known: Tensor) -> Tensor:
    """- log of the candidates' probability, a mean over voxels that have fewer candidates than there are classes."""
    told = ~known.all(1)
    total = torch.logsumexp(logits.log_softmax(1).masked_fill(~known, -torch.inf), dim=1)
    return -(total * told).sum() / told.sum().clamp_min(1)


def marginal_dice(logits: Tensor, known: Tensor, smooth: float = 1.0) -> Tensor:
    """`medcook.losses.soft_dice` of every structure over the voxels where it is the only candidate, or is none."""
    only = known & (known.sum(1, keepdim=True) == 1)
    told, truth = (only | ~known)[:, 1:], only[:, 1:]
    soft = logits.softmax(1)[:, 1:] * told
    axes = (0, *range(2, logits.ndim))
    overlap, size = (soft * truth).sum(axes), soft.sum(axes) + truth.sum(axes)
    return 1 - ((2 * overlap + smooth) / (size + smooth)).mean()


@dataclass
class Harmonised(Supervised):
    """Training on sources that each draw one structure: cross-entropy and Dice of what each voxel may be.

    complete   whether the moving average completes the annotations, from `start` (a share of the steps) on
    threshold  how sure it must be
    A batch without groups (`SourcesTask` gives them) is dealt to the sources image by image.
    """

    channels: tuple[int, ...] = CHANNELS
    complete: bool = True
    start: float = 0.4
    threshold: float = 0.8

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        logits = nets["model"](labelled.images).float()
        known = candidates(labelled.labels, self.drawn(labelled, logits.shape[1]))
        if self.complete and now.fraction >= self.start:
            known = completed(known, self.teach(nets, labelled.images), self.threshold)
        return marginal_cross_entropy(logits, known) + marginal_dice(logits, known)

    def drawn(self, batch: Batch, classes: int) -> Tensor:
        """(B, classes) bool: source k draws structure k + 1."""
        groups = torch.arange(len(batch.labels), device=batch.labels.device) if batch.groups is None else batch.groups
        return nn.functional.one_hot(groups % (classes - 1) + 1, classes).bool()

    @torch.no_grad()
    def teach(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """Probabilities (B, classes, *size) of the moving average."""
        return nets["average"](images).float().softmax(1)


recipe = Recipe(
    paper="cads",
    title="Completing what each source leaves out",
    claim="Where each of three sources draws one of three structures of the heart, completing their annotations gives "
    "a higher Dice than taking what a source does not draw for background.",
    arms={
        "as background": Arm(BASELINE),
        "completed": Arm(Harmonised()),
        "not completed": Arm(Harmonised(complete=False)),
        "all labels": Arm(BASELINE, {"hidden": False}),
        "completed wherever": Arm(Harmonised(threshold=0.0)),
    },
    compare=("completed", "as background"),
    ablation=("completed", "not completed"),
    replicate="fold",
    scales={
        "quick": Scale(SourcesTask("embedded"), Budget(steps=30, batch=6, checks=2), replicates=1),
        "full": Scale(SourcesTask("acdc"), BUDGET, arms=("as background", "completed", "not completed")),
    },
    source="arXiv 2507.22953 and the authors' code, github.com/murong-xu/CADS",
    components=(
        Component(
            "comprehensive dataset",
            "implemented",
            "manifest and reader in the published layout, tested on a fixture; its 22,022 CTs are not at hand, so that "
            "hearts stand for them. The sources are simulated: the real labels of real hearts are hidden, so that "
            "source k has structure k alone",
        ),
        Component(
            "harmonised labels",
            "implemented",
            "names and numbers of each source are brought to one list, by words and synonyms, as in the authors' code. "
            "A structure that the list lacks is ignored here",
        ),
        Component(
            "integration of heterogeneous sources",
            "implemented",
            "candidates of each voxel and a marginal loss, so that one network learns from all sources at once. It is "
            "our choice, after Shi et al.: how the authors' first networks were trained we could not read",
        ),
        Component(
            "completed annotations",
            "implemented",
            "by the moving average of the same network, from 40% of the steps on, anew in every step; the authors' "
            "pseudo-labels are made once, before their model is trained. What experts drew stays, as there",
        ),
        Component(
            "quality control",
            "simplified",
            "a threshold on how sure the network is; the arm `completed wherever` does without. The authors name an "
            "unsupervised one, whose details we could not read",
        ),
        Component(
            "established architecture",
            "simplified",
            "the book's U-Net for every arm; there nine nnU-Nets with residual encoders",
        ),
        Component("evaluation on 18 data sets and a hospital cohort", "absent", "held-out hearts of one data set"),
        Component("radiation oncology", "absent", "no planning CT is used here"),
        Component("clinical software", "absent", "their 3D Slicer plugin is not part of a recipe"),
    ),
)
