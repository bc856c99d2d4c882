"""A small VILA-M3 with random weights by the published names, and the published model written out for it."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from named_shapes import line, norm
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

from medcook.networks.vila import IMAGE

EYES = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2}
EYES |= {"image_size": 20, "patch_size": 4}
MOUTH = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3}
MOUTH |= {"num_key_value_heads": 1, "vocab_size": 9, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
MOUTH |= {"bos_token_id": 0, "eos_token_id": 1}
VOCABULARY = ("<s>", "</s>", "USER", "ASSISTANT", ":", "lungs", "are", "large", "?")


def published_state() -> dict[str, dict[str, Tensor]]:
    """{part: weights} with random values, by their published names."""
    start, shapes = "vision_model", {"vision_tower": {}, "mm_projector": {}, "llm": {}}
    eyes, llm = shapes["vision_tower"], shapes["llm"]
    eyes |= {
        f"{start}.embeddings.patch_embedding.weight": (8, 3, 4, 4),
        f"{start}.embeddings.patch_embedding.bias": (8,),
    }
    eyes |= {f"{start}.embeddings.position_embedding.weight": (25, 8), f"{start}.head.probe": (1, 1, 8)}
    for number in range(3):
        layer = f"{start}.encoder.layers.{number}"
        for part in ("k", "v", "q", "out"):
            eyes |= line(f"{layer}.self_attn.{part}_proj", 8, 8)
        eyes |= norm(f"{layer}.layer_norm1", 8) | norm(f"{layer}.layer_norm2", 8)
        eyes |= line(f"{layer}.mlp.fc1", 8, 12) | line(f"{layer}.mlp.fc2", 12, 8)
    eyes |= norm(f"{start}.post_layernorm", 8) | norm(f"{start}.head.layernorm", 8)
    eyes |= {f"{start}.head.attention.in_proj_weight": (24, 8), f"{start}.head.attention.in_proj_bias": (24,)}
    eyes |= line(f"{start}.head.attention.out_proj", 8, 8)
    eyes |= line(f"{start}.head.mlp.fc1", 8, 12) | line(f"{start}.head.mlp.fc2", 12, 8)
    shapes["mm_projector"] |= norm("layers.1", 32) | line("layers.2", 32, 12) | line("layers.4", 12, 12)
    llm |= {"model.embed_tokens.weight": (9, 12), "model.norm.weight": (12,), "lm_head.weight": (9, 12)}
    for number in range(2):
        layer = f"model.layers.{number}"
        llm |= {f"{layer}.input_layernorm.weight": (12,), f"{layer}.post_attention_layernorm.weight": (12,)}
        for part, outputs in (("q", 12), ("k", 4), ("v", 4), ("o", 12)):
            llm |= line(f"{layer}.self_attn.{part}_proj", 12, outputs, bias=False)
        for part, (inputs, outputs) in {"gate": (12, 20), "up": (12, 20), "down": (20, 12)}.items():
            llm |= line(f"{layer}.mlp.{part}_proj", inputs, outputs, bias=False)
    rng = torch.Generator().manual_seed(0)
    return {
        part: {name: 0.5 * torch.randn(shape, generator=rng) for name, shape in names.items()}
        for part, names in shapes.items()
    }


class Reference:
    """The published model's forward pass from its own names, patch by patch and token by token."""

    def __init__(self):
        self.parts = published_state()

    def line(self, part: str, name: str, x: Tensor) -> Tensor:
        bias = self.parts[part].get(f"{name}.bias", torch.zeros(1))
        return x @ self.parts[part][f"{name}.weight"].T + bias

    def norm(self, part: str, name: str, x: Tensor, eps: float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return self.parts[part][f"{name}.weight"] * scaled + self.parts[part][f"{name}.bias"]

    def rms(self, name: str, x: Tensor) -> Tensor:
        return self.parts["llm"][f"{name}.weight"] * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    def picture(self, image: Tensor) -> Tensor:
        """(3, 20, 20) to nine picture tokens (9, 12)."""
        eyes, start = self.parts["vision_tower"], "vision_model"
        kernel = eyes[f"{start}.embeddings.patch_embedding.weight"].flatten(1)
        cells = [image[:, r : r + 4, c : c + 4].flatten() for r in range(0, 20, 4) for c in range(0, 20, 4)]
        x = torch.stack(cells) @ kernel.T + eyes[f"{start}.embeddings.patch_embedding.bias"]
        x = x + eyes[f"{start}.embeddings.position_embedding.weight"]
        for number in range(2):  # of three layers, the last is not heard
            layer = f"{start}.encoder.layers.{number}"
            seen = self.norm("vision_tower", f"{layer}.layer_norm1", x, 1e-6)
            q, k, v = (self.line("vision_tower", f"{layer}.self_attn.{part}_proj", seen) for part in "qkv")
            heads = [(q[:, h] @ k[:, h].T / 2).softmax(1) @ v[:, h] for h in (slice(0, 4), slice(4, 8))]
            x = x + self.line("vision_tower", f"{layer}.self_attn.out_proj", torch.cat(heads, 1))
            inner = self.line(
                "vision_tower", f"{layer}.mlp.fc1", self.norm("vision_tower", f"{layer}.layer_norm2", x, 1e-6)
            )
            x = x + self.line("vision_tower", f"{layer}.mlp.fc2", F.gelu(inner, approximate="tanh"))
        grid, tokens = x.view(5, 5, 8), []
        at = lambda r, c: grid[r, c] if r < 5 and c < 5 else torch.zeros(8)  # noqa: E731
        for r in range(0, 5, 2):
            for c in range(0, 5, 2):
                tokens.append(torch.cat([at(r, c), at(r, c + 1), at(r + 1, c), at(r + 1, c + 1)]))
        four = self.norm("mm_projector", "layers.1", torch.stack(tokens), 1e-5)
        return self.line("mm_projector", "layers.4", F.gelu(self.line("mm_projector", "layers.2", four)))

    def logits(self, row: list[int], pictures: list[Tensor]) -> Tensor:
        """Of what comes after a row of words and pictures, (9,)."""
        given, pictures = [], list(pictures)
        for word in row:
            given.append(pictures.pop(0) if word == IMAGE else self.parts["llm"]["model.embed_tokens.weight"][[word]])
        x = torch.cat(given)
        for number in range(2):
            layer = f"model.layers.{number}"
            seen = self.rms(f"{layer}.input_layernorm", x)
            q, k, v = (self.line("llm", f"{layer}.self_attn.{part}_proj", seen) for part in "qkv")
            k = self.turned(k)
            heads = []
            for head in q.split(4, 1):
                similar = self.turned(head) @ k.T / 2
                heads.append(similar.masked_fill(torch.ones_like(similar).triu(1) > 0, -torch.inf).softmax(1) @ v)
            x = x + self.line("llm", f"{layer}.self_attn.o_proj", torch.cat(heads, 1))
            seen = self.rms(f"{layer}.post_attention_layernorm", x)
            inner = F.silu(self.line("llm", f"{layer}.mlp.gate_proj", seen)) * self.line(
                "llm", f"{layer}.mlp.up_proj", seen
            )
            x = x + self.line("llm", f"{layer}.mlp.down_proj", inner)
        return self.rms("model.norm", x[-1]) @ self.parts["llm"]["lm_head.weight"].T

    def turned(self, x: Tensor) -> Tensor:
        """(L, 4): pairs of numbers as complex ones, turned by an angle that grows with the place."""
        number = torch.complex(x[:, :2], x[:, 2:])
        angle = torch.arange(len(x))[:, None] * 10000.0 ** -torch.tensor([0.0, 0.5])
        number = number * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([number.real, number.imag], dim=1)


def write(folder: Path, parts: dict | None = None, dtype=torch.float32) -> Path:
    """A checkpoint in the published layout; the language model is in two files."""
    parts, configs = parts or published_state(), {"mm_projector": {"mm_projector_type": "mlp_downsample"}}
    configs |= {"vision_tower": EYES | {"model_type": "siglip_vision_model"}, "llm": MOUTH | {"model_type": "llama"}}
    for part, state in parts.items():
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(configs[part]), encoding="utf-8")
        state = {name: tensor.to(dtype).contiguous() for name, tensor in state.items()}
        if part != "llm":
            save_file(state, folder / part / "model.safetensors")
            continue
        files = {name: f"model-0000{1 + k % 2}-of-00002.safetensors" for k, name in enumerate(state)}
        for file in set(files.values()):
            save_file({name: state[name] for name in files if files[name] == file}, folder / part / file)
        (folder / part / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}), encoding="utf-8")
    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(VOCABULARY)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(":", "isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "llm" / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "?"}
    (folder / "llm" / "tokenizer_config.json").write_text(json.dumps(kind), encoding="utf-8")
    return folder
