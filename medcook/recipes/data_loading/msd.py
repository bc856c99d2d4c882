"""The Medical Segmentation Decathlon (Antonelli, Reinke, Bakas et al., Nature Communications 13, 2022).

Algorithms were entered, not networks: each was trained anew on every one of seven known tasks, and then, as it was, on
three that nobody had seen. Which algorithm is best was said by tests: how many others does it beat, in each task, of
each structure and in each metric. Who did well all over the known tasks did so on the unseen ones, too; a solution made
for one task may be beaten.

  score(a)  = the number of b with p(a > b) < 0.05, Wilcoxon's signed-rank test, one-sided, over cases
  rank(a)   = the mean over tasks of the mean over structures and metrics (Dice, surface Dice) of the score's rank

Here three tasks are known, hearts, lungs, and organs of head and neck; hippocampi, a task of the Decathlon, and cells
are not. Every algorithm has a network for each task: nothing that one learns reaches another. The ranking is in
`_ranking.py`, what an algorithm does with a task's data in `_decathlon.py`. Validation patients were looked at once,
after 150 steps of three algorithms; how many steps there are followed from it, and none of the rules.
"""

from copy import deepcopy
from dataclasses import dataclass
from math import nan

import torch
from torch import Tensor, nn

from medcook import metrics
from medcook.data import IGNORE, Case
from medcook.data.transforms import Augment
from medcook.evaluation import row
from medcook.losses import find_loss
from medcook.methods import Batch, Method, Moment
from medcook.methods.semi_supervised import NARROW
from medcook.networks import build_network
from medcook.precision import autocast
from medcook.recipes.data_loading._decathlon import DecathlonTask
from medcook.recipes.data_loading._ranking import surface_dice
from medcook.recipes.recipe import Arm, Component, Recipe, Scale
from medcook.sampling import trained
from medcook.tasks import Budget

KNOWN = ("acdc", "chest_xray", "openkbp")
STRUCTURES = (3, 1, 7, 2, 1)
"""Of the tasks below, in their order; their labels are numbered one after the other."""
TOLERANCE = 0.01
"""Of the image's longer side: an outline nearer than this is right. One pixel at least."""

FULL = DecathlonTask(
    "acdc",
    evaluation="test",
    counts=(20, 4, 10),
    parts=(("chest_xray", 40, 4, 25), ("openkbp", 0, 1, 0), ("hippocampus", 20, 4, 30), ("bubil", 0, 2, 0)),
    balanced=True,
)
QUICK = DecathlonTask("embedded", counts=(3, 1, 1))


@dataclass
class Retrained(Method):
    """One algorithm, trained on every task: a network for each, from random weights of its own.

    structures  of each task; of other data, whose structures are not as many in all, there is one task
    """

    channels: tuple[int, ...] = NARROW
    structures: tuple[int, ...] = STRUCTURES

    axes = 2

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        """`model` and `average` hold a network for each task, which knows its own structures alone."""
        counts = self.structures if sum(self.structures) == classes - 1 else (classes - 1,)
        shape = {"inputs": inputs, "channels": self.channels, "dims": dims}
        model = nn.ModuleList(build_network(self.network, classes=1 + count, **shape) for count in counts)
        return nn.ModuleDict({"model": model, "average": deepcopy(model).requires_grad_(False)})

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        """The mean of the tasks' losses; each is of the images that the batch has of it."""
        groups = labelled.groups
        if groups is None:
            groups = torch.zeros(len(labelled.images), dtype=torch.long)
        losses = []
        for number in groups.unique().tolist():
            mine = groups == number
            labels = renumbered(labelled.labels[mine], sum(self.structures[:number]))
            losses.append(find_loss(self.loss)(nets["model"][number](labelled.images[mine]).float(), labels))
        return torch.stack(losses).mean()

    def answer(self, nets: nn.ModuleDict, images: Tensor, number: int) -> Tensor:
        """Probabilities (B, 1 + structures, *size) by the network of a task."""
        return nets["average"][number](images).float().softmax(1)

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """Of all tasks' structures (B, classes, *size), where nobody says which task it is: every network's share."""
        answers = [self.answer(nets, images, number) for number in range(len(nets["average"]))]
        structures = torch.cat([each[:, 1:] for each in answers], dim=1) / len(answers)
        return torch.cat([1 - structures.sum(1, keepdim=True), structures], dim=1)


def renumbered(labels: Tensor, before: int) -> Tensor:
    """Labels that begin behind `before` as 1, 2, ...; background and what is not annotated stay."""
    return torch.where((labels > 0) & (labels != IGNORE), labels - before, labels)


