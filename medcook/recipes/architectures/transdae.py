"""TransDAE (Azad, Adibfar and Fu, preprint 2024, arXiv 2409.02018): a hierarchical transformer with dual attention.

Attention between pixels alone overlooks which channels belong together, and costs the square of the number of pixels.
Dual attention has both: pixels through a context of channels (efficient attention, Shen et al., WACV 2021),
    softmax_channels(Q) (softmax_pixels(K)' V),
and channels among themselves, softmax(s K' Q) applied to V. Skips let the two scales that they join interact.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.recipes.architectures._settings import BASELINE, CHANNELS, Architecture, scales
from medcook.recipes.recipe import Arm, Component, Recipe


def efficient_attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """(B, N, C) each; the N x N attention softmax(Q) softmax(K)' is never formed, its rows sum to one all the same."""
    context = keys.float().softmax(1).transpose(1, 2) @ values.float()
    return (queries.float().softmax(-1) @ context).to(values.dtype)


def channel_attention(queries: Tensor, keys: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    """(B, N, C) each, in len(scale) heads: every channel is a mix of its head's, by their cosine over all pixels."""
    heads = len(scale)
    split = lambda x: x.transpose(1, 2).unflatten(1, (heads, -1))  # noqa: E731  (B, heads, C / heads, N)
    queries, keys = (F.normalize(split(x).float(), dim=-1) for x in (queries, keys))
    weights = (scale[:, None, None] * (queries @ keys.transpose(-2, -1))).softmax(-1)
    return (weights.to(values.dtype) @ split(values)).flatten(1, 2).transpose(1, 2)


class Spatial(nn.Module):
    """Attention of pixels, a map (B, H, W, width) to the same."""

    def __init__(self, width: int):
        super().__init__()
        self.enter, self.leave = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        told = efficient_attention(*self.enter(x.flatten(1, 2)).chunk(3, dim=-1))
        return self.leave(told).unflatten(1, x.shape[1:3])


class Channel(nn.Module):
    """Attention of channels, a map (B, H, W, width) to the same."""

    def __init__(self, width: int, heads: int = 8):
        super().__init__()
        self.enter, self.leave = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.scale = nn.Parameter(torch.ones(heads))

    def forward(self, x: Tensor) -> Tensor:
        told = channel_attention(*self.enter(x.flatten(1, 2)).chunk(3, dim=-1), self.scale)
        return self.leave(told).unflatten(1, x.shape[1:3])


class MixedFeedForward(nn.Module):
    """A map (B, H, W, width) to the same: two linear layers, between them a depthwise convolution that tells where."""

    def __init__(self, width: int, expand: int = 2):
        super().__init__()
        inner = expand * width
        self.enter, self.leave = nn.Linear(width, inner), nn.Linear(inner, width)
        self.near = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.norm = nn.LayerNorm(inner)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        near = self.near(x.movedim(-1, 1)).movedim(1, -1)
        return self.leave(F.gelu(self.norm(x + near)))


class DualBlock(nn.Module):
    """A map (B, width, H, W) to the same: attention of channels, then of pixels, each with its feed-forward layer.

    spatial, channel  False: without that attention; its feed-forward layer stays
    """

    def __init__(self, width: int, *, spatial: bool = True, channel: bool = True):
        super().__init__()
        kinds = [Channel] * channel + [MixedFeedForward] + [Spatial] * spatial + [MixedFeedForward]
        self.steps = nn.ModuleList(kind(width) for kind in kinds)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in kinds)

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(1, -1)
        for norm, step in zip(self.norms, self.steps, strict=True):
            x = x + step(norm(x))
        return x.movedim(-1, 1)


class InterScale(nn.Module):
    """Skip (B, skip, 2H, 2W) and deep (B, deep, H, W) features as one map (B, skip, 2H, 2W).

    Joined, they weight themselves by a large kernel in three parts (Guo et al., 2023): 5 x 5 and 7 x 7 with gaps of 3,
    both depthwise, then 1 x 1; together 23 x 23.

    interaction  False: joined alone
    """

    def __init__(self, skip: int, deep: int, *, interaction: bool = True):
        super().__init__()
        self.expand = nn.Linear(deep, 4 * skip)
        self.join = nn.Conv2d(2 * skip, skip, 1)
        if interaction:
            self.near = nn.Conv2d(skip, skip, 5, padding=2, groups=skip)
            self.far = nn.Conv2d(skip, skip, 7, padding=9, dilation=3, groups=skip)
            self.point = nn.Conv2d(skip, skip, 1)
        self.interaction = interaction

    def forward(self, skip: Tensor, deep: Tensor) -> Tensor:
        deep = F.pixel_shuffle(self.expand(deep.movedim(1, -1)).movedim(-1, 1), 2)
        both = self.join(torch.cat([skip, deep[:, :, : skip.shape[2], : skip.shape[3]]], dim=1))
        if not self.interaction:
            return both
        near = self.near(both)
        with torch.autocast(near.device.type, enabled=False):  # on CPUs its bfloat16 gradient is not the same twice
            far = self.far(near.to(self.far.weight.dtype))
        return both + both * self.point(far.to(both.dtype))


