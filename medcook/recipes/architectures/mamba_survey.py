"""Mamba for medical images, a survey (Bansal et al., preprint 2024, arXiv 2410.02362): scans in place of attention.

A state-space layer hears a whole map as attention does, but its cost grows with the number N of tokens, not with N^2;
the survey orders such layers by what they select and by the order in which they scan. Its protocol as code: one U-Net,
whose three deepest levels mix their tokens by attention or by a scan,
    S4: delta, B, C fixed for each channel; S5: one state for all channels; S6 (Mamba): delta, B, C chosen by the token.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.networks import UNet
from medcook.recipes.architectures._scan import Recurrence, SelectiveStateSpace
from medcook.recipes.architectures._settings import BASELINE, CHANNELS, Architecture, scales
from medcook.recipes.recipe import Arm, Component, Recipe

STATES = 8


def rows(height: int, width: int) -> Tensor:
    """Pixel numbers (H * W,) in the order of the scan: row by row from the top left."""
    return torch.arange(height * width)


def columns(height: int, width: int) -> Tensor:
    """Column by column from the top left."""
    return rows(height, width).reshape(height, width).T.flatten()


def snake(height: int, width: int) -> Tensor:
    """Row by row, every other row backwards: each pixel is next to the one before it."""
    lines = rows(height, width).reshape(height, width).clone()
    lines[1::2] = lines[1::2].flip(1)
    return lines.flatten()


def backwards(order: Callable[[int, int], Tensor]) -> Callable[[int, int], Tensor]:
    """The same way from its end."""
    return lambda height, width: order(height, width).flip(0)


ORDERS = {
    "rows": (rows,),
    "columns": (columns,),
    "snake": (snake,),
    "both ways": (rows, backwards(rows)),
    "cross": (rows, backwards(rows), columns, backwards(columns)),
}
"""Scan orders by name; of several, each takes its share of the channels."""


def inverse(order: Tensor) -> Tensor:
    """Where each pixel went: x[order][inverse(order)] is x."""
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    return back


def time_invariant_scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """A scan (batch, L, E) whose delta (E,), B and C (E, N) are the same for all tokens: one long convolution, by FFT.

    Its kernel is K_l = sum_n C_n exp(l delta A_n) delta B_n, for l = 0 ... L - 1.
    """
    length = x.shape[1]
    steps = torch.arange(length, device=x.device)
    fading = torch.exp(steps[:, None, None] * delta[:, None] * A)
    kernel = (fading * (C * B)).sum(-1) * delta
    spectra = torch.fft.rfft(x.float(), 2 * length, dim=1) * torch.fft.rfft(kernel, 2 * length, dim=0)
    return torch.fft.irfft(spectra, 2 * length, dim=1)[:, :length] + D * x.float()


def first_steps(width: int) -> Tensor:
    """Steps between 0.001 and 0.1, as what softplus makes steps of."""
    return torch.logspace(-3, -1, width).expm1().log()


class S4(nn.Module):
    """Tokens (B, L, width) to the same: a time-invariant state space for every channel."""

    def __init__(self, width: int, states: int = STATES):
        super().__init__()
        self.step = nn.Parameter(first_steps(width))
        self.log_rate = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(width, 1))
        self.written, self.heard = nn.Parameter(torch.ones(width, states)), nn.Parameter(torch.randn(width, states))
        self.past = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        delta, rate = F.softplus(self.step), -self.log_rate.exp()
        return time_invariant_scan(x, delta, rate, self.written, self.heard, self.past).to(x.dtype)


class S5(nn.Module):
    """Tokens (B, L, width) to the same: one time-invariant state that all channels write to and read from."""

    def __init__(self, width: int, states: int = STATES):
        super().__init__()
        self.step = nn.Parameter(first_steps(states))
        self.log_rate = nn.Parameter(torch.arange(1.0, states + 1).log())
        self.written, self.heard = nn.Linear(width, states, bias=False), nn.Linear(states, width, bias=False)
        self.past = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        delta = F.softplus(self.step)
        added = delta * self.written(x).float()
        states = Recurrence.apply(torch.exp(-delta * self.log_rate.exp()).expand_as(added), added)
        return self.heard(states.to(x.dtype)) + self.past * x


class ScanMixer(nn.Module):
    """Tokens (B, H * W, width) of a map of `size` to the same: a gated scan, every order over its share of channels."""

    def __init__(self, width: int, kind: type[nn.Module] = SelectiveStateSpace, order: str = "cross"):
        super().__init__()
        self.orders = ORDERS[order]
        self.enter, self.leave = nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.scans = nn.ModuleList(kind(width // len(self.orders), STATES) for _ in self.orders)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x, gate = self.enter(x).chunk(2, dim=-1)
        scanned = []
        for order, scan, part in zip(self.orders, self.scans, x.chunk(len(self.orders), dim=-1), strict=True):
            way = order(*size).to(x.device)
            scanned.append(scan(F.silu(part[:, way]))[:, inverse(way)])
        return self.leave(torch.cat(scanned, dim=-1) * F.silu(gate))


class AttentionMixer(nn.Module):
    """Tokens (B, N, width) to the same: self-attention (Vaswani et al., NeurIPS 2017), a head for 16 channels."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = max(1, width // 16)
        self.enter, self.leave = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        split = lambda x: x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # noqa: E731
        told = F.scaled_dot_product_attention(*(split(part) for part in self.enter(x).chunk(3, dim=-1)))
        return self.leave(told.transpose(1, 2).flatten(2))


