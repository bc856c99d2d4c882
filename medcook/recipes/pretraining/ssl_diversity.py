"""Exploring the Effect of Dataset Diversity in Self-Supervised Learning for Surgical Computer Vision.

Jaspers, de Jong, Al Khalil, Zeelenberg, Kusters, Li, van Jaarsveld, Bakker, Ruurda, Brinkman, de With and van der
Sommen, Data Engineering in Medical Imaging (MICCAI workshop), 2024.

A network that ImageNet trained goes on to learn by DINO, from images of the procedure alone that is asked about, or
from those of other procedures as well; then it is fine-tuned on few labels. Here hearts take the place of the
procedure, and X-rays, hippocampi and head CT that of the others:

    ImageNet     encoder of ImageNet -> labels, for as many steps as the others have with labels
    specific     encoder of ImageNet -> DINO on hearts -> labels
    diverse      encoder of ImageNet -> DINO on hearts, X-rays, hippocampi and heads, as many images -> labels
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.errors import MedcookError
from medcook.methods import Batch, Moment
from medcook.methods.frozen import PHOTOGRAPH
from medcook.networks.squeezenet import FEATURES, POOLED, SqueezeNet, load_squeezenet
from medcook.pretraining import Pretrained, fresh, nothing
from medcook.recipes.pretraining._dino import Dino, crops
from medcook.recipes.pretraining._settings import BRAINS, HEARTS, scales
from medcook.recipes.recipe import Arm, Component, Recipe, Scale
from medcook.tasks import Budget

LEVELS = {"conv1": 96, "fire3": 128, "fire5": 256, "fire9": FEATURES}
"""Channels of the maps that the way up takes, at a half, a quarter, an eighth and a sixteenth of the image."""
NAMES = ("conv1", *(f"fire{number}" for number in range(2, 10)))


class GreyEncoder(nn.Module):
    """SqueezeNet's features of z-scored grey images (B, inputs, H, W), the first channel as a grey photograph.

    A grey photograph is the same in red, green and blue, so the first convolution sums its weights over them.
    """

    def __init__(self, net: SqueezeNet):
        super().__init__()
        self.layers = nn.ModuleDict({name: getattr(net, name) for name in NAMES})
        first = nn.Conv2d(1, net.conv1.out_channels, 7, stride=2, padding=3)
        first.load_state_dict({"weight": net.conv1.weight.sum(1, keepdim=True), "bias": net.conv1.bias})
        self.layers["conv1"] = first

    def levels(self, images: Tensor) -> list[Tensor]:
        """The maps of `LEVELS`, finest first."""
        x, found = PHOTOGRAPH * images[:, :1], []
        for name, layer in self.layers.items():
            x = F.relu(layer(x)) if name == "conv1" else layer(x)
            if name in LEVELS:
                found.append(x)
            if name in POOLED:
                x = F.max_pool2d(x, 3, stride=2, ceil_mode=True)
        return found

    def forward(self, images: Tensor) -> Tensor:
        return self.levels(images)[-1]


class PyramidNet(nn.Module):
    """An encoder with a feature pyramid (Lin et al., CVPR 2017) on top: (B, inputs, H, W) to logits (B, classes, H, W).

    Each level becomes `width` channels, and is added to the coarser one, enlarged; the finest makes the logits.
    """

    def __init__(self, encoder: GreyEncoder, classes: int, width: int = 32):
        super().__init__()
        self.encoder = encoder
        self.norms = nn.ModuleList(nn.GroupNorm(8, channels) for channels in LEVELS.values())
        self.lateral = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in LEVELS.values())
        self.smooth = nn.ModuleList(self._block(width) for _ in LEVELS)
        self.head = nn.Conv2d(width, classes, 1)

    @staticmethod
    def _block(width: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.ReLU(inplace=True))

    def forward(self, images: Tensor) -> Tensor:
        maps = [
            side(norm(x)) for side, norm, x in zip(self.lateral, self.norms, self.encoder.levels(images), strict=True)
        ]
        x = torch.zeros_like(maps[-1])
        for fine, smooth in zip(reversed(maps), reversed(self.smooth), strict=True):
            x = smooth(fine + F.interpolate(x, size=fine.shape[2:], mode="bilinear", align_corners=False))
        return F.interpolate(self.head(x).float(), size=images.shape[2:], mode="bilinear", align_corners=False)


@dataclass
class Distilled(Pretrained):
    """DINO on the pool, then training on labels.

    waits     nothing happens in the place of DINO
    imagenet  whether the encoder starts from ImageNet's weights, or from random ones
    size      of a large crop in pixels; small ones have half of it
    small     how many small crops there are beside the two large ones
    """

    rate: float = 1e-3
    pretext_rate: float = 3e-4
    waits: bool = False
    imagenet: bool = True
    size: int = 64
    small: int = 2

    axes = 2
    trial = BRAINS

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        if dims != 2:
            raise MedcookError("SqueezeNet sees images, not volumes.", "Take a data set that is prepared as slices.")
        net = load_squeezenet() if self.imagenet else SqueezeNet(features_only=True)
        model = PyramidNet(GreyEncoder(net), classes)
        nets = nn.ModuleDict({"model": model, "average": fresh(model)})
        if self.share and not self.waits:
            nets["pretext"] = Dino(model.encoder, FEATURES)
        return nets

    def pretext(self, nets: nn.ModuleDict, images: Batch, now: Moment) -> Tensor:
        if self.waits:
            return nothing()
        rng = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        seen = lambda size, areas: self.augmentation.intensity(crops(images.images, size, areas, rng), rng)  # noqa: E731
        large = [seen(self.size, (0.4, 1.0)) for _ in range(2)]
        small = [seen(self.size // 2, (0.1, 0.4)) for _ in range(self.small)]
        return nets["pretext"].loss(nets["model"].encoder, large, small)

    def after_pretext(self, nets: nn.ModuleDict, now: Moment) -> None:
        if not self.waits:
            nets["pretext"].move(nets["model"].encoder, now)


MANY = ("acdc", "chest_xray", "hippocampus", "openkbp")
IMAGES = 1200
"""In either pool: nearly all slices of the 67 patients without labels, or a quarter as many of each set."""
SMALL = Distilled(imagenet=False)
FULL_ARMS = ("ImageNet", "specific", "diverse")


def both_scales() -> dict[str, Scale]:
    """Of the chapter, with fewer steps, which are dear here; `quick` has random weights, since others are fetched."""
    budget = Budget(steps=300, batch=8, checks=3)
    found = scales(BRAINS, replace(HEARTS, most=IMAGES), *FULL_ARMS, budget=budget)
    others = tuple(name for name in ARMS if name not in FULL_ARMS)
    return found | {"quick": replace(found["quick"], arms=others)}


ARMS = {
    "ImageNet": Arm(Distilled(waits=True)),
    "specific": Arm(Distilled(), {"pool": MANY[:1]}),
    "diverse": Arm(Distilled(), {"pool": MANY}),
    "random start": Arm(replace(SMALL, waits=True)),
    "random start, specific": Arm(SMALL),
    "random start, diverse": Arm(SMALL, {"pool": ("embedded", "embedded, negative")}),
}

recipe = Recipe(
    paper="ssl-diversity",
    title="Self-supervision on one kind of images, or on many",
    claim="Before fine-tuning on three labelled hearts, DINO on images of four kinds raises Dice above DINO on hearts.",
    arms=ARMS,
    compare=("diverse", "specific"),
    ablation=("specific", "ImageNet"),
    replicate="draw",
    scales=both_scales(),
    source="abstract; README of the official code (github TimJaspers0801/SurgeNet); DINO: Caron et al., ICCV 2021",
    components=(
        Component(
            "self-supervised pre-training with DINO",
            "implemented",
            "two large and two small crops, centring and sharpening, a teacher that follows; 128 prototypes in place "
            "of 65536, crops of 64 and 32 pixels, 150 steps of 8 images, and a teacher that keeps 0.99 of itself at "
            "first, not 0.996, since it could not move otherwise. Intensities change as in the book's augmentation; "
            "there are no colours to change",
        ),
        Component(
            "procedure-specific pre-training",
            "simplified",
            "hearts of the patients without labels in place of one surgical procedure: there are no surgical images "
            "at hand",
        ),
        Component(
            "pre-training on diverse data",
            "simplified",
            "a quarter each of hearts, chest X-rays, hippocampi and head-and-neck CT, all on the grid of the hearts. "
            "There are as many images as in the other pool, so that it is diversity that is compared and not number; "
            "in the paper the diverse set is larger, and has the specific one in it. These kinds also differ more than "
            "procedures do",
        ),
        Component(
            "start from ImageNet",
            "implemented",
            "SqueezeNet, the one network with ImageNet weights at hand, in place of larger ones; also the comparator, "
            "with as many steps on labels as the others",
        ),
        Component(
            "segmentation decoder",
            "implemented",
            "a feature pyramid on the encoder, as in the official code",
        ),
        Component("three downstream applications", "absent", "segmentation alone; no phases or instruments at hand"),
    ),
)
