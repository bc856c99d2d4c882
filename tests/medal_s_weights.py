"""A small Medal S with random weights by the published names, and the published model written out for it."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

CHANNELS, WIDTH, HEADS, WORDS, BUCKETS = (4, 6, 8), 12, 2, 11, 32


class Weights(dict):
    """Names and random tensors."""

    def __init__(self, seed: int):
        super().__init__()
        self.rng = torch.Generator().manual_seed(seed)

    def put(self, name: str, *shape: int, bias: int = 0) -> None:
        self[f"{name}.weight"] = torch.randn(shape, generator=self.rng) * 0.4
        if bias:
            self[f"{name}.bias"] = torch.randn(bias, generator=self.rng) * 0.2

    def block(self, name: str, inputs: int, outputs: int) -> None:
        self.put(f"{name}.conv", outputs, inputs, 3, 3, 3, bias=outputs)
        self.put(f"{name}.norm", outputs, bias=outputs)
        for number, part in enumerate(("conv", "norm")):  # published files hold these twice
            for kind in ("weight", "bias"):
                self[f"{name}.all_modules.{number}.{kind}"] = self[f"{name}.{part}.{kind}"]


def published() -> dict[str, Tensor]:
    """Of the segmentation model; with intermediate outputs, which only training has."""
    state, before = Weights(0), 1
    for level, count in enumerate(CHANNELS):
        state.block(f"backbone.encoder.stages.{level}.0.convs.0", before, count)
        state.block(f"backbone.encoder.stages.{level}.0.convs.1", count, count)
        before = count
    for number, (deep, skip) in enumerate(((8, 6), (6, 4))):
        state.put(f"backbone.decoder.transpconvs.{number}", deep, skip, 2, 2, 2, bias=skip)
        state.block(f"backbone.decoder.stages.{number}.convs.0", 2 * skip, skip)
        state.block(f"backbone.decoder.stages.{number}.convs.1", skip, skip)
    state.put("projection_layer.0", WIDTH, sum(CHANNELS), bias=WIDTH)
    state.put("projection_layer.2", WIDTH, WIDTH, bias=WIDTH)
    for number in range(2):
        name = f"transformer_decoder.layers.{number}"
        state[f"{name}.multihead_attn.in_proj_weight"] = torch.randn(3 * WIDTH, WIDTH, generator=state.rng) * 0.4
        state[f"{name}.multihead_attn.in_proj_bias"] = torch.randn(3 * WIDTH, generator=state.rng) * 0.2
        state.put(f"{name}.multihead_attn.out_proj", WIDTH, WIDTH, bias=WIDTH)
        state.put(f"{name}.linear1", 20, WIDTH, bias=20), state.put(f"{name}.linear2", WIDTH, 20, bias=WIDTH)
        for k in (1, 2, 3):
            state.put(f"{name}.norm{k}", WIDTH, bias=WIDTH)
    state.put("transformer_decoder.norm", WIDTH, bias=WIDTH)
    state.put("mask_embed_proj.0", 10, WIDTH, bias=10), state.put("mask_embed_proj.2", 4, 10, bias=4)
    state.put("mid_mask_embed_proj.0.0", 10, WIDTH, bias=10)
    state.block("fusion_conv.convs.0", 8, 4)
    return {f"module.{name}": tensor for name, tensor in state.items()}


def published_text() -> dict[str, Tensor]:
    """Of the text encoder; with a weight of the pictures' side."""
    state, name = Weights(1), "text_tower.biolord"
    state.put(f"{name}.embeddings.word_embeddings", WORDS, WIDTH)
    state.put(f"{name}.embeddings.position_embeddings", 20, WIDTH)
    state.put(f"{name}.embeddings.LayerNorm", WIDTH, bias=WIDTH)
    for number in range(2):
        layer = f"{name}.encoder.layer.{number}"
        for part in ("q", "k", "v", "o"):
            state.put(f"{layer}.attention.attn.{part}", WIDTH, WIDTH, bias=WIDTH)
        state.put(f"{layer}.attention.LayerNorm", WIDTH, bias=WIDTH)
        state.put(f"{layer}.intermediate.dense", 20, WIDTH, bias=20)
        state.put(f"{layer}.output.dense", WIDTH, 20, bias=WIDTH)
        state.put(f"{layer}.output.LayerNorm", WIDTH, bias=WIDTH)
    state.put(f"{name}.encoder.relative_attention_bias", BUCKETS, HEADS)
    state.put("projection_layer.0", WIDTH, WIDTH, bias=WIDTH), state.put("projection_layer.2", WIDTH, WIDTH, bias=WIDTH)
    state.put("modality_embed", 5, WIDTH)
    state["atlas_tower.encoder.weight"] = torch.zeros(3)
    return {f"module.{name}": tensor for name, tensor in state.items()}


