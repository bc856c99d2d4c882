"""Window attention upsampling (Li, Cai, Gao, Li and Hu, BIBM 2022; arXiv 2106.10637).

A decoder that upsamples bilinearly asks nobody what the finer grid looks like. Here each pixel of the skip connection
asks: it is a query, the deeper pixels of the same window are keys and values, and what it is told is added to the
bilinear upsampling, which stays as the residual. Windows keep the cost linear in the number of pixels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.networks import UNet
from medcook.networks.unet import DoubleConv
from medcook.recipes.architectures._settings import BASELINE, CHANNELS, Architecture, scales
from medcook.recipes.recipe import Arm, Component, Recipe


def windows(x: Tensor, side: int) -> Tensor:
    """(B, C, H, W) to (B * windows, side * side, C): non-overlapping squares, row by row; H and W multiples of side."""
    batch, channels, height, width = x.shape
    x = x.reshape(batch, channels, height // side, side, width // side, side)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(-1, side * side, channels)


def joined(tokens: Tensor, side: int, height: int, width: int) -> Tensor:
    """What `windows` took apart: (B, C, height, width)."""
    x = tokens.reshape(-1, height // side, width // side, side, side, tokens.shape[-1])
    return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, tokens.shape[-1], height, width)


def padded(x: Tensor, height: int, width: int) -> Tensor:
    """Zeros below and on the right, up to that size."""
    return F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2]))


class WindowAttentionUpsample(nn.Module):
    """Deep features (B, deep, H, W) on the grid of the skip (B, skip, 2H, 2W), as (B, skip, 2H, 2W).

    heads      of the attention (None: one for every eight channels of the skip)
    window     side of a window in deep pixels; it has twice as many of the skip
    attention  False: the bilinear residual alone; `residual` False: the attention alone
    """

    def __init__(
        self,
        deep: int,
        skip: int,
        *,
        heads: int | None = None,
        window: int = 4,
        attention: bool = True,
        residual: bool = True,
    ):
        super().__init__()
        self.heads, self.window, self.residual = heads or max(1, skip // 8), window, residual
        self.project = nn.Conv2d(deep, skip, 1)
        if attention:
            self.query_norm, self.deep_norm = nn.LayerNorm(skip), nn.LayerNorm(deep)
            self.query, self.key_value = nn.Linear(skip, skip), nn.Linear(deep, 2 * skip)
            self.bias = nn.Parameter(torch.zeros(self.heads, 4 * window * window, window * window))
            self.out = nn.Linear(skip, skip)
        self.attention = attention

    def attend(self, deep: Tensor, skip: Tensor) -> Tensor:
        """softmax(q k' / sqrt(d) + bias) v in every window: queries of the skip, keys and values of the deep."""
        (height, width), side = skip.shape[2:], 2 * self.window
        whole = [-(-size // side) * side for size in (height, width)]
        skip, deep = padded(skip, *whole), padded(deep, *(size // 2 for size in whole))
        queries = self.query(self.query_norm(windows(skip, side)))
        keys, values = self.key_value(self.deep_norm(windows(deep, self.window))).chunk(2, dim=-1)
        split = lambda tokens: tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # noqa: E731
        told = F.scaled_dot_product_attention(
            split(queries), split(keys), split(values), attn_mask=self.bias.to(queries.dtype)
        )
        told = joined(self.out(told.transpose(1, 2).flatten(2)), side, *whole)
        return told[:, :, :height, :width]

    def forward(self, deep: Tensor, skip: Tensor) -> Tensor:
        if not self.residual:
            return self.attend(deep, skip)
        smooth = F.interpolate(self.project(deep), size=skip.shape[2:], mode="bilinear", align_corners=False)
        return smooth + self.attend(deep, skip) if self.attention else smooth


class WauUNet(UNet):
    """The book's U-Net with another way up: (B, inputs, H, W) to logits (B, classes, H, W)."""

    def __init__(self, *, inputs: int, classes: int, channels: tuple[int, ...] = CHANNELS, **upsampling):
        super().__init__(inputs=inputs, classes=classes, channels=channels)
        pairs = list(zip(channels, channels[1:], strict=False))
        self.upsample = nn.ModuleList(WindowAttentionUpsample(deep, skip, **upsampling) for skip, deep in pairs)
        self.up = nn.ModuleList(DoubleConv(2 * skip, skip, 2) for skip, _ in pairs)

    def features(self, image: Tensor) -> Tensor:
        skips = [self.down[0](image)]
        for block in self.down[1:]:
            skips.append(block(self.pool(skips[-1], 2)))
        x = skips.pop()
        for upsample, block in zip(reversed(self.upsample), reversed(self.up), strict=True):
            skip = skips.pop()
            x = block(torch.cat([skip, upsample(x, skip)], dim=1))
        return x


@dataclass
class Wau(Architecture):
    """A U-Net that upsamples by window attention.

    attention  False: bilinear upsampling alone, all else equal; `residual` False: attention alone
    """

    attention: bool = True
    residual: bool = True

    def model(self, inputs: int, classes: int) -> nn.Module:
        return WauUNet(
            inputs=inputs,
            classes=classes,
            channels=self.channels,
            attention=self.attention,
            residual=self.residual,
        )


recipe = Recipe(
    paper="wau",
    title="Window attention upsampling",
    claim="Upsampling by window attention, with the bilinear one as residual, raises a U-Net's Dice on hearts.",
    arms={
        "unet": Arm(BASELINE),
        "wau": Arm(Wau()),
        "bilinear alone": Arm(Wau(attention=False)),
        "without residual": Arm(Wau(residual=False)),
    },
    compare=("wau", "unet"),
    ablation=("wau", "bilinear alone"),
    replicate="fold",
    scales=scales("unet", "wau", "bilinear alone"),
    published={"Synapse, Dice": 0.8030, "MSD brain, Dice": 0.7475},
    source="the abstract of the preprint's first version",
    components=(
        Component(
            "attention decoder",
            "implemented",
            "queries from the skip, keys and values from the deeper features, heads of eight channels, a learnt bias "
            "for every pair of positions in a window; one attention at each level, without the feed-forward layer of "
            "a transformer",
        ),
        Component("bilinear residual", "implemented", "deep features through a 1 x 1 convolution, upsampled and added"),
        Component(
            "window attention",
            "implemented",
            "windows of 4 x 4 deep and 8 x 8 skip pixels, not shifted; zeros fill the last windows (our choice)",
        ),
        Component("other architectures", "absent", "tested in the U-Net alone, on hearts alone"),
    ),
)
