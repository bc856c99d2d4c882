"""Methods that predict more than once: dropout at prediction, ensembles, augmented views; and two that predict better.

The contract: a method that can sample has `samples(nets, images, count)`, (count, B, classes, *size) probabilities,
each a prediction of its own; `medcook.sampling.case_samples` brings them to a case's own grid.
"""

from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from medcook.data.case import IGNORE
from medcook.errors import MedcookError
from medcook.losses import find_loss
from medcook.measures.calibration import temper
from medcook.methods.method import Batch, Method, Moment
from medcook.networks import UNet


@dataclass
class Sampling(Method):
    """A method whose prediction is the mean of `passes` samples, the same ones whenever it is asked."""

    passes: int = 8

    def samples(self, nets: nn.ModuleDict, images: Tensor, count: int) -> Tensor:
        """(count, B, classes, *size) probabilities; what is random follows torch's global generator."""
        raise NotImplementedError

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.samples(nets, images, self.passes).mean(0)


@dataclass
class MCDropout(Sampling):
    """Dropout in the deep blocks of a U-Net, in training and in prediction (Gal and Ghahramani, ICML 2016).

    dropout  share of the feature maps that is dropped, whole maps at a time
    deep     how many of the deepest blocks on the way down, and on the way up, drop
    """

    dropout: float = 0.3
    deep: int = 2

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        nets = super().build(inputs, classes, dims)
        for net in nets.values():
            add_dropout(net, self.dropout, self.deep, dims)
        return nets

    def samples(self, nets: nn.ModuleDict, images: Tensor, count: int) -> Tensor:
        """`count` passes, each with masks of its own; everything but dropout stays as it is."""
        drops = [layer for layer in nets["average"].modules() if isinstance(layer, nn.modules.dropout._DropoutNd)]
        before = [layer.training for layer in drops]
        for layer in drops:
            layer.train()
        try:
            return torch.stack([nets["average"](images).float().softmax(1) for _ in range(count)])
        finally:
            for layer, training in zip(drops, before, strict=True):
                layer.train(training)


def add_dropout(net: nn.Module, share: float, deep: int, dims: int) -> None:
    """Put dropout of whole feature maps behind the `deep` deepest blocks on each side of our U-Net."""
    if not isinstance(net, UNet):
        raise MedcookError(f"Dropout has no place in a {type(net).__name__}.", "Take network='unet'.")
    drop = nn.Dropout2d if dims == 2 else nn.Dropout3d
    for block in [*net.down[-deep:], *net.up[-deep:]]:
        block.append(drop(share))


@dataclass
class DeepEnsemble(Sampling):
    """Networks of one kind from different random starts, each with its own augmentation (Lakshminarayanan et al. 2017).

    They train side by side: a step shows all of them the same cases, each in a view of its own, and one optimiser
    moves them (AdamW treats every weight by itself; only clipping looks at all gradients together). A step costs
    `members` times a single network's.
    """

    passes: int = 5
    members: int = 5

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        """`model` and `average` are lists of networks."""
        members = nn.ModuleList(
            super(DeepEnsemble, self).build(inputs, classes, dims)["model"] for _ in range(self.members)
        )
        return nn.ModuleDict({"model": members, "average": deepcopy(members).requires_grad_(False)})

    def augment(self, batch: Batch, rng: torch.Generator) -> Batch:
        """The cases as they are: each member makes its own view of them in `training_step`."""
        return batch

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        """The mean of the members' losses, each on a view of its own."""
        losses = []
        for net in nets["model"]:
            seen = super().augment(labelled, torch.Generator().manual_seed(int(torch.randint(2**31, (1,)))))
            losses.append(find_loss(self.loss)(net(seen.images).float(), seen.labels))
        return torch.stack(losses).mean()

    def samples(self, nets: nn.ModuleDict, images: Tensor, count: int) -> Tensor:
        """One prediction of each member; more than there are members begin again with the first."""
        found = [net(images).float().softmax(1) for net in nets["average"][: min(count, self.members)]]
        return torch.stack([found[k % self.members] for k in range(count)])

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        return self.samples(nets, images, self.members).mean(0)