class Reference:
    """Both published models, from their weights alone, for one case."""

    def __init__(self, state: dict[str, Tensor]):
        self.state = {name.removeprefix("module."): tensor for name, tensor in state.items()}

    def two(self, name: str) -> tuple[Tensor, Tensor]:
        return self.state[f"{name}.weight"], self.state[f"{name}.bias"]

    def line(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.two(name)
        return x @ weight.T + bias

    def norm(self, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
        weight, bias = self.two(name)
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + eps).sqrt() * weight + bias

    def block(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        x = F.conv3d(x, *self.two(f"{name}.conv"), stride=stride, padding=1)
        mean, spread = x.mean((2, 3, 4), keepdim=True), x.var((2, 3, 4), keepdim=True, correction=0)
        weight, bias = (part[None, :, None, None, None] for part in self.two(f"{name}.norm"))
        x = (x - mean) / (spread + 1e-5).sqrt() * weight + bias
        return torch.where(x > 0, x, 0.01 * x)

    def masks(self, volume: Tensor, queries: Tensor, coarse: Tensor | None = None) -> Tensor:
        """(1, 8, 8, 8) and (N, WIDTH), with coarse masks (N, 8, 8, 8) or none, to logits (N, 8, 8, 8)."""
        maps, x = [], volume[None]
        for level in range(3):
            x = self.block(f"backbone.encoder.stages.{level}.0.convs.0", x, 2 if level else 1)
            x = self.block(f"backbone.encoder.stages.{level}.0.convs.1", x)
            maps.append(x)
        for number in range(2):
            x = F.conv_transpose3d(x, *self.two(f"backbone.decoder.transpconvs.{number}"), stride=2)
            x = torch.cat([x, maps[1 - number]], 1)
            for k in (0, 1):
                x = self.block(f"backbone.decoder.stages.{number}.convs.{k}", x)
        cells = []
        for i in range(2):
            for j in range(2):
                for k in range(2):
                    parts = []
                    for each in maps:
                        n = each.shape[2] // 2
                        place = (slice(i * n, i * n + n), slice(j * n, j * n + n), slice(k * n, k * n + n))
                        parts.append(each[0][(slice(None), *place)].mean((1, 2, 3)))
                    cells.append((torch.cat(parts), (i, j, k)))
        tokens = torch.stack([cell for cell, _ in cells])
        tokens = F.gelu(self.line("projection_layer.2", F.gelu(self.line("projection_layer.0", tokens))))
        places = torch.stack([self.place(at) for _, at in cells])
        for number in range(2):
            queries = self.asked(f"transformer_decoder.layers.{number}", queries, tokens, places)
        queries = self.norm("transformer_decoder.norm", queries)
        embeddings = F.gelu(self.line("mask_embed_proj.2", F.gelu(self.line("mask_embed_proj.0", queries))))
        if coarse is not None:
            shown = sum(mask * vector[:, None, None, None] for mask, vector in zip(coarse, embeddings, strict=True))
            x = self.block("fusion_conv.convs.0", torch.cat([x, shown[None]], 1))
        return torch.stack([(x[0] * vector[:, None, None, None]).sum(0) for vector in embeddings])

    def place(self, at: tuple[int, int, int]) -> Tensor:
        """12 numbers: for each axis two rates, the sine and the cosine of each."""
        found = []
        for coordinate in at:
            for rate in (1.0, 10000**-0.5):
                found += [math.sin(coordinate * rate), math.cos(coordinate * rate)]
        return torch.tensor(found)

    def asked(self, name: str, queries: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
        weight = self.state[f"{name}.multihead_attn.in_proj_weight"].chunk(3)
        bias = self.state[f"{name}.multihead_attn.in_proj_bias"].chunk(3)
        sources = (self.norm(f"{name}.norm2", queries), tokens + places, tokens)
        q, k, v = (x @ w.T + b for x, w, b in zip(sources, weight, bias, strict=True))
        queries = queries + self.line(f"{name}.multihead_attn.out_proj", attend(q, k, v))
        inner = self.line(f"{name}.linear1", self.norm(f"{name}.norm3", queries)).clamp_min(0)
        return queries + self.line(f"{name}.linear2", inner)

    def query(self, tokens: list[int], modality: int) -> Tensor:
        """A name without what fills it up."""
        name = "text_tower.biolord"
        places = [2 + k for k in range(len(tokens))]  # MPNet counts from the one after its padding's number, 1
        x = self.state[f"{name}.embeddings.word_embeddings.weight"][tokens]
        x = self.norm(
            f"{name}.embeddings.LayerNorm",
            x + self.state[f"{name}.embeddings.position_embeddings.weight"][places],
            1e-12,
        )
        table = self.state[f"{name}.encoder.relative_attention_bias.weight"]
        count = range(len(tokens))
        near = torch.stack([torch.stack([table[bucket(there - here)] for there in count]) for here in count])
        for number in range(2):
            layer = f"{name}.encoder.layer.{number}"
            q, k, v = (self.line(f"{layer}.attention.attn.{part}", x) for part in ("q", "k", "v"))
            seen = self.line(f"{layer}.attention.attn.o", attend(q, k, v, near.movedim(2, 0)))
            x = self.norm(f"{layer}.attention.LayerNorm", x + seen, 1e-12)
            inner = self.line(f"{layer}.output.dense", F.gelu(self.line(f"{layer}.intermediate.dense", x)))
            x = self.norm(f"{layer}.output.LayerNorm", x + inner, 1e-12)
        mean = self.line("projection_layer.2", F.gelu(self.line("projection_layer.0", x.mean(0))))
        return mean + self.state["modality_embed.weight"][modality]


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention of `HEADS` heads; bias (HEADS, N, T) is added to what is compared."""
    heads = []
    for number, (a, b, c) in enumerate(zip(*(part.chunk(HEADS, 1) for part in (q, k, v)), strict=True)):
        fits = a @ b.T / a.shape[1] ** 0.5
        heads.append((fits if bias is None else fits + bias[number]).softmax(1) @ c)
    return torch.cat(heads, 1)


def bucket(away: int) -> int:
    """Which of 32 buckets a distance below 8 falls into: 16 for what comes before or is the same, 16 for the rest."""
    return abs(away) + (16 if away > 0 else 0)
