"""xLSTM-UNet (Chen et al., IEEE BHI 2024, arXiv 2407.01530): Vision-LSTM blocks in a U-Net.

Convolutions see what is near. A matrix LSTM (xLSTM, Beck et al., NeurIPS 2024) keeps a matrix C of all it has seen:
    C_t = f_t C_(t-1) + i_t v_t k_t',   n_t = f_t n_(t-1) + i_t k_t,   h_t = C_t q_t / max(|n_t q_t|, 1),
i = exp, f = sigmoid of what the token says. Blocks of it, one from the first pixel to the last and the next one back,
follow the convolutions of the deep levels (Vision-LSTM, Alkin et al., ICLR 2025).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.networks import UNet
from medcook.recipes.architectures._settings import BASELINE, CHANNELS, Architecture, scales
from medcook.recipes.recipe import Arm, Component, Recipe


def mlstm(queries: Tensor, keys: Tensor, values: Tensor, log_input: Tensor, log_forget: Tensor) -> Tensor:
    """h (B, heads, L, d) of all tokens at once, in float32: attention whose weights are gates, not a softmax.

    Token t weights token s <= t by D_ts = exp(log i_s + sum of log f from s + 1 to t), times q_t k_s / sqrt(d). The
    largest exponent of each row is taken out of it, and put back where the row is normalised.

    queries, keys, values (B, heads, L, d); log_input, log_forget (B, heads, L), the latter at most 0
    """
    with torch.autocast(queries.device.type, enabled=False):
        faded = log_forget.float().cumsum(-1)
        entered = log_input.float() - faded
        largest = entered.detach().cummax(-1).values
        exponents = entered[..., None, :] - largest[..., :, None]
        later = torch.ones(exponents.shape[-2:], dtype=torch.bool, device=exponents.device).triu(1)
        similar = queries.float() / queries.shape[-1] ** 0.5 @ keys.float().transpose(-2, -1)
        weights = similar * exponents.masked_fill(later, -torch.inf).exp()
        least = (-faded - largest).clamp_max(60).exp()
        norm = torch.maximum(weights.sum(-1).abs(), least) + 1e-6
        return (weights @ values.float()) / norm[..., None]


class HeadLinear(nn.Module):
    """(..., width) to the same: a linear layer of each group of `side` channels for itself."""

    def __init__(self, width: int, side: int = 4):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width // side, side, side) * (2 / (5 * side)) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...gi,goi->...go", x.unflatten(-1, self.weight.shape[:2]), self.weight).flatten(-2)


class MatrixMemory(nn.Module):
    """What the matrix LSTM makes of a sequence: (B, L, width) after and before its convolution to (B, L, width).

    heads  memories side by side (None: one for every 64 channels)
    """

    def __init__(self, width: int, heads: int | None = None):
        super().__init__()
        self.heads = heads = heads or max(1, width // 64)
        self.query, self.key, self.value = (HeadLinear(width) for _ in range(3))
        self.gates = nn.Linear(3 * width, 2 * heads)
        self.norm = nn.GroupNorm(heads, width)
        nn.init.zeros_(self.gates.weight)
        with torch.no_grad():  # at first most is kept, and all tokens are let in alike
            self.gates.bias.copy_(torch.cat([0.1 * torch.randn(heads), torch.linspace(3, 6, heads)]))

    def forward(self, near: Tensor, x: Tensor) -> Tensor:
        parts = self.query(near), self.key(near), self.value(x)
        log_input, forget = self.gates(torch.cat(parts, dim=-1)).float().transpose(1, 2).chunk(2, dim=1)
        split = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        told = mlstm(*split, log_input, F.logsigmoid(forget)).transpose(1, 2).flatten(2)
        return self.norm(told.flatten(0, 1)).unflatten(0, told.shape[:2])


class VisionLstm(nn.Module):
    """Tokens (B, L, width) to the same: x + Linear((memory + skip * near) * silu(gate)), near a causal convolution.

    back    from the last token to the first; `memory` False: the block without its matrix memory
    """

    def __init__(self, width: int, *, back: bool, memory: bool = True, expand: int = 2):
        super().__init__()
        inner, self.back = expand * width, back
        self.norm = nn.LayerNorm(width)
        self.enter, self.leave = nn.Linear(width, 2 * inner, bias=False), nn.Linear(inner, width, bias=False)
        self.near = nn.Conv1d(inner, inner, 4, groups=inner)
        self.memory = MatrixMemory(inner) if memory else None
        self.skip = nn.Parameter(torch.ones(inner))

    def forward(self, tokens: Tensor) -> Tensor:
        x, gate = self.enter(self.norm(tokens.flip(1) if self.back else tokens)).chunk(2, dim=-1)
        near = F.silu(self.near(F.pad(x.transpose(1, 2), (3, 0))).transpose(1, 2))
        told = self.skip * near
        if self.memory is not None:
            told = told + self.memory(near, x)
        told = self.leave(told * F.silu(gate))
        return tokens + (told.flip(1) if self.back else told)


class LstmPair(nn.Module):
    """A map (B, width, H, W) to the same: two blocks over its pixels row by row, the first there, the second back."""

    def __init__(self, width: int, *, memory: bool = True):
        super().__init__()
        self.blocks = nn.Sequential(*(VisionLstm(width, back=back, memory=memory) for back in (False, True)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:])


class XlstmUNet(UNet):
    """The book's U-Net, with Vision-LSTM blocks on its deepest levels: (B, inputs, H, W) to logits (B, classes, H, W).

    levels  how many levels, from the deepest, have a pair of blocks after their convolutions
    """

    def __init__(
        self, *, inputs: int, classes: int, channels: tuple[int, ...] = CHANNELS, levels: int = 2, memory: bool = True
    ):
        super().__init__(inputs=inputs, classes=classes, channels=channels)
        for level in range(len(channels) - levels, len(channels)):
            self.down[level] = nn.Sequential(self.down[level], LstmPair(channels[level], memory=memory))


@dataclass
class Xlstm(Architecture):
    """A U-Net with Vision-LSTM blocks on its two deepest levels.

    memory  False: the blocks without their matrix memory, all else equal
    """

    memory: bool = True

    def model(self, inputs: int, classes: int) -> nn.Module:
        return XlstmUNet(inputs=inputs, classes=classes, channels=self.channels, memory=self.memory)


recipe = Recipe(
    paper="xlstm-unet",
    title="xLSTM-UNet: Vision-LSTM blocks in a U-Net",
    claim="Vision-LSTM blocks on its deep levels raise a U-Net's Dice on hearts.",
    arms={
        "unet": Arm(BASELINE),
        "xlstm-unet": Arm(Xlstm()),
        "without memory": Arm(Xlstm(memory=False)),
    },
    compare=("xlstm-unet", "unet"),
    ablation=("xlstm-unet", "without memory"),
    replicate="fold",
    scales=scales("unet", "xlstm-unet", "without memory"),
    components=(
        Component(
            "matrix memory",
            "implemented",
            "mLSTM with exponential input gate in its parallel form, stabilised; a head for 64 channels",
        ),
        Component(
            "Vision-LSTM block",
            "implemented",
            "twofold inner width, causal convolution over four tokens, keys and queries from groups of four channels, "
            "learnt skip, gate, as in the official code, github.com/tianrun-chen/xLSTM-UNet-PyTorch; directions "
            "alternate from block to block as in Vision-LSTM, where that code scans from the top left alone",
        ),
        Component(
            "U-Net with local features",
            "simplified",
            "the book's convolutions for residual ones; a pair of blocks on each of the two deepest levels, of 16 x 16 "
            "and 8 x 8 pixels, where the paper has one on the deepest or on every other level",
        ),
        Component("three dimensions", "absent", "slices alone"),
        Component("abdomen, endoscopy and cells", "absent", "hearts alone"),
        Component("against transformers and Mamba", "absent", "compared with the U-Net alone"),
    ),
)
