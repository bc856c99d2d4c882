"""D-Former (Wu, Liao, Chen, Wang, Chen, Gao and Wu, Neural Computing and Applications 2023; arXiv 2201.00462).

Attention among all tokens of a volume is dear, attention within windows sees little. Here two scopes alternate: a local
one, the tokens of a window, and a global one, as many tokens taken from the whole volume at a constant distance, like
the taps of a dilated convolution. A U of such transformers, with patches merged and expanded, makes masks.

It starts by calling 5% of the voxels a structure (in the training labels 4.6% are), by the bias of its head (Lin et
al., Focal Loss, ICCV 2017, section 4.1), which is neither in the paper nor in the authors' code. From the usual start,
where all classes are alike, it learned nothing in 150 steps, in three folds and on a fourth at a fifth of the rate: the
first steps move all weights towards the background, until logits hardly differ between voxels, and the gradient with
them is gone (its norm fell from 2 to 0.02 in 32 steps). The U-Net learns from the usual start, and keeps it.

Six looks, on the fourth fold with seed 90, which are in no evidence. From the usual start, in float32: training
patients, 60 steps at a third of the chapter's rate (no difference between structures and background); two of them to
learn by heart, 49 steps at that rate (none either), 105 at the chapter's (a soft Dice of 0.10, rising in the last ten)
and 65 with deep supervision (0.04). From the start that is now used: the same two, 49 steps (0.81); then all, as the
evidence trains, with a Dice of 0.79 on validation patients after 150 steps. Set on the way: this start, for both
D-Formers, and layer normalisation in float32, whose part was not measured alone.
"""

from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.recipes.volumes._settings import BASELINE, VolumeNetwork, scales

Sides = tuple[int, int, int] | list[int]


