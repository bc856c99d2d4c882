"""DINO-AugSeg: frozen features, augmented among wavelets and fused by context (Xu et al., arXiv 2601.08078, 2026).

With few labelled patients an encoder is not trained but borrowed, and what is learned is a decoder. Two parts of it are
new. Training features lose random coefficients of their wavelet transform, low and high ones alike, so that the decoder
sees more kinds of features than the few images have. And at every step up, what is deep and knows the context asks what
is fine and knows the places.

  WT-Aug   f' = W^-1(m * W f), W the Haar transform, every coefficient kept with probability 0.7; for 0.7 of the batches
  CG-Fuse  z = LN(d) + softmax(Q(LN d) K(LN f)^T / sqrt(c)) V(LN f), d from below and enlarged, f fine and pooled;
           the next d = conv([f, z])
"""

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.errors import MedcookError
from medcook.losses import find_loss
from medcook.methods import Batch, Method, Moment
from medcook.methods.frozen import PHOTOGRAPH
from medcook.networks.squeezenet import FIRES, POOLED, SqueezeNet, load_squeezenet
from medcook.recipes.recipe import Arm, Component, Recipe, Scale
from medcook.recipes.semi_supervised._settings import SUPERVISED
from medcook.tasks import Budget, Task

LEVELS = {"conv1": 96, "fire3": 128, "fire7": 384}
"""Layers of the frozen encoder, fine to deep, and their channels; about a half, a quarter and an eighth of the size."""
RANDOM = ", random features"


@torch.no_grad()
def pyramid(encoder: SqueezeNet, images: Tensor) -> list[Tensor]:
    """Features of z-scored slices (B, C, H, W) at each of `LEVELS`, each channel as large as the others."""
    x, found = PHOTOGRAPH * images[:, :1].expand(-1, 3, -1, -1), []
    for name in ("conv1", *FIRES):
        x = F.relu(encoder.conv1(x)) if name == "conv1" else getattr(encoder, name)(x)
        if name in LEVELS:
            found.append(F.instance_norm(x))
        if len(found) == len(LEVELS):
            break
        if name in POOLED:
            x = F.max_pool2d(x, 3, stride=2, ceil_mode=True)
    return found


def haar(x: Tensor) -> Tensor:
    """(4, B, C, H / 2, W / 2) low, and three high bands, of maps (B, C, H, W) with even sides; orthonormal."""
    a, b, c, d = x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]
    return torch.stack([a + b + c + d, a + b - c - d, a - b + c - d, a - b - c + d]) / 2


def inverse_haar(bands: Tensor) -> Tensor:
    """Maps (B, C, H, W) of their four bands."""
    low, rows, columns, both = bands
    top = torch.stack([low + rows + columns + both, low + rows - columns - both], dim=-1)
    bottom = torch.stack([low - rows + columns - both, low - rows - columns + both], dim=-1)
    return torch.stack([top, bottom], dim=-3).flatten(-2).flatten(-3, -2) / 2


def drop_coefficients(maps: Tensor, share: float) -> Tensor:
    """Maps (B, C, H, W) without a random share of their wavelet coefficients; odd sides repeat their border."""
    height, width = maps.shape[2:]
    even = F.pad(maps, (0, width % 2, 0, height % 2), mode="replicate")
    bands = haar(even)
    kept = (torch.rand_like(bands) >= share).to(bands.dtype)
    return inverse_haar(bands * kept)[..., :height, :width]


class ContextFusion(nn.Module):
    """Deep maps (B, D, h, w) and fine ones (B, C, H, W) to (B, C, H, W).

    context  True: the enlarged deep maps ask the fine ones, pooled by `pool`; False: they are put side by side
    """

    def __init__(self, deep: int, fine: int, pool: int, context: bool):
        super().__init__()
        self.pool, self.context = pool, context
        self.shrink = nn.Conv2d(deep, fine, 1)
        if context:
            self.norms = nn.ModuleList(nn.LayerNorm(fine) for _ in range(2))
            self.ask, self.key, self.value, self.out = (nn.Linear(fine, fine) for _ in range(4))
        self.conv = nn.Sequential(
            nn.Conv2d(2 * fine, fine, 3, padding=1, bias=False), nn.BatchNorm2d(fine), nn.ReLU(),
            nn.Conv2d(fine, fine, 3, padding=1, bias=False), nn.BatchNorm2d(fine), nn.ReLU(),
        )  # fmt: skip

    def forward(self, deep: Tensor, fine: Tensor) -> Tensor:
        enlarged = F.interpolate(self.shrink(deep), size=fine.shape[2:], mode="bilinear", align_corners=False)
        if self.context:
            enlarged = self.attend(enlarged, F.avg_pool2d(fine, self.pool))
        return self.conv(torch.cat([fine, enlarged], dim=1))

    def attend(self, asking: Tensor, answering: Tensor) -> Tensor:
        """Maps (B, C, H, W) of what asks, with what it was told by (B, C, h, w)."""
        one, other = (
            norm(maps.flatten(2).transpose(1, 2)) for norm, maps in zip(self.norms, (asking, answering), strict=True)
        )
        scores = self.ask(one) @ self.key(other).transpose(1, 2) / one.shape[2] ** 0.5
        told = one + self.out(scores.softmax(-1) @ self.value(other))
        return told.transpose(1, 2).unflatten(2, asking.shape[2:])


