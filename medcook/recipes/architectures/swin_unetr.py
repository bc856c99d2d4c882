"""Swin UNETR (Hatamizadeh, Nath, Tang, Yang, Roth and Xu, BrainLes at MICCAI 2021; arXiv 2201.01266).

The encoder is a Swin transformer (Liu et al., ICCV 2021): tokens attend to those of their window, which is cheap, and
every second layer shifts the windows by half a side, so that neighbours across a border meet. Its features at five
resolutions go through skip connections to a convolutional decoder, which makes masks of them. Here on slices.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.recipes.architectures._settings import BASELINE, Architecture, scales
from medcook.recipes.recipe import Arm, Component, Recipe


def windows(x: Tensor, side: int) -> Tensor:
    """(B, H, W, C) to (B, windows, side * side, C): non-overlapping squares, row by row; H and W multiples of side."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // side, side, width // side, side, channels)
    return x.transpose(2, 3).reshape(batch, -1, side * side, channels)


def joined(tokens: Tensor, side: int, height: int, width: int) -> Tensor:
    """What `windows` took apart: (B, height, width, C)."""
    batch, _, _, channels = tokens.shape
    x = tokens.reshape(batch, height // side, width // side, side, side, channels)
    return x.transpose(2, 3).reshape(batch, height, width, channels)


def strangers(height: int, width: int, side: int, shift: tuple[int, int], device=None) -> Tensor:
    """(windows, n, n): which of the n = side * side tokens of a window came from opposite edges of the image.

    An image rolled by `shift` has its first rows below its last ones; a window there holds both, and they are no
    neighbours. The same for columns.
    """
    below = torch.arange(height, device=device) >= height - shift[0]
    right = torch.arange(width, device=device) >= width - shift[1]
    part = windows((2 * below[:, None] + right[None, :])[None, :, :, None], side)[0, :, :, 0]
    return part[:, :, None] != part[:, None, :]


def relative_position(side: int) -> Tensor:
    """(n, n): a number for how far apart two tokens of a window are, down and right; (2 * side - 1)^2 in all."""
    row, column = torch.arange(side * side) // side, torch.arange(side * side) % side
    down = row[:, None] - row[None, :] + side - 1
    right = column[:, None] - column[None, :] + side - 1
    return down * (2 * side - 1) + right


class WindowAttention(nn.Module):
    """softmax(q k' / sqrt(d) + bias) v within every window; the bias depends on the relative position alone."""

    def __init__(self, channels: int, heads: int, side: int):
        super().__init__()
        self.heads, self.scale = heads, (channels // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.bias = nn.Parameter(nn.init.trunc_normal_(torch.empty((2 * side - 1) ** 2, heads), std=0.02))
        self.register_buffer("position", relative_position(side), persistent=False)

    def forward(self, tokens: Tensor, hidden: Tensor | None = None) -> Tensor:
        """tokens (B, windows, n, C) to the same; hidden (windows, n, n): whom a token must not see."""
        split = self.qkv(tokens).unflatten(-1, (3, self.heads, -1))
        queries, keys, values = split.permute(3, 0, 1, 4, 2, 5)  # each (B, windows, heads, n, d)
        bias = F.embedding(self.position, self.bias).permute(2, 0, 1)  # (heads, n, n)
        scores = (queries @ keys.transpose(-2, -1)).float() * self.scale + bias
        if hidden is not None:
            scores = scores.masked_fill(hidden[:, None], -torch.inf)
        told = scores.softmax(-1).to(values.dtype) @ values
        return self.proj(told.transpose(2, 3).flatten(3))


class SwinBlock(nn.Module):
    """Window attention, then a small network for each token, both residual: (B, H, W, C) to the same."""

    def __init__(self, channels: int, heads: int, side: int, shift: int):
        super().__init__()
        self.side, self.shift = side, shift
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attention = WindowAttention(channels, heads, side)
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))

    def attend(self, x: Tensor) -> Tensor:
        """Attention in windows that start `shift` pixels further down and right; no shift along what one window fills.

        Zeros fill the last windows.
        """
        _, height, width, _ = x.shape
        x = F.pad(x, (0, 0, 0, -width % self.side, 0, -height % self.side))
        whole = x.shape[1:3]
        down, right = (self.shift if size > self.side else 0 for size in (height, width))
        hidden = strangers(*whole, self.side, (down, right), x.device) if down or right else None
        x = x.roll((-down, -right), (1, 2))
        x = joined(self.attention(windows(x, self.side), hidden), self.side, *whole)
        return x.roll((down, right), (1, 2))[:, :height, :width]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Merge(nn.Module):
    """Four neighbours become one token of twice the width: (B, H, W, C) to (B, H/2, W/2, 2C)."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels)
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        four = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(four, dim=-1)))


class SwinEncoder(nn.Module):
    """(B, inputs, H, W), multiples of 32, to features (B, size * 2^i, H / 2^(i+1), W / 2^(i+1)), i = 0, ..., 4.

    A token is a patch of 2 x 2 pixels; each of four stages is a block without shift, one with, and a merge.
    """

    def __init__(self, inputs: int, size: int, *, side: int = 8, shift: bool = True):
        super().__init__()
        self.embed = nn.Conv2d(inputs, size, 2, stride=2)
        shifts = (0, side // 2 if shift else 0)
        self.stages = nn.ModuleList(
            nn.Sequential(*(SwinBlock(size * 2**i, 2**i, side, by) for by in shifts), Merge(size * 2**i))
            for i in range(4)
        )

    def forward(self, image: Tensor) -> list[Tensor]:
        x = [self.embed(image).permute(0, 2, 3, 1)]
        for stage in self.stages:
            x.append(stage(x[-1]))
        return [F.layer_norm(tokens, tokens.shape[-1:]).permute(0, 3, 1, 2) for tokens in x]


class SwinUNETR(nn.Module):
    """Swin encoder, residual convolutions on every skip, convolutional decoder: (B, inputs, H, W) to logits.

    Images are padded with zeros to multiples of 32.
    """

    def __init__(self, *, inputs: int, classes: int, size: int = 8, side: int = 8, shift: bool = True):
        super().__init__()
        from monai.networks.blocks import UnetrBasicBlock, UnetrUpBlock

        self.encoder = SwinEncoder(inputs, size, side=side, shift=shift)
        widths = [size, *(size * 2**i for i in range(5))]  # at 1, 1/2, ..., 1/32 of the resolution
        self.skip = nn.ModuleList(
            UnetrBasicBlock(2, i, o, 3, 1, "batch", res_block=True)
            for i, o in zip([inputs, *widths[1:]], widths, strict=True)
        )
        self.up = nn.ModuleList(
            UnetrUpBlock(2, deep, fine, 3, 2, "batch", res_block=True)
            for fine, deep in zip(widths, widths[1:], strict=False)
        )
        self.head = nn.Conv2d(size, classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[2:]
        image = F.pad(image, (0, -width % 32, 0, -height % 32))
        skips = [block(x) for block, x in zip(self.skip, [image, *self.encoder(image)], strict=True)]
        x = skips.pop()
        for up, skip in zip(reversed(self.up), reversed(skips), strict=True):
            x = up(x, skip)
        return self.head(x)[:, :, :height, :width]


@dataclass
class Swin(Architecture):
    """A shifted-window transformer that encodes, and convolutions that decode; `channels` has no meaning here.

    size   features of a token at half the resolution; twice as many at every further halving
    side   of a window, in tokens; `shift` False: all layers have the same windows
    """

    size: int = 8
    side: int = 8
    shift: bool = True

    def model(self, inputs: int, classes: int) -> nn.Module:
        return SwinUNETR(inputs=inputs, classes=classes, size=self.size, side=self.side, shift=self.shift)


recipe = Recipe(
    paper="swin-unetr",
    title="Swin UNETR: a shifted-window transformer as encoder",
    claim="With a Swin transformer as its encoder, a segmentation network has a higher Dice than a U-Net on hearts.",
    arms={
        "unet": Arm(BASELINE),
        "swin-unetr": Arm(Swin()),
        "without shift": Arm(Swin(shift=False)),
    },
    compare=("swin-unetr", "unet"),
    ablation=("swin-unetr", "without shift"),
    replicate="fold",
    scales=scales("unet", "swin-unetr", "without shift"),
    published={
        "BraTS 2021, Dice, fold 0": 0.8854,
        "BraTS 2021, Dice, fold 1": 0.9059,
        "BraTS 2021, Dice, fold 2": 0.8981,
        "BraTS 2021, Dice, fold 3": 0.8924,
        "BraTS 2021, Dice, fold 4": 0.9035,
    },
    source="the README of the official code (SwinUNETR/BRATS21 of github.com/Project-MONAI/research-contributions), "
    "feature size 48",
    components=(
        Component(
            "shifted windows",
            "implemented",
            "8 x 8 tokens (the paper's 7^3 in a volume), every second layer shifted by 4; a relative position bias; "
            "tokens from opposite edges are hidden from each other",
        ),
        Component(
            "hierarchical Swin encoder",
            "implemented",
            "patches of 2 x 2, then four stages of two blocks and a merge, on slices; small, with 8 features in place "
            "of 48, and 1, 2, 4 and 8 heads",
        ),
        Component(
            "skips at five resolutions to a CNN decoder",
            "implemented",
            "and one of the image itself; MONAI's residual blocks, with batch in place of instance normalisation, for "
            "a map of one pixel has no variance",
        ),
        Component("volumes of four modalities", "absent", "slices of one sequence, trained from scratch"),
        Component("ensemble of the challenge", "absent", "single models are compared"),
    ),
)
