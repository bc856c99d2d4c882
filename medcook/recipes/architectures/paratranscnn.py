"""ParaTransCNN, a convolutional and a transformer encoder side by side (Sun, Xu and Duan, arXiv 2401.15307, 2024).

Convolutions see what is near, attention sees the whole image. Two encoders read the same image, each a pyramid; at
every level their features are laid side by side and a channel attention decides which of them count (squeeze and
excitation: Hu et al., CVPR 2018). A convolutional decoder takes what is merged, at the bottom and by skip connections.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.networks.unet import DoubleConv
from medcook.recipes.architectures._settings import BASELINE, CHANNELS, Architecture, scales
from medcook.recipes.recipe import Arm, Component, Recipe

DIMS = (16, 32, 64)


class Residual(nn.Module):
    """The block of a ResNet of 18 or 34 layers (He et al., CVPR 2016): x + two convolutions, at `stride`.

    With a stride, give it 16 channels or more: with 8, the gradient of its 1 x 1 convolution, in bfloat16 on a CPU,
    ends the process on large maps (PyTorch 2.13).
    """

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        same = inputs == outputs and stride == 1
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.convolutions(x) + self.shortcut(x))


class ConvolutionalEncoder(nn.Module):
    """(B, inputs, H, W) to features at H / 4, H / 8 and H / 16; widths (stem, then one residual block each)."""

    def __init__(self, inputs: int, widths: tuple[int, int, int, int]):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(inputs, widths[0], 7, 2, padding=3, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)
        )
        self.first = Residual(widths[0], widths[0], 1)
        self.blocks = nn.ModuleList(Residual(i, o, 2) for i, o in zip(widths, widths[1:], strict=False))

    def forward(self, image: Tensor) -> list[Tensor]:
        x, levels = self.first(self.stem(image)), []
        for block in self.blocks:
            x = block(x)
            levels.append(x)
        return levels


class TransformerLayer(nn.Module):
    """(B, dim, H, W) to the same: every token hears all of the image, then passes two linear layers by itself.

    What is heard is on a grid `reduction` times coarser, made by a convolution (Wang et al., ICCV 2021); 1 keeps it.
    """

    def __init__(self, dim: int, *, heads: int, reduction: int):
        super().__init__()
        self.first_norm, self.second_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.reduce = nn.Conv2d(dim, dim, reduction, reduction) if reduction > 1 else nn.Identity()
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.alone = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        asking = self.first_norm(tokens)
        heard = self.reduce(asking.transpose(1, 2).reshape(x.shape)).flatten(2).transpose(1, 2)
        tokens = tokens + self.attention(asking, heard, heard, need_weights=False)[0]
        tokens = tokens + self.alone(self.second_norm(tokens))
        return tokens.transpose(1, 2).reshape(x.shape)


class TransformerEncoder(nn.Module):
    """(B, inputs, H, W) to features at H / 4, H / 8 and H / 16: patches of 4 x 4 pixels, then of 2 x 2 tokens."""

    def __init__(self, inputs: int, dims: tuple[int, ...] = DIMS, *, depth: int = 3, heads: int = 4):
        super().__init__()
        self.stages = nn.ModuleList()
        for i, o, patch, reduction in zip((inputs, *dims), dims, (4, 2, 2), (4, 2, 1), strict=False):
            layers = (TransformerLayer(o, heads=heads, reduction=reduction) for _ in range(depth))
            self.stages.append(nn.Sequential(nn.Conv2d(i, o, patch, patch), *layers))

    def forward(self, image: Tensor) -> list[Tensor]:
        x, levels = image, []
        for stage in self.stages:
            x = stage(x)
            levels.append(x)
        return levels


class ChannelAttention(nn.Module):
    """x times one weight in (0, 1) for each channel, which two linear layers find from the means of all channels."""

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        self.squeeze = nn.Linear(channels, max(1, channels // reduction), bias=False)
        self.excite = nn.Linear(max(1, channels // reduction), channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.excite(F.relu(self.squeeze(x.mean((2, 3))))).sigmoid()
        return x * weights[:, :, None, None]


def enlarged(x: Tensor, times: int) -> Tensor:
    """Bilinear, to a height and width that many times as large."""
    return F.interpolate(x, scale_factor=times, mode="bilinear", align_corners=False)


class ParaTransCnn(nn.Module):
    """(B, inputs, H, W) to logits (B, classes, H, W).

    convolutional, transformer  which of the encoders there are
    attention                   False: their features side by side, unweighted
    """

    def __init__(
        self,
        *,
        inputs: int,
        classes: int,
        channels: tuple[int, ...] = CHANNELS,
        convolutional: bool = True,
        transformer: bool = True,
        attention: bool = True,
    ):
        super().__init__()
        encoders = [ConvolutionalEncoder(inputs, channels[1:])] if convolutional else []
        encoders += [TransformerEncoder(inputs)] if transformer else []
        self.encoders = nn.ModuleList(encoders)
        merged = [c * convolutional + d * transformer for c, d in zip(channels[2:], DIMS, strict=True)]
        self.merge = nn.ModuleList(ChannelAttention(width) if attention else nn.Identity() for width in merged)
        narrow, wide = channels[1], channels[2]
        self.bottom, self.middle, self.fine = (
            DoubleConv(width, out, 2)
            for width, out in ((merged[2], wide), (merged[1] + wide, narrow), (merged[0] + narrow, narrow))
        )
        self.head = nn.Conv2d(narrow, classes, 1)

    def merged(self, image: Tensor) -> list[Tensor]:
        """Both encoders' features of each level, finest first, side by side and weighted."""
        levels = zip(*(encoder(image) for encoder in self.encoders), strict=True)
        return [merge(torch.cat(level, dim=1)) for merge, level in zip(self.merge, levels, strict=True)]

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[2:]
        fine, middle, bottom = self.merged(F.pad(image, (0, -width % 16, 0, -height % 16)))
        x = enlarged(self.bottom(bottom), 2)
        x = enlarged(self.middle(torch.cat([middle, x], dim=1)), 2)
        x = self.fine(torch.cat([fine, x], dim=1))
        return enlarged(self.head(x), 4)[:, :, :height, :width]


