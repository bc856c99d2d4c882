"""LightM-UNet (Liao, Zhu, Wang, Pan, Wang and Ma, preprint 2024, arXiv 2403.05246): Mamba makes a U-Net light.

Deep convolutions hold most of a U-Net's weights. Here residual vision Mamba layers take their place: a state that is
carried from pixel to pixel, row by row, hears the whole map at a cost that grows with the number of pixels,
    M = VSS(norm(x)) + s x,  out = Linear(norm(M)),  s learnt,
and what is left of the convolutions is depthwise.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.recipes.architectures._scan import SelectiveStateSpace
from medcook.recipes.architectures._settings import BASELINE, CHANNELS, Architecture, scales
from medcook.recipes.recipe import Arm, Component, Recipe


class VisionStateSpace(nn.Module):
    """A map (B, H, W, width) to the same: Linear(norm(SSM(silu(DWConv(Linear x)))) * silu(Linear x)).

    expand  inner channels for each outer one; `scan` False: without SSM, what remains hears the next pixels alone
    """

    def __init__(self, width: int, *, expand: int = 1, states: int = 16, scan: bool = True):
        super().__init__()
        inner = expand * width
        self.enter = nn.Linear(width, 2 * inner)
        self.local = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.scan = SelectiveStateSpace(inner, states) if scan else None
        self.norm = nn.LayerNorm(inner)
        self.leave = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.enter(x).chunk(2, dim=-1)
        x = F.silu(self.local(x.movedim(-1, 1)).movedim(1, -1))
        if self.scan is not None:
            x = self.scan(x.flatten(1, 2)).unflatten(1, x.shape[1:3])
        return self.leave(self.norm(x) * F.silu(gate))


class ResidualVisionMamba(nn.Module):
    """(B, inputs, H, W) to (B, outputs, H, W): the residual vision Mamba layer.

    residual  False: without s x
    """

    def __init__(self, inputs: int, outputs: int, *, residual: bool = True, **space):
        super().__init__()
        self.norm, self.norm_mixed = nn.LayerNorm(inputs), nn.LayerNorm(inputs)
        self.space = VisionStateSpace(inputs, **space)
        self.adjust = nn.Parameter(torch.ones(1)) if residual else None
        self.project = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(1, -1)
        mixed = self.space(self.norm(x))
        if self.adjust is not None:
            mixed = mixed + self.adjust * x
        return self.project(self.norm_mixed(mixed)).movedim(-1, 1)


class LightConv(nn.Module):
    """(B, width, H, W) to the same: relu(norm(DWConv(x) + s x)); a depthwise convolution, then one of a pixel alone."""

    def __init__(self, width: int):
        super().__init__()
        self.near = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.point = nn.Conv2d(width, width, 1, bias=False)
        self.adjust = nn.Parameter(torch.ones(1))
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.point(self.near(x)) + self.adjust * x))


class LightMUNet(nn.Module):
    """(B, inputs, H, W) to logits (B, classes, H, W); as many deep levels as `depths` are of Mamba layers.

    depths  layers of each deep level; the levels above them, too fine for a scan here, are light convolutions
    """

    def __init__(
        self,
        *,
        inputs: int,
        classes: int,
        channels: tuple[int, ...] = CHANNELS,
        depths: tuple[int, ...] = (1, 2, 4),
        **layer,
    ):
        super().__init__()
        fine = max(1, len(channels) - len(depths))
        self.down = nn.ModuleList()
        for level, (before, width) in enumerate(zip((inputs, *channels), channels, strict=False)):
            if level < fine:
                side = 3 if level == 0 else 1
                stem = nn.Conv2d(before, width, side, padding=side // 2, bias=False)
                self.down.append(nn.Sequential(stem, LightConv(width)))
            else:
                widths = (before, *[width] * depths[level - fine])
                layers = [ResidualVisionMamba(i, o, **layer) for i, o in zip(widths, widths[1:], strict=False)]
                self.down.append(nn.Sequential(*layers))
        pairs = list(zip(channels, channels[1:], strict=False))
        self.narrow = nn.ModuleList(nn.Conv2d(deep, skip, 1, bias=False) for skip, deep in pairs)
        self.up = nn.ModuleList(LightConv(skip) for skip, _ in pairs)
        self.head = nn.Conv2d(channels[0], classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        skips = [self.down[0](image)]
        for block in self.down[1:]:
            skips.append(block(F.max_pool2d(skips[-1], 2)))
        x = skips.pop()
        for narrow, block, skip in zip(reversed(self.narrow), reversed(self.up), reversed(skips), strict=True):
            x = F.interpolate(narrow(x), size=skip.shape[2:], mode="bilinear", align_corners=False)
            x = block(skip + x)
        return self.head(x)


@dataclass
class LightM(Architecture):
    """A light U-Net of residual vision Mamba layers.

    scan      False: the layers without their state space, all else equal; `residual` False: without s x
    """

    scan: bool = True
    residual: bool = True

    def model(self, inputs: int, classes: int) -> nn.Module:
        return LightMUNet(
            inputs=inputs, classes=classes, channels=self.channels, scan=self.scan, residual=self.residual
        )


recipe = Recipe(
    paper="lightm-unet",
    title="LightM-UNet: residual vision Mamba layers",
    claim="A U-Net of residual vision Mamba layers and depthwise convolutions segments hearts as well as the U-Net, "
    "within 0.01 Dice, with fewer parameters.",
    arms={
        "unet": Arm(BASELINE),
        "lightm-unet": Arm(LightM()),
        "without scan": Arm(LightM(scan=False)),
        "without residual": Arm(LightM(residual=False)),
    },
    compare=("lightm-unet", "unet"),
    ablation=("lightm-unet", "without scan"),
    replicate="fold",
    expect="cheaper-at-equal-quality",
    margin=0.01,
    cost="parameters",
    scales=scales("unet", "lightm-unet", "without scan"),
    published={"parameters, nnU-Net's over its own": 116.0, "computation, nnU-Net's over its own": 21.0},
    source="the paper's abstract; the layer follows the official code, github.com/MrBlankness/LightM-UNet",
    components=(
        Component(
            "residual vision Mamba layer",
            "implemented",
            "two norms where the official code uses one twice; without the outer residual blocks of that code",
        ),
        Component(
            "selective state space",
            "implemented",
            "in plain PyTorch, 16 states, row by row from the top left; no inner expansion for the official code's "
            "twofold one, for time; the convolution before it is depthwise on the map, there along the row",
        ),
        Component("linear complexity", "implemented", "every pixel costs the same, however many there are"),
        Component(
            "lightweight U-Net",
            "simplified",
            "1, 2 and 4 layers on the three deepest levels, on maps of at most 32 x 32; above them and in the decoder "
            "depthwise convolutions with the learnt residual; batch norm; under half the parameters of a small U-Net, "
            "where the paper's nnU-Net has a hundred times as many",
        ),
        Component("three dimensions", "absent", "slices alone"),
    ),
)
