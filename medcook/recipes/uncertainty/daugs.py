"""DAUGS analysis: data adaptive uncertainty-guided space-time analysis (Yalcinkaya et al., JCMR 2024).

A pool of networks differs in its random starts alone. Each one segments a case patch by patch: patches overlap, so it
says something about every pixel several times, and how far it contradicts itself there is its uncertainty map. Case by
case, the solution of the network that contradicts itself least is handed out: a start that breaks down on another
site's images is found out without a label. With p_i(x) what patch i says of pixel x, of n(x) patches that hold it:

    solution     p(x) = mean of p_i(x)
    map          s(x) = standard deviation of p_i(x), with n(x) - 1
    uncertainty  U    = ||s||_F^2 / number of pixels that the solution segments
    choice       the network with the smallest U

Here the networks learn lungs at one site (Montgomery) and are scored at another (Shenzhen). Patients of the training
site are not scored: that nothing changes for them is another claim, and cannot be averaged into this one. Beside the
arms that choose from the pool stand the mean of its solutions, and one network of the same size that is trained on and
sees whole images.
"""

from dataclasses import dataclass
from itertools import product
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from medcook import metrics
from medcook.cohorts import CohortTask, meets
from medcook.data import Case
from medcook.evaluation import row
from medcook.losses import find_loss
from medcook.methods import Batch, Method, Moment
from medcook.recipes.recipe import Arm, Component, Recipe, Scale
from medcook.recipes.uncertainty._validation import once
from medcook.sampling import trained
from medcook.tasks import Budget
from medcook.training import validation_dice

FAILED = 0.8
"""A solution with a Dice below this counts as failed (our figure for lungs)."""


