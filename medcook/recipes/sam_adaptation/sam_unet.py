"""SAM-UNet (Yang et al., 2024): a convolution branch beside SAM's frozen vision transformer.

The transformer keeps what it learnt and is frozen. A ResNet learns beside it: before the last block of each quarter of
the transformer, its features of one scale join the tokens. What the quarters give out is upscaled, as the skip
connections of a U-Net are, and joins the mask decoder where masks are made. With z_i the tokens after quarter i, r_i
the ResNet's features, B_i the block before which they join:

    z_i = B_i(z + reshape_i(r_i)),   s = up(neck(z_4)) + sum over i < 4 of bridge_i(z_i),
    masks = mask tokens . (decoder's features + s)
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from medcook.cohorts import CohortTask, meets
from medcook.data import Case
from medcook.evaluation import row
from medcook.recipes.recipe import Arm, Component, Recipe, Scale
from medcook.sam.adapting import PromptedSam, predictor_of, targets_of
from medcook.sam.model import PATCH, SIZE, Embedding, SmallSam
from medcook.sam.prompts import Prompt, box_of, first_click
from medcook.sam.zero_shot import dice
from medcook.tasks import Budget

SIDE = SIZE // PATCH
"""Tokens a side."""
QUARTERS = 4


class Residual(nn.Module):
    """The basic block of a ResNet, (B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.GroupNorm(8, outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.GroupNorm(8, outputs),
        )
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layers(x) + self.shortcut(x))


class Branch(nn.Module):
    """A small ResNet: images (B, 1, SIZE, SIZE) to features (B, channels[i], side, side) of sides 40, 20, 10 and 5."""

    def __init__(self, channels: tuple[int, ...]):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, channels[0], 3, 2, 1, bias=False), nn.GroupNorm(8, channels[0]), nn.ReLU()
        )
        sides = (channels[0], *channels)
        self.stages = nn.ModuleList(Residual(i, o, 2) for i, o in zip(sides, channels, strict=False))

    def forward(self, images: Tensor) -> list[Tensor]:
        x, found = self.stem(images), []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        return found


class Reshaper(nn.Module):
    """Features (B, channels, side, side) to what is added to the tokens (B, SIDE, SIDE, width); 0 at first."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.project = zeroed(nn.Conv2d(channels, width, 1))

    def forward(self, features: Tensor) -> Tensor:
        if features.shape[-1] > SIDE:
            features = F.adaptive_avg_pool2d(features, SIDE)
        elif features.shape[-1] < SIDE:
            features = F.interpolate(features, (SIDE, SIDE), mode="bilinear", align_corners=False)
        return self.project(features).permute(0, 2, 3, 1)


class Bridge(nn.Sequential):
    """Channels-first features (B, inputs, SIDE, SIDE) four times as large, (B, outputs, 4 SIDE, 4 SIDE); 0 at first."""

    def __init__(self, inputs: int, middle: int, outputs: int):
        super().__init__(
            nn.ConvTranspose2d(inputs, middle, 2, stride=2),
            nn.GroupNorm(1, middle),
            nn.GELU(),
            zeroed(nn.ConvTranspose2d(middle, outputs, 2, stride=2)),
        )


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer with weights and bias 0: what it adds starts at nothing, and SAM-UNet starts as SAM."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class SamUNet(nn.Module):
    """The small SAM with a branch beside its encoder; answers prompts as the small SAM does.

    branch  join the ResNet's features to the tokens
    fusion  join the features of all quarters to the mask decoder
    """

    def __init__(self, base: SmallSam, channels: tuple[int, ...], branch: bool, fusion: bool):
        super().__init__()
        self.base = base
        encoder = base.sam.vision_encoder
        width, hidden = encoder.config.hidden_size, encoder.config.output_channels
        self.branch = Branch(channels) if branch else None
        self.reshapers = nn.ModuleList(Reshaper(count, width) for count in channels) if branch else None
        self.up = Bridge(hidden, hidden // 4, hidden // 8) if fusion else None
        self.bridges = nn.ModuleList(Bridge(width, hidden // 4, hidden // 8) for _ in range(3)) if fusion else None

    def embed(self, images: Tensor) -> Embedding:
        """(B, 1, SIZE, SIZE) to their embedding; features of several scales join `quarter`, where masks are made."""
        base, encoder = self.base, self.base.sam.vision_encoder
        coarse, states = self.encode(encoder, images)
        fine, quarter, eighth = encoder.patch_embed.finer
        quarter = base.skips[1](quarter)
        if self.up is not None:
            quarter = quarter + self.up(coarse)
            for bridge, state in zip(self.bridges, states, strict=True):
                quarter = quarter + bridge(state.permute(0, 3, 1, 2))
        return Embedding(coarse, base.skips[0](eighth), quarter, fine)

    def encode(self, encoder: nn.Module, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(B, hidden, SIDE, SIDE), and the tokens (B, SIDE, SIDE, width) after the first three quarters."""
        beside = self.branch(images) if self.branch is not None else None
        length = len(encoder.layers) // QUARTERS
        tokens, states = encoder.patch_embed(images) + encoder.pos_embed, []
        for number, layer in enumerate(encoder.layers):
            quarter, place = divmod(number, length)
            if beside is not None and place == length - 1:
                tokens = tokens + self.reshapers[quarter](beside[quarter])
            tokens = layer(tokens)
            if place == length - 1:
                states.append(tokens)
        return encoder.neck(tokens), states[:-1]

    def decode(self, embedding, prompts):
        return self.base.decode(embedding, prompts)

    def refine(self, logits, embedding):
        return self.base.refine(logits, embedding)