def grouped(x: Tensor, sides: Sides, dilated: bool) -> Tensor:
    """(B, D, H, W, C) to (B, groups, tokens, C), prod(sides) tokens a group; D, H, W are multiples of the sides.

    A local group is a window of these sides. A dilated one has as many tokens along every axis, as far apart as there
    are groups along it: where `count` groups lie along an axis, group r has the tokens r, r + count, r + 2 count, ...
    """
    batch, *size, channels = x.shape
    counts = [length // side for length, side in zip(size, sides, strict=True)]
    pairs = zip(sides, counts, strict=True) if dilated else zip(counts, sides, strict=True)
    x = x.reshape(batch, *(length for pair in pairs for length in pair), channels)
    x = x.permute(0, 2, 4, 6, 1, 3, 5, 7) if dilated else x.permute(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(batch, prod(counts), prod(sides), channels)


def joined(groups: Tensor, sides: Sides, size: Sides, dilated: bool) -> Tensor:
    """What `grouped` took apart: (B, *size, C)."""
    counts = [length // side for length, side in zip(size, sides, strict=True)]
    x = groups.reshape(groups.shape[0], *counts, *sides, groups.shape[-1])
    x = x.permute(0, 4, 1, 5, 2, 6, 3, 7) if dilated else x.permute(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(groups.shape[0], *size, groups.shape[-1])


def filled(x: Tensor, multiples: Sides) -> Tensor:
    """Zeros at the far ends of (B, D, H, W, C), up to multiples."""
    back, below, right = (-length % multiple for length, multiple in zip(x.shape[1:4], multiples, strict=True))
    return F.pad(x, (0, 0, 0, right, 0, below, 0, back))


class TokenNorm(nn.LayerNorm):
    """Layer normalisation in float32, (..., C) to the same.

    With bfloat16 on a CPU the gradients of its weight and bias are summed in bfloat16, which stops growing after some
    thousand tokens (PyTorch 2.13); the finest grid of a batch of hippocampi has 35,840.
    """

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(torch.promote_types(x.dtype, torch.float32)))


class Attention(nn.Module):
    """softmax(q k' / sqrt(d)) v within every group, (B, D, H, W, C) to the same.

    side     tokens of a group along an axis, or all that there are
    dilated  whether a group reaches over the whole volume or is a window
    """

    def __init__(self, channels: int, heads: int, side: int, dilated: bool):
        super().__init__()
        self.heads, self.side, self.dilated = heads, side, dilated
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        batch, *size, _ = x.shape
        sides = [min(self.side, length) for length in size]
        x, real = filled(x, sides), filled(x.new_ones(1, *size, 1), sides)
        tokens = grouped(x, sides, self.dilated)
        told = self.attend(tokens, grouped(real, sides, self.dilated)[0, :, :, 0].bool())
        depth, height, width = size
        return joined(told, sides, x.shape[1:4], self.dilated)[:, :depth, :height, :width]

    def attend(self, tokens: Tensor, real: Tensor) -> Tensor:
        """tokens (B, groups, n, C) to the same; real (groups, n): False for the filling, which nobody sees."""
        batch, groups = tokens.shape[:2]
        split = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).flatten(0, 1)
        queries, keys, values = split.permute(2, 0, 3, 1, 4)  # each (B * groups, heads, n, d)
        seen = None if real.all() else real[:, None, None].repeat(batch, 1, 1, 1)
        wide = (each.to(torch.promote_types(each.dtype, torch.float32)) for each in (queries, keys, values))
        with torch.autocast(tokens.device.type, enabled=False):  # on a CPU its bfloat16 gradient takes thrice the time
            told = F.scaled_dot_product_attention(*wide, attn_mask=seen)
        return self.proj(told.transpose(1, 2).flatten(2)).unflatten(0, (batch, groups))


class ScopeModule(nn.Module):
    """Attention, then a small network for each token, both residual: (B, D, H, W, C) to the same."""

    def __init__(self, channels: int, heads: int, side: int, dilated: bool):
        super().__init__()
        self.norm1, self.norm2 = TokenNorm(channels), TokenNorm(channels)
        self.attention = Attention(channels, heads, side, dilated)
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PositionEncoding(nn.Module):
    """A depthwise 3 x 3 x 3 convolution, added: its zero padding says where a token is, whatever the size.

    In float32: with bfloat16 on a CPU its weight gradient reads memory that nobody has written where the grid is two
    tokens deep (PyTorch 2.13).
    """

    def __init__(self, channels: int):
        super().__init__()
        self.convolution = nn.Conv3d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return x + self.convolution(x.float().movedim(-1, 1)).movedim(1, -1)


class DFormerBlock(nn.Sequential):
    """Position encoding, then `depth` scope modules, local and global by turns: (B, D, H, W, C) to the same.

    dilated   False: the global scope is a window too, all else equal
    position  False: no encoding
    """

    def __init__(self, channels: int, depth: int, side: int, *, dilated: bool = True, position: bool = True):
        heads = channels // 8
        scopes = [ScopeModule(channels, heads, side, dilated and i % 2 == 1) for i in range(depth)]
        super().__init__(*([PositionEncoding(channels)] if position else []), *scopes)


class PatchMerging(nn.Module):
    """Eight neighbours become one token of twice the width; zeros make odd sides even."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm, self.reduction = TokenNorm(8 * channels), nn.Linear(8 * channels, 2 * channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = filled(x, (2, 2, 2))
        batch, depth, height, width, channels = x.shape
        x = x.reshape(batch, depth // 2, 2, height // 2, 2, width // 2, 2, channels)
        return self.reduction(self.norm(x.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4)))


class PatchExpanding(nn.Module):
    """One token becomes eight neighbours of half the width, cropped to `size`."""

    def __init__(self, channels: int):
        super().__init__()
        self.expansion, self.norm = nn.Linear(channels, 4 * channels, bias=False), TokenNorm(channels // 2)

    def forward(self, x: Tensor, size: Sides) -> Tensor:
        batch, depth, height, width, channels = x.shape
        x = self.expansion(x).reshape(batch, depth, height, width, 2, 2, 2, channels // 2)
        x = x.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(batch, 2 * depth, 2 * height, 2 * width, channels // 2)
        return self.norm(x)[:, : size[0], : size[1], : size[2]]


class DFormer(nn.Module):
    """(B, inputs, *size) to logits (B, classes, *size); a token is a patch of 2 x 2 x 2 voxels.

    width       features of a token at half the resolution; twice as many at every further halving
    depths      scope modules at each level, from the finest to the deepest; side, scopes: see `DFormerBlock`
    foreground  probability of all structures together that the bias of the head starts with
    """

    def __init__(
        self,
        *,
        inputs: int,
        classes: int,
        width: int = 24,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        side: int = 4,
        foreground: float = 0.05,
        **scopes,
    ):
        super().__init__()
        widths = [width * 2**level for level in range(len(depths))]
        stages = [
            [DFormerBlock(w, depth, side, **scopes) for w, depth in zip(some, depths, strict=False)]
            for some in (widths, widths[:-1])
        ]
        self.embed, self.embed_norm = nn.Conv3d(inputs, width, 2, stride=2), TokenNorm(width)
        self.down, self.up = map(nn.ModuleList, stages)
        self.merge = nn.ModuleList(map(PatchMerging, widths[:-1]))
        self.expand = nn.ModuleList(map(PatchExpanding, widths[1:]))
        self.mix = nn.ModuleList(nn.Linear(2 * w, w) for w in widths[:-1])
        self.deep_norm, self.norm, self.last = TokenNorm(widths[-1]), TokenNorm(width), PatchExpanding(width)
        self.head = nn.Linear(width // 2, classes)
        others = classes - 1
        self.head.bias.data = torch.tensor([1 - foreground] + others * [foreground / others]).log()

    def forward(self, image: Tensor) -> Tensor:
        patches = self.embed(filled(image.movedim(1, -1), (2, 2, 2)).movedim(-1, 1))
        x, skips = self.embed_norm(patches.movedim(1, -1)), []
        for block, merge in zip(self.down, self.merge, strict=False):
            skips.append(x)
            x = merge(block(x))
        x = self.deep_norm(self.down[-1](x))
        for block, expand, mix in zip(reversed(self.up), reversed(self.expand), reversed(self.mix), strict=True):
            skip = skips.pop()
            x = block(mix(torch.cat([expand(x, skip.shape[1:4]), skip], dim=-1)))
        return self.head(self.last(self.norm(x), image.shape[2:])).movedim(-1, 1)


@dataclass
class Dilated(VolumeNetwork):
    """A U of transformers whose attention is local and global by turns; `channels` has no meaning here.

    width     features of a token at half the resolution; `side` of a group, in tokens
    dilated   False: the global scope is a window too, all else equal
    position  False: no position encoding
    """

    width: int = 24
    depths: tuple[int, ...] = (2, 2, 6, 2)
    side: int = 4
    dilated: bool = True
    position: bool = True

    def model(self, inputs: int, classes: int) -> nn.Module:
        return DFormer(
            inputs=inputs,
            classes=classes,
            width=self.width,
            depths=self.depths,
            side=self.side,
            dilated=self.dilated,
            position=self.position,
        )


recipe = Recipe(
    paper="d-former",
    title="D-Former: attention that is local and dilated by turns",
    claim="A U of transformers that attend within windows and to samples of the whole volume by turns has a higher "
    "Dice on hippocampi than a 3D U-Net.",
    arms={
        "unet": Arm(BASELINE),
        "d-former": Arm(Dilated()),
        "without dilation": Arm(Dilated(dilated=False)),
        "without position encoding": Arm(Dilated(position=False)),
    },
    compare=("d-former", "unet"),
    ablation=("d-former", "without dilation"),
    replicate="fold",
    scales=scales("unet", "d-former", "without dilation"),
    components=(
        Component(
            "local scope attention",
            "implemented",
            "windows of 4 x 4 x 4 tokens (2 x 8 x 8 in the authors' code, for volumes with thick slices); filling up "
            "to whole windows is hidden from the attention",
        ),
        Component(
            "dilated global attention",
            "implemented",
            "as many tokens as in a window, spread over the whole grid, as in the authors' code; their spacing follows "
            "from the size of the grid, and where a window fills it, local and global are the same",
        ),
        Component(
            "U-shaped encoder and decoder",
            "implemented",
            "levels of 2, 2, 6 and 2 scope modules, merging and expanding as in the code, skips from before each "
            "level; small, with 24 features in place of 96 and 3, 6, 12 and 24 heads of 8; patches of 2 x 2 x 2 (the "
            "paper's: 2 x 4 x 4), as a hippocampus is small, and the last expansion halves the features",
        ),
        Component(
            "dynamic position encoding",
            "implemented",
            "not in the abstract; a depthwise convolution at the start of every level, as in the code",
        ),
        Component("deep supervision", "absent", "the authors' code has it; here arms differ in the network alone"),
        Component("low computational cost", "absent", "seconds are recorded with every run; the claim is about Dice"),
        Component("Synapse and ACDC", "absent", "hippocampi; both networks are trained from scratch, as in the paper"),
    ),
)
