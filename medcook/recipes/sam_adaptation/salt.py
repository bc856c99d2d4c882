"""SALT: Singular Value Adaptation with Low-Rank Transformation (Elsayed et al., 2025, arXiv 2503.16055).

Each linear layer of the frozen encoder is taken apart by its singular value decomposition, and only what lies between
the two sets of singular vectors learns: the largest singular values are scaled and shifted one by one, the rest gets a
low-rank update. Where LoRA adds directions without regard to the weight, SALT first turns the knobs that the weight
has.

    W  = U diag(s) V^T                                                  s_1 >= s_2 >= ... >= s_n
    W' = U S' V^T,   S' = [ diag(relu(a * s_top + b))         0            ]   r largest: scale a, shift b
                          [            0              diag(s_rest) + X Y   ]   n - r others: X (n-r, d), Y (d, n-r)

At a = 1, b = 0 and X = 0 nothing has changed.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.methods import Supervised
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.recipes.sam_adaptation._adapters import LINEAR, lora, scales
from medcook.sam.adapting import AdaptedSam, Segmenter


class SingularLinear(nn.Module):
    """A linear layer whose weight (out, in) is kept as its decomposition; see the module's equations.

    top   how many singular values are scaled and shifted; `rank` d of the update of the rest, 0 for none
    """

    def __init__(self, linear: nn.Linear, top: int, rank: int, rescale: bool = True):
        super().__init__()
        left, values, right = torch.linalg.svd(linear.weight.detach().float(), full_matrices=False)
        self.top = min(top, len(values))
        rest = len(values) - self.top
        for name, tensor in (("left", left), ("values", values), ("right", right)):
            self.register_parameter(name, nn.Parameter(tensor.contiguous(), requires_grad=False))
        self.bias = linear.bias
        self.scale = nn.Parameter(torch.zeros(self.top), requires_grad=rescale)  # a - 1, so that decay pulls to a = 1
        self.shift = nn.Parameter(torch.zeros(self.top), requires_grad=rescale)
        rank = rank if rest else 0
        self.down = nn.Parameter(torch.zeros(rest, rank), requires_grad=rank > 0)
        self.up = nn.Parameter(torch.randn(rank, rest) / max(1, rest) ** 0.5, requires_grad=rank > 0)

    def weight(self) -> Tensor:
        """W' (out, in), float32."""
        with torch.autocast(self.left.device.type, enabled=False):
            top = torch.relu(rescaled(self.values[: self.top], self.scale, self.shift))
            values = torch.cat([top, self.values[self.top :]])
            weight = (self.left * values) @ self.right
            if self.down.numel():
                weight = weight + (self.left[:, self.top :] @ self.down) @ (self.up @ self.right[self.top :])
        return weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight(), self.bias)


def rescaled(values: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Singular values (r,) scaled by 1 + `scale` and shifted, before negative ones are cut off."""
    return values * (1 + scale) + shift


def decompose(encoder: nn.Module, **settings) -> None:
    """Put a `SingularLinear` in the place of every linear layer of an encoder that has one of the names `LINEAR`."""
    found = [(parent, name) for parent in encoder.modules() for name in LINEAR if hasattr(parent, name)]
    for parent, name in found:
        setattr(parent, name, SingularLinear(getattr(parent, name), **settings))


@dataclass
class Salt(AdaptedSam):
    """The small SAM with its encoder adapted between its singular vectors.

    top      singular values of each layer (of 192) that are scaled and shifted; 192 is the paper's SVD baseline
    rank     of the update of the others; 0 takes it away
    rescale  False: scales and shifts stay as they are
    """

    top: int = 64
    rank: int = 11
    rescale: bool = True

    def adapt(self, model: Segmenter) -> nn.Module:
        decompose(model.sam.sam.vision_encoder, top=self.top, rank=self.rank, rescale=self.rescale)
        return model


@dataclass
class Lora(AdaptedSam):
    """The baseline: low-rank updates of the same layers; rank 4 has about as many trainable weights as SALT."""

    rank: int = 4

    def adapt(self, model: Segmenter) -> nn.Module:
        lora(model.sam.sam.vision_encoder, self.rank)
        return model


recipe = Recipe(
    paper="salt",
    title="SALT: singular values adapted, with a low-rank transformation of the rest",
    claim="With three labelled patients and as many trainable weights in the encoder, scaling and shifting the top "
    "singular values with a low-rank update of the rest gives a higher Dice than LoRA.",
    arms={
        "decoder only": Arm(AdaptedSam()),
        "lora": Arm(Lora()),
        "salt": Arm(Salt()),
        "singular values only": Arm(Salt(top=192, rank=0)),
        "low-rank only": Arm(Salt(rescale=False)),
        "u-net": Arm(Supervised(channels=(8, 16, 32, 64, 64))),
    },
    compare=("salt", "lora"),
    ablation=("salt", "singular values only"),
    replicate="draw",
    scales=scales("decoder only", "lora", "salt", "singular values only"),
    published={"gain in Dice over LoRA and SVD, at least": 0.02, "trainable share of parameters": 0.039},
    source="the paper's abstract (gain of 2% to 5% over five data sets); form of the update: the official code, "
    "github.com/BioMedIA-MBZUAI/SALT",
    components=(
        Component(
            "scale and shift of the top singular values",
            "implemented",
            "the largest 64 of 192 in each of the encoder's 32 linear layers; negative values are cut off, as in the "
            "official code for all, here for those that are rescaled (our reading)",
        ),
        Component(
            "low-rank update of the remaining subspace",
            "implemented",
            "X Y between the remaining singular vectors; rank 11, so that the layer has as many trainable weights as "
            "LoRA of rank 4 (11 776 and 12 288 a block)",
        ),
        Component("comparison with LoRA", "implemented", "peft's LoRA in the same layers"),
        Component("comparison with SVD", "implemented", "`singular values only`: all 192 scaled and shifted"),
        Component(
            "text prompts and training with box-free labels of vessels",
            "absent",
            "the paper builds on SAM with text prompts; here a token for each class asks for all at once, and the mask "
            "decoder learns in every arm",
        ),
    ),
)