class Decoder(nn.Module):
    """The levels of an encoder, fine to deep, to logits (B, classes, H / 2, W / 2), about."""

    def __init__(self, classes: int, channels: tuple[int, ...], context: bool):
        super().__init__()
        self.project = nn.ModuleList(nn.Conv2d(i, o, 1) for i, o in zip(LEVELS.values(), channels, strict=True))
        fine, middle, deep = channels
        self.fuse = nn.ModuleList([ContextFusion(deep, middle, 2, context), ContextFusion(middle, fine, 4, context)])
        self.head = nn.Conv2d(fine, classes, 1)

    def forward(self, levels: list[Tensor]) -> Tensor:
        fine, middle, deep = (project(maps) for project, maps in zip(self.project, levels, strict=True))
        return self.head(self.fuse[1](self.fuse[0](deep, middle), fine))


@dataclass
class DinoAugSeg(Method):
    """A frozen encoder and a decoder that learns; `channels` are the decoder's, fine to deep.

    features  imagenet, or random: a frozen encoder that knows nothing, where there is no network to fetch weights
    wavelets  False: training features stay as they are; `share` of coefficients dropped, `often` share of batches
    context   False: deep and fine features are put side by side
    """

    channels: tuple[int, ...] = (16, 32, 48)
    features: Literal["imagenet", "random"] = "imagenet"
    wavelets: bool = True
    share: float = 0.3
    often: float = 0.7
    context: bool = True

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        if dims != 2:
            raise MedcookError("SqueezeNet sees images, not volumes.", "Take a data set that is prepared as slices.")
        encoder = load_squeezenet() if self.features == "imagenet" else SqueezeNet(features_only=True)
        decoder = Decoder(classes, self.channels, self.context)
        return nn.ModuleDict(
            {
                "encoder": encoder.requires_grad_(False),
                "model": decoder,
                "average": deepcopy(decoder).requires_grad_(False),
            }
        )

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        levels = pyramid(nets["encoder"], labelled.images)
        if self.wavelets and torch.rand(()) < self.often:
            levels = [drop_coefficients(maps, self.share) for maps in levels]
        return find_loss(self.loss)(self.full_size(nets["model"](levels), labelled.images), labelled.labels)

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """Class probabilities (B, classes, *size); nothing is augmented."""
        return self.full_size(nets["average"](pyramid(nets["encoder"], images)), images).softmax(1)

    @staticmethod
    def full_size(logits: Tensor, images: Tensor) -> Tensor:
        return F.interpolate(logits.float(), size=images.shape[2:], mode="bilinear", align_corners=False)


METHODS = {
    "dino-augseg": DinoAugSeg(),
    "without wavelets": DinoAugSeg(wavelets=False),
    "without context": DinoAugSeg(context=False),
    "plain decoder": DinoAugSeg(wavelets=False, context=False),
}

recipe = Recipe(
    paper="dino-augseg",
    title="Frozen features, wavelet augmentation, contextual fusion",
    claim="On the same frozen features and with three labelled patients, wavelet augmentation and contextual fusion "
    "raise Dice against a plain decoder.",
    arms={name: Arm(method) for name, method in METHODS.items()}
    | {name + RANDOM: Arm(replace(method, features="random")) for name, method in METHODS.items()}
    | {"U-Net": Arm(SUPERVISED)},
    compare=("dino-augseg", "plain decoder"),
    ablation=("dino-augseg", "without wavelets"),
    replicate="draw",
    scales={
        "quick": Scale(
            Task("embedded", labelled=3),
            Budget(steps=40, batch=8, checks=1),
            replicates=1,
            arms=(*(name + RANDOM for name in METHODS), "U-Net"),
        ),
        "full": Scale(
            Task("acdc", labelled=3, evaluation="test"),
            Budget(steps=200, batch=8, checks=2),
            arms=("dino-augseg", "without wavelets", "plain decoder", "U-Net"),
        ),
    },
    metric="dice",
    components=(
        Component(
            "WT-Aug",
            "implemented",
            "one level of Haar, coefficients of all bands dropped with 0.3, for 0.7 of the batches, as in the official "
            "code",
        ),
        Component(
            "CG-Fuse",
            "simplified",
            "one head without rotary positions, at two steps up; the official code has four heads and three steps",
        ),
        Component(
            "frozen DINOv3 features",
            "simplified",
            "SqueezeNet's ImageNet features, the pre-trained weights at hand; DINOv3's ConvNeXt is far larger",
        ),
        Component("six data sets, five modalities", "absent", "heart MR alone"),
    ),
)
