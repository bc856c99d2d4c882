"""A decoder that can be prompted with maps, and what makes a prompt of maps: both of Co-Seg++, at a small size.

The prompt encoder (SSP-Encoder, at first called STP-Encoder) lets the places of a map attend to each other, and then
to those of the image, which a selective scan has read in order. The decoder (MTC-Decoder) is that of SAM: output tokens
and places attend to each other; a token's mask is its product with the features of every pixel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SamMaskDecoderConfig
from transformers.models.sam.modeling_sam import SamTwoWayTransformer

from medcook.recipes.architectures._blocks import resized
from medcook.recipes.architectures._scan import SelectiveStateSpace
from medcook.recipes.language._semantics import mapped, mlp, places


def rotated(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, h w, d) of places in a grid (h, w), pairs of channels turned by angles that grow with row or column.

    Products of two tokens depend on how far these are apart, not on where they lie (rotary embedding, Su et al. 2021,
    the first half of the pairs by rows and the rest by columns).
    """
    quarter = tokens.shape[-1] // 4
    speeds = 100.0 ** -(torch.arange(quarter, device=tokens.device) / quarter)
    lines = [torch.arange(side, device=tokens.device)[:, None] * speeds for side in size]
    rows, columns = lines[0].repeat_interleave(size[1], 0), lines[1].repeat(size[0], 1)
    angles = torch.cat([rows, columns], dim=1)
    first, second = tokens.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class Attend(nn.Module):
    """Tokens (B, h w, C) of a grid attend to others of the same grid, with one head and `rotated` places."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.ask, self.offer, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, y: Tensor | None, size: tuple[int, int]) -> Tensor:
        """y None: to each other."""
        x = self.norm(x)
        key, value = self.offer(x if y is None else y).chunk(2, dim=-1)
        asked, offered = rotated(self.ask(x), size), rotated(key, size)
        return self.out((asked @ offered.transpose(1, 2) / key.shape[2] ** 0.5).softmax(2) @ value)


class Scan(nn.Module):
    """Tokens (B, N, C), read in order: each takes up what came before it."""

    def __init__(self, width: int):
        super().__init__()
        self.enter, self.leave = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.near, self.scan = nn.Conv1d(width, width, 3, padding=1, groups=width), SelectiveStateSpace(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.near(self.enter(x).transpose(1, 2)).transpose(1, 2)
        return self.leave(self.scan(F.silu(x)))


class PromptEncoder(nn.Module):
    """Maps (B, inputs, H, W) and the image's embedding (B, width, h, w) to a prompt (B, width, h, w).

    without maps the prompt is one learnt vector at every place
    """

    def __init__(self, inputs: int, width: int):
        super().__init__()
        few = width // 4
        steps = [(inputs, few), (few, few), (few, width)]
        shrink = [[nn.Conv2d(i, o, 2, 2), nn.GroupNorm(1, o), nn.GELU()] for i, o in steps]
        self.shrink = nn.Sequential(*sum(shrink, []), nn.Conv2d(width, width, 1))
        self.scan, self.mine, self.image = Scan(width), Attend(width), Attend(width)
        self.norm, self.mix = nn.LayerNorm(width), mlp(width, 2 * width, width)
        self.nothing = nn.Parameter(0.02 * torch.randn(1, width, 1, 1))

    def forward(self, maps: Tensor | None, embedding: Tensor) -> Tensor:
        if maps is None:
            return self.nothing.expand_as(embedding)
        size = tuple(embedding.shape[2:])
        x, read = resized(self.shrink(maps), size).flatten(2).transpose(1, 2), embedding.flatten(2).transpose(1, 2)
        x = x + self.mine(x, None, size)
        x = x + self.image(x, self.scan(read), size)
        return mapped(x + self.mix(self.norm(x)), size)


class Decoder(nn.Module):
    """The embedding of an image, a prompt for it, and finer maps of it, to `outputs` logits; in two passes.

    Each pass has output tokens of its own, all else is shared.
    """

    def __init__(self, outputs: int, width: int, skips: tuple[int, ...]):
        super().__init__()
        config = SamMaskDecoderConfig(hidden_size=width, num_attention_heads=2, mlp_dim=2 * width)
        config._attn_implementation = "eager"
        self.two_way = SamTwoWayTransformer(config)
        self.tokens = nn.Parameter(torch.randn(2, outputs, width))
        steps = zip((width, *skips[:0:-1]), skips[::-1], strict=True)
        self.up = nn.ModuleList(nn.ConvTranspose2d(i, o, 2, 2) for i, o in steps)
        self.norms = nn.ModuleList(nn.GroupNorm(1, count) for count in skips[:0:-1])
        self.masks, self.summary = mlp(width, width, skips[0] + 1), nn.Conv2d(width, 2, 1)

    def forward(self, embedding: Tensor, prompt: Tensor, skips: list[Tensor], second: bool) -> tuple[Tensor, Tensor]:
        """Logits (B, outputs, H, W), and a summary of every place (B, 2, h, w)."""
        codes = mapped(places(embedding, embedding.shape[1])[None], embedding.shape[2:]).expand_as(embedding)
        tokens = self.tokens[int(second)].expand(len(embedding), 1, -1, -1)
        tokens, x = self.two_way(tokens, embedding + prompt, codes, None)
        x = mapped(x[:, 0], embedding.shape[2:])
        summary = self.summary(x)
        for larger, norm, skip in zip(self.up, (*self.norms, nn.Identity()), skips[::-1], strict=True):
            x = F.relu(norm(resized(larger(x), skip.shape[2:]) + skip))
        weights = self.masks(tokens[:, 0])
        logits = torch.einsum("bchw,bkc->bkhw", x, weights[..., :-1]) / x.shape[1] ** 0.5
        return logits + weights[..., -1, None, None], summary