MIXERS = {
    "self-attention": lambda width, order: AttentionMixer(width),
    "s4": lambda width, order: ScanMixer(width, S4, order),
    "s5": lambda width, order: ScanMixer(width, S5, order),
    "s6": lambda width, order: ScanMixer(width, SelectiveStateSpace, order),
}


def multiply_adds(mixer: str, tokens: int, width: int) -> int:
    """Of one map of N tokens: 4 N W^2 + 2 N^2 W for attention; for S6, in one order, every term has one N."""
    if mixer == "self-attention":
        return 4 * tokens * width**2 + 2 * tokens**2 * width
    rank = max(1, width // 16)
    projections = 3 * width**2 + width * (rank + 2 * STATES) + rank * width
    return tokens * (projections + width * STATES)


class Mixing(nn.Module):
    """A map (B, width, H, W) to the same: x + mixer(norm(x)) over its pixels; `mixer` of MIXERS, `order` of ORDERS."""

    def __init__(self, width: int, mixer: str, order: str):
        super().__init__()
        self.norm, self.mixer = nn.LayerNorm(width), MIXERS[mixer](width, order)

    def forward(self, x: Tensor) -> Tensor:
        added = self.mixer(self.norm(x.flatten(2).transpose(1, 2)), x.shape[2:])
        return x + added.transpose(1, 2).unflatten(2, x.shape[2:])


class MixedUNet(UNet):
    """The book's U-Net, whose `levels` deepest levels mix their pixels: (B, inputs, H, W) to (B, classes, H, W)."""

    def __init__(
        self,
        *,
        inputs: int,
        classes: int,
        channels: tuple[int, ...] = CHANNELS,
        mixer: str = "s6",
        order: str = "cross",
        levels: int = 3,
    ):
        super().__init__(inputs=inputs, classes=classes, channels=channels)
        for level in range(len(channels) - levels, len(channels)):
            self.down[level] = nn.Sequential(self.down[level], Mixing(channels[level], mixer, order))


@dataclass
class Mixed(Architecture):
    """A U-Net whose three deepest levels mix their tokens by a mixer of MIXERS, in an order of ORDERS."""

    mixer: str = "s6"
    order: str = "cross"

    def model(self, inputs: int, classes: int) -> nn.Module:
        return MixedUNet(inputs=inputs, classes=classes, channels=self.channels, mixer=self.mixer, order=self.order)


recipe = Recipe(
    paper="mamba-survey",
    title="Mamba for medical images: scans in place of attention",
    claim="A U-Net with selective scans, whose cost is linear in the number of tokens, segments hearts as well as one "
    "with self-attention in their place, within 0.01 Dice.",
    arms={
        "unet": Arm(BASELINE),
        "self-attention": Arm(Mixed(mixer="self-attention")),
        "selective scan": Arm(Mixed()),
        "time-invariant scan": Arm(Mixed(mixer="s4")),
        "one state": Arm(Mixed(mixer="s5")),
        "rows": Arm(Mixed(order="rows")),
        "columns": Arm(Mixed(order="columns")),
        "snake": Arm(Mixed(order="snake")),
        "both ways": Arm(Mixed(order="both ways")),
    },
    compare=("selective scan", "self-attention"),
    ablation=("selective scan", "time-invariant scan"),
    replicate="fold",
    expect="non-inferior",
    margin=0.01,
    scales=scales("unet", "self-attention", "selective scan", "time-invariant scan"),
    components=(
        Component(
            "linear cost",
            "implemented",
            "multiply-adds in closed form and counted by torch; the memory that fused kernels save is not measured",
        ),
        Component(
            "scan orders",
            "implemented",
            "rows, columns, snake, both ways and cross-scan; of several orders each scans its share of the channels, "
            "so that all cost the same, where most networks of the survey scan all channels in every order",
        ),
        Component(
            "S4, S5 and S6",
            "simplified",
            "real diagonal A in all three, without the complex one and its start from HiPPO; S4 as a long convolution",
        ),
        Component(
            "U-Net hybrids",
            "simplified",
            "one hybrid: mixers after the convolutions of the three deepest levels of the encoder, without Mamba's own "
            "short convolution",
        ),
        Component("pure Mamba and graph networks", "absent", "hybrids with convolutions and with attention alone"),
        Component("several modalities", "absent", "heart MR alone"),
        Component("classification, restoration and registration", "absent", "segmentation alone"),
    ),
)
