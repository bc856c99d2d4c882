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

import torch.nn.functional as F
from torch import Tensor, nn

from medcook.methods.frozen import PHOTOGRAPH
from medcook.networks.squeezenet import FEATURES, POOLED, SqueezeNet, load_squeezenet
from medcook.recipes.pretraining._dino import Distilled
from medcook.recipes.pretraining._pyramid import PyramidNet
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


@dataclass
class FromImageNet(Distilled):
    """SqueezeNet with a pyramid on top.

    imagenet  whether the encoder starts from ImageNet's weights, or from random ones
    """

    imagenet: bool = True

    def pyramid(self, inputs: int, classes: int) -> PyramidNet:
        net = load_squeezenet() if self.imagenet else SqueezeNet(features_only=True)
        return PyramidNet(GreyEncoder(net), tuple(LEVELS.values()), classes)


MANY = ("acdc", "chest_xray", "hippocampus", "openkbp")
IMAGES = 1200
"""In either pool: nearly all slices of the 67 patients without labels, or a quarter as many of each set."""
SMALL = FromImageNet(imagenet=False)
FULL_ARMS = ("ImageNet", "specific", "diverse")


def both_scales() -> dict[str, Scale]:
    """Of the chapter, with fewer steps, which are dear here; `quick` has random weights, since others are fetched."""
    budget = Budget(steps=400, batch=8, checks=4)
    found = scales(BRAINS, replace(HEARTS, most=IMAGES), *FULL_ARMS, budget=budget)
    others = tuple(name for name in ARMS if name not in FULL_ARMS)
    return found | {"quick": replace(found["quick"], arms=others)}


ARMS = {
    "ImageNet": Arm(FromImageNet(waits=True)),
    "specific": Arm(FromImageNet(), {"pool": MANY[:1]}),
    "diverse": Arm(FromImageNet(), {"pool": MANY}),
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
            "of 65536, crops of 64 and 32 pixels, 200 steps of 8 images, batch normalisation in the head, and a "
            "teacher that keeps 0.97 of itself at first, not 0.996, since it could not move otherwise; these two after "
            "losses that stood still on images of the pool. Intensities change as in the book's augmentation; "
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
