"""A small network for diffusion: a U-Net that is told the time, and what else there is to tell."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def time_features(t: Tensor, size: int) -> Tensor:
    """(B, size) float32: sines and cosines of times (B,) at `size` / 2 wave lengths (Ho et al., as in Transformers)."""
    waves = torch.exp(-math.log(10_000) * torch.arange(size // 2, device=t.device) / (size // 2))
    angles = t.float()[:, None] * waves
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Block(nn.Module):
    """Two convolutions around which the input passes; time and condition scale and shift what is between them."""

    def __init__(self, inputs: int, outputs: int, told: int, dims: int = 2):
        super().__init__()
        conv = nn.Conv2d if dims == 2 else nn.Conv3d
        self.first = nn.Sequential(nn.GroupNorm(8, inputs), nn.SiLU(), conv(inputs, outputs, 3, padding=1))
        self.norm = nn.GroupNorm(8, outputs, affine=False)
        self.scale = nn.Linear(told, 2 * outputs)
        self.second = nn.Sequential(nn.SiLU(), conv(outputs, outputs, 3, padding=1))
        self.past = conv(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        nn.init.zeros_(self.second[-1].weight), nn.init.zeros_(self.second[-1].bias)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        """x (B, inputs, *size), told (B, told)."""
        scale, shift = self.scale(told).view(len(x), -1, *[1] * (x.ndim - 2)).chunk(2, dim=1)
        return self.past(x) + self.second(self.norm(self.first(x)) * (1 + scale) + shift)


class Attend(nn.Module):
    """Positions of a map (B, width, *size) look at tokens (B, L, tokens), and add what they find."""

    def __init__(self, width: int, tokens: int, heads: int = 4):
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.attention = nn.MultiheadAttention(width, heads, kdim=tokens, vdim=tokens, batch_first=True)
        nn.init.zeros_(self.attention.out_proj.weight)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        queries = self.norm(x).flatten(2).transpose(1, 2)
        found = self.attention(queries, tokens.to(queries), tokens.to(queries), need_weights=False)[0]
        return x + found.transpose(1, 2).reshape(x.shape)


class Denoiser(nn.Module):
    """A small U-Net that is told the time, and if wanted a vector, maps or tokens.

    The image is first folded, `fold` x `fold` pixels into one position: at this size most of the work is saved so.
    Sides of the image are multiples of fold * 2 ** (len(channels) - 1); channels are multiples of 8.

    inputs, outputs  channels of what comes in (image and maps, concatenated) and of what is given
    told             size of the vector that is told beside the time; 0: none
    tokens           size of the tokens that the deepest map attends to; 0: none
    """

    def __init__(
        self,
        inputs: int = 1,
        outputs: int = 1,
        channels: tuple[int, ...] = (32, 64, 64),
        told: int = 0,
        tokens: int = 0,
        fold: int = 2,
        dims: int = 2,
    ):
        super().__init__()
        conv, width = (nn.Conv2d if dims == 2 else nn.Conv3d), 2 * channels[0]
        self.fold, self.dims, self.features = fold, dims, width
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.told = nn.Linear(told, width) if told else None
        self.enter = conv(inputs * fold**dims, channels[0], 3, padding=1)
        above, below = (channels[0], *channels[:-1]), (*channels[1:], channels[-1])
        self.down = nn.ModuleList(Block(i, o, width, dims) for i, o in zip(above, channels, strict=True))
        self.attend = Attend(channels[-1], tokens) if tokens else None
        self.middle = Block(channels[-1], channels[-1], width, dims)
        self.up = nn.ModuleList(Block(i + o, o, width, dims) for i, o in zip(below, channels, strict=True))
        self.leave = nn.Sequential(nn.GroupNorm(8, channels[0]), nn.SiLU(), conv(channels[0], outputs * fold**dims, 1))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        *,
        maps: Tensor | None = None,
        told: Tensor | None = None,
        tokens: Tensor | None = None,
    ) -> Tensor:
        """(B, C, *size) and times (B,) to (B, outputs, *size); `maps` (B, M, *size) are concatenated with x."""
        known = self.time(time_features(t, self.features))
        if self.told is not None:
            known = known + self.told(told)
        known = F.silu(known)
        x = x if maps is None else torch.cat([x, maps.to(x)], dim=1)
        x, skips = self.enter(folded(x, self.fold)), []
        for number, block in enumerate(self.down):
            x = block(halved(x) if number else x, known)
            skips.append(x)
        x = self.middle(x if self.attend is None else self.attend(x, tokens), known)
        for number, block in reversed(list(enumerate(self.up))):
            x = block(torch.cat([x, skips[number]], dim=1), known)
            if number:
                x = F.interpolate(x, scale_factor=2, mode="nearest")
        return unfolded(self.leave(x), self.fold)


def halved(x: Tensor) -> Tensor:
    """Means of 2 x 2 (x 2) neighbours."""
    return (F.avg_pool2d if x.ndim == 4 else F.avg_pool3d)(x, 2)


def folded(x: Tensor, fold: int) -> Tensor:
    """(B, C, *size) to (B, C * fold ** dims, *size / fold): blocks of pixels become channels."""
    dims = x.ndim - 2
    sides = [part for side in x.shape[2:] for part in (side // fold, fold)]
    order = (0, 1, *range(3, 3 + 2 * dims, 2), *range(2, 2 + 2 * dims, 2))
    return x.reshape(*x.shape[:2], *sides).permute(order).flatten(1, 1 + dims)


def unfolded(x: Tensor, fold: int) -> Tensor:
    """The inverse of `folded`."""
    dims = x.ndim - 2
    x = x.reshape(len(x), -1, *[fold] * dims, *x.shape[2:])
    order = (0, 1, *(place for axis in range(dims) for place in (2 + dims + axis, 2 + axis)))
    return x.permute(order).reshape(*x.shape[:2], *(side * fold for side in x.shape[2 + dims :]))


def guided(net: nn.Module, x: Tensor, t: Tensor, tokens: Tensor, guidance: float) -> Tensor:
    """What a net says of x (B, ...) with tokens (2 B, ...), first of no text and then of the text.

    Guidance without a classifier (Ho and Salimans, 2021): 1 follows the text; above 1 what it changes is exaggerated. A
    net may give the image or the noise: guided images are those of guided noise, as each is linear in the other.
    """
    without, told = net(torch.cat([x, x]), torch.cat([t, t]), tokens=tokens).float().chunk(2)
    return without + guidance * (told - without)
