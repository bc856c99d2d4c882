"""BiomedParse with random weights by the published names, its parts in transformers, and its decoder written out."""

import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, FocalNetConfig, FocalNetModel

PUBLISHED = {
    "stages": (192, (2, 2, 18, 2), 4, 3),
    "width": 512,
    "inner": 2048,
    "layers": (6, 9),
    "queries": 101,
    "text": (49408, 77, 512, 12),
}
"""Of biomedparse_v1.pt. FocalNet: width, blocks, levels, window; text: words, length, width, layers."""
TINY = {
    "stages": (4, (1, 2, 1, 1), 2, 3),
    "width": 64,
    "inner": 12,
    "layers": (2, 4),
    "queries": 5,
    "text": (13, 7, 8, 2),
}
HEADS = 4
PREDICTOR, PIXELS = "sem_seg_head.predictor", "sem_seg_head.pixel_decoder"
TEXT = f"{PREDICTOR}.lang_encoder.lang_encoder"

FOCAL = (
    (r"^backbone\.patch_embed\.proj", "embeddings.patch_embeddings.projection"),
    (r"^backbone\.patch_embed\.norm", "embeddings.norm"),
    (r"^backbone\.layers\.(\d+)\.blocks", r"encoder.stages.\1.layers"),
    (r"^backbone\.layers\.(\d+)\.downsample\.proj", r"encoder.stages.\1.downsample.projection"),
    (r"^backbone\.layers", "encoder.stages"),
    (r"modulation\.f\.", "modulation.projection_in."),
    (r"modulation\.h\.", "modulation.projection_context."),
    (r"modulation\.proj\.", "modulation.projection_out."),
    (r"^backbone\.norm3\.", "layernorm."),
)
CLIP = (
    (rf"^{TEXT}\.token_embedding", "embeddings.token_embedding"),
    (rf"^{TEXT}\.positional_embedding", "embeddings.position_embedding.weight"),
    (rf"^{TEXT}\.ln_final", "final_layer_norm"),
    (rf"^{TEXT}\.resblocks", "encoder.layers"),
    (r"\.attn\.", ".self_attn."),
    (r"\.ln_", ".layer_norm"),
    (r"\.c_fc\.", ".fc1."),
    (r"\.c_proj\.", ".fc2."),
)
"""Published names, and those of transformers."""


def focal_model(stages: tuple) -> FocalNetModel:
    """The backbone as transformers has it; it norms the last map alone."""
    width, depths, levels, window = stages
    shape = {"embed_dim": width, "depths": list(depths), "focal_levels": [levels] * 4, "focal_windows": [window] * 4}
    kind = {"use_conv_embed": True, "use_layerscale": True, "use_post_layernorm": True, "normalize_modulator": True}
    return FocalNetModel(FocalNetConfig(**shape, **kind), add_pooling_layer=False).eval()


def text_model() -> CLIPTextModel:
    """The small text encoder as transformers has it."""
    words, length, width, layers = TINY["text"]
    shape = {"vocab_size": words, "max_position_embeddings": length, "hidden_size": width, "num_hidden_layers": layers}
    shape |= {"num_attention_heads": HEADS, "intermediate_size": 4 * width}
    ends = {"bos_token_id": 0, "eos_token_id": words - 1, "pad_token_id": words - 1}
    return CLIPTextModel(CLIPTextConfig(**shape, **ends, hidden_act="quick_gelu", layer_norm_eps=1e-12)).eval()


def into(model: nn.Module, renamed: tuple, state: dict[str, Tensor]) -> None:
    """All weights of a model of transformers from published ones."""
    found = {}
    for name, tensor in state.items():
        for pattern, new in renamed:
            name = re.sub(pattern, new, name)
        found[name] = tensor
    model.load_state_dict({name: found[name] for name in model.state_dict()})


