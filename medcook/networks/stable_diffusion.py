"""The architecture of Stable Diffusion 1 (Rombach et al., CVPR 2022), and the reader of a published checkpoint.

An autoencoder (`medcook.networks.latents`) makes images into latents and back; a U-Net finds the noise in latents, told
the time by an embedding that every residual block adds, and a sentence by attention to its words; CLIP's text encoder,
that of transformers, reads the sentence. A checkpoint is a folder as diffusers writes it (`unet`, `vae`,
`text_encoder`, `tokenizer`), with weights as safetensors. Parts are called here as the published weights are.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from medcook.errors import MedcookError
from medcook.networks.latents import Autoencoder, Resnet, Sampler, level

CHANNELS = (320, 640, 1280, 1280)
WEIGHTS = "diffusion_pytorch_model.safetensors"
OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Older names in the autoencoder's attention."""


class Attention(nn.Module):
    """Tokens (B, N, C) attend to others (B, T, D)."""

    def __init__(self, width: int, others: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = (nn.Linear(others, width, bias=False) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, others: Tensor) -> Tensor:
        parts = (self.to_q(x), self.to_k(others), self.to_v(others))
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        return self.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Gated(nn.Module):
    """Twice as many channels, of which one half gates the other by GELU."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class Transformer(nn.Module):
    """Attention to each other, to the words, and a gated network at each token; each after a norm, each added."""

    def __init__(self, width: int, words: int, heads: int):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attn1, self.attn2 = Attention(width, width, heads), Attention(width, words, heads)
        self.ff = nn.Module()
        self.ff.net = nn.Sequential(Gated(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        seen = self.norm1(x)
        x = x + self.attn1(seen, seen)
        x = x + self.attn2(self.norm2(x), words)
        return x + self.ff.net(self.norm3(x))


class Listening(nn.Module):
    """A transformer block on feature maps (B, C, H, W), which hears words (B, T, D)."""

    def __init__(self, channels: int, words: int, heads: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, 1e-6)
        self.proj_in, self.proj_out = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([Transformer(channels, words, heads)])

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        tokens = self.proj_in(self.norm(x))
        found = self.transformer_blocks[0](tokens.flatten(2).transpose(1, 2), words)
        return x + self.proj_out(found.transpose(1, 2).reshape(tokens.shape))


def timed(t: Tensor, width: int) -> Tensor:
    """(B, width) cosines, then sines, of times (B,)."""
    rates = torch.exp(-math.log(10000) * torch.arange(width // 2, device=t.device) / (width // 2))
    angles = t.float()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class UNet(nn.Module):
    """Latents (B, 4, h, w), times (B,) and words (B, T, width) to the noise in the latents."""

    def __init__(self, channels=CHANNELS, words: int = 768, heads: int = 8, groups: int = 32, latents: int = 4):
        super().__init__()
        first, last, time = channels[0], len(channels) - 1, 4 * channels[0]
        self.conv_in = nn.Conv2d(latents, first, 3, padding=1)
        self.time_embedding = nn.Module()
        self.time_embedding.linear_1, self.time_embedding.linear_2 = nn.Linear(first, time), nn.Linear(time, time)
        resnet = lambda before, after: Resnet(before, after, time, groups, 1e-5)  # noqa: E731
        hears = lambda count: Listening(count, words, heads, groups)  # noqa: E731
        self.down_blocks, skips = nn.ModuleList(), [first]
        for number, (before, count) in enumerate(zip((first, *channels), channels, strict=False)):
            attentions = [hears(count) for _ in range(2)] if number < last else []
            halves = [Sampler(count, down=True)] if number < last else []
            resnets = [resnet(before, count), resnet(count, count)]
            self.down_blocks.append(level(resnets=resnets, attentions=attentions, downsamplers=halves))
            skips += [count] * (3 if number < last else 2)
        deep = channels[-1]
        self.mid_block = level(resnets=[resnet(deep, deep) for _ in range(2)], attentions=[hears(deep)])
        self.up_blocks, before = nn.ModuleList(), deep
        for number, count in enumerate(reversed(channels)):
            resnets = [resnet((count if k else before) + skips.pop(), count) for k in range(3)]
            attentions = [hears(count) for _ in range(3)] if number else []
            doubles = [Sampler(count, down=False)] if number < last else []
            self.up_blocks.append(level(resnets=resnets, attentions=attentions, upsamplers=doubles))
            before = count
        self.conv_norm_out, self.conv_out = nn.GroupNorm(groups, first, 1e-5), nn.Conv2d(first, latents, 3, padding=1)

    def forward(self, latents: Tensor, t: Tensor, words: Tensor) -> Tensor:
        embed = self.time_embedding
        time = embed.linear_2(F.silu(embed.linear_1(timed(t, self.conv_in.out_channels))))
        x = self.conv_in(latents)
        skips = [x]
        for block in self.down_blocks:
            for number, resnet in enumerate(block.resnets):
                x = resnet(x, time)
                x = block.attentions[number](x, words) if hasattr(block, "attentions") else x
                skips.append(x)
            if hasattr(block, "downsamplers"):
                x = block.downsamplers[0](x)
                skips.append(x)
        x = self.mid_block.attentions[0](self.mid_block.resnets[0](x, time), words)
        x = self.mid_block.resnets[1](x, time)
        for block in self.up_blocks:
            for number, resnet in enumerate(block.resnets):
                x = resnet(torch.cat([x, skips.pop()], dim=1), time)
                x = block.attentions[number](x, words) if hasattr(block, "attentions") else x
            if hasattr(block, "upsamplers"):
                x = block.upsamplers[0](x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


def part_of(folder: Path, name: str, build) -> nn.Module:
    """A part of a checkpoint, in evaluation mode; `build` makes an empty one of its config.json."""
    path = folder / name
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        stored = {current(key): tensor.float() for key, tensor in load_file(path / WEIGHTS).items()}
        model = build(config)
        model.load_state_dict({key: squeezed(stored[key], own) for key, own in model.state_dict().items()})
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise MedcookError(f"{path}: this part of the checkpoint cannot be read ({reason}).", HINT) from error
    return model.eval()


HINT = "Take a whole folder of Stable Diffusion 1 in the format of diffusers, with weights as safetensors."


def current(name: str) -> str:
    """A weight's name as it is called today."""
    parts = name.split(".")
    if "attentions" in parts and parts[-2] in OLD:
        parts[-2] = OLD[parts[-2]]
    return ".".join(parts)


def squeezed(stored: Tensor, own: Tensor) -> Tensor:
    """A stored weight as a matrix, where it was written as a convolution of one pixel."""
    return stored.flatten(1) if stored.ndim == 4 and own.ndim == 2 else stored


class StableDiffusion:
    """A checkpoint, ready to make images of sentences."""

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        self.unet = part_of(folder, "unet", unet_of)
        self.vae = part_of(folder, "vae", lambda c: Autoencoder(tuple(c["block_out_channels"]), c["norm_num_groups"]))
        try:
            self.text = CLIPTextModel.from_pretrained(folder / "text_encoder", local_files_only=True).eval()
            self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        except Exception as error:
            raise MedcookError(f"{folder}: text encoder or tokenizer cannot be read.", HINT) from error

    @torch.no_grad()
    def words(self, sentences: list[str]) -> Tensor:
        """(B, T, width): what attention hears."""
        length = self.text.config.max_position_embeddings
        found = self.tokenizer(sentences, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return self.text(found["input_ids"]).last_hidden_state

    @torch.no_grad()
    def images(self, sentences: list[str], side: int = 512, steps: int = 50, guidance: float = 7.5, seed: int = 0):
        """Images (B, 3, side, side), 0 to 1, by DDIM (Song et al., ICLR 2021), guided away from the empty sentence."""
        words, nothing = self.words(sentences), self.words([""] * len(sentences))
        rng = torch.Generator().manual_seed(seed)
        small = side // 2 ** (len(self.vae.encoder.down_blocks) - 1)
        x, signal = torch.randn(len(sentences), 4, small, small, generator=rng), signals()
        times = [1 + k * (len(signal) // steps) for k in reversed(range(steps))]
        for t, following in zip(times, [*times[1:], 0], strict=True):
            at = torch.full((len(x),), t)
            told, untold = self.unet(x, at, words), self.unet(x, at, nothing)
            noise = untold + guidance * (told - untold)
            clean = (x - (1 - signal[t]).sqrt() * noise) / signal[t].sqrt()
            x = signal[following].sqrt() * clean + (1 - signal[following]).sqrt() * noise
        return (self.vae.images(x) / 2 + 0.5).clamp(0, 1)


def signals(times: int = 1000) -> Tensor:
    """The share of the variance that is image at each time; the square roots of the noise's steps are evenly spaced."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, times, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0).float()


def unet_of(config: dict) -> UNet:
    """The U-Net that its config.json describes."""
    if config.get("use_linear_projection") or not isinstance(config["attention_head_dim"], int):
        raise ValueError("this is a U-Net of Stable Diffusion 2 or later")
    sizes = (tuple(config["block_out_channels"]), config["cross_attention_dim"], config["attention_head_dim"])
    return UNet(*sizes, config["norm_num_groups"], config["in_channels"])
