"""Scribbles and multi-scale adversarial attention gates (Valvano, Leo and Tsaftaris, IEEE TMI 2021; arXiv 2007.01152).

Scribbles say where the structures are, but not how far they reach; label maps of other patients say what a plausible
map looks like. At every level of the decoder an attention gate maps the classes and lets features pass where there is
foreground. A discriminator sees these maps together with the prediction, and they must look like true maps to it.

    gate        x_d <- x_d sum_{c > 0} a_d^c,  a_d = softmax of a 1 x 1 convolution, at each level d of the decoder
    adversary   1/2 (D(true maps) - 1)^2 + 1/2 (D(y, a_1, a_2, ...) + 1)^2 for D;  1/2 (D(y, a_1, ...) - 1)^2 for y, a
    total       partial cross-entropy on the scribbles + weight * adversary, the two first brought to the same size

The weight of the adversary is that of the official code. That it plays was looked at on the embedded cohort, and once,
for 160 steps, on the validation patients of fold 4 of the hearts, which is not scored.
"""

from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from medcook.errors import MedcookError
from medcook.imperfect import PartlyLabelled, UnpairedTask
from medcook.losses import find_loss
from medcook.methods import Batch, Moment
from medcook.networks.unet import UNet
from medcook.recipes.imperfect_labels._adversarial import frozen, structures, taken_for_real, told_apart
from medcook.recipes.imperfect_labels._settings import scales
from medcook.recipes.recipe import Arm, Component, Recipe


