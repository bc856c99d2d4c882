"""The decoder of SEEM (Zou et al., NeurIPS 2023; arXiv 2304.06718), which is that of X-Decoder with more to attend to.

A transformer on the coarsest map and a feature pyramid give features of every fourth pixel and maps of three scales.
Learnt queries ask the scales in turn, each only where its last mask is, as in Mask2Former; then queries and the tokens
of the text attend to all of each other. Every query ends as a mask and as a vector to be compared with those of names.

Parts are named as in the published weights. Left out is what answers strokes: their tokens and memories.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS, SCALES = 32, 3
"""Groups of channels that are normalised together; scales that are asked, the coarsest first."""


def places_of(height: int, width: int, channels: int) -> Tensor:
    """(height * width, channels) of DETR: sines and cosines of the row, then of the column, from 0 to 2 pi."""
    half = channels // 2
    rates = 10000 ** (torch.arange(half) // 2 * 2 / half)
    angles = [2 * math.pi * torch.arange(1, size + 1)[:, None] / (size + 1e-6) / rates for size in (height, width)]
    rows, columns = (torch.stack([each[:, 0::2].sin(), each[:, 1::2].cos()], dim=2).flatten(1) for each in angles)
    return torch.cat([rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)], dim=2).flatten(0, 1)


class Attending(nn.Module):
    """Queries and places (B, N, width) attend to tokens and their places (B, T, width), and are normalised.

    name    of the attention in the published weights
    hidden  (B * heads, N, T), True where a query does not look
    """

    def __init__(self, name: str, width: int, heads: int):
        super().__init__()
        self.name, self.norm = name, nn.LayerNorm(width)
        self.add_module(name, nn.MultiheadAttention(width, heads, batch_first=True))

    def forward(
        self, x: Tensor, places: Tensor, tokens: Tensor, token_places: Tensor, hidden: Tensor | None = None
    ) -> Tensor:
        attention = getattr(self, self.name)
        seen, _ = attention(x + places, tokens + token_places, tokens, attn_mask=hidden, need_weights=False)
        return self.norm(x + seen)


class Thinking(nn.Module):
    """Two layers and a norm."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.linear1, self.linear2, self.norm = nn.Linear(width, inner), nn.Linear(inner, width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.linear2(self.linear1(x).relu()))


class EncoderLayer(nn.Module):
    """Tokens (B, T, width) attend to each other; places are added to what is compared."""

    def __init__(self, width: int, heads: int, inner: int):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        x = self.norm1(x + self.self_attn(x + places, x + places, x, need_weights=False)[0])
        return self.norm2(x + self.linear2(self.linear1(x).relu()))


class NormedConv(nn.Conv2d):
    """A convolution without bias, and a norm over groups of channels."""

    def __init__(self, inputs: int, outputs: int, size: int):
        super().__init__(inputs, outputs, size, padding=size // 2, bias=False)
        self.norm = nn.GroupNorm(GROUPS, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class PixelDecoder(nn.Module):
    """Maps of four scales, the finest first, to features (B, width, H / 4, W / 4) and the maps of three scales."""

    def __init__(self, widths: tuple[int, ...], width: int, heads: int, inner: int, layers: int):
        super().__init__()
        self.input_proj = nn.Conv2d(widths[-1], width, 1)
        self.transformer = nn.Module()
        self.transformer.encoder = nn.Module()
        self.transformer.encoder.layers = nn.ModuleList(EncoderLayer(width, heads, inner) for _ in range(layers))
        for number, each in enumerate(widths, 1):
            self.add_module(f"layer_{number}", NormedConv(width, width, 3))
            if number < len(widths):
                self.add_module(f"adapter_{number}", NormedConv(each, width, 1))
        self.mask_features = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        deep = self.input_proj(maps[-1])
        x, places = deep.flatten(2).movedim(1, 2), places_of(*deep.shape[2:], deep.shape[1]).to(deep)
        for layer in self.transformer.encoder.layers:
            x = layer(x, places)
        found = [getattr(self, f"layer_{len(maps)}")(x.movedim(2, 1).unflatten(2, deep.shape[2:])).relu()]
        for number in range(len(maps) - 1, 0, -1):
            here = getattr(self, f"adapter_{number}")(maps[number - 1])
            here = here + F.interpolate(found[-1], here.shape[2:])
            found.append(getattr(self, f"layer_{number}")(here).relu())
        return self.mask_features(found[-1]), found[:SCALES]


class Predictor(nn.Module):
    """The queries, what they ask, and what becomes of them."""

    def __init__(self, language: nn.Module, queries: int, width: int, heads: int, inner: int, layers: int):
        super().__init__()
        self.lang_encoder, self.heads, every = language, heads, range(layers)
        self.query_feat, self.query_embed = nn.Embedding(queries, width), nn.Embedding(queries, width)
        self.level_embed = nn.Embedding(SCALES, width)
        self.transformer_cross_attention_layers = nn.ModuleList(
            Attending("multihead_attn", width, heads) for _ in every
        )
        self.transformer_self_attention_layers = nn.ModuleList(Attending("self_attn", width, heads) for _ in every)
        self.transformer_ffn_layers = nn.ModuleList(Thinking(width, inner) for _ in every)
        self.decoder_norm = nn.LayerNorm(width)
        self.mask_embed = nn.Module()
        self.mask_embed.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.class_embed = nn.Parameter(torch.zeros(width, width))

    def masks(self, queries: Tensor, features: Tensor) -> Tensor:
        """Logits (B, Q, h, w) of queries (B, Q, width) on features (B, width, h, w)."""
        first, second, last = self.mask_embed.layers
        return torch.einsum("bqc,bchw->bqhw", last(second(first(queries).relu()).relu()), features)

    def unseen(self, masks: Tensor, size: torch.Size) -> Tensor:
        """(B * heads, Q, cells), True outside a query's mask; a query whose mask is empty looks everywhere."""
        outside = F.interpolate(masks, size, mode="bilinear").sigmoid().flatten(2) < 0.5
        outside = outside & ~outside.all(2, keepdim=True)
        return outside.repeat_interleave(self.heads, dim=0)

    def forward(self, features: Tensor, maps: list[Tensor], words: Tensor) -> tuple[Tensor, Tensor]:
        """Features, maps of three scales, tokens (T, width) of the names; to masks and vectors of all queries."""
        batch, count = len(features), len(self.query_feat.weight)
        x, own = (each.weight.expand(batch, -1, -1) for each in (self.query_feat, self.query_embed))
        told = places = words.expand(batch, -1, -1)
        levels = zip(maps, self.level_embed.weight, strict=True)
        scales = [(each + level[:, None, None]).flatten(2).movedim(1, 2) for each, level in levels]
        where = [places_of(*each.shape[2:], each.shape[1]).to(each) for each in maps]
        layers = (
            self.transformer_cross_attention_layers,
            self.transformer_self_attention_layers,
            self.transformer_ffn_layers,
        )
        for number, (ask, share, think) in enumerate(zip(*layers, strict=True)):
            scale = number % SCALES
            hidden = self.unseen(self.masks(self.decoder_norm(x), features), maps[scale].shape[2:])
            x = ask(x, own, scales[scale], where[scale], hidden)
            everyone, everywhere = torch.cat([x, told], dim=1), torch.cat([own, places], dim=1)
            x, told = think(share(everyone, everywhere, everyone, everywhere)).split([count, len(words)], dim=1)
        x = self.decoder_norm(x)
        return self.masks(x, features), x @ self.class_embed
