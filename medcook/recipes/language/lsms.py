"""LSMS, a language-guided scale-aware segmentor (Ouyang, Zhang, Lin, Wang, Chen, Chen and Lin, arXiv 2408.17347, 2024).

Idea: lesions differ in size, so image and sentence must meet at several scales. Scale-aware vision-language attention
lets convolutions with kernels of several sizes and an attention over the sentence's words work side by side; together
they say how much of each feature is kept. With D a depthwise convolution and S_k strips of length k across and down,

    a = D(x),    out = W (a + sum_k S_k(a) + gate(c) * c) * x,    c: what the words that a pixel attends to say

A full-scale decoder then puts features of all scales together at once, after each has seen those of all others.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from medcook.data import Case
from medcook.language import ToldUNet
from medcook.networks.unet import DoubleConv
from medcook.recipes.language._one import one_finding_rows
from medcook.recipes.language._settings import (
    BASELINE,
    FINDINGS,
    FINDINGS_BUDGET,
    FINDINGS_QUICK,
    SIDE,
    ToldOfFindings,
    scales,
)
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.sampling import once, trained

KERNELS = (5, 7, 11)
"""Lengths of the strips in pixels of a stage; stages have 32 to 4 pixels a side."""
BUDGET = replace(FINDINGS_BUDGET, steps=700, precision="float32")
"""Of all arms."""
COARSE = 8
"""A scale takes part in the decoder's global attention with at most so many places a side."""


def over_space(x: Tensor) -> Tensor:
    """Every channel of (B, N, C) with mean 0 and variance 1 over the N places: what is the same everywhere vanishes."""
    x = x - x.mean(1, keepdim=True)
    return x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt()


class WordAttention(nn.Module):
    """Every place of a map asks the words: c = softmax(q k / sqrt(C)) v, then gated by itself, gate(c) * c."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.ask, self.out = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.key, self.value = nn.Linear(width, channels), nn.Linear(width, channels)
        self.gate = nn.Sequential(
            nn.Linear(channels, channels, bias=False), nn.ReLU(), nn.Linear(channels, channels, bias=False), nn.Tanh()
        )

    def forward(self, maps: Tensor, words: Tensor, empty: Tensor) -> Tensor:
        """Maps (B, C, H, W), words (B, L, width), where there is none (B, L): (B, C, H, W) float32."""
        with torch.autocast(maps.device.type, enabled=False):
            places, words = maps.float().flatten(2).transpose(1, 2), words.float()
            fits = over_space(self.ask(places)) @ self.key(words).transpose(1, 2) / maps.shape[1] ** 0.5
            said = fits.masked_fill(empty[:, None], -torch.inf).softmax(-1) @ self.value(words)
            said = over_space(self.out(said))
            return (self.gate(said) * said).transpose(1, 2).reshape(maps.shape)


def along(channels: int, size: tuple[int, int]) -> nn.Conv2d:
    """A depthwise convolution with a kernel of this size; the map keeps its own."""
    return nn.Conv2d(channels, channels, size, padding=(size[0] // 2, size[1] // 2), groups=channels)


class ScaleAwareAttention(nn.Module):
    """Scale-aware vision-language attention, the formula above; without kernels there is one scale, that of D."""

    def __init__(self, channels: int, width: int, kernels: tuple[int, ...]):
        super().__init__()
        self.near = along(channels, (5, 5))
        self.strips = nn.ModuleList(nn.Sequential(along(channels, (1, k)), along(channels, (k, 1))) for k in kernels)
        self.words = WordAttention(channels, width)
        self.mix = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, words: Tensor, empty: Tensor) -> Tensor:
        near = self.near(x)
        found = near + self.words(near, words, empty)
        for strip in self.strips:
            found = found + strip(near)
        return self.mix(found) * x


class Stage(nn.Module):
    """Attention between two pointwise layers, then a small network at each place, both added to what comes in."""

    def __init__(self, channels: int, width: int, kernels: tuple[int, ...]):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(2))
        self.enter, self.leave = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        self.attention = ScaleAwareAttention(channels, width, kernels)
        self.think = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 1),
            along(2 * channels, (3, 3)),
            nn.GELU(),
            nn.Conv2d(2 * channels, channels, 1),
        )

    def forward(self, x: Tensor, words: Tensor, empty: Tensor) -> Tensor:
        heard = self.attention(F.gelu(self.enter(self.norms[0](x))), words, empty)
        x = x + self.leave(heard)
        return x + self.think(self.norms[1](x))


class FullScaleDecoder(nn.Module):
    """All stages at once: each becomes tokens, every token attends to those of all stages, and the sum of all stages,
    resized to the finest of them and squeezed, is resized to the image and mixed with what was seen there."""

    def __init__(self, channels: tuple[int, ...], width: int):
        super().__init__()
        finest, *stages = channels
        self.enter = nn.ModuleList(nn.Conv2d(count, width, 1) for count in stages)
        self.scale = nn.Parameter(0.02 * torch.randn(len(stages), width))
        self.everything = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.squeeze = DoubleConv(width, finest, 2)
        self.mix = DoubleConv(2 * finest, finest, 2)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps (B, C, H, W) from fine to coarse: (B, channels[0], H, W) of the finest."""
        finest, *stages = maps
        total = self.together([enter(each) for enter, each in zip(self.enter, stages, strict=True)])
        coarse = F.interpolate(self.squeeze(total), size=finest.shape[2:], mode="bilinear", align_corners=False)
        return self.mix(torch.cat([finest, coarse], dim=1))

    def together(self, stages: list[Tensor]) -> Tensor:
        """(B, width, H, W) of the finest of several maps (B, width, ., .): each with what it saw in the others."""
        few = [F.adaptive_avg_pool2d(each, [min(COARSE, side) for side in each.shape[2:]]) for each in stages]
        tokens = [each.flatten(2).transpose(1, 2) + scale for each, scale in zip(few, self.scale, strict=True)]
        seen = self.everything(torch.cat(tokens, dim=1)).split([each.shape[1] for each in tokens], dim=1)
        seen = [other.transpose(1, 2).reshape(each.shape) for other, each in zip(seen, few, strict=True)]
        return resized_sum([*stages, resized_sum(seen)])