class Overlapping(nn.Module):
    """Overlapping patches: a convolution with a stride, then a layer norm; (B, inputs, H, W) to about 1 / stride."""

    def __init__(self, inputs: int, width: int, kernel: int, stride: int):
        super().__init__()
        self.conv = nn.Conv2d(inputs, width, kernel, stride, padding=kernel // 2)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x).movedim(1, -1)).movedim(-1, 1)


class TransDaeNet(nn.Module):
    """(B, inputs, H, W) to logits (B, classes, H, W): dual blocks on maps of 1/4, 1/8 and 1/16 of each side."""

    def __init__(
        self, *, inputs: int, classes: int, channels: tuple[int, ...] = CHANNELS[2:], interaction: bool = True, **dual
    ):
        super().__init__()
        pairs = list(zip(channels, channels[1:], strict=False))
        first = Overlapping(inputs, channels[0], 7, 4)
        self.patches = nn.ModuleList([first, *(Overlapping(fine, deep, 3, 2) for fine, deep in pairs)])
        self.down = nn.ModuleList(DualBlock(width, **dual) for width in channels)
        self.skips = nn.ModuleList(InterScale(fine, deep, interaction=interaction) for fine, deep in pairs)
        self.up = nn.ModuleList(DualBlock(fine, **dual) for fine, _ in pairs)
        self.last = nn.Linear(channels[0], 16 * channels[0])
        self.norm = nn.LayerNorm(channels[0])
        self.head = nn.Conv2d(channels[0], classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        x, found = image, []
        for patches, block in zip(self.patches, self.down, strict=True):
            x = block(patches(x))
            found.append(x)
        found.pop()
        for skip, block in zip(reversed(self.skips), reversed(self.up), strict=True):
            x = block(skip(found.pop(), x))
        x = F.pixel_shuffle(self.last(x.movedim(1, -1)).movedim(-1, 1), 4)[:, :, : image.shape[2], : image.shape[3]]
        return self.head(self.norm(x.movedim(1, -1)).movedim(-1, 1))


@dataclass
class TransDae(Architecture):
    """A hierarchical transformer with dual attention.

    spatial, channel  False: without attention of pixels, or of channels; `interaction` False: skips that only join
    """

    spatial: bool = True
    channel: bool = True
    interaction: bool = True

    def model(self, inputs: int, classes: int) -> nn.Module:
        return TransDaeNet(
            inputs=inputs,
            classes=classes,
            channels=self.channels[2:],
            spatial=self.spatial,
            channel=self.channel,
            interaction=self.interaction,
        )


recipe = Recipe(
    paper="transdae",
    title="TransDAE: dual attention in a hierarchical transformer",
    claim="A transformer with attention of pixels and of channels, and scales that interact in its skips, beats the "
    "U-Net on hearts without pre-training.",
    arms={
        "unet": Arm(BASELINE),
        "transdae": Arm(TransDae()),
        "without channel attention": Arm(TransDae(channel=False)),
        "without spatial attention": Arm(TransDae(spatial=False)),
        "without interaction": Arm(TransDae(interaction=False)),
    },
    compare=("transdae", "unet"),
    ablation=("transdae", "without channel attention"),
    replicate="fold",
    scales=scales("unet", "transdae", "without channel attention"),
    components=(
        Component(
            "efficient spatial attention",
            "implemented",
            "softmax over channels of the queries and over pixels of the keys, one head; our reading of the abstract, "
            "after DAE-Former of the same group (Azad et al., 2022): there is no official code",
        ),
        Component(
            "channel attention",
            "implemented",
            "cosine of channels over all pixels, eight heads with a learnt scale, before the spatial one as in "
            "DAE-Former; our reading, too",
        ),
        Component(
            "inter-scale interaction module",
            "simplified",
            "the abstract says what it is for, a summary that it takes a large kernel apart; which kernel, and that it "
            "weights the joined scales, is our choice",
        ),
        Component(
            "hierarchical transformer",
            "simplified",
            "overlapping patches of 7 x 7 every 4 pixels, three stages of one dual block with a twofold feed-forward "
            "layer, where such networks have four stages of two or more and fourfold ones; widths of the chapter; no "
            "pre-trained weights, as in the paper",
        ),
        Component("multi-organ CT", "absent", "hearts alone"),
    ),
)
