"""SWTR-Unet (Hille et al., Computer Methods and Programs in Biomedicine 2023, arXiv 2201.10981): a hybrid network.

A residual network sees what is near, a transformer what is far, a U-Net's decoder makes a mask of it. Features of the
encoder become tokens, pass through transformer blocks whose windows are shifted every second time (Liu et al., ICCV
2021), and take the way of the skip connections to the decoder; on the deepest level one window holds the whole image.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.networks import UNet
from medcook.recipes.architectures._settings import BASELINE, CHANNELS, Architecture, scales
from medcook.recipes.architectures.paratranscnn import Residual
from medcook.recipes.architectures.swin_unetr import SwinBlock
from medcook.recipes.recipe import Arm, Component, Recipe


class Tokens(nn.Module):
    """Features (B, width, H, W) to the same: Linear(norm(blocks(Linear x))), a token for each place.

    blocks  transformer blocks; every second one has windows shifted by half their side. 0: the projections alone
    side    of a window, in tokens; `shift` False: all blocks have the same windows
    """

    def __init__(self, width: int, *, blocks: int = 2, side: int = 8, shift: bool = True):
        super().__init__()
        self.enter, self.leave, self.norm = nn.Linear(width, width), nn.Linear(width, width), nn.LayerNorm(width)
        shifts = (side // 2 if shift and number % 2 else 0 for number in range(blocks))
        self.blocks = nn.Sequential(*(SwinBlock(width, max(1, width // 16), side, by) for by in shifts))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.blocks(self.enter(x.movedim(1, -1)))
        return self.leave(self.norm(tokens)).movedim(-1, 1)


class SwtrUNet(UNet):
    """The book's U-Net with a residual encoder, and tokens in between: (B, inputs, H, W) to logits (B, classes, H, W).

    levels  how many levels, from the deepest, pass through `Tokens` before they reach the decoder
    """

    def __init__(self, *, inputs: int, classes: int, channels: tuple[int, ...] = CHANNELS, levels: int = 3, **tokens):
        super().__init__(inputs=inputs, classes=classes, channels=channels)
        self.down = nn.ModuleList(Residual(i, o, 1) for i, o in zip((inputs, *channels), channels, strict=False))
        self.tokens = nn.ModuleList(Tokens(width, **tokens) for width in channels[-levels:])

    def encoded(self, image: Tensor) -> list[Tensor]:
        """The features of the residual encoder, finest first, each level half as fine as the one before."""
        levels = [self.down[0](image)]
        for block in self.down[1:]:
            levels.append(block(self.pool(levels[-1], 2)))
        return levels

    def features(self, image: Tensor) -> Tensor:
        levels = self.encoded(image)
        first = len(levels) - len(self.tokens)
        levels[first:] = [tokens(level) for tokens, level in zip(self.tokens, levels[first:], strict=True)]
        x = levels.pop()
        for block, skip in zip(reversed(self.up), reversed(levels), strict=True):
            x = F.interpolate(x, size=skip.shape[2:], mode=self.mode, align_corners=False)
            x = block(torch.cat([skip, x], dim=1))
        return x


@dataclass
class Swtr(Architecture):
    """Residual encoder, transformer blocks on its three deepest levels, U-Net decoder.

    blocks  of each level; 0: none, all else equal
    side    of a window, in tokens; `shift` False: all blocks of a level have the same windows
    """

    blocks: int = 2
    side: int = 8
    shift: bool = True

    def model(self, inputs: int, classes: int) -> nn.Module:
        settings = {"blocks": self.blocks, "side": self.side, "shift": self.shift}
        return SwtrUNet(inputs=inputs, classes=classes, channels=self.channels, **settings)


recipe = Recipe(
    paper="swtr-unet",
    title="SWTR-Unet: transformer blocks between a residual encoder and a U-Net's decoder",
    claim="A residual encoder whose features pass through shifted-window transformer blocks before a U-Net's decoder "
    "reaches a higher Dice on hearts than a U-Net.",
    arms={
        "unet": Arm(BASELINE),
        "swtr-unet": Arm(Swtr()),
        "without transformer": Arm(Swtr(blocks=0)),
        "without shift": Arm(Swtr(shift=False)),
    },
    compare=("swtr-unet", "unet"),
    ablation=("swtr-unet", "without transformer"),
    replicate="fold",
    scales=scales("unet", "swtr-unet", "without transformer"),
    published={
        "liver MR, Dice of the liver": 0.98,
        "liver MR, Dice of lesions": 0.81,
        "LiTS, Dice of the liver": 0.97,
        "LiTS, Dice of lesions": 0.79,
    },
    source="the paper's abstract",
    components=(
        Component(
            "transformer blocks",
            "implemented",
            "a pair for each of the three deepest levels, the windows of the second shifted; 8 x 8 tokens with a "
            "relative position bias; on a slice of 128 x 128 the deepest level is one window; number, width and place "
            "are our reading, for we know of no official code",
        ),
        Component(
            "U-Net decoder",
            "implemented",
            "the book's, down to the full resolution; what it takes of the deep levels has passed the transformer",
        ),
        Component(
            "pretrained ResNet",
            "simplified",
            "one residual block for each level, from scratch, the first at full resolution; pooling halves, not "
            "strides; the one pretrained encoder at hand, SqueezeNet, has no normalisation and would need a smaller "
            "learning rate than the other arms have",
        ),
        Component("liver and hepatic lesions", "absent", "hearts in MR; neither MR nor CT of livers is at hand"),
        Component("inter-observer variability", "absent", "a single expert's labels"),
        Component("correlation analysis", "absent", "of size and contrast of lesions with Dice; there are no lesions"),
    ),
)
