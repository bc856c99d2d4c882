"""A small Stable Diffusion with random weights by the published names, and the published model written out for it."""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from medcook.networks.latents import SCALE, Autoencoder
from medcook.networks.stable_diffusion import UNet

CHANNELS, GROUPS, HEADS, WIDTH = (8, 16, 24), 4, 2, 12
VOCABULARY = ["<|startoftext|>", "<|endoftext|>", "!", "a", "b"]


def weights() -> dict[str, dict[str, Tensor]]:
    """Of `unet` and `vae`: names as published, since the parts are called so; none is as it was initialised."""
    torch.manual_seed(0)
    found = {"unet": UNet(CHANNELS, WIDTH, HEADS, GROUPS), "vae": Autoencoder(CHANNELS, GROUPS)}
    moved = lambda part: {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in part.items()}  # noqa: E731
    return {name: moved(model.state_dict()) for name, model in found.items()}


def write(folder: Path, parts: dict[str, dict[str, Tensor]] | None = None) -> Path:
    """A checkpoint in the format of diffusers."""
    common = {"block_out_channels": list(CHANNELS), "norm_num_groups": GROUPS}
    configs = {
        "unet": common | {"cross_attention_dim": WIDTH, "attention_head_dim": HEADS, "in_channels": 4},
        "vae": common,
    }
    for name, state in (parts or weights()).items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(configs[name]), encoding="utf-8")
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / name / FILE)
    torch.manual_seed(1)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextConfig(
        vocab_size=len(VOCABULARY), max_position_embeddings=6, eos_token_id=1, bos_token_id=0, **sizes
    )
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    words = folder / "tokenizer"
    words.mkdir()
    table = {word if word.startswith("<") else f"{word}</w>": number for number, word in enumerate(VOCABULARY)}
    (words / "vocab.json").write_text(json.dumps(table), encoding="utf-8")
    (words / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    ends = {name: "<|endoftext|>" for name in ("unk_token", "pad_token", "eos_token")}
    (words / "tokenizer_config.json").write_text(json.dumps(ends | {"bos_token": "<|startoftext|>"}), encoding="utf-8")
    return folder


FILE = "diffusion_pytorch_model.safetensors"


class Reference:
    """One part, from its weights alone, for one case: maps are (C, H, W)."""

    def __init__(self, state: dict[str, Tensor], eps: float):
        self.state, self.eps = state, eps

    def has(self, name: str) -> bool:
        return any(key.startswith(f"{name}.") for key in self.state)

    def norm(self, name: str, x: Tensor, eps: float | None = None) -> Tensor:
        """Over groups of channels."""
        parts = []
        for group in x.chunk(GROUPS):
            parts.append((group - group.mean()) / (group.var(correction=0) + (eps or self.eps)).sqrt())
        return (
            torch.cat(parts) * self.state[f"{name}.weight"][:, None, None] + self.state[f"{name}.bias"][:, None, None]
        )

    def layer_norm(self, name: str, x: Tensor) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        return x * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def line(self, name: str, x: Tensor) -> Tensor:
        found = x @ self.state[f"{name}.weight"].T
        return found + self.state[f"{name}.bias"] if f"{name}.bias" in self.state else found

    def conv(self, name: str, x: Tensor, **how) -> Tensor:
        how = {"padding": self.state[f"{name}.weight"].shape[2] // 2} | how
        return F.conv2d(x[None], self.state[f"{name}.weight"], self.state[f"{name}.bias"], **how)[0]

    def resnet(self, name: str, x: Tensor, time: Tensor | None) -> Tensor:
        found = self.conv(f"{name}.conv1", swish(self.norm(f"{name}.norm1", x)))
        if time is not None:
            found = found + self.line(f"{name}.time_emb_proj", swish(time))[:, None, None]
        found = self.conv(f"{name}.conv2", swish(self.norm(f"{name}.norm2", found)))
        return found + (self.conv(f"{name}.conv_shortcut", x) if self.has(f"{name}.conv_shortcut") else x)

    def attend(self, name: str, x: Tensor, others: Tensor, heads: int) -> Tensor:
        parts = (self.line(f"{name}.to_{k}", source) for k, source in (("q", x), ("k", others), ("v", others)))
        found = []
        for q, k, v in zip(*(part.chunk(heads, 1) for part in parts), strict=True):
            found.append((q @ k.T / q.shape[1] ** 0.5).softmax(1) @ v)
        return self.line(f"{name}.to_out.0", torch.cat(found, 1))

    def listen(self, name: str, x: Tensor, words: Tensor) -> Tensor:
        tokens = self.conv(f"{name}.proj_in", self.norm(f"{name}.norm", x, 1e-6)).flatten(1).T
        block = f"{name}.transformer_blocks.0"
        seen = self.layer_norm(f"{block}.norm1", tokens)
        tokens = tokens + self.attend(f"{block}.attn1", seen, seen, HEADS)
        tokens = tokens + self.attend(f"{block}.attn2", self.layer_norm(f"{block}.norm2", tokens), words, HEADS)
        value, gate = self.line(f"{block}.ff.net.0.proj", self.layer_norm(f"{block}.norm3", tokens)).chunk(2, 1)
        tokens = tokens + self.line(f"{block}.ff.net.2", value * F.gelu(gate))
        return x + self.conv(f"{name}.proj_out", tokens.T.reshape(x.shape))

    def noise(self, x: Tensor, t: int, words: Tensor) -> Tensor:
        """Latents (4, h, w) and words (T, WIDTH) to the noise."""
        half = CHANNELS[0] // 2
        angles = [t * math.exp(-math.log(10000) * k / half) for k in range(half)]
        time = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
        time = self.line("time_embedding.linear_2", swish(self.line("time_embedding.linear_1", time)))
        x = self.conv("conv_in", x)
        skips = [x]
        for block in range(3):
            for k in range(2):
                x = self.resnet(f"down_blocks.{block}.resnets.{k}", x, time)
                x = self.listen(f"down_blocks.{block}.attentions.{k}", x, words) if block < 2 else x
                skips.append(x)
            if block < 2:
                x = self.conv(f"down_blocks.{block}.downsamplers.0.conv", x, stride=2)
                skips.append(x)
        x = self.listen("mid_block.attentions.0", self.resnet("mid_block.resnets.0", x, time), words)
        x = self.resnet("mid_block.resnets.1", x, time)
        for block in range(3):
            for k in range(3):
                x = self.resnet(f"up_blocks.{block}.resnets.{k}", torch.cat([x, skips.pop()]), time)
                x = self.listen(f"up_blocks.{block}.attentions.{k}", x, words) if block else x
            if block < 2:
                doubled = x.repeat_interleave(2, 1).repeat_interleave(2, 2)
                x = self.conv(f"up_blocks.{block}.upsamplers.0.conv", doubled)
        return self.conv("conv_out", swish(self.norm("conv_norm_out", x)))

    def middle(self, side: str, x: Tensor) -> Tensor:
        x = self.resnet(f"{side}.mid_block.resnets.0", x, None)
        name = f"{side}.mid_block.attentions.0"
        tokens = self.norm(f"{name}.group_norm", x).flatten(1).T
        x = x + self.attend(name, tokens, tokens, 1).T.reshape(x.shape)
        return self.resnet(f"{side}.mid_block.resnets.1", x, None)

    def encoded(self, x: Tensor) -> Tensor:
        x = self.conv("encoder.conv_in", x)
        for block in range(3):
            for k in range(2):
                x = self.resnet(f"encoder.down_blocks.{block}.resnets.{k}", x, None)
            if block < 2:
                filled = F.pad(x, (0, 1, 0, 1))
                x = self.conv(f"encoder.down_blocks.{block}.downsamplers.0.conv", filled, stride=2, padding=0)
        x = self.conv("encoder.conv_out", swish(self.norm("encoder.conv_norm_out", self.middle("encoder", x))))
        return SCALE * self.conv("quant_conv", x)[:4]

    def decoded(self, x: Tensor) -> Tensor:
        x = self.middle("decoder", self.conv("decoder.conv_in", self.conv("post_quant_conv", x / SCALE)))
        for block in range(3):
            for k in range(3):
                x = self.resnet(f"decoder.up_blocks.{block}.resnets.{k}", x, None)
            if block < 2:
                doubled = x.repeat_interleave(2, 1).repeat_interleave(2, 2)
                x = self.conv(f"decoder.up_blocks.{block}.upsamplers.0.conv", doubled)
        return self.conv("decoder.conv_out", swish(self.norm("decoder.conv_norm_out", x)))


def swish(x: Tensor) -> Tensor:
    return x * x.sigmoid()
