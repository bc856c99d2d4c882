"""FocalNet (Yang, Li, Dai and Gao, NeurIPS 2022; arXiv 2203.11926), as BiomedParse and SEEM use it as a backbone.

There is no attention: every place gathers what is around it by depthwise convolutions, one after the other and each
wider than the last, and by the mean over the image; gates, which each place sets itself, say how much of each level is
taken; and the sum multiplies what the place asks with.

  y(i) = q(i) * h( sum over levels of gate(i, level) * context(i, level) / (1 + levels) )

Parts are named as in the published weights. Left out is stochastic depth, which only training would have.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Modulation(nn.Module):
    """(B, H, W, width) to the same; the focal windows are `window`, `window + 2` and so on."""

    def __init__(self, width: int, levels: int, window: int):
        super().__init__()
        self.f = nn.Linear(width, 2 * width + levels + 1)
        self.h, self.proj = nn.Conv2d(width, width, 1), nn.Linear(width, width)
        sizes = (window + 2 * level for level in range(levels))
        self.focal_layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, size, padding=size // 2, groups=width, bias=False), nn.GELU())
            for size in sizes
        )

    def forward(self, x: Tensor) -> Tensor:
        width, levels = x.shape[-1], len(self.focal_layers)
        query, context, gates = self.f(x).movedim(-1, 1).split([width, width, levels + 1], dim=1)
        found = torch.zeros_like(query)
        for level, layer in enumerate(self.focal_layers):
            context = layer(context)
            found = found + context * gates[:, [level]]
        found = found + F.gelu(context.mean((2, 3), keepdim=True)) * gates[:, [levels]]
        return self.proj((query * self.h(found / (levels + 1))).movedim(1, -1))


class Mlp(nn.Module):
    """Two layers of four times the width."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Modulation and perceptron; what each adds is normalised afterwards, and scaled for each channel."""

    def __init__(self, width: int, levels: int, window: int):
        super().__init__()
        self.modulation, self.mlp = Modulation(width, levels, window), Mlp(width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.gamma_1, self.gamma_2 = (nn.Parameter(torch.full((width,), 1e-4)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gamma_1 * self.norm1(self.modulation(x))
        return x + self.gamma_2 * self.norm2(self.mlp(x))


class Patches(nn.Module):
    """(B, inputs, H, W) to tokens (B, h, w, width): at the start a fourth of each side, between stages a half."""

    def __init__(self, inputs: int, width: int, first: bool = False):
        super().__init__()
        size, stride, padding = (7, 4, 2) if first else (3, 2, 1)
        self.proj, self.norm = nn.Conv2d(inputs, width, size, stride, padding), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).movedim(1, -1))


class Stage(nn.Module):
    """Some blocks, and the way down to the next stage unless it is the last."""

    def __init__(self, width: int, depth: int, levels: int, window: int, last: bool):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, levels, window) for _ in range(depth))
        if not last:
            self.downsample = Patches(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class FocalNet(nn.Module):
    """RGB images (B, 3, H, W), whose sides are multiples of 32, to the maps of four stages, the finest first.

    As published for BiomedParse, it is FocalNet-L with four focal levels: maps (B, 192 * 2**n, H / 2**(2 + n), ...).
    """

    def __init__(self, width: int = 192, depths: tuple[int, ...] = (2, 2, 18, 2), levels: int = 4, window: int = 3):
        super().__init__()
        self.patch_embed = Patches(3, width, first=True)
        self.widths = tuple(width * 2**number for number in range(len(depths)))
        sizes = list(zip(self.widths, depths, strict=True))
        self.layers = nn.ModuleList(
            Stage(each, depth, levels, window, last=each == self.widths[-1]) for each, depth in sizes
        )
        for number, each in enumerate(self.widths):
            self.add_module(f"norm{number}", nn.LayerNorm(each))

    def forward(self, images: Tensor) -> list[Tensor]:
        x, found = self.patch_embed(images), []
        for number, stage in enumerate(self.layers):
            x = stage(x)
            found.append(getattr(self, f"norm{number}")(x).movedim(-1, 1))
            if number < len(self.layers) - 1:
                x = stage.downsample(x.movedim(-1, 1))
        return found
