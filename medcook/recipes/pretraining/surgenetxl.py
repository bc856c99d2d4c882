"""SurgeNetXL: scaling up self-supervised learning for surgical foundation models (Jaspers, de Jong, Li, Kusters,
Bakker, van Jaarsveld, Kuiper, van Hillegersberg, Ruurda, Brinkman, Pluim, de With, Breeuwer, Al Khalil and van der
Sommen, arXiv 2501.09436, 2025).

CAFormer (see `medcook.networks.caformer`) learns by DINO (see `_dino`) from as many unlabelled images as can be had,
and is then fine-tuned with a feature pyramid on top. The study scales the number of images, the length of the training
and the network. Here hearts take the place of operations, and a small CAFormer that of one with 23 million weights.
"""

from dataclasses import dataclass

from medcook.networks.caformer import CAFormer
from medcook.recipes.pretraining._dino import Distilled
from medcook.recipes.pretraining._pyramid import PyramidNet
from medcook.recipes.pretraining._settings import BRAINS, HEARTS, scales
from medcook.recipes.recipe import Arm, Component, Recipe

DIMS, DEPTHS = (16, 32, 64, 96), (1, 1, 2, 1)
"""Of the small network: channels and blocks of each stage."""


@dataclass
class SmallSurgeNet(Distilled):
    """A small CAFormer with a pyramid on top, tokens of 2 x 2 pixels."""

    pretext_rate: float = 1e-3

    def pyramid(self, inputs: int, classes: int) -> PyramidNet:
        return PyramidNet(CAFormer(inputs=inputs, dims=DIMS, depths=DEPTHS, stem=2), DIMS, classes)


FEW = 128
"""About a tenth of the images of the patients without labels."""

recipe = Recipe(
    paper="surgenetxl",
    title="DINO on as many images as can be had",
    claim="DINO on unlabelled hearts raises the Dice of a CAFormer that is then trained on three labelled ones.",
    arms={
        "from scratch": Arm(SmallSurgeNet(waits=True)),
        "all images": Arm(SmallSurgeNet()),
        "a tenth of the images": Arm(SmallSurgeNet(), {"most": FEW}),
    },
    compare=("all images", "from scratch"),
    ablation=("all images", "a tenth of the images"),
    replicate="draw",
    scales=scales(BRAINS, HEARTS),
    source="abstract, README and code of the authors (github TimJaspers0801/SurgeNet)",
    components=(
        Component(
            "CAFormer and its checkpoints",
            "implemented",
            "CAFormer-S18 as published, with ReLU as in SurgeNet, and a loader for a teacher's file, tested with "
            "made-up weights: none were at hand. What is trained here is a small one: 1, 1, 2 and 1 blocks of 16 to 96 "
            "channels, tokens of 2 x 2 pixels. ConvNeXt v2 and PVT v2, which the study also trains, are left out",
        ),
        Component(
            "pre-training by DINO",
            "implemented",
            "as in ssl-diversity, with random weights at the start in place of ImageNet's; 300 steps of 8 images for "
            "50 epochs of 4.7 million frames",
        ),
        Component("feature pyramid for segmentation", "implemented", "four levels of 32 channels, added up"),
        Component(
            "scaling of data",
            "simplified",
            "all 1200 slices or so of the patients without labels, or a tenth of them, for as many steps; the "
            "ablation. In the paper 0.2 to 4.7 million frames of many procedures",
        ),
        Component("scaling of training and of the network", "absent", "one length, and one small network"),
        Component("surgical images", "absent", "hearts are what is at hand"),
        Component("phase recognition and critical view of safety", "absent", "segmentation alone"),
        Component(
            "comparison with ImageNet", "absent", "CAFormer's ImageNet weights are not at hand; see ssl-diversity"
        ),
    ),
)
