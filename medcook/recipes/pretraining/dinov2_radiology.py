"""Towards General Purpose Vision Foundation Models for Medical Image Analysis: DINOv2 on Radiology Benchmarks.

Baharoon, Qureshi, Ouyang, Xu, Aljouie and Peng, arXiv 2312.02366, 2023. Are features of photographs good enough for
radiology? A network that photographs trained is asked in every usual way: its features stay as they are, and the
nearest known images, a linear layer or a decoder on them answer; or it is tuned, a little or all of it; with few
labels. What segments is compared with a U-Net from random weights, what diagnoses with other features.

  frozen        logits = decoder(f), f the encoder's maps at four depths, every channel of mean 0, deviation 1
  linear        decoder(f) = sum over levels of enlarged W_l f_l, a linear layer on the maps enlarged and put together
  hierarchical  decoder(f) = a way up as a U-Net has it, from the deepest level to the finest
  low-rank      W + 2 B A in place of every W of the encoder but the first, B and A of rank 4, B = 0 at the start
  kNN           the share of the nearest known X-rays that show tuberculosis; nearest by the angle between mean maps

DINOv2's weights are not at hand; SqueezeNet's, which ImageNet's labels trained, take their place.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from medcook.errors import MedcookError
from medcook.methods import Method, Supervised
from medcook.networks.squeezenet import SqueezeNet, load_squeezenet
from medcook.pretraining import encoded, fresh, pooled
from medcook.recipes.few_shot.dino_augseg import ContextFusion
from medcook.recipes.pretraining._probing import StudyTask, study_rows
from medcook.recipes.pretraining._settings import CHANNELS
from medcook.recipes.pretraining.ssl_diversity import LEVELS, GreyEncoder
from medcook.recipes.recipe import Arm, Component, Recipe, Scale
from medcook.recipes.sam_adaptation._adapters import lora
from medcook.tasks import Budget

FEW = 4
"""X-rays whose lungs are drawn."""
LAYERS = ("squeeze", "expand1x1", "expand3x3")
"""The convolutions of SqueezeNet's fire modules."""

Start = Literal["imagenet", "random"]
Tunes = Literal["nothing", "low-rank", "all"]
RANDOM = ", random features"


XRAYS = StudyTask("chest_xray", labelled=FEW, evaluation="test")
BRAINS = StudyTask("embedded", labelled=FEW, outcome="group", positive="atrophy")


class LinearDecoder(nn.Module):
    """Maps at several depths, finest first, to logits (B, classes, H, W) of the finest one's size.

    A linear layer and bilinear enlargement commute, so that the layer comes first, where there are fewer places.
    """

    def __init__(self, channels: tuple[int, ...], classes: int):
        super().__init__()
        self.heads = nn.ModuleList(nn.Conv2d(count, classes, 1) for count in channels)

    def forward(self, levels: list[Tensor]) -> Tensor:
        size = levels[0].shape[2:]
        found = (head(maps) for head, maps in zip(self.heads, levels, strict=True))
        return sum(F.interpolate(each, size=size, mode="bilinear", align_corners=False) for each in found)


class HierarchicalDecoder(nn.Module):
    """The same with the way up of a U-Net: every level is narrowed, and joined with what comes from below."""

    def __init__(self, channels: tuple[int, ...], classes: int, widths: tuple[int, ...]):
        super().__init__()
        self.project = nn.ModuleList(nn.Conv2d(i, o, 1) for i, o in zip(channels, widths, strict=True))
        pairs = list(zip(widths, widths[1:], strict=False))
        self.join = nn.ModuleList(ContextFusion(deep, fine, 1, context=False) for fine, deep in reversed(pairs))
        self.head = nn.Conv2d(widths[0], classes, 1)

    def forward(self, levels: list[Tensor]) -> Tensor:
        *finer, x = (project(maps) for project, maps in zip(self.project, levels, strict=True))
        for join, fine in zip(self.join, reversed(finer), strict=True):
            x = join(x, fine)
        return self.head(x)


