"""Segmentation that a person guides: marks on an image, simulated people who make them, and methods that listen.

A person marks pixels: some that belong to what is meant, some that do not. Marks are (B, 2, *size) bool, channel 0
what belongs, channel 1 what does not; a click is one pixel, a scribble many. All of it works in two and three
dimensions, on the network's grid.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from scipy import ndimage
from torch import Tensor, nn

from medcook.cohorts import CohortTask
from medcook.data import IGNORE, Case
from medcook.errors import MedcookError
from medcook.evaluation import row
from medcook.losses import find_loss
from medcook.methods import Batch, Method, Moment
from medcook.networks import build_network
from medcook.precision import autocast
from medcook.preparation import Preparation, preparation_for
from medcook.sam.prompts import deepest, largest_part
from medcook.sampling import trained
from medcook.tasks import Samples

COUNTS = (1, 3, 5)
"""Numbers of clicks after which the answer is scored."""
MEANT, BESIDE = 0, 1
"""Channels of marks: what belongs to what is meant, and what does not."""


@dataclass(frozen=True)
class InteractiveTask(CohortTask):
    """One structure at a time is asked for; `hidden` ones (label values) are never shown in training.

    In training labels a hidden structure is unlabelled: neither a target nor background to another one.
    asked     whom the clicks of a score are about: `all` structures, the `known` or the `hidden` ones
    volumes   cases as volumes also where the book prepares slices (the embedded cohort)
    """

    hidden: tuple[int, ...] = ()
    asked: Literal["all", "known", "hidden"] = "all"
    volumes: bool = False

    @cached_property
    def preparation(self) -> Preparation:
        if self.volumes and self.dataset == "embedded":
            return Preparation(size=(8, 64, 64))
        return preparation_for(self.dataset)

    @property
    def targets(self) -> dict[int, str]:
        """{label value: name} of what is asked for when scored."""
        chosen = {"all": lambda value: True, "known": lambda value: value not in self.hidden}
        chosen["hidden"] = lambda value: value in self.hidden
        if found := {value: name for value, name in self.structures.items() if chosen[self.asked](value)}:
            return found
        raise MedcookError(f"{self.dataset}: no structure is {self.asked}.", "Say which are `hidden`.")

    def samples(self, role: str) -> Samples:
        samples = super().samples(role)
        if not self.hidden:
            return samples
        hidden = torch.isin(samples.labels, torch.tensor(self.hidden, dtype=torch.uint8))
        return replace(samples, labels=torch.where(hidden, IGNORE, samples.labels))


def no_marks(masks: Tensor) -> Tensor:
    """Marks (B, 2, *size), none yet, for masks (B, *size)."""
    return torch.zeros(len(masks), 2, *masks.shape[1:], dtype=torch.bool, device=masks.device)


def random_pixels(where: Tensor, count: int = 1) -> Tensor:
    """(B, *size) bool: up to `count` random pixels of each mask (B, *size); all of it where it has no more."""
    chance = torch.rand(where.shape, device=where.device).masked_fill(~where, -1).flatten(1)
    best = chance.topk(min(count, chance.shape[1]), dim=1)
    chosen = torch.zeros_like(chance, dtype=torch.bool).scatter_(1, best.indices, best.values >= 0)
    return chosen.view(where.shape)


def with_click(
    marks: Tensor,
    answer: Tensor,
    truth: Tensor,
    known: Tensor | None = None,
    pick: Callable[[Tensor], Tensor] = random_pixels,
) -> Tensor:
    """Marks (B, 2, *size) and a click on a wrong pixel of each answer (B, *size) bool; of the larger error.

    known  (B, *size): pixels of which the truth is known; errors elsewhere are none
    pick   which pixel of masks (B, *size) is clicked, at random unless told otherwise
    """
    missing, extra = truth & ~answer, answer & ~truth
    if known is not None:
        extra = extra & known
    size = (-1, *[1] * (truth.ndim - 1))
    more = (missing.flatten(1).sum(1) >= extra.flatten(1).sum(1)).view(size)
    clicks = pick(torch.where(more, missing, extra))
    return marks | torch.stack([clicks & more, clicks & ~more], dim=1)


def careful_click(marks: Tensor, answer: Tensor, truth: Tensor) -> Tensor:
    """Marks (B, 2, *size) and a click in the middle of the largest connected error of each answer (B, *size) bool."""
    marks = marks.clone()
    for number, (mine, right) in enumerate(zip(answer.numpy(), truth.numpy(), strict=True)):
        kinds = {MEANT: right & ~mine, BESIDE: mine & ~right}
        sizes = {kind: largest_part(error) for kind, error in kinds.items()}
        worse = MEANT if sizes[MEANT] >= sizes[BESIDE] else BESIDE
        if sizes[worse]:
            marks[(number, worse, *deepest(kinds[worse]))] = True
    return marks


def gaussians(marks: Tensor, sigma: float) -> Tensor:
    """Marks (B, C, *size) as soft dots: exp(-d^2 / (2 sigma^2)) of the distance d in pixels to the nearest mark.

    Where a channel has no mark it is zero everywhere.
    """
    return (-(distances(marks) ** 2) / (2 * sigma**2)).exp()


def distances(marks: Tensor) -> Tensor:
    """(B, C, *size) float32: pixels to the nearest mark of each channel; infinite where it has none."""
    found = torch.full(marks.shape, torch.inf)
    for place in marks.flatten(2).any(2).nonzero().tolist():
        mark = marks[tuple(place)].cpu().numpy()
        found[tuple(place)] = torch.from_numpy(ndimage.distance_transform_edt(~mark)).float()
    return found.to(marks.device)


class GuidedNet(nn.Module):
    """A network of the image and what guides it; `classes` is how many the task has, for `Guided.predict`."""

    def __init__(self, network: nn.Module, classes: int):
        super().__init__()
        self.network, self.classes = network, classes

    def forward(self, images: Tensor, guidance: Tensor) -> Tensor:
        """Images (B, C, *size) and guidance (B, G, *size) to logits (B, 2, *size)."""
        return self.network(torch.cat([images, guidance.to(images.dtype)], dim=1))


@dataclass
class Guided(Method):
    """A U-Net that sees, beside the image, where a person clicked, and its own answer so far.

    sigma    width of a click in pixels, see `gaussians`
    rounds   answers in a training step: the first to one click, each next one to a click on what is wrong with it
    """

    channels: tuple[int, ...] = (8, 16, 32, 64, 64)
    sigma: float = 4.0
    rounds: int = 2

    guides = 3
    """Channels of `guidance`; a class attribute."""

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        model = GuidedNet(self.backbone(inputs + self.guides, dims), classes)
        return nn.ModuleDict({"model": model, "average": deepcopy(model).requires_grad_(False)})

    def backbone(self, inputs: int, dims: int) -> nn.Module:
        """A network from (B, inputs, *size) to (B, 2, *size)."""
        return build_network(self.network, inputs=inputs, classes=2, channels=self.channels, dims=dims)

    def guidance(self, marks: Tensor, before: Tensor | None) -> Tensor:
        """(B, guides, *size): soft dots of the marks, and the probability that the answer before gave (0: none)."""
        dots = gaussians(marks, self.sigma)
        said = torch.zeros_like(dots[:, :1]) if before is None else before.float().softmax(1)[:, 1:]
        return torch.cat([dots, said], dim=1)

    def start(self, net: nn.Module, images: Tensor) -> object:
        """What is worked out once an image (B, C, *size), before anybody clicks; here the image itself."""
        return images

    def respond(self, net: nn.Module, state: object, marks: Tensor, before: Tensor | None) -> Tensor:
        """Logits (B, 2, *size) after marks (B, 2, *size) and the logits before."""
        return net(state, self.guidance(marks, before))

    def first(self, truth: Tensor) -> Tensor:
        """The first marks (B, 2, *size) on masks (B, *size): a click on a random pixel of each."""
        marks = no_marks(truth)
        marks[:, MEANT] = random_pixels(truth)
        return marks

    def correct(self, marks: Tensor, answer: Tensor, truth: Tensor, known: Tensor) -> Tensor:
        """The marks and what a person adds to them after an answer (B, *size) bool, see `with_click`."""
        return with_click(marks, answer, truth, known)

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        """The mean loss of the answers of all rounds."""
        target = chosen_structure(labelled.labels)
        truth, known = target == 1, target != IGNORE
        marks, answer, losses = self.first(truth), None, []
        state = self.start(nets["model"], labelled.images)
        for turn in range(self.rounds):
            if turn:
                marks = self.correct(marks, answer.argmax(1) == 1, truth, known)
            logits = self.respond(nets["model"], state, marks, answer)
            losses.append(self.answer_loss(logits, target))
            answer = logits.detach()
        return sum(losses) / len(losses)

    def answer_loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of an answer (B, 2, *size); target (B, *size) is 1, 0 or `IGNORE`."""
        return find_loss(self.loss)(logits.float(), target)

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """Class probabilities (B, classes, *size) without a mark: nobody said which structure, so all are alike."""
        net, marks = nets["average"], no_marks(images[:, 0])
        probability = self.respond(net, self.start(net, images), marks, None).float().softmax(1)
        return torch.cat([probability[:, :1]] + [probability[:, 1:] / (net.classes - 1)] * (net.classes - 1), dim=1)