@dataclass
class TestTime(Sampling):
    """Test-time augmentation of one trained network: views of an image, each prediction turned back (Wang et al. 2019).

    turn       mirror images, and turn those with equal sides by quarters
    intensity  how strong grey values change, as a share of what training does; the first view is left as it is
    """

    turn: bool = True
    intensity: float = 0.5

    __test__ = False  # not a test, whatever pytest makes of the name

    def samples(self, nets: nn.ModuleDict, images: Tensor, count: int) -> Tensor:
        found = []
        for number in range(count):
            seen = self.view(images, number)
            found.append(self.turned(nets["average"](seen).float().softmax(1), number, back=True))
        return torch.stack(found)

    def view(self, images: Tensor, number: int) -> Tensor:
        """View 0 is the image; the others are turned, and their grey values changed at random."""
        if number and self.intensity:
            rng = torch.Generator().manual_seed(int(torch.randint(2**31, (1,))))
            widths = ("gamma", "contrast", "brightness", "noise")
            weaker = {name: getattr(self.augmentation, name) * self.intensity for name in widths}
            images = replace(self.augmentation, **weaker).intensity(images, rng)
        return self.turned(images, number)

    def turned(self, images: Tensor, number: int, back: bool = False) -> Tensor:
        """Images (B, C, *size) in position `number`, or from there `back` again; exact, nothing is interpolated."""
        if not self.turn:
            return images
        every = positions(tuple(images.shape[2:]))
        axes, quarters = every[number % len(every)]
        if back:
            return images.rot90(-quarters, (-2, -1)).flip(axes)
        return images.flip(axes).rot90(quarters, (-2, -1))


def positions(size: tuple[int, ...]) -> list[tuple[tuple[int, ...], int]]:
    """(axes to flip, quarter turns) of every position of a grid that keeps its size, the unchanged one first.

    A square has 8; any other grid 2 for each axis.
    """
    if len(size) == 2 and size[0] == size[1]:
        return [(axes, quarters) for axes in ((), (-1,)) for quarters in range(4)]
    axes = range(-len(size), 0)
    return [
        (tuple(a for a, on in zip(axes, flips, strict=True) if on), 0) for flips in product((0, 1), repeat=len(size))
    ]


@dataclass
class RandomRater(Method):
    """Label sampling: every step learns from one rater of each image, drawn anew (Jensen et al. 2019).

    Over many steps the network sees every rater, so that its softmax tends to the share of them who mark a voxel.
    """

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        return super().training_step(nets, labelled._replace(labels=draw_rater(labelled)), unlabelled, now)


def draw_rater(batch: Batch) -> Tensor:
    """(B, *size) labels: for each image the annotation of a random rater who annotated it; `labels` without raters."""
    if batch.raters is None:
        return batch.labels
    there = (batch.raters != IGNORE).flatten(2).any(2).float()
    chosen = torch.multinomial(there + 1e-12, 1)[:, 0]
    return batch.raters[torch.arange(len(chosen)), chosen]


@dataclass
class Tempered(Method):
    """A network whose logits are divided by a temperature found after training (Guo et al. 2017).

    Training leaves it at 1; `tempered(fitted)` gives the same run with the temperature that `fit_temperature` found.
    """

    temperature: float = 1.0

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        return temper(super().predict(nets, images), self.temperature, axis=1)


def tempered(fitted, role: str = "val"):
    """The same trained run, its temperature fitted on the cases of a role; `fitted.method` is a `Tempered`."""
    method = replace(fitted.method, temperature=1.0)
    return replace(fitted, method=replace(method, temperature=fit_temperature(replace(fitted, method=method), role)))


@torch.no_grad()
def fit_temperature(fitted, role: str = "val") -> float:
    """The temperature of least cross-entropy on the cases of a role, on the network's grid, in float32.

    Where the task hands out raters, all of them are right: the mean over raters is what is least. The cases must not
    be those that are scored.
    """
    if role == "val" and fitted.task.evaluation == "val":
        raise MedcookError("The validation cases are scored here.", "Fit the temperature on other cases (role=...).")
    fitted.nets.load_state_dict(fitted.weights["last"])
    fitted.nets.eval()
    samples = fitted.task.samples(role)
    said = torch.cat([fitted.method.predict(fitted.nets, part) for part in samples.images.split(16)])
    truth = samples.labels[:, None] if samples.raters is None else samples.raters
    return best_temperature(said, truth)


def best_temperature(probabilities: Tensor, labels: Tensor) -> float:
    """T between 0.05 and 20 with the least cross-entropy of p^(1/T) / sum p^(1/T).

    probabilities (N, classes, *size); labels (N, R, *size), all R of them right, `IGNORE` left out
    """
    logits = probabilities.clamp_min(1e-12).log().double()
    classes = logits.shape[1]
    votes = torch.stack([(labels == value).sum(1) for value in range(classes)], dim=1).double()

    def cost(log_temperature: float) -> float:
        return float(-(votes * (logits / np.exp(log_temperature)).log_softmax(1)).sum() / votes.sum())

    return float(np.exp(minimize_scalar(cost, bounds=np.log([0.05, 20.0]), method="bounded").x))
