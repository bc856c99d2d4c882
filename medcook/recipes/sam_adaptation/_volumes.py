"""Clicks in volumes: what the three-dimensional recipes of this chapter share."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.data import Case
from medcook.data.transforms import Augment
from medcook.evaluation import row
from medcook.methods import Batch, Method, Moment
from medcook.sam.pretraining import mask_loss
from medcook.sam.prompts import deepest, largest_part
from medcook.sam.zero_shot import SMALLEST, dice

MILD = Augment(rotate=12, scale=0.12, shift=0.06, gamma=0.3, contrast=0.2, brightness=0.2, noise=0.1)
"""That of the book's 3D baseline: the volumes are cropped around the hippocampus and share one orientation."""


def as_volumes(images: Tensor) -> Tensor:
    """(B, C, D, H, W) as they are; images (B, C, H, W) as volumes of one slice."""
    return images if images.ndim == 5 else images[:, :, None]


def asked_in(labels: Tensor, objects: int) -> tuple[Tensor, Tensor]:
    """Random structures of labels (B, D, H, W): masks (M, D, H, W) bool, and (M,) whose volume each belongs to."""
    masks, owner = [], []
    for number, label in enumerate(labels):
        values, counts = label.unique(return_counts=True)
        there = values[(counts >= SMALLEST) & (values > 0) & (values < 255)]
        for value in there[torch.randperm(len(there))[:objects]]:
            masks.append(label == value)
            owner.append(number)
    if not masks:
        return labels.new_zeros((0, *labels.shape[1:]), dtype=torch.bool), torch.zeros(0, dtype=torch.long)
    return torch.stack(masks), torch.tensor(owner)