def in_thirds(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with attention's one weight as three."""
    more = {}
    for name, tensor in state.items():
        if ".attn.in_proj_" in name:
            stem, kind = name.split("in_proj_")
            more |= {f"{stem}{part}_proj.{kind}": third for part, third in zip("qkv", tensor.chunk(3), strict=True)}
    return state | more


def shapes(sizes: dict = TINY) -> dict[str, tuple[int, ...]]:
    """{name: shape} of what the model uses of the published file."""
    found: dict[str, tuple[int, ...]] = {}

    def put(name: str, *shape: int, bias: bool = True) -> None:
        found[f"{name}.weight"] = shape
        if bias:
            found[f"{name}.bias"] = shape[:1]

    def attention(name: str, width: int) -> None:
        found[f"{name}.in_proj_weight"], found[f"{name}.in_proj_bias"] = (3 * width, width), (3 * width,)
        put(f"{name}.out_proj", width, width)

    first, depths, levels, window = sizes["stages"]
    put("backbone.patch_embed.proj", first, 3, 7, 7), put("backbone.patch_embed.norm", first)
    widths = [first * 2**number for number in range(4)]
    for stage, (each, depth) in enumerate(zip(widths, depths, strict=True)):
        for number in range(depth):
            name = f"backbone.layers.{stage}.blocks.{number}"
            put(f"{name}.modulation.f", 2 * each + levels + 1, each), put(f"{name}.modulation.h", each, each, 1, 1)
            put(f"{name}.modulation.proj", each, each)
            for level in range(levels):
                size = window + 2 * level
                put(f"{name}.modulation.focal_layers.{level}.0", each, 1, size, size, bias=False)
            put(f"{name}.mlp.fc1", 4 * each, each), put(f"{name}.mlp.fc2", each, 4 * each)
            put(f"{name}.norm1", each), put(f"{name}.norm2", each)
            found[f"{name}.gamma_1"] = found[f"{name}.gamma_2"] = (each,)
        put(f"backbone.norm{stage}", each)
        if stage < 3:
            name = f"backbone.layers.{stage}.downsample"
            put(f"{name}.proj", 2 * each, each, 3, 3), put(f"{name}.norm", 2 * each)

    width, inner, queries = sizes["width"], sizes["inner"], sizes["queries"]
    put(f"{PIXELS}.input_proj", width, widths[-1], 1, 1), put(f"{PIXELS}.mask_features", width, width, 3, 3)
    for number in range(1, 5):
        put(f"{PIXELS}.layer_{number}", width, width, 3, 3, bias=False), put(f"{PIXELS}.layer_{number}.norm", width)
    for number, each in enumerate(widths[:3], 1):
        put(f"{PIXELS}.adapter_{number}", width, each, 1, 1, bias=False), put(f"{PIXELS}.adapter_{number}.norm", width)
    for number in range(sizes["layers"][0]):
        name = f"{PIXELS}.transformer.encoder.layers.{number}"
        attention(f"{name}.self_attn", width)
        put(f"{name}.linear1", inner, width), put(f"{name}.linear2", width, inner)
        put(f"{name}.norm1", width), put(f"{name}.norm2", width)

    for number in range(sizes["layers"][1]):
        for part, name in (("cross", "multihead_attn"), ("self", "self_attn")):
            layer = f"{PREDICTOR}.transformer_{part}_attention_layers.{number}"
            attention(f"{layer}.{name}", width), put(f"{layer}.norm", width)
        layer = f"{PREDICTOR}.transformer_ffn_layers.{number}"
        put(f"{layer}.linear1", inner, width), put(f"{layer}.linear2", width, inner), put(f"{layer}.norm", width)
        if number < 3:
            put(f"{PREDICTOR}.mask_embed.layers.{number}", width, width)
    put(f"{PREDICTOR}.decoder_norm", width), put(f"{PREDICTOR}.level_embed", 3, width, bias=False)
    put(f"{PREDICTOR}.query_feat", queries, width, bias=False)
    put(f"{PREDICTOR}.query_embed", queries, width, bias=False)
    found[f"{PREDICTOR}.class_embed"] = (width, width)

    words, length, text, layers = sizes["text"]
    put(f"{TEXT}.token_embedding", words, text, bias=False), put(f"{TEXT}.ln_final", text)
    found[f"{TEXT}.positional_embedding"] = (length, text)
    for number in range(layers):
        name = f"{TEXT}.resblocks.{number}"
        attention(f"{name}.attn", text)
        put(f"{name}.ln_1", text), put(f"{name}.ln_2", text)
        put(f"{name}.mlp.c_fc", 4 * text, text), put(f"{name}.mlp.c_proj", text, 4 * text)
    found[f"{PREDICTOR}.lang_encoder.lang_proj"] = (text, width)
    found[f"{PREDICTOR}.lang_encoder.logit_scale"] = ()
    return found


def published(seed: int = 0) -> dict[str, Tensor]:
    """A small file, with some weights of strokes and of the PubMedBERT that is carried along."""
    rng = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes().items():
        spread = 0.5 if len(shape) < 2 else min(0.5, 1.5 / math.prod(shape[1:]) ** 0.5)
        state[name] = spread * torch.randn(shape, generator=rng) + ("norm" in name and name.endswith("weight"))
    state[f"{PREDICTOR}.pn_indicator.weight"] = torch.zeros(2, 64)
    state[f"{PREDICTOR}.mask_sptial_embed.0"] = torch.zeros(64, 64)
    state[f"{PREDICTOR}.lang_encoder.biomed_encoder.pooler.dense.weight"] = torch.zeros(3, 3)
    state["dilation_kernel"] = torch.ones(1, 1, 3, 3)
    return state


class Reference:
    """The published decoder, from its weights alone, for one image."""

    def __init__(self, state: dict[str, Tensor]):
        self.state = state

    def line(self, name: str, x: Tensor) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        return x * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def conv(self, name: str, x: Tensor, padding: int) -> Tensor:
        """(C, H, W), and a norm over 32 groups of channels."""
        x = F.conv2d(x[None], self.state[f"{name}.weight"], padding=padding)[0]
        groups = x.reshape(32, -1)
        groups = (groups - groups.mean(1, keepdim=True)) / (groups.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
        weight, bias = (self.state[f"{name}.norm.{part}"][:, None, None] for part in ("weight", "bias"))
        return groups.reshape(x.shape) * weight + bias

    def attended(self, name: str, asking: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None = None) -> Tensor:
        """(N, width); seen (N, T) is True where a query looks."""
        weights, biases = (self.state[f"{name}.in_proj_{part}"].chunk(3) for part in ("weight", "bias"))
        q, k, v = (x @ w.T + b for x, w, b in zip((asking, keys, values), weights, biases, strict=True))
        heads = []
        for a, b, c in zip(*(part.chunk(HEADS, 1) for part in (q, k, v)), strict=True):
            fits = a @ b.T / a.shape[1] ** 0.5
            heads.append((fits if seen is None else fits.masked_fill(~seen, -math.inf)).softmax(1) @ c)
        return self.line(f"{name}.out_proj", torch.cat(heads, 1))

    def thought(self, name: str, x: Tensor) -> Tensor:
        return self.line(f"{name}.linear2", self.line(f"{name}.linear1", x).clamp_min(0))

    def pyramid(self, maps: list[Tensor], code) -> tuple[Tensor, list[Tensor]]:
        """Four maps (C, H, W); code(height, width) gives places (cells, width)."""
        deep = F.conv2d(maps[3][None], self.state[f"{PIXELS}.input_proj.weight"])[0]
        deep = deep + self.state[f"{PIXELS}.input_proj.bias"][:, None, None]
        x, places = deep.flatten(1).T, code(*deep.shape[1:])
        for number in range(TINY["layers"][0]):
            name = f"{PIXELS}.transformer.encoder.layers.{number}"
            x = self.norm(f"{name}.norm1", x + self.attended(f"{name}.self_attn", x + places, x + places, x))
            x = self.norm(f"{name}.norm2", x + self.thought(name, x))
        found = [self.conv(f"{PIXELS}.layer_4", x.T.reshape(deep.shape), 1).clamp_min(0)]
        for number in (3, 2, 1):
            larger = found[-1].repeat_interleave(2, 1).repeat_interleave(2, 2)
            here = self.conv(f"{PIXELS}.adapter_{number}", maps[number - 1], 0) + larger
            found.append(self.conv(f"{PIXELS}.layer_{number}", here, 1).clamp_min(0))
        features = F.conv2d(found[3][None], self.state[f"{PIXELS}.mask_features.weight"], padding=1)[0]
        return features + self.state[f"{PIXELS}.mask_features.bias"][:, None, None], found[:3]

    def masks(self, queries: Tensor, features: Tensor) -> Tensor:
        x = self.norm(f"{PREDICTOR}.decoder_norm", queries)
        for number in range(3):
            x = self.line(f"{PREDICTOR}.mask_embed.layers.{number}", x if number == 0 else x.clamp_min(0))
        return torch.stack([(features * one[:, None, None]).sum(0) for one in x])

    def decoded(self, features: Tensor, maps: list[Tensor], words: Tensor, code) -> tuple[Tensor, Tensor]:
        """Masks (Q, h, w) and vectors (Q, width) of all queries; words (T, width) are what the names say."""
        x, own = (self.state[f"{PREDICTOR}.{name}.weight"] for name in ("query_feat", "query_embed"))
        count, told = len(x), words
        for number in range(TINY["layers"][1]):
            scale = (number % 3, maps[number % 3])
            tokens = scale[1].flatten(1).T + self.state[f"{PREDICTOR}.level_embed.weight"][scale[0]]
            small = F.interpolate(self.masks(x, features)[None], scale[1].shape[1:], mode="bilinear")[0]
            seen = small.flatten(1) >= 0
            seen[~seen.any(1)] = True
            name = f"{PREDICTOR}.transformer_cross_attention_layers.{number}"
            places = code(*scale[1].shape[1:])
            asked = self.attended(f"{name}.multihead_attn", x + own, tokens + places, tokens, seen)
            x = torch.cat([self.norm(f"{name}.norm", x + asked), told])
            name, placed = f"{PREDICTOR}.transformer_self_attention_layers.{number}", x + torch.cat([own, words])
            x = self.norm(f"{name}.norm", x + self.attended(f"{name}.self_attn", placed, placed, x))
            name = f"{PREDICTOR}.transformer_ffn_layers.{number}"
            x = self.norm(f"{name}.norm", x + self.thought(name, x))
            x, told = x[:count], x[count:]
        vectors = self.norm(f"{PREDICTOR}.decoder_norm", x) @ self.state[f"{PREDICTOR}.class_embed"]
        return self.masks(x, features), vectors
