"""Multi-scale MPU-Net (Yu, Han and Song, arXiv 2307.05799, 2023).

A convolution sees a neighbourhood. At the bottom of this U-Net the volume becomes a sequence of its voxels, each of
which attends to all others (position attention); on the way up every level is weighted by what the levels below found
(cross-attention), and each level says its own map, of which the mean is the result. The loss adds Tversky index and
cross-entropy. The paper's equations were not at hand: this follows the authors' code, github.com/Stefan-Yu404/MP-UNet.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.data.case import IGNORE
from medcook.losses import find_loss
from medcook.methods import Batch, Moment
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.recipes.volumes._settings import BASELINE, CHANNELS, VolumeNetwork, scales


def serialised(volume: Tensor) -> Tensor:
    """A volume (B, C, D, H, W) as a sequence of its voxels (B, D * H * W, C)."""
    return volume.flatten(2).mT


class PositionAttention(nn.Module):
    """(B, C, D, H, W) to the same: each voxel adds the mean of what all voxels say, weighted by how they match it.

    Queries and keys have an eighth of the channels. `share`, how much is added, starts at 0: as if it were not there.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.query, self.key = (nn.Conv3d(channels, max(1, channels // 8), 1) for _ in range(2))
        self.value = nn.Conv3d(channels, channels, 1)
        self.share = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            matches = serialised(self.query(x)) @ serialised(self.key(x)).mT
            said = matches.softmax(-1) @ serialised(self.value(x))
            return x + self.share * said.mT.unflatten(2, x.shape[2:])


class CrossAttention(nn.Module):
    """Features of a level, joined with its skip, and what came from below, both (B, C, D, H, W), to the same.

    Both are brought to half the channels and added, a ReLU leaves what is there in either, and from that comes one
    weight between 0 and 1 for each voxel of the level.
    """

    def __init__(self, channels: int):
        super().__init__()
        half = max(1, channels // 2)
        self.level, self.below = (nn.Sequential(nn.Conv3d(channels, half, 1), nn.BatchNorm3d(half)) for _ in range(2))
        self.weigh = nn.Sequential(nn.Conv3d(half, 1, 1), nn.BatchNorm3d(1), nn.Sigmoid())

    def forward(self, level: Tensor, below: Tensor) -> Tensor:
        return level * self.weigh(F.relu(self.level(level) + self.below(below)))


def convolved(inputs: int, outputs: int, count: int, norm: bool = False) -> nn.Sequential:
    """`count` 3 x 3 x 3 convolutions, each with a PReLU; with `norm` batch normalisation before it."""
    layers = []
    for each in [inputs, *[outputs] * (count - 1)]:
        layers += [nn.Conv3d(each, outputs, 3, padding=1), *[nn.BatchNorm3d(outputs)] * norm, nn.PReLU(outputs)]
    return nn.Sequential(*layers)


def reduced(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """A maximum over 3 x 3 x 3 voxels, a convolution that halves the sides or, with stride 1, keeps them; an ELU."""
    convolution = nn.Conv3d(inputs, outputs, 2, 2) if stride == 2 else nn.Conv3d(inputs, outputs, 3, padding=1)
    return nn.Sequential(nn.MaxPool3d(3, 1, padding=1), convolution, nn.BatchNorm3d(outputs), nn.ELU())


class MPUNet(nn.Module):
    """(B, inputs, D, H, W) to log-probabilities (B, classes, D, H, W), of the mean of the maps of all levels.

    attention  False: neither position attention nor cross-attention, all else equal
    dropout    share of activations that is dropped between the stages
    """

    def __init__(
        self,
        *,
        inputs: int,
        classes: int,
        channels: tuple[int, ...] = CHANNELS,
        attention: bool = True,
        dropout: float = 0.2,
    ):
        super().__init__()
        fine, deep = list(reversed(channels[:-1])), channels[-1]
        self.first = convolved(inputs, channels[0], 2)
        self.encoders = nn.ModuleList(convolved(c, c, 2) for c in [*channels[1:], deep])
        self.downs = nn.ModuleList(reduced(i, o, 2) for i, o in zip(channels, channels[1:], strict=False))
        self.downs.append(reduced(deep, deep, 1))
        self.bottom = nn.Sequential(
            reduced(deep, deep, 1),
            convolved(deep, deep, 1, norm=True),
            PositionAttention(deep) if attention else nn.Identity(),
            convolved(deep, deep, 1, norm=True),
        )
        self.decoders = nn.ModuleList([convolved(deep, deep, 3), *(convolved(2 * c, c, 3) for c in fine)])
        self.ups = nn.ModuleList(nn.ConvTranspose3d(i, o, 2, 2) for i, o in zip([deep, *fine], fine, strict=False))
        self.slopes = nn.ModuleList(nn.PReLU(c) for c in fine)
        self.attend = nn.ModuleList(CrossAttention(c) for c in ([deep, *fine] if attention else []))
        self.heads = nn.ModuleList(nn.Conv3d(c, classes, 1) for c in [deep, *fine])
        self.drop = nn.Dropout(dropout)
        for module in self.modules():
            if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
                nn.init.kaiming_normal_(module.weight, a=0.25)
                nn.init.zeros_(module.bias)

    def encoded(self, image: Tensor) -> list[Tensor]:
        """The levels, finest first; the last two are on the same grid, and the very last is the bottom."""
        levels = [self.first(image) + image.mean(1, keepdim=True)]
        for down, encoder in zip(self.downs, self.encoders, strict=True):
            x = down(levels[-1])
            levels.append(self.drop(encoder(x) + x))
        return [*levels[:-1], self.bottom(levels[-1])]

    def maps(self, image: Tensor) -> list[Tensor]:
        """Probabilities (B, classes, D, H, W) of the levels, at the size of the image, the coarsest first."""
        *skips, below = self.encoded(image)
        found = []
        for number, (decoder, head) in enumerate(zip(self.decoders, self.heads, strict=True)):
            skip = skips.pop()
            x = decoder(torch.cat([below, skip], dim=1) if number else skip) + below
            x = self.attend[number](x, below) if self.attend else x
            x = self.drop(x) if skips else x
            logits = head(x).float()
            if skips:
                logits = F.interpolate(logits, size=image.shape[2:], mode="trilinear", align_corners=False)
                below = self.slopes[number](self.ups[number](x, output_size=skips[-1].shape[2:]))
            found.append(logits.softmax(1))
        return found

    def forward(self, image: Tensor) -> Tensor:
        return logarithm(average(self.maps(image)))


def average(maps: list[Tensor]) -> Tensor:
    """The mean of the maps of all levels."""
    return sum(maps) / len(maps)


def logarithm(probabilities: Tensor) -> Tensor:
    """Their finite logarithm, a softmax of which gives them back."""
    return probabilities.clamp_min(1e-7).log()


def hybrid_loss(probabilities: Tensor, labels: Tensor, extra: float = 0.3, missed: float = 0.7) -> Tensor:
    """One minus the mean Tversky index, and binary cross-entropy; probabilities (B, classes, *size) of each class.

    The index is hits / (hits + extra * what is found too much + missed * what is missed + 1) for each image and class,
    so that a missed voxel costs more than one too much. Unlabelled voxels count in neither part.
    """
    known = (labels != IGNORE)[:, None]
    truth = F.one_hot(labels.masked_fill(~known[:, 0], 0).long(), probabilities.shape[1]).movedim(-1, 1) * known
    axes = tuple(range(2, labels.ndim + 1))
    soft = probabilities.float() * known
    hits, found, there = (soft * truth).sum(axes), soft.sum(axes), truth.sum(axes)
    index = hits / (hits + extra * (found - hits) + missed * (there - hits) + 1)
    with torch.autocast(soft.device.type, enabled=False):
        entropy = F.binary_cross_entropy(soft, truth.float(), reduction="sum")
    return 1 - index.mean() + entropy / (known.sum() * truth.shape[1]).clamp_min(1)


@dataclass
class Serialised(VolumeNetwork):
    """MPU-Net; the mean map and, with a weight that fades, the maps of all levels but the finest are supervised.

    attention  False: neither position attention nor cross-attention, all else equal
    hybrid     False: the book's loss in place of the paper's
    """

    attention: bool = True
    hybrid: bool = True

    def model(self, inputs: int, classes: int) -> nn.Module:
        return MPUNet(inputs=inputs, classes=classes, channels=self.channels, attention=self.attention)

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        def loss(p: Tensor) -> Tensor:
            if self.hybrid:
                return hybrid_loss(p, labelled.labels)
            return find_loss(self.loss)(logarithm(p), labelled.labels)

        maps = nets["model"].maps(labelled.images)
        coarse = 0.4 * 0.8 ** int(20 * now.fraction)
        return loss(average(maps)) + coarse * sum(loss(p) for p in maps[:-1])


recipe = Recipe(
    paper="mpu-net",
    title="Position attention at the bottom of a multi-scale U-Net",
    claim="On hippocampi, a U-Net with position attention and cross-attention has a higher Dice than a plain one.",
    arms={
        "unet": Arm(BASELINE),
        "mpu-net": Arm(Serialised(hybrid=False)),
        "without attention": Arm(Serialised(attention=False, hybrid=False)),
        "hybrid loss": Arm(Serialised()),
    },
    compare=("mpu-net", "unet"),
    ablation=("mpu-net", "without attention"),
    replicate="fold",
    scales=scales(),
    published={"LiTS 2017, Dice": 0.9217, "LiTS 2017, IoU": 0.8591},
    source="abstract; modules, loss and weights from the authors' code, github.com/Stefan-Yu404/MP-UNet",
    components=(
        Component(
            "image serialisation",
            "implemented",
            "as in the code: the voxels of the deepest grid, here 4 x 7 x 5, become a sequence; positional encodings "
            "are defined there but never used, and left out here",
        ),
        Component(
            "position attention module",
            "implemented",
            "between two convolutions on the deepest grid, with 64 channels (the code's: 256)",
        ),
        Component(
            "cross-attention in the decoder",
            "implemented",
            "the code's: at each level one weight for each voxel, from the level and what came from below; no softmax "
            "over positions, as the name might suggest",
        ),
        Component(
            "multi-scale module",
            "implemented",
            "a map from each level of the decoder, of which the mean predicts; the maps of the three coarser levels "
            "are supervised too, with a weight that starts at 0.4 and falls by a fifth after every twentieth of the "
            "training (the code: 30 of 600 epochs)",
        ),
        Component(
            "hybrid loss",
            "implemented",
            "Tversky index with weights 0.3 and 0.7, and binary cross-entropy of the probabilities. The code sends "
            "these through a sigmoid once more, which keeps them between 0.5 and 0.73; without it, as here, training "
            "ran away in all three folds of the first evidence and found nothing. So it is an arm of its own, and the "
            "others have the book's loss",
        ),
        Component(
            "encoder and decoder",
            "simplified",
            "the code's residual stages and dropout, 8 to 64 channels wide and then constant (the code's: 16 to 512, "
            "and a decoder twice as wide as the encoder); its ELUs have the number of channels as alpha, here 1",
        ),
        Component("liver tumours in CT", "absent", "hippocampi in MR; LiTS is not at hand"),
    ),
)
