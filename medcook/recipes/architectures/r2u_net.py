"""Recurrent residual U-Net, R2U-Net (Alom, Hasan, Yakopcic, Taha and Asari, 2018; arXiv 1802.06955).

A convolution looks once. A recurrent one looks at its input again, each time together with what it saw before:
O(s) = f(Wf x + Wr O(s-1)), so that it sees further with the same weights. Two of these, with their input added to what
they find (the residual), take the place of each pair of convolutions of a U-Net.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from medcook.networks import UNet
from medcook.recipes.architectures._settings import BASELINE, Architecture, scales
from medcook.recipes.recipe import Arm, Component, Recipe

CHANNELS = (6, 12, 24, 48, 48)
"""Three quarters of the baseline's widths: a recurrent convolution has two kernels, and as a whole there are as many
parameters as in the baseline."""


def kernel(channels: int) -> nn.Conv2d:
    """A 3 x 3 convolution that keeps width and size."""
    return nn.Conv2d(channels, channels, 3, padding=1, bias=False)


class RecurrentConv(nn.Module):
    """O(0) = f(Wf x), then t times O(s) = f(Wf x + Wr O(s-1)); f normalises and rectifies. (B, C, H, W) to O(t).

    t  0: no recurrence. Both kernels are there, and are used once, one after the other: f(Wr f(Wf x))
    """

    def __init__(self, channels: int, t: int = 2):
        super().__init__()
        self.t = t
        self.feed, self.recur = kernel(channels), kernel(channels)
        self.norm = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(max(t, 1) + 1))

    def forward(self, x: Tensor) -> Tensor:
        fed = self.feed(x)
        state = F.relu(self.norm[0](fed))
        if self.t == 0:
            return F.relu(self.norm[1](self.recur(state)))
        for norm in self.norm[1:]:
            state = F.relu(norm(fed + self.recur(state)))
        return state


class RecurrentResidualBlock(nn.Module):
    """(B, inputs, H, W) to (B, outputs, H, W): to the right width, then two recurrent convolutions around the residual.

    residual  False: what they find, without their input (the paper's RU-Net)
    """

    def __init__(self, inputs: int, outputs: int, *, t: int = 2, residual: bool = True):
        super().__init__()
        self.residual = residual
        self.project = nn.Conv2d(inputs, outputs, 1)
        self.recurrent = nn.Sequential(RecurrentConv(outputs, t), RecurrentConv(outputs, t))

    def forward(self, x: Tensor) -> Tensor:
        x = self.project(x)
        found = self.recurrent(x)
        return x + found if self.residual else found


class R2UNet(UNet):
    """The book's U-Net with other blocks: (B, inputs, H, W) to logits (B, classes, H, W)."""

    def __init__(
        self,
        *,
        inputs: int,
        classes: int,
        channels: tuple[int, ...] = CHANNELS,
        t: int = 2,
        residual: bool = True,
    ):
        super().__init__(inputs=inputs, classes=classes, channels=channels)
        down = zip((inputs, *channels), channels, strict=False)
        up = [(deep + skip, skip) for skip, deep in zip(channels, channels[1:], strict=False)]
        self.down = nn.ModuleList(RecurrentResidualBlock(i, o, t=t, residual=residual) for i, o in down)
        self.up = nn.ModuleList(RecurrentResidualBlock(i, o, t=t, residual=residual) for i, o in up)


@dataclass
class R2U(Architecture):
    """A U-Net of recurrent residual blocks.

    t         steps of the recurrence; 0 for none, with the same kernels in a row: a residual U-Net
    residual  False: no residual
    """

    channels: tuple[int, ...] = CHANNELS
    t: int = 2
    residual: bool = True

    def model(self, inputs: int, classes: int) -> nn.Module:
        return R2UNet(inputs=inputs, classes=classes, channels=self.channels, t=self.t, residual=self.residual)


recipe = Recipe(
    paper="r2u-net",
    title="R2U-Net: recurrent residual convolutions",
    claim="With as many parameters as a U-Net, recurrent residual convolutions reach a higher Dice on hearts.",
    arms={
        "unet": Arm(BASELINE),
        "r2u-net": Arm(R2U()),
        "without recurrence": Arm(R2U(t=0)),
        "without residual": Arm(R2U(residual=False)),
    },
    compare=("r2u-net", "unet"),
    ablation=("r2u-net", "without recurrence"),
    replicate="fold",
    scales=scales("unet", "r2u-net", "without recurrence"),
    components=(
        Component(
            "recurrent convolution",
            "implemented",
            "a kernel for the input and one for the state, both shared by all steps, t = 2; every step has a batch "
            "normalisation of its own, for the statistics differ (our choice)",
        ),
        Component("residual unit", "implemented", "a 1 x 1 convolution to the width, then the identity around both"),
        Component(
            "same number of parameters",
            "implemented",
            "widths are three quarters of the baseline's; without recurrence there are the same kernels in a row, "
            "which is the paper's residual U-Net",
        ),
        Component("RU-Net", "implemented", "the arm without residual; not run at full"),
        Component("other organs", "absent", "retina, skin and lungs; hearts alone, and upsampling is the book's"),
    ),
)