@dataclass
class Pool(Method):
    """Networks with different random starts, trained on patches; what of theirs is handed out is a matter of choice.

    members  how many networks there are
    side     of a patch, as a share of the image's; `steps` is how many strides a patch's side has
    choice   whose solution is handed out: of the network that is `least uncertain` about the image, that is `best on
             validation` patients, or `any` (each as likely); `average` hands out the mean of all
    """

    channels: tuple[int, ...] = (8, 16, 32, 64)
    members: int = 5
    side: float = 0.5
    steps: int = 4
    choice: Literal["least uncertain", "best on validation", "any", "average"] = "least uncertain"

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        pools = [nn.ModuleList() for _ in range(2)]
        for _ in range(self.members):
            member = super().build(inputs, classes, dims)
            pools[0].append(member["model"])
            pools[1].append(member["average"])
        return nn.ModuleDict({"model": pools[0], "average": pools[1]})

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        """Every member sees its own random patches of the same images."""
        sides, losses = self.sides(labelled.images), []
        for net in nets["model"]:
            images, labels = random_patches(labelled.images, labelled.labels, sides)
            losses.append(find_loss(self.loss)(net(images).float(), labels))
        return torch.stack(losses).mean()

    def sides(self, images: Tensor) -> tuple[int, ...]:
        return tuple(max(1, round(self.side * size)) for size in images.shape[2:])

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """What is handed out; the first network where validation patients, or chance, would have to decide."""
        return self.answers(nets, images)[0]

    def answers(self, nets: nn.ModuleDict, images: Tensor, elected: int = 0) -> Tensor:
        """(answers, B, classes, *size): the probabilities that may be handed out, one as likely as the other.

        elected  the network that is best on validation patients
        """
        if self.choice == "best on validation":
            return self.solve(nets["average"][elected], images)[0][None]
        found = [self.solve(net, images) for net in nets["average"]]
        solutions = torch.stack([solution for solution, _ in found])
        if self.choice == "any":
            return solutions
        if self.choice == "average":
            return solutions.mean(0, keepdim=True)
        return least_uncertain(solutions, torch.stack([uncertainty(*one) for one in found]))[None]

    def solve(self, net: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        """A network's solution (B, classes, *size) and uncertainty map (B, *size) of images (B, C, *size)."""
        return patchwise(lambda part: net(part).float().softmax(1), images, self.sides(images), self.steps)


def random_patches(images: Tensor, labels: Tensor, sides: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """One patch at a random place of each of images (B, C, *size) and labels (B, *size)."""
    places = []
    for _ in images:
        starts = [int(torch.randint(0, n - side + 1, ())) for n, side in zip(labels.shape[1:], sides, strict=True)]
        places.append(box(starts, sides))
    cut = [(image[:, *place], label[place]) for image, label, place in zip(images, labels, places, strict=True)]
    return tuple(torch.stack(patches) for patches in zip(*cut, strict=True))


def patchwise(answer, images: Tensor, sides: tuple[int, ...], steps: int) -> tuple[Tensor, Tensor]:
    """Mean (B, classes, *size) of what `answer` says of overlapping patches, and its standard deviation (B, *size).

    answer  (N, C, *sides) to probabilities (N, classes, *sides); steps: strides to a patch's side
    The variances of the structures are added up; where one patch alone holds a pixel, the deviation is 0.
    """
    size = images.shape[2:]
    places = [box(starts, sides) for starts in product(*map(lambda n, side: grid(n, side, steps), size, sides))]
    said = answer(torch.cat([images[:, :, *place] for place in places])).split(len(images))
    total, squares = (images.new_zeros(len(images), said[0].shape[1], *size) for _ in range(2))
    count = images.new_zeros(size)
    for place, probabilities in zip(places, said, strict=True):
        total[:, :, *place] += probabilities
        squares[:, :, *place] += probabilities**2
        count[place] += 1
    mean = total / count
    variance = (squares / count - mean**2).clamp_min(0) * count / (count - 1).clamp_min(1)
    return mean, variance[:, 1:].sum(1).sqrt()


def grid(size: int, side: int, steps: int) -> list[int]:
    """Where patches start along an axis: a stride apart, the last one flush with the end."""
    return [*range(0, size - side, max(1, side // steps)), size - side]


def box(starts, sides) -> tuple[slice, ...]:
    return tuple(slice(start, start + side) for start, side in zip(starts, sides, strict=True))


def uncertainty(solution: Tensor, deviation: Tensor) -> Tensor:
    """U (B,) = ||deviation||_F^2 / pixels segmented; infinite where nothing is segmented, so that this never wins."""
    area = (solution.argmax(1) > 0).flatten(1).sum(1)
    return torch.where(area > 0, (deviation**2).flatten(1).sum(1) / area.clamp_min(1), torch.inf)


def least_uncertain(solutions: Tensor, uncertainties: Tensor) -> Tensor:
    """(members, B, classes, *size) and (members, B): for each image the solution that is the least uncertain."""
    return solutions[uncertainties.argmin(0), torch.arange(solutions.shape[1])]


class OneOf(NamedTuple):
    """A member of the pool as a predictor."""

    method: Pool
    net: nn.Module

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        return self.method.solve(self.net, images)[0]


@once
def elected(fitted) -> int:
    """The member with the highest Dice on the validation patients, who are the training site's."""
    nets, val = trained(fitted), fitted.task.samples("val")
    return int(np.argmax([validation_dice(OneOf(fitted.method, net), nets, val) for net in nets["average"]]))


@torch.no_grad()
def external_rows(fitted, case: Case) -> list[dict]:
    """Dice, and whether it failed, of a case from another site than the training's; the mean over possible answers."""
    if meets(case.attributes, fitted.task.keep):
        return []
    method, preparation = fitted.method, fitted.task.preparation
    best = elected(fitted) if method.choice == "best on validation" else 0
    answers = method.answers(trained(fitted), preparation.images(case), best)
    guesses = [preparation.restore(answer, case).argmax(0).numpy() for answer in answers]
    rows = []
    for value, name in fitted.task.structures.items():
        dice = np.array([metrics.dice(guess == value, case.label == value) for guess in guesses])
        rows.append(row(case, name, dice=float(dice.mean()), failed=float((dice < FAILED).mean())))
    return rows


MONTGOMERY = CohortTask("chest_xray", evaluation="test", keep=(("site", "Montgomery"),))
NORTH = CohortTask("embedded", evaluation="test", keep=(("site", "north"),))

recipe = Recipe(
    paper="daugs",
    title="DAUGS: the solution that contradicts itself least",
    claim="On another site's X-rays, choosing case by case the network that is least uncertain raises Dice over the "
    "network that is best on the training site's validation patients.",
    arms={
        "one network": Arm(Pool(choice="best on validation")),
        "least uncertain": Arm(Pool()),
        "any network": Arm(Pool(choice="any")),
        "average": Arm(Pool(choice="average")),
        "whole image": Arm(Pool(members=1, side=1.0, choice="average")),
    },
    compare=("least uncertain", "one network"),
    ablation=("least uncertain", "any network"),
    score=external_rows,
    scales={
        "quick": Scale(NORTH, Budget(steps=40, batch=8, checks=1), replicates=1),
        "full": Scale(
            MONTGOMERY,
            Budget(steps=400, batch=8, checks=2),
            arms=("one network", "least uncertain", "any network"),
        ),
    },
    published={
        "failed series, DAUGS": 0.043,
        "failed series, established approach": 0.171,
    },
    source="the paper's abstract; the definitions of map and U follow the official code, github.com/TIM-Lab/DAUGS",
    components=(
        Component(
            "pool of networks",
            "implemented",
            "five small U-Nets in one loop; they see the same images in the same order, and patches of their own",
        ),
        Component(
            "sliding-patch analysis",
            "simplified",
            "training and prediction on patches of half the image's side, as in the paper (64 of 128); solution and "
            "map share a stride of a quarter patch, where the official code takes a finer one for the map; no removal "
            "of small components afterwards",
        ),
        Component(
            "uncertainty map",
            "implemented",
            "the official code's standard deviation over patches; with several structures their variances are added",
        ),
        Component(
            "selection by uncertainty",
            "implemented",
            "squared Frobenius norm of the map by the area segmented; an empty solution is never chosen (our reading)",
        ),
        Component("space-time patches", "absent", "X-rays have no time axis; perfusion series are not at hand"),
    ),
)