@dataclass
class ParallelEncoders(Architecture):
    """Two encoders, merged by channel attention.

    convolutional, transformer  False: the other encoder alone, with the same decoder
    attention                   False: merged without weights
    """

    convolutional: bool = True
    transformer: bool = True
    attention: bool = True

    def model(self, inputs: int, classes: int) -> nn.Module:
        return ParaTransCnn(
            inputs=inputs,
            classes=classes,
            channels=self.channels,
            convolutional=self.convolutional,
            transformer=self.transformer,
            attention=self.attention,
        )


recipe = Recipe(
    paper="paratranscnn",
    title="ParaTransCNN",
    claim="A transformer beside a convolutional encoder, merged by channel attention, beats a U-Net on hearts in Dice.",
    arms={
        "unet": Arm(BASELINE),
        "paratranscnn": Arm(ParallelEncoders()),
        "convolutions alone": Arm(ParallelEncoders(transformer=False)),
        "transformer alone": Arm(ParallelEncoders(convolutional=False)),
        "without channel attention": Arm(ParallelEncoders(attention=False)),
    },
    compare=("paratranscnn", "unet"),
    ablation=("paratranscnn", "convolutions alone"),
    replicate="fold",
    scales=scales("unet", "paratranscnn", "convolutions alone"),
    published={
        "Synapse, Dice": 0.8386,
        "Synapse, U-Net, Dice": 0.7685,
        "Kvasir-SEG, Dice": 0.8822,
        "Kvasir-SEG, U-Net, Dice": 0.8305,
    },
    source="the tables in the README of github.com/HongkunSun/ParaTransCNN",
    components=(
        Component(
            "parallel encoders",
            "implemented",
            "both read the image, and give features at a quarter, an eighth and a sixteenth of it",
        ),
        Component(
            "ResNet branch",
            "simplified",
            "one residual block for each level behind a 7 x 7 stem, trained from scratch; the paper's is a ResNet-34 "
            "trained on ImageNet, with three to six",
        ),
        Component(
            "pyramid transformer branch",
            "implemented",
            "three pre-norm layers for each level, without position embedding, as in the published code, but 16 to 64 "
            "wide (the paper's: 320 to 1280) and without dropout; to spare time, tokens of the first two levels hear a "
            "grid four times and twice coarser, as in the pyramid vision transformer (the published code: all of it)",
        ),
        Component(
            "merging by channel attention",
            "implemented",
            "squeeze and excitation of both encoders' channels together, reduced sixteen times",
        ),
        Component(
            "skip connections and bottleneck",
            "implemented",
            "merged features of all three levels; the decoder is narrower than the paper's and upsamples bilinearly "
            "as the book's U-Net does, the last time by four; the paper's transposed convolutions want longer training",
        ),
        Component("small organs", "absent", "Dice over the structures of the heart; no small organ among them"),
    ),
)