class OnFeatures(nn.Module):
    """An encoder that photographs trained and a decoder: images (B, C, H, W) to logits (B, classes, H, W)."""

    def __init__(self, encoder: GreyEncoder, decoder: nn.Module):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def descend(self, images: Tensor) -> list[Tensor]:
        """The encoder's maps, finest first."""
        return self.encoder.levels(images)

    def forward(self, images: Tensor) -> Tensor:
        levels = [F.instance_norm(maps.float()) for maps in self.descend(images)]
        logits = self.decoder(levels).float()
        return F.interpolate(logits, size=images.shape[2:], mode="bilinear", align_corners=False)


def prepare(encoder: nn.Module, tunes: Tunes, rank: int) -> None:
    """Freeze all of an encoder but what is tuned."""
    if tunes == "low-rank":
        lora(encoder, rank, LAYERS)
    for name, weight in encoder.named_parameters():
        weight.requires_grad_({"nothing": False, "low-rank": "lora_" in name, "all": True}[tunes])


class Embeds:
    """A method whose network gives vectors, too."""

    def embed(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """(B, D): the mean over the deepest maps of the network that predicts."""
        return pooled(encoded(nets["average"], images))


@dataclass
class Photographs(Embeds, Method):
    """A decoder on features of photographs, which are tuned or not.

    channels  of the hierarchical decoder, fine to deep
    start     `imagenet`, or `random` where there is no network to fetch weights
    tunes     what of the encoder learns: nothing, low-rank updates of its weights (LoRA), or all of it
    slower    the rate of the encoder's own weights, where all learn, as a share of the decoder's
    rank      of the low-rank updates
    """

    channels: tuple[int, ...] = (16, 32, 48, 64)
    start: Start = "imagenet"
    tunes: Tunes = "nothing"
    decoder: Literal["linear", "hierarchical"] = "hierarchical"
    slower: float = 0.1
    rank: int = 4

    axes = 2

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        if dims != 2:
            raise MedcookError("SqueezeNet sees images, not volumes.", "Take a data set that is prepared as slices.")
        net = load_squeezenet() if self.start == "imagenet" else SqueezeNet(features_only=True)
        encoder = GreyEncoder(net)
        prepare(encoder, self.tunes, self.rank)
        model = OnFeatures(encoder, self.make_decoder(classes))
        return nn.ModuleDict({"model": model, "average": fresh(model)})

    def make_decoder(self, classes: int) -> nn.Module:
        levels = tuple(LEVELS.values())
        if self.decoder == "linear":
            return LinearDecoder(levels, classes)
        return HierarchicalDecoder(levels, classes, self.channels)

    def optimise(self, learns: list[nn.Parameter], steps: int) -> tuple[Optimizer, LRScheduler]:
        """AdamW and one cycle, as for every method; the decoder's parameters come last."""
        with torch.device("meta"):
            count = len(list(self.make_decoder(2).parameters()))
        share = self.slower if self.tunes == "all" else 1.0
        groups = [(learns[-count:], self.rate), (learns[:-count], share * self.rate)]
        groups = [(weights, rate) for weights, rate in groups if weights]
        optimiser = AdamW(
            [{"params": weights, "lr": rate} for weights, rate in groups], weight_decay=self.decay, fused=True
        )
        return optimiser, OneCycleLR(optimiser, [rate for _, rate in groups], total_steps=steps, pct_start=0.2)


@dataclass
class FromNothing(Embeds, Supervised):
    """The chapter's U-Net from random weights."""

    channels: tuple[int, ...] = CHANNELS


def arms(start: Start, suffix: str = "") -> dict[str, Arm]:
    """Every way of asking the features."""
    found = {
        "frozen features": Photographs(start=start),
        "linear decoder": Photographs(start=start, decoder="linear"),
        "low-rank updates": Photographs(start=start, tunes="low-rank"),
        "fine-tuned": Photographs(start=start, tunes="all"),
    }
    return {name + suffix: Arm(method) for name, method in found.items()}


FULL_ARMS = ("frozen features", "low-rank updates", "fine-tuned", "U-Net")

recipe = Recipe(
    paper="dinov2-radiology",
    title="Features of photographs in radiology: frozen, tuned a little, tuned",
    claim="With the lungs of four X-rays drawn, a decoder on frozen features of photographs segments lungs better than "
    "a U-Net from random weights, by Dice.",
    arms=arms("imagenet") | arms("random", RANDOM) | {"U-Net": Arm(FromNothing())},
    compare=("frozen features", "U-Net"),
    replicate="draw",
    score=study_rows,
    scales={
        "quick": Scale(
            BRAINS,
            Budget(steps=30, batch=6, precision="float32", checks=0),
            replicates=1,
            arms=(*arms("random", RANDOM), "U-Net"),
        ),
        "full": Scale(XRAYS, Budget(steps=240, batch=8, checks=0), arms=FULL_ARMS),
    },
    source="abstract; decoders, the frozen encoder and the rates' separation: the authors' code, "
    "github.com/MohammedSB/DINOv2ForRadiology (dinov2/eval/segmentation, README.md)",
    components=(
        Component(
            "organ segmentation on frozen features",
            "implemented",
            "of X-rays alone, as on the paper's Montgomery set, of two hospitals. The encoder is SqueezeNet, at 128 x "
            "128, and each map is normalised before the decoder, as a transformer's last norm does it there. "
            "Nothing was looked at on any patients before the evaluation",
        ),
        Component(
            "linear and hierarchical decoders",
            "simplified",
            "the linear one is the paper's, on four depths instead of the last one, since SqueezeNet's last map has "
            "8 x 8 places; `full` does not run it. The way up of a U-Net takes maps of four depths, there of one size, "
            "here of four, joined as in DINO-AugSeg's plain decoder",
        ),
        Component(
            "few-shot learning",
            "simplified",
            f"segmentation with {FEW} X-rays drawn, one number of labels and not a series; diagnosis has all training "
            "patients' outcomes",
        ),
        Component(
            "end-to-end fine-tuning",
            "implemented",
            "the encoder's rate is a tenth of the decoder's; the paper chooses it among several on validation patients",
        ),
        Component(
            "parameter-efficient fine-tuning",
            "implemented",
            "LoRA by peft, of rank 4, on all convolutions of the fire modules; their updates learn at the decoder's "
            "rate",
        ),
        Component(
            "kNN",
            "implemented",
            "15 nearest of 448 training X-rays decide on tuberculosis; of every arm's own encoder, as it is after "
            "segmentation was learnt (frozen features are as they were). Column `knn`; its AUC and the probe's: "
            "`diagnosis` in _probing.py",
        ),
        Component(
            "linear probing",
            "implemented",
            "logistic regression on the mean of the deepest maps, of one strength; column `score`. The paper chooses "
            "rates and depths on validation patients",
        ),
        Component(
            "comparison with U-Net",
            "implemented",
            "the chapter's, from random weights, with the same steps, loss and augmentation",
        ),
        Component("TransUNet", "absent", "one comparator at `full`"),
        Component(
            "comparison with other pre-trained models",
            "simplified",
            "of diagnosis alone: features of the U-Net that learnt to segment. No other pre-trained network is at hand",
        ),
        Component(
            "DINOv2",
            "simplified",
            "SqueezeNet, trained with ImageNet's labels on 1.2 million photographs: 0.7 million weights for 22 million "
            "and more, and labels for self-supervision on 142 million",
        ),
        Component("CT and MRI, 3D classification", "absent", "X-rays alone are segmented and diagnosed here"),
        Component("over 100 experiments", "simplified", "four arms, three draws of the drawn X-rays"),
    ),
)