@dataclass
class PromptedSamUNet(PromptedSam):
    """Learns a convolution branch, prompt encoder and mask decoder; the transformer stays as it is.

    widths          channels of the branch's four scales
    branch, fusion  see `SamUNet`
    """

    widths: tuple[int, ...] = (32, 48, 64, 96)
    branch: bool = True
    fusion: bool = True

    def adapt(self, model: SmallSam) -> SamUNet:
        return SamUNet(model, self.widths, self.branch, self.fusion)


def unseen_rows(fitted, case: Case) -> list[dict]:
    """Dice from the box (dice) and from one click (click_1) of a case from another site than the training's."""
    if meets(case.attributes, fitted.task.keep):
        return []
    predictor, found = predictor_of(fitted), {}
    for target in targets_of(fitted.task, case):
        prompts = {"dice": Prompt(box=box_of(target.mask)), "click_1": first_click(target.mask)}
        scores = {name: dice(predictor(target.image, prompt).mask, target.mask) for name, prompt in prompts.items()}
        found.setdefault(target.structure, []).append(scores)
    mean = lambda many, name: sum(one[name] for one in many) / len(many)  # noqa: E731
    return [row(case, name, **{key: mean(many, key) for key in many[0]}) for name, many in found.items()]


MONTGOMERY = CohortTask("chest_xray", evaluation="test", keep=(("site", "Montgomery"),))
NORTH = CohortTask("embedded", evaluation="test", keep=(("site", "north"),))

recipe = Recipe(
    paper="sam-unet",
    title="SAM-UNet: convolutions beside a frozen transformer",
    claim="Trained on one site's X-rays, a convolution branch beside the frozen encoder segments another site's lungs "
    "from a box better than fine-tuning the whole small SAM does.",
    arms={
        "fine-tuned": Arm(PromptedSam(tuned=("encoder", "prompts", "decoder"))),
        "sam-unet": Arm(PromptedSamUNet()),
        "without branch": Arm(PromptedSamUNet(branch=False)),
        "without fusion": Arm(PromptedSamUNet(fusion=False)),
        "decoder only": Arm(PromptedSam()),
    },
    compare=("sam-unet", "fine-tuned"),
    ablation=("sam-unet", "without branch"),
    score=unseen_rows,
    scales={
        "quick": Scale(NORTH, Budget(steps=30, batch=4, checks=0), replicates=1),
        "full": Scale(
            MONTGOMERY,
            Budget(steps=120, batch=4, checks=0),
            arms=("fine-tuned", "sam-unet", "without branch", "decoder only"),
        ),
    },
    published={"SA-Med2D-16M, Dice from a box": 0.883},
    source="the paper's abstract; where branch, bridges and decoder meet follows the official code, "
    "github.com/Hhankyangg/sam-unet",
    components=(
        Component(
            "convolution branch",
            "implemented",
            "a ResNet of basic blocks at a quarter to a 32nd of the resolution, as in the official code, slimmed and "
            "with group normalisation; it joins the tokens before blocks 2, 4, 6 and 8. What it adds starts at zero "
            "(our choice), so that training starts from the small SAM",
        ),
        Component("frozen transformer", "implemented", "with its convolution stem; prompt encoder and decoder learn"),
        Component(
            "multi-scale fusion",
            "implemented",
            "the encoder's result and the tokens of its first three quarters, upscaled, join the decoder at a quarter "
            "of the resolution",
        ),
        Component(
            "universal pre-training",
            "absent",
            "SA-Med2D-16M is out of reach; the small SAM knows synthetic scenes, the training one site's X-rays",
        ),
        Component("unseen modalities", "simplified", "another site with other machines and patients, not a modality"),
    ),
)
