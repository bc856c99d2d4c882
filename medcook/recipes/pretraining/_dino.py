"""DINO (Caron, Touvron, Misra, Jegou, Mairal, Bojanowski and Joulin, ICCV 2021): self-distillation without labels.

A student sees crops of an image, large and small ones; a teacher, the student's moving average, sees the large ones
alone. Both say which of K prototypes a crop belongs to, and the student is to say what the teacher says of another
crop:

    loss = mean over pairs of different crops (t, s) of  - sum_k P_t(t)_k log P_s(s)_k
    P_s = softmax(z_s / heat_s),  P_t = softmax((z_t - c) / heat_t),  heat_t < heat_s,  c a moving mean of z_t

The centre c keeps one prototype from winning everywhere, the low temperature keeps all from being alike.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.errors import MedcookError
from medcook.methods import Batch, Moment, own_generator
from medcook.pretraining import OptionalPretext, follow, fresh, pooled
from medcook.recipes.pretraining._pyramid import PyramidNet
from medcook.recipes.pretraining._settings import BRAINS

STUDENT_HEAT, TEACHER_HEAT = 0.1, 0.04
CENTRE, MOMENTUM = 0.9, 0.97
"""How much of the centre and of the teacher stays in a step. The teacher's share grows to 1 along half a cosine.

DINO starts at 0.996, for trainings of many epochs; here the teacher has to move within a hundred steps.
"""


class Prototypes(nn.Module):
    """(B, inputs) features to (B, count) scores: three layers, unit length, and unit prototypes.

    As DINO's head, with the batch normalisation that its code offers: a short training else finds all images alike.
    """

    def __init__(self, inputs: int, count: int, hidden: int = 128, width: int = 64):
        super().__init__()
        between = lambda: (nn.BatchNorm1d(hidden), nn.GELU())  # noqa: E731
        self.layers = nn.Sequential(
            nn.Linear(inputs, hidden), *between(), nn.Linear(hidden, hidden), *between(), nn.Linear(hidden, width)
        )
        self.prototypes = nn.Linear(width, count, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        unit = F.normalize(self.layers(features).float(), dim=1)
        return (unit @ F.normalize(self.prototypes.weight.float(), dim=1).T).float()


def crops(images: Tensor, size: int, areas: tuple[float, float], rng: torch.Generator) -> Tensor:
    """A random square of each image (B, C, H, W), mirrored or not, as (B, C, size, size).

    areas  of a square, as a share of the image's, least and most
    """
    count = len(images)
    side = (torch.rand(count, generator=rng) * (areas[1] - areas[0]) + areas[0]).sqrt()
    mirror = torch.randint(0, 2, (count,), generator=rng) * 2.0 - 1
    place = (torch.rand(count, 2, generator=rng) * 2 - 1) * (1 - side)[:, None]
    matrix = torch.zeros(count, 2, 3)
    matrix[:, 0, 0], matrix[:, 1, 1], matrix[:, :, 2] = side * mirror, side, place
    grid = F.affine_grid(matrix, [count, images.shape[1], size, size], align_corners=False)
    return F.grid_sample(images, grid.to(images.device), padding_mode="border", align_corners=False)


def distilled(student: list[Tensor], teacher: list[Tensor], centre: Tensor) -> Tensor:
    """DINO's loss of scores (B, K) a crop; the first crops of the student are those that the teacher sees."""
    said = [((scores - centre) / TEACHER_HEAT).softmax(1).detach() for scores in teacher]
    found = [(scores / STUDENT_HEAT).log_softmax(1) for scores in student]
    pairs = [
        -(wanted * got).sum(1).mean()
        for number, wanted in enumerate(said)
        for other, got in enumerate(found)
        if number != other
    ]
    return torch.stack(pairs).mean()


class Dino(nn.Module):
    """What DINO needs beside the student's encoder: heads, the teacher's encoder, and the centre.

    encoder  images to feature maps (B, features, *small); it is copied for the teacher
    """

    def __init__(self, encoder: nn.Module, features: int, count: int = 128):
        super().__init__()
        self.head = Prototypes(features, count)
        self.teacher, self.teacher_head = fresh(encoder), fresh(self.head)
        self.register_buffer("centre", torch.zeros(count))

    def loss(self, encoder: nn.Module, large: list[Tensor], small: list[Tensor]) -> Tensor:
        """Of two or more large crops and any number of small ones; moves the centre."""
        student = [self.head(pooled(encoder(crop))) for crop in (*large, *small)]
        with torch.no_grad():
            teacher = [self.teacher_head(pooled(self.teacher(crop))) for crop in large]
        loss = distilled(student, teacher, self.centre)
        self.centre.lerp_(torch.cat(teacher).mean(0), 1 - CENTRE)
        return loss

    def move(self, encoder: nn.Module, now: Moment) -> None:
        """The teacher follows the student."""
        kept = 1 - (1 - MOMENTUM) * (1 + math.cos(math.pi * now.fraction)) / 2
        follow(self.teacher, encoder, kept)
        follow(self.teacher_head, self.head, kept)


@dataclass
class Distilled(OptionalPretext):
    """DINO for a network's encoder, then all of the network on labels; a subclass says which network.

    size   of a large crop in pixels; small ones have half of it
    small  how many small crops there are beside the two large ones
    """

    rate: float = 1e-3
    pretext_rate: float = 3e-4
    size: int = 64
    small: int = 2

    axes = 2
    trial = BRAINS

    def model(self, inputs: int, classes: int, dims: int) -> PyramidNet:
        if dims != 2:
            raise MedcookError("This network sees images, not volumes.", "Take a data set that is prepared as slices.")
        return self.pyramid(inputs, classes)

    def pyramid(self, inputs: int, classes: int) -> PyramidNet:
        """An encoder with a pyramid on top."""
        raise NotImplementedError

    def pretext_parts(self, model: PyramidNet, inputs: int, dims: int) -> nn.Module:
        return Dino(model.encoder, model.channels[-1])

    def pretext(self, nets: nn.ModuleDict, images: Batch, now: Moment) -> Tensor:
        rng = own_generator()
        seen = lambda size, areas: self.augmentation.intensity(crops(images.images, size, areas, rng), rng)  # noqa: E731
        large = [seen(self.size, (0.4, 1.0)) for _ in range(2)]
        small = [seen(self.size // 2, (0.1, 0.4)) for _ in range(self.small)]
        return nets["pretext"].loss(nets["model"].encoder, large, small)

    def after_pretext(self, nets: nn.ModuleDict, now: Moment) -> None:
        nets["pretext"].move(nets["model"].encoder, now)