def resized_sum(maps: list[Tensor]) -> Tensor:
    """The sum of maps (B, C, ., .), all resized to the first."""
    size = maps[0].shape[2:]
    rest = [F.interpolate(each, size=size, mode="bilinear", align_corners=False) for each in maps[1:]]
    return sum(rest, maps[0])


class LSMSNet(ToldUNet):
    """The finest level sees the image alone; every coarser one is a stage that hears the words."""

    def __init__(self, inputs: int, channels: tuple[int, ...], width: int, kernels: tuple[int, ...], full_scale: bool):
        super().__init__(inputs, channels, width)
        self.net.down = self.net.down[:1]
        del self.deepest
        pairs = list(zip(channels, channels[1:], strict=False))
        self.shrink = nn.ModuleList(nn.Conv2d(fine, coarse, 3, stride=2, padding=1) for fine, coarse in pairs)
        self.stages = nn.ModuleList(Stage(count, width, kernels) for count in channels[1:])
        self.whole = FullScaleDecoder(channels, width=32) if full_scale else None
        if full_scale:
            self.net.up = nn.ModuleList()
            del self.rising

    def encode(self, images: Tensor) -> list[Tensor]:
        return [self.net.down[0](images)]

    def fuse(self, maps: list[Tensor], vectors: Tensor, sentences: tuple[str, ...]) -> list[Tensor]:
        words, empty = self.text.tokens(sentences)
        maps = list(maps)
        for shrink, stage in zip(self.shrink, self.stages, strict=True):
            maps.append(stage(shrink(maps[-1]), words, empty))
        return maps

    def rise(self, maps: list[Tensor], vectors: Tensor) -> Tensor:
        return self.whole(maps) if self.whole is not None else super().rise(maps, vectors)


