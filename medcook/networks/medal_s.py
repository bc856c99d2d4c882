"""The architecture of Medal S, and the reader of its published checkpoints.

A U-Net of volumes gives features of every voxel and, averaged over patches, of every scale; names, which a text
encoder has turned into queries, attend to the latter (a transformer decoder without self-attention, as in SAT), and
each becomes a mask embedding. All masks come from one product with the voxels' features. A coarse mask for each name
can be given along: weighted by the names' own embeddings, they become a map that is fused with the features.

The text encoder is BioLORD, an MPNet, with a projection and a vector for the modality. Both checkpoints are
dictionaries with the weights as `model_state_dict`; the words that BioLORD knows are not in them.
"""

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MPNetConfig, MPNetModel

from medcook.errors import MedcookError

SOURCE = "github.com/yinghemedical/Medal-S"
MODALITIES = ("ct", "mri", "us", "pet", "microscopy")
CHANNELS, WIDTH, HEADS = (64, 64, 128, 256, 512, 768), 768, 8
"""Features of the six levels; width of queries; heads of the query decoder."""


class Block(nn.Module):
    """Convolution 3 x 3 x 3, instance norm, leaky ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv3d(inputs, outputs, 3, stride, 1)
        self.norm = nn.InstanceNorm3d(outputs, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.norm(self.conv(x)))


class Blocks(nn.Module):
    """Several blocks in a row; only the first one strides."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, count: int = 2):
        super().__init__()
        self.convs = nn.Sequential(
            *(Block(outputs if k else inputs, outputs, 1 if k else stride) for k in range(count))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.convs(x)


class Backbone(nn.Module):
    """The U-Net, with strides on the way down and transposed convolutions on the way up."""

    def __init__(self, inputs: int, channels: tuple[int, ...]):
        super().__init__()
        down = zip((inputs, *channels), channels, strict=False)
        self.encoder, self.decoder = nn.Module(), nn.Module()
        self.encoder.stages = nn.ModuleList(
            nn.Sequential(Blocks(before, count, 2 if level else 1)) for level, (before, count) in enumerate(down)
        )
        up = list(zip(channels[:0:-1], channels[-2::-1], strict=True))
        self.decoder.transpconvs = nn.ModuleList(nn.ConvTranspose3d(deep, skip, 2, 2) for deep, skip in up)
        self.decoder.stages = nn.ModuleList(Blocks(2 * skip, skip) for _, skip in up)

    def forward(self, volumes: Tensor) -> tuple[list[Tensor], Tensor]:
        """(B, inputs, *size) to the maps of all levels, the finest first, and the last features (B, C, *size)."""
        maps = []
        for stage in self.encoder.stages:
            maps.append(stage(maps[-1] if maps else volumes))
        x = maps[-1]
        for grow, stage, skip in zip(self.decoder.transpconvs, self.decoder.stages, maps[-2::-1], strict=True):
            x = stage(torch.cat([grow(x), skip], dim=1))
        return maps, x


class Layer(nn.Module):
    """Queries (B, N, width) ask tokens (B, T, width), whose places are added to the keys alone; `norm1` has no use."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.multihead_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, queries: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
        asked = self.norm2(queries)
        queries = queries + self.multihead_attn(asked, tokens + places, tokens, need_weights=False)[0]
        return queries + self.linear2(self.linear1(self.norm3(queries)).relu())


class Decoder(nn.Module):
    """Several layers, and a norm at the end."""

    def __init__(self, width: int, heads: int, hidden: int, layers: int):
        super().__init__()
        self.layers = nn.ModuleList(Layer(width, heads, hidden) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, queries: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
        for layer in self.layers:
            queries = layer(queries, tokens, places)
        return self.norm(queries)


def places_of(size: tuple[int, int, int], width: int) -> Tensor:
    """(cells, width): sines and cosines of the three coordinates in turn, a third of the channels for each axis."""
    third = 2 * -(-width // 6)
    rates = 10000 ** (-torch.arange(0, third, 2) / third)
    parts = []
    for length in size:
        angles = torch.arange(length)[:, None] * rates
        parts.append(torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1))
    grid = torch.meshgrid(*(torch.arange(length) for length in size), indexing="ij")
    return torch.cat([part[at.flatten()] for part, at in zip(parts, grid, strict=True)], dim=1)[:, :width]


class MedalS(nn.Module):
    """Volumes (B, inputs, H, W, D) and queries (B, N, width) to logits (B, N, H, W, D).

    Sides are multiples of a patch's, 2 ** (levels - 1). `hidden` of the query decoder and of the mask embeddings'
    network.
    """

    def __init__(
        self,
        inputs: int = 1,
        channels: tuple[int, ...] = CHANNELS,
        width: int = WIDTH,
        heads: int = HEADS,
        layers: int = 6,
        hidden: tuple[int, int] = (2048, 256),
    ):
        super().__init__()
        self.backbone = Backbone(inputs, channels)
        self.projection_layer = nn.Sequential(
            nn.Linear(sum(channels), width), nn.GELU(), nn.Linear(width, width), nn.GELU()
        )
        self.transformer_decoder = Decoder(width, heads, hidden[0], layers)
        self.mask_embed_proj = nn.Sequential(
            nn.Linear(width, hidden[1]), nn.GELU(), nn.Linear(hidden[1], channels[0]), nn.GELU()
        )
        self.fusion_conv = Blocks(2 * channels[0], channels[0], count=1)

    def tokens(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Tokens (B, cells, width) of all levels, averaged over patches, and their places (cells, width)."""
        size = tuple(maps[-1].shape[2:])
        pooled = [F.avg_pool3d(each, each.shape[2] // size[0]) for each in maps]
        found = self.projection_layer(torch.cat(pooled, dim=1).flatten(2).transpose(1, 2))
        return found, places_of(size, found.shape[2]).to(found)

    def fused(self, features: Tensor, embeddings: Tensor, coarse: Tensor) -> Tensor:
        """Features (B, C, H, W, D) that have seen coarse masks (B, N, H, W, D), 0 to 1, of the same names in order."""
        shown = torch.einsum("bnhwd,bnc->bchwd", coarse, embeddings)
        return self.fusion_conv(torch.cat([features, shown], dim=1))

    def forward(self, volumes: Tensor, queries: Tensor, coarse: Tensor | None = None) -> Tensor:
        maps, features = self.backbone(volumes)
        embeddings = self.mask_embed_proj(self.transformer_decoder(queries, *self.tokens(maps)))
        if coarse is not None:
            features = self.fused(features, embeddings, coarse)
        return torch.einsum("bchwd,bnc->bnhwd", features, embeddings)


class TextEncoder(nn.Module):
    """Tokens of names and the number of their modality, in `MODALITIES`, to queries (N, width)."""

    def __init__(self, **mpnet):
        super().__init__()
        self.text_tower = nn.Module()
        self.text_tower.biolord = MPNetModel(MPNetConfig(**mpnet), add_pooling_layer=False)
        width = self.text_tower.biolord.config.hidden_size
        self.projection_layer = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.modality_embed = nn.Embedding(len(MODALITIES), width)

    def forward(self, tokens: Tensor, mask: Tensor, modality: Tensor) -> Tensor:
        """Tokens and mask (N, L), modality (N,): the mean over the words that are there, projected, and its vector."""
        words = self.text_tower.biolord(input_ids=tokens, attention_mask=mask).last_hidden_state
        there = mask[..., None].to(words)
        mean = (words * there).sum(1) / there.sum(1).clamp_min(1e-9)
        return self.projection_layer(mean) + self.modality_embed(modality)


def load_medal_s(weights: str | Path, heads: int = HEADS) -> MedalS:
    """The segmentation model of a downloaded checkpoint, in evaluation mode; its sizes are those of the weights.

    Weights of intermediate outputs, which only training has, are left out. MedcookError naming what does not fit.
    """

    def build(state: dict[str, Tensor]) -> MedalS:
        firsts = numbered(state, r"backbone\.encoder\.stages\.\d+\.0\.convs\.0\.conv\.weight")
        layers = numbered(state, r"transformer_decoder\.layers\.\d+\.linear1\.weight")
        hidden, width = layers[0].shape
        return MedalS(
            firsts[0].shape[1],
            tuple(map(len, firsts)),
            width,
            heads,
            len(layers),
            (hidden, len(state["mask_embed_proj.0.weight"])),
        )

    return loaded(weights, build)


def load_text_encoder(weights: str | Path, heads: int = 12) -> TextEncoder:
    """The text encoder of a downloaded checkpoint, in evaluation mode; the pictures' side of it is left out."""

    def build(state: dict[str, Tensor]) -> TextEncoder:
        name = "text_tower.biolord."
        words, width = state[f"{name}embeddings.word_embeddings.weight"].shape
        layers = numbered(state, r"text_tower\.biolord\.encoder\.layer\.\d+\.intermediate\.dense\.weight")
        buckets, _ = state[f"{name}encoder.relative_attention_bias.weight"].shape
        return TextEncoder(
            vocab_size=words,
            hidden_size=width,
            num_hidden_layers=len(layers),
            num_attention_heads=heads,
            intermediate_size=len(layers[0]),
            max_position_embeddings=len(state[f"{name}embeddings.position_embeddings.weight"]),
            relative_attention_num_buckets=buckets,
        )

    return loaded(weights, build)


def numbered(state: dict[str, Tensor], pattern: str) -> list[Tensor]:
    """The weights whose names match, in the order of their number."""
    names = sorted((name for name in state if re.fullmatch(pattern, name)), key=lambda n: int(re.search(r"\d+", n)[0]))
    if not names:
        raise KeyError(f"no weight is named as {pattern}")
    return [state[name] for name in names]


def loaded(weights: str | Path, build) -> nn.Module:
    """A model of these weights, in evaluation mode; `build` makes an empty one of what the weights' sizes say."""
    weights = Path(weights)
    if not weights.is_file():
        raise MedcookError(f"{weights}: there is no Medal S checkpoint.", f"See {SOURCE} for its two checkpoints.")
    try:
        stored = torch.load(weights, map_location="cpu", weights_only=True)["model_state_dict"]
        state = {name.removeprefix("module."): tensor.float() for name, tensor in stored.items()}
        model = build(state)
        model.load_state_dict({name: state[name] for name in model.state_dict() if name in state})
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise MedcookError(f"{weights}: the checkpoint cannot be read ({reason}).", "Download it again.") from error
    return model.eval()
