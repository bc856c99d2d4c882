"""SAM-Med2D (Cheng et al., 2023): adapters in the encoder, everything behind it fine-tuned, with every kind of prompt.

The encoder's own weights stay frozen; each of its blocks gets an adapter that reweights channels by squeeze and
excitation, then mixes neighbouring tokens by a convolution down and one up, beside a skip:
    c = x * sigmoid(W2 relu(W1 mean(x))),    adapter(x) = x + relu(up(relu(down(c)))).
Prompt encoder and mask decoder learn as a whole, from points, boxes and the masks of earlier answers, which clicks
on what is still wrong correct.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.recipes.sam_adaptation._prompting import ZERO_SHOT, every_prompt_rows, scales
from medcook.sam.adapting import PromptedSam
from medcook.sam.model import SmallSam

FASTER = 10
"""The adapters' scale is so many times its weight: it starts at zero, and learns as many times faster."""


class Adapter(nn.Module):
    """Tokens (B, H, W, width) to tokens; starts as the identity."""

    def __init__(self, width: int, ratio: float = 0.25):
        super().__init__()
        inner = int(width * ratio)
        self.channel = nn.Sequential(
            nn.Linear(width, inner, bias=False), nn.ReLU(), nn.Linear(inner, width, bias=False), nn.Sigmoid()
        )
        self.down = nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False)
        self.up = nn.ConvTranspose2d(width, width, 4, stride=2, padding=1, bias=False)
        for layer in (self.down, self.up):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        self.scale = nn.Parameter(torch.zeros(width, 1, 1))

    def forward(self, tokens: Tensor) -> Tensor:
        maps = tokens.permute(0, 3, 1, 2)
        mixed = self.mixed(self.reweighted(maps))
        return tokens + (FASTER * self.scale * mixed).permute(0, 2, 3, 1)

    def reweighted(self, maps: Tensor) -> Tensor:
        """Channels of maps (B, width, H, W), each times a weight in 0 to 1 that all of them decide together."""
        return maps * self.channel(maps.mean((2, 3)))[:, :, None, None]

    def mixed(self, maps: Tensor) -> Tensor:
        """Maps (B, width, H, W) at half the resolution and back: each token hears its neighbours."""
        height, width = maps.shape[2:]
        return self.up(self.down(maps).relu()).relu()[..., :height, :width]


def adapted(model: SmallSam) -> SmallSam:
    """The model with an adapter before the MLP of each block of its encoder."""
    encoder = model.sam.vision_encoder
    for layer in encoder.layers:
        layer.mlp = nn.Sequential(Adapter(encoder.config.hidden_size), layer.mlp)
    return model


@dataclass
class SamMed2D(PromptedSam):
    """Frozen encoder with adapters; prompt encoder and decoder learn.

    adapters  False: nothing is added to the encoder
    """

    tuned: tuple[str, ...] = ("prompts", "decoder")
    rounds: int = 2
    prompts: str = "mixed"
    adapters: bool = True

    def adapt(self, model: SmallSam) -> SmallSam:
        return adapted(model) if self.adapters else model


recipe = Recipe(
    paper="sam-med2d",
    title="SAM-Med2D: adapters in the encoder, every kind of prompt",
    claim="Adapters and tuning with every kind of prompt, on five labelled patients, raise the mean Dice over box, one "
    "click and three clicks far above the small SAM's zero-shot answers.",
    arms={
        "zero-shot": Arm(ZERO_SHOT),
        "sam-med2d": Arm(SamMed2D()),
        "without adapters": Arm(SamMed2D(adapters=False)),
        "boxes only": Arm(SamMed2D(prompts="box", rounds=1)),
    },
    compare=("sam-med2d", "zero-shot"),
    ablation=("sam-med2d", "without adapters"),
    replicate="draw",
    scales=scales("zero-shot", "sam-med2d", "without adapters", steps=120),
    score=every_prompt_rows,
    components=(
        Component(
            "adapter layers",
            "implemented",
            "in every block, before its MLP, with the paper's shapes; a learnt scale that starts at zero takes the "
            "place of the official layer norm, so that training starts from SAM itself",
        ),
        Component(
            "points, boxes and masks as prompts",
            "implemented",
            "clicks, boxes and scribbles at first; in later rounds the last answer's logits",
        ),
        Component(
            "iterative correction",
            "implemented",
            "a click on a random wrong pixel after each answer; two rounds instead of nine",
        ),
        Component(
            "fine-tuned prompt encoder and decoder",
            "implemented",
            "all their weights; the encoder's own stay frozen",
        ),
        Component(
            "4.6 million images of many modalities",
            "absent",
            "one set, five patients: the tuning strategy is tested, not the collection, nor the nine held-out sets",
        ),
    ),
)