@torch.no_grad()
def segmented(fitted, case: Case) -> Tensor:
    """The label map (*spatial) of a case, numbered as its own set does, by its task's network."""
    nets, preparation, number = trained(fitted), fitted.task.preparation, case.attributes["modality"]
    parts = preparation.images(case).split(16)
    with autocast(fitted.cost):
        answers = torch.cat([fitted.method.answer(nets, part, number) for part in parts]).float()
    return preparation.restore(answers, case).argmax(0)


def task_rows(fitted, case: Case) -> list[dict]:
    """A row for each annotated structure of a case, on the case's own grid.

    set    the task;   nsd  the surface Dice at `TOLERANCE`;   known, unseen  the Dice where the task is one, else NaN
    """
    data, name = fitted.task.data, case.attributes["set"]
    found, rows = segmented(fitted, case).numpy(), []
    tolerance = max(1.0, TOLERANCE * max(case.spatial[-2:]))
    for value in data.sets[name].manifest.structures:
        own = data.offsets[name] + value
        if own in case.attributes.get("annotated", fitted.task.structures):
            pred, truth = found == value, case.label == own
            dice = metrics.dice(pred, truth)
            kinds = {"known": dice, "unseen": nan} if name in KNOWN else {"known": nan, "unseen": dice}
            flags = {
                "missed": bool(truth.any() and not pred.any()),
                "false_alarm": bool(pred.any() and not truth.any()),
            }
            values = {"dice": dice, "nsd": surface_dice(pred, truth, tolerance), **kinds, **flags}
            rows.append(row(case, fitted.task.structures[own], set=name, **values))
    return rows


UNTOUCHED = Augment(0, 0, 0, 0, 0, 0, 0)
ARMS = {
    "self-configuring": Arm(Retrained()),
    "made for hearts": Arm(Retrained(), {"settings": "hearts"}),
    "one size": Arm(Retrained(), {"settings": "whole"}),
    "small, not augmented": Arm(Retrained(channels=(4, 8, 16, 32), augmentation=UNTOUCHED), {"settings": "whole"}),
}

recipe = Recipe(
    paper="msd",
    title="The Decathlon: one algorithm for many tasks, and for those that nobody has seen",
    claim="Retrained on two tasks that it was not made for, hippocampi and cells, an algorithm that configures itself "
    "by a task's training data has a higher Dice than one whose settings were made for hearts.",
    arms=ARMS,
    compare=("self-configuring", "made for hearts"),
    metric="unseen",
    score=task_rows,
    scales={
        "quick": Scale(QUICK, Budget(steps=40, batch=6, precision="float32", checks=0), replicates=1),
        "full": Scale(FULL, Budget(steps=1000, batch=16, checks=0)),
    },
    source="the abstract; ranking by tests as in the authors' package, github.com/wiesenfa/challengeR (testThenRank)",
    components=(
        Component(
            "one algorithm for many tasks",
            "implemented",
            "trained on every task from random weights, with a network for each; steps and images are the same for all "
            "algorithms. All tasks are trained in one run, side by side: what they share is the norm to which the "
            "gradients of a step are cut, nothing else",
        ),
        Component(
            "known and unseen tasks",
            "simplified",
            "three known ones and two others in place of seven and three, in slices. No setting was chosen by how well "
            "it does on either, but for the number of steps. Columns `known` and `unseen`; in the mean over the latter "
            "a hippocampus and a cell count the same, and there are three times as many of the one",
        ),
        Component(
            "ranking by significance",
            "implemented",
            "`standings`: one-sided Wilcoxon tests of all pairs, in each task, structure and metric, at 0.05 and not "
            "adjusted; scores, ranks, means. With three test patients, as of openkbp, no test can be significant, and "
            "all algorithms share a place. `kept`: Kendall's tau of the ranks on known and on unseen tasks",
        ),
        Component(
            "normalised surface Dice",
            "simplified",
            "of outlines in slices, in pixels, since three of the sets have no spacing; the tolerance is a hundredth "
            "of the image's side, where theirs is set by clinicians for each structure",
        ),
        Component(
            "self-configuring algorithm",
            "simplified",
            "nnU-Net, which won, in one of its rules: an image's resolution follows from the training data, here from "
            "where in the image labels are. Patch, depth and batch are the same for all, since there is one grid; a CT "
            "is cut to the same values, and every case is brought to zero mean and unit variance",
        ),
        Component(
            "solution made for one task",
            "implemented",
            "the book's baseline for hearts: half of the image, about what moves; elsewhere about the middle",
        ),
        Component(
            "axis of difficulties",
            "simplified",
            "small data (7 CTs), small objects (organs of a few voxels), two sites (X-rays), five kinds of images; no "
            "tumours",
        ),
        Component("ten data sets", "absent", "one is at hand, the hippocampus; the book reads all ten"),
        Component("stability of the ranking", "absent", "they resample cases; here there are three seeds"),
        Component("the winner on other problems, for two years", "absent", "two unseen tasks stand for them"),
    ),
)
