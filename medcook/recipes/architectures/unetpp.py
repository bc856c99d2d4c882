"""UNet++ (Zhou, Siddiquee, Tajbakhsh and Liang, IEEE Transactions on Medical Imaging 2020; arXiv 1912.05074).

How deep should a U-Net be? UNet++ holds those of every depth, with one encoder in common. Their decoders fill the
triangle between encoder and decoder: node X(i, j), at resolution i and after j steps along the skip, sees every earlier
node of its resolution (the dense skips) and that below. Every U-Net has a head and is trained; deep ones can be cut.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.networks.unet import DoubleConv
from medcook.recipes.architectures._settings import BASELINE, CHANNELS, DeeplySupervised, scales
from medcook.recipes.recipe import Arm, Component, Recipe


class Node(nn.Module):
    """H([earlier nodes, up(below)]): maps (B, width, H, W) and (B, below, H/2, W/2) to (B, width, H, W).

    H is a convolution, normalised and rectified; what comes from below is brought to `width` before it grows.
    """

    def __init__(self, earlier: int, below: int, width: int):
        super().__init__()
        self.project = nn.Conv2d(below, width, 1)
        self.mix = nn.Sequential(
            nn.Conv2d((earlier + 1) * width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )

    def forward(self, earlier: list[Tensor], below: Tensor) -> Tensor:
        size = earlier[0].shape[2:]
        below = F.interpolate(self.project(below), size=size, mode="bilinear", align_corners=False)
        return self.mix(torch.cat([*earlier, below], dim=1))


def name(row: int, column: int) -> str:
    """Where X(row, column) stands among the modules."""
    return f"x{row}{column}"


class NestedUNet(nn.Module):
    """U-Nets of depth 1, 2, ..., len(channels) - 1 in one: (B, inputs, H, W) to logits (B, classes, H, W).

    dense  False: a node sees the nearest earlier node of its resolution alone
    deep   False: the deepest U-Net alone has a head
    """

    def __init__(
        self,
        *,
        inputs: int,
        classes: int,
        channels: tuple[int, ...] = CHANNELS,
        dense: bool = True,
        deep: bool = True,
    ):
        super().__init__()
        self.dense, self.depth = dense, len(channels) - 1
        self.node = nn.ModuleDict()
        for row, (above, width) in enumerate(zip((inputs, *channels), channels, strict=False)):
            self.node[name(row, 0)] = DoubleConv(above, width, 2)
            for column in range(1, self.depth - row + 1):
                self.node[name(row, column)] = Node(column if dense else 1, channels[row + 1], width)
        depths = range(1, self.depth + 1) if deep else [self.depth]
        self.head = nn.ModuleDict({str(depth): nn.Conv2d(channels[0], classes, 1) for depth in depths})

    def features(self, image: Tensor, depth: int) -> list[Tensor]:
        """X(0, 1), ..., X(0, depth), each (B, channels[0], H, W); nodes of deeper U-Nets are not computed.

        X(i, 0) = H(pool X(i-1, 0)) and X(i, j) = H([X(i, 0), ..., X(i, j-1), up X(i+1, j-1)]), diagonal by diagonal.
        """
        x: dict[tuple[int, int], Tensor] = {}
        for level in range(depth + 1):
            x[level, 0] = self.node[name(level, 0)](F.max_pool2d(x[level - 1, 0], 2) if level else image)
            for column in range(1, level + 1):
                row = level - column
                earlier = [x[row, k] for k in range(0 if self.dense else column - 1, column)]
                x[row, column] = self.node[name(row, column)](earlier, x[row + 1, column - 1])
        return [x[0, column] for column in range(1, depth + 1)]

    def outputs(self, image: Tensor) -> list[Tensor]:
        """The logits of every head, the deepest first."""
        features = self.features(image, self.depth)
        return [head(features[int(depth) - 1]) for depth, head in reversed(self.head.items())]

    def pruned(self, image: Tensor, depth: int) -> Tensor:
        """The logits of the U-Net of that depth, at its own cost."""
        return self.head[str(depth)](self.features(image, depth)[-1])

    def forward(self, image: Tensor) -> Tensor:
        return self.outputs(image)[0]


@dataclass
class UNetPP(DeeplySupervised):
    """Nested U-Nets with dense skips, trained at all heads; their mean probabilities predict.

    dense  False: no dense skips; `deep` False: neither heads of shallow U-Nets nor their mean
    prune  the depth of the U-Net that predicts alone; 0: all. It changes nothing of the training, and needs `deep`
    """

    dense: bool = True
    prune: int = 0

    def model(self, inputs: int, classes: int) -> nn.Module:
        return NestedUNet(inputs=inputs, classes=classes, channels=self.channels, dense=self.dense, deep=self.deep)

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        network = nets["average"]
        outputs = [network.pruned(images, self.prune)] if self.prune else network.outputs(images)
        return torch.stack([logits.float().softmax(1) for logits in outputs]).mean(0)


recipe = Recipe(
    paper="unetpp",
    title="UNet++: nested U-Nets with dense skips",
    claim="Nested U-Nets with dense skips and deep supervision have a higher Dice than a U-Net on hearts.",
    arms={
        "unet": Arm(BASELINE),
        "unet++": Arm(UNetPP()),
        "without dense skips": Arm(UNetPP(dense=False)),
        "without deep supervision": Arm(UNetPP(deep=False)),
        "pruned to depth 3": Arm(UNetPP(prune=3)),
    },
    compare=("unet++", "unet"),
    ablation=("unet++", "without dense skips"),
    replicate="fold",
    scales=scales("unet", "unet++", "without dense skips"),
    published={"MSD liver, Dice": 0.9611, "MSD liver tumour, Dice": 0.6625},
    source="the README of the official PyTorch code (pytorch/ of github.com/MrGiovanni/UNetPlusPlus), validation, "
    "deepest head, within nnU-Net; the U-Net beside it has 0.9618 and 0.6337",
    components=(
        Component(
            "nested U-Nets",
            "implemented",
            "depths 1 to 4 with one encoder in common, at the U-Net's widths; to keep a step near twice its own, a "
            "node outside the encoder is one convolution, as in the paper's formula (its code has two), and a 1 x 1 "
            "convolution narrows what is upsampled; as a whole it has as many parameters as the U-Net",
        ),
        Component("dense skips", "implemented", "without them it is the paper's UNet+: the nearest earlier node alone"),
        Component(
            "deep supervision",
            "implemented",
            "the mean of cross-entropy and Dice over four heads, all weights equal; their mean probabilities predict",
        ),
        Component("pruning", "implemented", "at prediction, one head and the nodes that it needs; not run at full"),
        Component("other backbones", "absent", "no pre-trained weights: all arms are trained from scratch"),
        Component("Mask R-CNN++", "absent", "no instances are segmented here"),
    ),
)
