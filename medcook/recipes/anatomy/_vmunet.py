"""VM-UNet (Ruan, Li and Xiang, preprint 2024, arXiv 2402.02491): a U-Net whose blocks are VMamba's four-way scans.

Tokens of `patch` x `patch` pixels; on the way down squares of 2 x 2 become one of twice the width or so, on the way up
one becomes four. What a level saw on the way down is added on the way up.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from medcook.recipes.architectures._scan import SelectiveStateSpace
from medcook.recipes.architectures.mamba_survey import ORDERS, inverse


class GatedScan(nn.Module):
    """A map (B, H, W, width) to the same: a scan in four directions behind a gate, as in VMamba's first version.

    x, z = Linear(map);  Linear(norm(sum over directions of SSM(silu(DWConv x))) * silu(z))
    grown  how many times wider it is inside
    """

    def __init__(self, width: int, states: int, grown: int = 2):
        super().__init__()
        inner = grown * width
        self.enter, self.leave = nn.Linear(width, 2 * inner, bias=False), nn.Linear(inner, width, bias=False)
        self.near = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.scans = nn.ModuleList(SelectiveStateSpace(inner, states) for _ in ORDERS["cross"])
        self.norm = nn.LayerNorm(inner)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[1:3]
        x, gate = self.enter(x).chunk(2, dim=-1)
        tokens = F.silu(self.near(x.movedim(-1, 1))).movedim(1, -1).flatten(1, 2)
        heard = 0
        for order, scan in zip(ORDERS["cross"], self.scans, strict=True):
            way = order(*size).to(x.device)
            heard = heard + scan(tokens[:, way])[:, inverse(way)]
        return self.leave(self.norm(heard).unflatten(1, size) * F.silu(gate))


class Block(nn.Module):
    """The visual state-space block: x + GatedScan(norm x)."""

    def __init__(self, width: int, states: int):
        super().__init__()
        self.norm, self.scan = nn.LayerNorm(width), GatedScan(width, states)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scan(self.norm(x))


class Merge(nn.Module):
    """Squares of 2 x 2 tokens become one: (B, H, W, inputs) to (B, H // 2, W // 2, outputs)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm, self.join = nn.LayerNorm(4 * inputs), nn.Linear(4 * inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        even = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2].movedim(-1, 1)
        return self.join(self.norm(F.pixel_unshuffle(even, 2).movedim(1, -1)))


class Expand(nn.Module):
    """A token becomes a square of them: (B, H, W, inputs) to (B, times * H, times * W, outputs)."""

    def __init__(self, inputs: int, outputs: int, times: int = 2):
        super().__init__()
        self.grow, self.times = nn.Linear(inputs, times**2 * outputs, bias=False), times
        self.norm = nn.LayerNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.pixel_shuffle(self.grow(x).movedim(-1, 1), self.times).movedim(1, -1))


class VMUNet(nn.Module):
    """(B, inputs, H, W) to logits (B, classes, H, W).

    widths  of the levels, finest first;   states  of each channel of a scan
    told    channels of a map of other features, of any size: its largest values in each of the deepest tokens, by a
            1 x 1 convolution, are added to these; 0: there is none

    Sides that are no multiple of patch * 2 ** (levels - 1) are rounded down on the way, and up again by repetition.
    """

    def __init__(self, *, inputs: int, classes: int, widths: tuple[int, ...], patch: int, states: int, told: int = 0):
        super().__init__()
        pairs = list(zip(widths, widths[1:], strict=False))
        self.embed, self.norm = nn.Conv2d(inputs, widths[0], patch, stride=patch), nn.LayerNorm(widths[0])
        self.down = nn.ModuleList(Block(width, states) for width in widths)
        self.merge = nn.ModuleList(Merge(fine, deep) for fine, deep in pairs)
        self.told = nn.Conv2d(told, widths[-1], 1) if told else None
        self.up = nn.ModuleList(Block(width, states) for width in widths)
        self.expand = nn.ModuleList(Expand(deep, fine) for fine, deep in pairs)
        self.last, self.head = Expand(widths[0], widths[0], patch), nn.Conv2d(widths[0], classes, 1)

    def forward(self, image: Tensor, told: Tensor | None = None) -> Tensor:
        x, skips = self.norm(self.embed(image).movedim(1, -1)), []
        for level, block in enumerate(self.down):
            skips.append(x)
            x = block(x)
            if level < len(self.merge):
                x = self.merge[level](x)
        if self.told is not None:
            x = x + added(self.told, told, x.shape[1:3]).movedim(1, -1)
        x = self.up[-1](x)
        for block, expand, skip in zip(
            reversed(self.up[:-1]), reversed(self.expand), reversed(skips[:-1]), strict=True
        ):
            x = block(fitting(expand(x), skip.shape[1:3]) + skip)
        return self.head(fitting(self.last(x), image.shape[2:]).movedim(-1, 1))


def added(convolution: nn.Conv2d, told: Tensor, size) -> Tensor:
    """What a map of other features (B, C, h, w) adds to a map of this size (B, width, *size)."""
    return convolution(F.adaptive_max_pool2d(told, tuple(size)))


def fitting(x: Tensor, size) -> Tensor:
    """A map (B, H, W, C) with its last rows and columns repeated up to a size."""
    rows, columns = size[0] - x.shape[1], size[1] - x.shape[2]
    return F.pad(x.movedim(-1, 1), (0, columns, 0, rows), mode="replicate").movedim(1, -1) if rows or columns else x