class GatedUNet(UNet):
    """A U-Net for slices, whose decoder blocks end with an attention gate, read after their first convolution."""

    def __init__(self, *, inputs: int, classes: int, channels: tuple[int, ...]):
        super().__init__(inputs=inputs, classes=classes, channels=channels, dims=2)
        self.gates = nn.ModuleList(nn.Conv2d(width, classes, 1) for width in channels[:-1])

    def maps(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits (B, classes, H, W), and the gates' class probabilities, finest level first, each on its own grid."""
        skips = [self.down[0](image)]
        for block in self.down[1:]:
            skips.append(block(self.pool(skips[-1], 2)))
        x, attention = skips.pop(), []
        for block, gate, skip in zip(reversed(self.up), reversed(self.gates), reversed(skips), strict=True):
            x = F.interpolate(x, size=skip.shape[2:], mode=self.mode, align_corners=False)
            first, second = list(block)[:3], list(block)[3:]
            x = nn.Sequential(*first)(torch.cat([skip, x], dim=1))
            attention.insert(0, gate(x).float().softmax(1))
            x = gated(nn.Sequential(*second)(x), attention[0])
        return self.head(x), attention

    def forward(self, image: Tensor) -> Tensor:
        return self.maps(image)[0]


def gated(features: Tensor, attention: Tensor) -> Tensor:
    """Features (B, C, H, W) times the probability of any structure, from class probabilities (B, classes, H, W)."""
    return features * attention[:, 1:].sum(1, keepdim=True).to(features.dtype)


class MultiScaleDiscriminator(nn.Module):
    """Judges label maps (B, structures, ., .) on `levels` grids, each half the one before: (B, 1), 1 for true ones.

    What it made of a finer grid is squeezed to a few sigmoid channels before it meets the next map.
    noise  standard deviation of what is added to the finest map; `flip` the probability that a whole batch's judgement
           changes its sign: both in training alone, so that it does not win too soon
    """

    def __init__(
        self, *, structures: int, levels: int, width: int = 8, squeeze: int = 12, noise: float = 0.2, flip: float = 0.1
    ):
        super().__init__()
        self.noise, self.flip = noise, flip
        self.first = nn.Conv2d(structures, width, 4, stride=2, padding=1)
        widths = [width * 2**level for level in range(levels)]
        self.squeezes = nn.ModuleList(nn.Conv2d(inputs, squeeze, 1) for inputs in widths[:-1])
        self.convolutions = nn.ModuleList(
            spectral_norm(nn.Conv2d(squeeze + structures, outputs, 4, stride=2, padding=1)) for outputs in widths[1:]
        )
        self.verdict = nn.Linear(widths[-1] * 16, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        finest, *coarser = maps
        if self.training:
            finest = finest + torch.randn_like(finest) * self.noise
        x = F.leaky_relu(self.first(finest), 0.2)
        for squeeze, convolution, level in zip(self.squeezes, self.convolutions, coarser, strict=True):
            x = torch.tanh(convolution(torch.cat([squeeze(x).sigmoid(), level.to(x.dtype)], dim=1)))
        judgement = self.verdict(F.adaptive_avg_pool2d(x, 4).flatten(1))
        return -judgement if self.training and torch.rand(()) < self.flip else judgement


def pyramid(maps: Tensor, sizes: list[torch.Size]) -> list[Tensor]:
    """Maps (B, structures, H, W) on several grids, bilinearly; the first is their own."""
    return [maps, *(F.interpolate(maps, size=size, mode="bilinear", antialias=True) for size in sizes[1:])]


@dataclass
class ScribbleAAG(PartlyLabelled):
    """Scribbles place the structures; unpaired label maps shape the prediction, and the gates below it.

    weight       of the adversary, against the loss on scribbles, when both are of the same size
    conditioned  False: the gates are there, but the discriminator sees the prediction alone, on all its grids
    """

    weight: float = 0.2
    conditioned: bool = True

    trial = UnpairedTask("embedded", labelled=4)

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        """Besides `model` and `average` a `judge`, which sees as many grids as the decoder has levels."""
        if dims != 2:
            raise MedcookError("ScribbleAAG is for slices.", "Choose a task on slices.")
        model = GatedUNet(inputs=inputs, classes=classes, channels=self.channels)
        judge = MultiScaleDiscriminator(structures=classes - 1, levels=len(self.channels) - 1)
        average = deepcopy(model).requires_grad_(False)
        return nn.ModuleDict({"model": model, "average": average, "judge": judge})

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        logits, attention = nets["model"].maps(labelled.images)
        supervised = find_loss(self.loss)(logits.float(), labelled.labels)
        if labelled.raters is None:
            return supervised
        true = structures(labelled.raters[:, 0], logits.shape[1])
        seen = self.shown(logits.float().softmax(1), attention)
        real, fake = nets["judge"](pyramid(true, [level.shape[2:] for level in seen])), nets["judge"](detached(seen))
        fooling = taken_for_real(frozen(nets["judge"], seen))
        balance = (supervised / fooling.clamp_min(1e-3)).detach()
        return supervised + told_apart(real, fake) + self.weight * balance * fooling

    def shown(self, probabilities: Tensor, attention: list[Tensor]) -> list[Tensor]:
        """What the discriminator sees of the structures: the prediction on the finest grid, the gates on the others."""
        coarser = attention[1:]
        if not self.conditioned:
            return pyramid(probabilities[:, 1:], [level.shape[2:] for level in attention])
        return [level[:, 1:] for level in (probabilities, *coarser)]


def detached(maps: list[Tensor]) -> list[Tensor]:
    return [level.detach() for level in maps]


recipe = Recipe(
    paper="scribble-aag",
    title="Multi-scale adversarial attention gates",
    claim="With scribbles on the images, and label maps of other patients as an adversarial prior of shape at several "
    "scales, hearts reach a higher Dice than with the scribbles alone.",
    arms={
        "scribbles alone": Arm(PartlyLabelled()),
        "attention gates": Arm(ScribbleAAG()),
        "gates not conditioned": Arm(ScribbleAAG(conditioned=False)),
        "full labels": Arm(PartlyLabelled(), changes={"own": "labels"}),
    },
    compare=("attention gates", "scribbles alone"),
    ablation=("attention gates", "gates not conditioned"),
    replicate="fold",
    scales=scales(UnpairedTask("embedded"), UnpairedTask("acdc")),
    source="the networks and losses follow the official code, "
    "github.com/gvalvano/multiscale-adversarial-attention-gates",
    components=(
        Component(
            "adversarial attention gates",
            "implemented",
            "at all four levels of the decoder, from the first of its two convolutions, applied after the second; the "
            "finest gate is not shown to the discriminator, which sees the prediction there, as in the official code",
        ),
        Component(
            "multi-scale GAN",
            "simplified",
            "one optimiser for both sides: the discriminator learns from detached maps, the segmentor through a "
            "discriminator whose weights are held constant. 8 to 64 filters (the official code: 32 to 512) and an "
            "average over 4 x 4 places before the last layer, so that any size of image goes; least squares, spectral "
            "normalisation, instance noise and flipped judgements as there. It plays on the scribbled images alone, "
            "where the code adds images without scribbles, and the code's second game on the scribbled ones is left "
            "out: there the segmentor also lowers the discriminator's loss",
        ),
        Component(
            "unpaired segmentation masks",
            "implemented",
            "half of the patients give images with scribbles, the other half label maps without images",
        ),
        Component(
            "learning from scribbles",
            "simplified",
            "partial cross-entropy, without weights of the classes, as in every arm here; its weight against the "
            "adversary follows from the ratio of the two losses at every step, as in the official code",
        ),
        Component(
            "expert scribbles",
            "simplified",
            "data and no mechanism: at `full` those that the authors released for ACDC, at `quick` simulated ones",
        ),
        Component("semi-supervised learning", "absent", "all images have scribbles"),
        Component("several sources of scribbles", "absent", "one set of scribbles is at hand"),
        Component("scribbles and masks together", "absent", "no image has a mask"),
        Component("LVSC, CHAOS and PPSS", "absent", "not at hand; hearts of ACDC alone"),
    ),
)
