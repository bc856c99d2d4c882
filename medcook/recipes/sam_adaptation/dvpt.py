"""DVPT: Dynamic Visual Prompt Tuning of large pre-trained models (He et al., Neural Networks 2025).

Beside the frozen layers of a vision transformer runs one small module, the same for every layer. It takes the layer's
tokens through a bottleneck; a few learnt prompts look at these as queries and become prompts of this very sample; what
they found is given back to the tokens, taken to the old width and added to the frozen features.

    Z  = gelu(X W_down)                            (N, r)   tokens X (N, D) in the bottleneck
    A  = softmax(P Z^T / sqrt(r))                  (m, N)   learnt prompts P (m, r) as queries
    P' = A Z                                       (m, r)   what they find in this sample
    X' = X + (Z + softmax(Z P'^T / sqrt(r)) P') W_up

Static prompts, the ablation, say P in place of P' whatever the sample is.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.methods import Supervised
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.recipes.sam_adaptation._adapters import lora, scales
from medcook.sam.adapting import AdaptedSam, Segmenter


class DynamicPrompts(nn.Module):
    """What is added to tokens (B, H, W, D); see the module's equations.

    dynamic  False: the prompts are the same for every sample
    """

    def __init__(self, width: int, bottleneck: int, prompts: int, dynamic: bool = True):
        super().__init__()
        self.dynamic = dynamic
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        self.prompts = nn.Parameter(torch.randn(prompts, bottleneck))
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        seen = F.gelu(self.down(tokens))
        flat = seen.flatten(1, 2)
        prompts = self.prompts.expand(len(flat), -1, -1)
        if self.dynamic:
            prompts = attend(prompts, flat)
        return self.up(seen + attend(flat, prompts).view_as(seen))


def attend(queries: Tensor, memory: Tensor) -> Tensor:
    """softmax(Q M^T / sqrt(r)) M: queries (B, m, r) and memory (B, n, r), its own keys and values; to (B, m, r)."""
    with torch.autocast(queries.device.type, enabled=False):
        queries, memory = queries.float(), memory.float()
        return F.scaled_dot_product_attention(queries, memory, memory)


class PromptedLayer(nn.Module):
    """A frozen layer and the module beside it, which other layers share."""

    def __init__(self, layer: nn.Module, beside: DynamicPrompts):
        super().__init__()
        self.layer, self.beside = layer, beside

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layer(tokens) + self.beside(tokens)


@dataclass
class Dvpt(AdaptedSam):
    """The small SAM with dynamic prompts beside every layer of its encoder.

    bottleneck  r; `prompts` m
    dynamic     False: static prompts
    shared      one module for all layers, or one for each
    """

    bottleneck: int = 64
    prompts: int = 8
    dynamic: bool = True
    shared: bool = True

    def adapt(self, model: Segmenter) -> nn.Module:
        encoder = model.sam.sam.vision_encoder
        make = lambda: DynamicPrompts(encoder.config.hidden_size, self.bottleneck, self.prompts, self.dynamic)  # noqa: E731
        one = make()
        encoder.layers = nn.ModuleList(PromptedLayer(layer, one if self.shared else make()) for layer in encoder.layers)
        return model


@dataclass
class Lora(AdaptedSam):
    """Another parameter-efficient method: low-rank updates of the encoder's attention."""

    rank: int = 4

    def adapt(self, model: Segmenter) -> nn.Module:
        lora(model.sam.sam.vision_encoder, self.rank, ("qkv", "proj"))
        return model


recipe = Recipe(
    paper="dvpt",
    title="DVPT: prompts that look at the sample before they speak",
    claim="With three labelled patients, dynamic prompts beside the frozen encoder give a higher Dice than training "
    "all of its weights.",
    arms={
        "decoder only": Arm(AdaptedSam()),
        "full tuning": Arm(AdaptedSam(tuned=("encoder", "decoder"))),
        "lora": Arm(Lora()),
        "dvpt": Arm(Dvpt()),
        "static prompts": Arm(Dvpt(dynamic=False)),
        "a module a layer": Arm(Dvpt(shared=False)),
        "u-net": Arm(Supervised(channels=(8, 16, 32, 64, 64))),
    },
    compare=("dvpt", "full tuning"),
    ablation=("dvpt", "static prompts"),
    replicate="draw",
    scales=scales("decoder only", "full tuning", "lora", "dvpt", "static prompts"),
    published={
        "extra trainable parameters, share": 0.005,
        "gain in kappa over full tuning, classification": 0.022,
        "labels saved, up to": 0.6,
        "storage saved for ViT-B/16": 0.99,
    },
    source="the paper's abstract",
    components=(
        Component(
            "bottleneck",
            "implemented",
            "64 wide; module and prompts are 25 344 weights, 0.4% of the small SAM; the paper has 0.5%",
        ),
        Component(
            "dynamic prompts",
            "implemented",
            "8 learnt queries attend to the bottlenecked tokens of the sample, which are keys and values themselves, "
            "without projections (our reading)",
        ),
        Component(
            "projection and aggregation",
            "implemented",
            "the abstract says projected and aggregated; that tokens read the prompts by a second attention, and that "
            "the sum is added to the layer's output, is our reading; zero at first",
        ),
        Component("sharing between layers", "implemented", "one module for all eight layers"),
        Component("classification", "absent", "segmentation alone; the figures on kappa are not tested"),
    ),
)