def chosen_structure(labels: Tensor) -> Tensor:
    """(B, *size) uint8: of each label map one random structure that it shows is 1, all else 0, unlabelled `IGNORE`."""
    target = torch.where(labels == IGNORE, labels, 0)
    for number, label in enumerate(labels):
        values = label[(label != 0) & (label != IGNORE)].unique()
        if len(values):
            value = values[int(torch.randint(len(values), ()))]
            target[number] = torch.where(label == IGNORE, label, (label == value).to(labels.dtype))
    return target


Click = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(marks, answer, truth) -> marks with what a simulated person adds."""


@torch.no_grad()
def session(fitted, images: Tensor, truth: Tensor, counts: Sequence[int] = COUNTS, click: Click = careful_click):
    """{n: answers (B, *size) bool after n clicks} of a trained method about masks (B, *size) on (B, C, *size)."""
    method, net = fitted.method, fitted.nets["average"]
    with autocast(fitted.cost):
        state, marks, before = method.start(net, images), no_marks(truth), None
        answer, found = torch.zeros_like(truth), {}
        for count in range(1, max(counts) + 1):
            marks = click(marks, answer, truth)
            before = method.respond(net, state, marks, before)
            answer = before.argmax(1) == 1
            if count in counts:
                found[count] = answer
    return found


def click_rows(fitted, case: Case) -> list[dict]:
    """A row for each structure asked for: Dice over the case after 1, 3 and 5 clicks an image, on the network's grid.

    dice      after the first click; dice_3 and dice_5 after more, each in the middle of the largest error
    An image is a slice, or the volume where volumes train; images that do not show the structure are not asked about.
    """
    trained(fitted)
    images, labels = fitted.task.preparation.images(case), fitted.task.preparation.labels(case)
    rows = []
    for value, name in fitted.task.targets.items():
        truth = labels == value
        there = truth.flatten(1).any(1)
        if there.any():
            answers = session(fitted, images[there], truth[there])
            scores = [overlap(answers[count], truth[there]) for count in COUNTS]
            values = dict(zip(("dice", "dice_3", "dice_5"), scores, strict=True))
            rows.append(row(case, name, **values))
    return rows


def overlap(answer: Tensor, truth: Tensor) -> float:
    """Dice of two masks of any shape, all their pixels together."""
    size = int(answer.sum() + truth.sum())
    return 2 * int((answer & truth).sum()) / size if size else 1.0