@dataclass
class LSMS(ToldOfFindings):
    """Trained as the baseline, with another network.

    kernels     see `ScaleAwareAttention`
    full_scale  whether all scales are decoded at once, or one after the other as in the baseline
    """

    kernels: tuple[int, ...] = KERNELS
    full_scale: bool = True

    def network_for(self, inputs: int) -> nn.Module:
        return LSMSNet(inputs, self.channels, self.width, self.kernels, self.full_scale)


def multiply_adds(net: nn.Module) -> float:
    """Millions of multiply-adds of a network that is asked one sentence about one image of the task's size."""
    image = torch.zeros(1, 1, SIDE, SIDE, device=next(net.parameters()).device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(image, ("small nodule in the upper field of the right lung",))
    return counter.get_total_flops() / 2e6


def costed_rows(fitted, case: Case) -> list[dict]:
    """`one_finding_rows`, with the multiply-adds of an answer in millions and the parameters in thousands."""
    rows, net = one_finding_rows(fitted, case), trained(fitted)["average"]
    mega = once(fitted, "multiply-adds", lambda: multiply_adds(net))
    kilo = sum(weights.numel() for weights in net.parameters()) / 1e3
    return [row | {"multiply_adds": mega, "parameters": kilo} for row in rows]


recipe = Recipe(
    paper="lsms",
    title="One finding among several: attention at several scales",
    claim="Scale-aware vision-language attention and a full-scale decoder outline the finding that a sentence means "
    "better than fusing image and sentence at one scale, with fewer multiply-adds.",
    arms={
        "told": Arm(BASELINE),
        "lsms": Arm(LSMS()),
        "one kernel": Arm(LSMS(kernels=())),
        "scale after scale": Arm(LSMS(full_scale=False)),
    },
    compare=("lsms", "told"),
    ablation=("lsms", "one kernel"),
    score=costed_rows,
    scales=scales(FINDINGS_QUICK, FINDINGS, "told", "lsms", "one kernel", budget=BUDGET),
    source="abstracts of versions 2 and 3, arXiv 2408.17347; code of SLViT by the same first author (Ouyang et al., "
    "IJCAI 2023), github.com/NaturalKnight/SLViT (lib/encoder.py); code of LSMS has not been found",
    components=(
        Component(
            "scale-aware vision-language attention",
            "simplified",
            "the block of SLViT, the forerunner with public code; the equations of LSMS itself were not at hand. "
            "There, strips of 7, 11 and 21 pixels on stages of 120 to 15 pixels and several blocks a stage; here of 5, "
            "7 and 11 on stages of 32 to 4, one block a stage, without layer scale or drop path",
        ),
        Component(
            "diverse convolutional kernels",
            "implemented",
            "the ablation keeps the first convolution of 5 x 5 and leaves out all strips",
        ),
        Component(
            "full-scale decoder",
            "simplified",
            "what the abstract says of it: features of all scales are modelled globally and complete each other. One "
            "transformer block over all places of all four stages, of which the finer two are averaged to 8 x 8; "
            "then all scales are resized, summed and mixed at once. The arm that decodes scale after scale, as the "
            "baseline does, is not run at `full`",
        ),
        Component(
            "lower computational cost",
            "implemented",
            "multiply_adds and parameters in every row: 31 million and 332 thousand, the baseline 50 million and 435 "
            "thousand. On a CPU a step takes 1.6 times as long nevertheless: depthwise convolutions are slow there. "
            "So all arms take 700 steps, in float32, which is faster for it",
        ),
        Component(
            "pretrained encoders",
            "absent",
            "image and text encoder begin at random; there, an image encoder from ImageNet and BERT. The first level "
            "sees the image alone in every arm",
        ),
        Component(
            "vision-language contrastive loss",
            "absent",
            "of version 3; all arms keep the chapter's loss. Pixels are compared with a vector of the sentence by the "
            "head that all arms share",
        ),
        Component(
            "RefHL-Seg",
            "absent",
            "not public; findings drawn into real chest X-rays, so that it is known which of several a sentence means. "
            "What was looked at, in one seed that is not scored and on validation images: Dice of this and of the "
            "baseline, 0.48 and 0.59; nothing was changed after it",
        ),
        Component("conventional segmentation without sentences", "absent", "out of this chapter's question"),
    ),
)
