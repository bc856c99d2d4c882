"""IS-Net: intermediate supervision by features of the label map (Qin, Dai, Hu, Fan, Shao and Van Gool, ECCV 2022).

Deep supervision says at every level of a decoder what the label is, not what the features should be. An encoder that
has learnt to give a label map back from itself knows such features: once frozen, its stages are targets for those of
the segmentation network, beside a side output at each of them. How many clicks a mask is from the right one is counted
by the paper's second half, `medcook.measures.correction`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.losses import find_loss
from medcook.methods import Batch, Moment
from medcook.networks import UNet
from medcook.networks.unet import DoubleConv
from medcook.recipes.architectures._settings import BASELINE, CHANNELS, DeeplySupervised, scales
from medcook.recipes.recipe import Arm, Component, Recipe


def masks(labels: Tensor, classes: int) -> Tensor:
    """Labels (B, H, W) as a mask for each class (B, classes, H, W); unlabelled pixels are in none."""
    return torch.stack([labels == value for value in range(classes)], dim=1).float()


def side_outputs(features: list[Tensor], sides: list[nn.Module]) -> list[Tensor]:
    """Logits of every stage that has a side, bilinearly on the grid of the first."""
    size = features[0].shape[2:]
    logits = [side(stage) for side, stage in zip(sides, features, strict=False)]
    return logits[:1] + [F.interpolate(each, size=size, mode="bilinear", align_corners=False) for each in logits[1:]]


def feature_distance(found: list[Tensor], wanted: list[Tensor]) -> Tensor:
    """Mean squared difference of the features of a stage, averaged over the stages."""
    pairs = zip(found, wanted, strict=True)
    return torch.stack([F.mse_loss(mine.float(), theirs.float()) for mine, theirs in pairs]).mean()


class SideUNet(UNet):
    """The book's U-Net, with side outputs: (B, inputs, H, W) to logits (B, classes, H, W).

    sides  False: the last head alone
    """

    def __init__(self, *, inputs: int, classes: int, channels: tuple[int, ...] = CHANNELS, sides: bool = True):
        super().__init__(inputs=inputs, classes=classes, channels=channels)
        self.sides = nn.ModuleList(nn.Conv2d(each, classes, 1) for each in channels[1:] if sides)

    def stages(self, image: Tensor) -> list[Tensor]:
        """Features of the decoder, finest first, and of the deepest stage of the encoder."""
        skips = [self.down[0](image)]
        for block in self.down[1:]:
            skips.append(block(self.pool(skips[-1], 2)))
        stages = [skips.pop()]
        for block, skip in zip(reversed(self.up), reversed(skips), strict=True):
            x = F.interpolate(stages[0], size=skip.shape[2:], mode=self.mode, align_corners=False)
            stages.insert(0, block(torch.cat([skip, x], dim=1)))
        return stages

    def features(self, image: Tensor) -> Tensor:
        return self.stages(image)[0]

    def heads(self, stages: list[Tensor]) -> list[Tensor]:
        """Logits of every stage, at full size; predicts the first."""
        return side_outputs(stages, [self.head, *self.sides])

    def outputs(self, image: Tensor) -> list[Tensor]:
        return self.heads(self.stages(image))


class TruthEncoder(nn.Module):
    """Label maps (B, classes, H, W) to features with the sizes of the U-Net's stages, and back at each of them."""

    def __init__(self, classes: int, channels: tuple[int, ...] = CHANNELS):
        super().__init__()
        self.classes = classes
        self.down = nn.ModuleList(DoubleConv(i, o, 2) for i, o in zip((classes, *channels), channels, strict=False))
        self.sides = nn.ModuleList(nn.Conv2d(each, classes, 1) for each in channels)

    def stages(self, truth: Tensor) -> list[Tensor]:
        """Features of every stage, finest first."""
        stages = [self.down[0](truth)]
        for block in self.down[1:]:
            stages.append(block(F.max_pool2d(stages[-1], 2)))
        return stages

    def outputs(self, truth: Tensor) -> list[Tensor]:
        """Logits of the same label map, from every stage."""
        return side_outputs(self.stages(truth), list(self.sides))


@dataclass
class ISNet(DeeplySupervised):
    """A U-Net supervised at every stage, by masks and by the features of a ground-truth encoder.

    guided  False: by masks alone; `deep` False: without side outputs
    first   share of the training in which the ground-truth encoder learns; afterwards it is frozen, and its features
            are targets. The U-Net learns from masks all the time, and has as many steps as in the other arms
    """

    guided: bool = True
    first: float = 1 / 3

    def model(self, inputs: int, classes: int) -> nn.Module:
        return SideUNet(inputs=inputs, classes=classes, channels=self.channels, sides=self.deep)

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        nets = super().build(inputs, classes, dims)
        if self.guided:
            nets["truth"] = TruthEncoder(classes, self.channels)
        return nets

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        stages = nets["model"].stages(labelled.images)
        loss = self.by_masks(nets["model"].heads(stages), labelled.labels)
        if not self.guided:
            return loss
        encoder = nets["truth"]
        truth = masks(labelled.labels, encoder.classes)
        if now.fraction < self.first:
            return loss + self.by_masks(encoder.outputs(truth), labelled.labels)
        encoder.eval()
        with torch.no_grad():
            wanted = encoder.stages(truth)
        return loss + feature_distance(stages, wanted)

    def by_masks(self, outputs: list[Tensor], labels: Tensor) -> Tensor:
        """The mean loss of all outputs."""
        return sum(find_loss(self.loss)(logits.float(), labels) for logits in outputs) / len(outputs)


recipe = Recipe(
    paper="isnet-dis",
    title="IS-Net: features of the label map as targets",
    claim="Supervision of every stage by masks and by features of a ground-truth encoder raises a U-Net's Dice on "
    "hearts.",
    arms={
        "unet": Arm(BASELINE),
        "is-net": Arm(ISNet()),
        "without features": Arm(ISNet(guided=False)),
        "without side outputs": Arm(ISNet(deep=False)),
    },
    compare=("is-net", "unet"),
    ablation=("is-net", "without features"),
    replicate="fold",
    scales=scales("unet", "is-net", "without features"),
    source="the abstract gives no figures; stages, losses and the counting of clicks follow the official code, "
    "github.com/xuebinqin/DIS",
    components=(
        Component(
            "ground-truth encoder",
            "implemented",
            "a stage for each of the U-Net's, of its blocks, that learns in the first third of the run to give the "
            "label map back at every stage and is frozen afterwards; the paper trains it before, until it is good "
            "enough, and halves the label map first",
        ),
        Component(
            "feature-level guidance",
            "implemented",
            "mean squared difference to the frozen features at every stage, in the last two thirds of the run",
        ),
        Component("mask-level guidance", "implemented", "a side output at every stage, all with the book's loss"),
        Component(
            "human correction efforts",
            "implemented",
            "medcook/measures/correction.py, of masks in two dimensions; the comparison here is of Dice",
        ),
        Component("backbone", "simplified", "the book's U-Net; the paper's stages are small U-Nets, as in U2-Net"),
        Component("DIS5K, and a benchmark of 16 models", "absent", "photographs; tested on hearts alone"),
    ),
)