def random_clicks(masks: Tensor) -> Tensor:
    """(M, 1, 3) a random voxel z, y, x inside each of masks (M, D, H, W); any voxel of an empty one."""
    where = torch.multinomial(masks.flatten(1).float() + 1e-9, 1)[:, 0]
    _, height, width = masks.shape[1:]
    place = torch.stack([where // (height * width), where // width % height, where % width], dim=1)
    return place[:, None].float()


def drawn(points: Tensor, marks: Tensor, size: tuple[int, ...], whole: tuple[int, ...], spread: float = 2.0) -> Tensor:
    """Clicks as soft dots, 1 for foreground and -1 for background: (M, 1, *size).

    points (M, N, 3) are voxels of a volume of the size `whole`; marks (M, N) are 1, 0, or -1 for no click
    """
    dots = torch.ones((*points.shape[:2], 1, 1, 1), device=points.device)
    for axis, (count, full) in enumerate(zip(size, whole, strict=True)):
        centres = (torch.arange(count, device=points.device) + 0.5) * (full / count) - 0.5
        near = torch.exp(-(((points[..., axis, None] - centres) / spread) ** 2))
        dots = dots * near.view(*points.shape[:2], *[count if k == axis else 1 for k in range(3)])
    shown = lambda mark: (dots * (marks == mark)[..., None, None, None]).amax(1)  # noqa: E731
    return (shown(1) - shown(0))[:, None]


class PositionCode(nn.Module):
    """SAM's random Fourier code of positions, for z, y, x: (..., 3) between 0 and 1 to (..., width)."""

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("waves", torch.randn(3, width // 2))

    def forward(self, places: Tensor) -> Tensor:
        angles = 2 * torch.pi * ((2 * places - 1) @ self.waves)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    def grid(self, size: tuple[int, ...]) -> Tensor:
        """(*size, width): the codes of a grid's cells."""
        axes = [(torch.arange(count, device=self.waves.device) + 0.5) / count for count in size]
        return self(torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1))


class Mixed(nn.ModuleDict):
    """Networks with layers of two and of three dimensions: no one memory format fits them, so that none is set."""

    def to(self, *args, memory_format=None, **kwargs) -> nn.ModuleDict:
        return super().to(*args, **kwargs) if args or kwargs else self


@dataclass
class ClickedVolumes(Method):
    """Learns to answer clicks in volumes: the base of the recipes' methods.

    objects  structures asked for in each volume of a batch
    clicks   clicks that a structure gets, while learning and when scored; each after the first on a remaining error
    """

    rate: float = 2e-3
    objects: int = 2
    clicks: int = 1
    augmentation: Augment = field(default_factory=lambda: MILD)

    def make(self) -> nn.Module:
        """`encode(volumes)` gives a tuple of tensors; `answer(those, points, marks, earlier)` logits (M, D, H, W)."""
        raise NotImplementedError

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        model = self.make()
        model.classes = classes
        return Mixed({"model": model, "average": deepcopy(model).requires_grad_(False)})

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        volumes = as_volumes(labelled.images)
        masks, owner = self.targets(volumes, as_volumes(labelled.labels[:, None])[:, 0], now)
        if not len(masks):  # a batch without a structure: nothing to ask for
            return 0.0 * sum(p.sum() for p in nets["model"].parameters() if p.requires_grad)
        embedding = tuple(part[owner] for part in nets["model"].encode(volumes))
        points, marks = random_clicks(masks), torch.ones(len(masks), 1, device=masks.device)
        earlier, total = None, 0.0
        for number in range(self.clicks):
            logits = nets["model"].answer(embedding, points, marks, earlier).float()
            total = total + mask_loss(logits.flatten(1, 2), masks.flatten(1, 2).float()).mean()
            if number + 1 < self.clicks:
                earlier = logits.detach()
                point, mark = random_correction(earlier > 0, masks)
                points, marks = torch.cat([points, point], dim=1), torch.cat([marks, mark], dim=1)
        return total / self.clicks

    def targets(self, volumes: Tensor, labels: Tensor, now: Moment) -> tuple[Tensor, Tensor]:
        """What is asked for in a step: masks (M, D, H, W) bool and (M,) the number of each one's volume."""
        return asked_in(labels, self.objects)

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """(B, classes, *size) where nobody clicks: the answer to a click in the middle, taken as class 1."""
        volumes, model = as_volumes(images), nets["average"]
        middle = torch.tensor([(count - 1) / 2 for count in volumes.shape[2:]])
        points, marks = middle.expand(len(volumes), 1, 3), torch.ones(len(volumes), 1)
        answer = model.answer(model.encode(volumes), points, marks, None).float().sigmoid()
        answer = answer.view(len(images), 1, *images.shape[2:])
        others = answer.new_zeros(len(images), nets["model"].classes - 2, *images.shape[2:])
        return torch.cat([1 - answer, answer, others], dim=1)

    def answers(self, nets: nn.ModuleDict, volume: Tensor, truth: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """(clicks, mask (D, H, W) bool) after one click, two, ... that truth gives; volume (1, 1, D, H, W)."""
        model, points, marks, earlier = nets["average"], [deepest(truth)], [1.0], None
        embedding = model.encode(volume)
        while True:
            at, mark = torch.tensor([points], dtype=torch.float32), torch.tensor([marks])
            earlier = model.answer(embedding, at, mark, earlier).float()
            answer = earlier[0].numpy() > 0
            yield len(points), answer
            if len(points) == self.clicks or (answer == truth).all():
                return
            point, is_missing = correction(answer, truth)
            points.append(point)
            marks.append(float(is_missing))


def random_correction(answers: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """A click (M, 1, 3) on a random wrong voxel of each of answers (M, D, H, W), and its mark (M, 1); -1 for none."""
    wrong = answers != masks
    point = random_clicks(wrong)
    z, y, x = point[:, 0].long().unbind(1)
    mark = masks[torch.arange(len(masks)), z, y, x].float()
    return point, torch.where(wrong.flatten(1).any(1), mark, -1.0)[:, None]


def correction(answer: np.ndarray, truth: np.ndarray) -> tuple[tuple[int, ...], bool]:
    """A click in the middle of the largest error, and whether it is on what is missing."""
    errors = [truth & ~answer, answer & ~truth]
    sizes = [largest_part(error) for error in errors]
    return deepest(errors[int(sizes[1] > sizes[0])]), sizes[0] >= sizes[1]


@torch.no_grad()
def click_rows(fitted, case: Case) -> list[dict]:
    """dice and prompts (how many it took) of each structure of a volume, on the prepared grid.

    From the last of the method's `answers` to clicks that the truth gives; from the class map where it has none.
    """
    method, preparation, nets = fitted.method, fitted.task.preparation, fitted.nets
    nets.load_state_dict(fitted.weights["last"])
    nets.eval()
    volume, labels = preparation.images(case), preparation.labels(case)[0].numpy()
    guess = None if hasattr(method, "answers") else method.predict(nets, volume)[0].argmax(0).numpy()
    rows = []
    for value, name in fitted.task.structures.items():
        truth = labels == value
        if truth.sum() < SMALLEST:
            continue
        prompts, mask = (0, guess == value) if guess is not None else list(method.answers(nets, volume, truth))[-1]
        rows.append(row(case, name, dice=dice(mask, truth), prompts=float(prompts)))
    return rows


def resized(volume: Tensor, size: tuple[int, ...]) -> Tensor:
    """(B, C, *any) to (B, C, *size), trilinear."""
    return F.interpolate(volume.float(), tuple(size), mode="trilinear", align_corners=False).to(volume.dtype)
