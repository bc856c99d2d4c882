"""A small MedImageInsight with random weights by the published names, and the published model written out for it."""

from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from named_shapes import line, norm
from safetensors.torch import save_file
from torch import Tensor

from medcook.networks.unicl import PUBLISHED, TOKENIZER

VOCABULARY = ("!", "a</w>", "b</w>", "c</w>", "<|startoftext|>", "<|endoftext|>")
HEADS, GROUPS, WINDOW = [1, 2], [2, 4], 3


def tiny_config() -> dict:
    config = deepcopy(PUBLISHED)
    two = {name: values[:2] for name, values in config["IMAGE_ENCODER"]["SPEC"].items() if name != "WINDOW_SIZE"}
    two |= {"DIM_EMBED": [8, 16], "DEPTHS": [1, 2], "NUM_HEADS": HEADS, "NUM_GROUPS": GROUPS, "WINDOW_SIZE": WINDOW}
    config["IMAGE_ENCODER"] |= {"IMAGE_SIZE": [40, 40], "SPEC": two, "NUM_CLASSES": 0}
    config["LANG_ENCODER"] = {"CONTEXT_LENGTH": 7, "WIDTH": 12, "HEADS": 3, "LAYERS": 2, "AUTOGRESSIVE": False}
    config["UNICL_MODEL"] = {"DIM_PROJECTION": 6}
    return config


def published_state() -> dict[str, Tensor]:
    """Random weights under the published names."""
    shapes = {"lang_encoder.token_embedding.weight": (6, 12), "lang_encoder.positional_embedding": (7, 12)}
    for number in range(2):
        block = f"lang_encoder.resblocks.{number}"
        shapes |= {f"{block}.attn.in_proj_weight": (36, 12), f"{block}.attn.in_proj_bias": (36,)}
        shapes |= line(f"{block}.attn.out_proj", 12, 12) | line(f"{block}.mlp.c_fc", 12, 48)
        shapes |= line(f"{block}.mlp.c_proj", 48, 12) | norm(f"{block}.ln_1", 12) | norm(f"{block}.ln_2", 12)
    shapes |= norm("lang_encoder.ln_final", 12) | norm("image_encoder.norms", 16)
    shapes |= {"image_projection": (16, 6), "lang_projection": (12, 6), "logit_scale": ()}
    for stage, (inputs, width, kernel, depth) in enumerate([(3, 8, 7, 1), (8, 16, 3, 2)]):
        conv = f"image_encoder.convs.{stage}"
        shapes |= {f"{conv}.proj.weight": (width, inputs, kernel, kernel), f"{conv}.proj.bias": (width,)}
        shapes |= norm(f"{conv}.norm", inputs if stage else width)
        for number in range(depth):
            for kind, attention in (("spatial_block", "window_attn"), ("channel_block", "channel_attn")):
                block = f"image_encoder.blocks.{stage}.{number}.{kind}"
                for conv in ("conv1", "conv2"):
                    shapes |= {f"{block}.{conv}.fn.dw.weight": (width, 1, 3, 3), f"{block}.{conv}.fn.dw.bias": (width,)}
                shapes |= norm(f"{block}.{attention}.norm", width) | norm(f"{block}.ffn.norm", width)
                shapes |= line(f"{block}.{attention}.fn.qkv", width, 3 * width)
                shapes |= line(f"{block}.{attention}.fn.proj", width, width)
                shapes |= line(f"{block}.ffn.fn.net.fc1", width, 4 * width)
                shapes |= line(f"{block}.ffn.fn.net.fc2", 4 * width, width)
    rng = torch.Generator().manual_seed(0)
    return {name: 0.4 * torch.randn(shape, generator=rng) for name, shape in shapes.items()}


class Reference:
    """The published model's forward pass from its own names, token by token and window by window."""

    def __init__(self, state: dict[str, Tensor]):
        self.state = state

    def line(self, name: str, x: Tensor) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return self.state[f"{name}.weight"] * scaled + self.state[f"{name}.bias"]

    def image(self, image: Tensor) -> Tensor:
        """(3, H, W) to a unit vector."""
        x = image.movedim(0, -1)
        for stage, depth in enumerate((1, 2)):
            name, stride, padding = f"image_encoder.convs.{stage}", (4, 2)[stage], (3, 1)[stage]
            weight, bias = self.state[f"{name}.proj.weight"], self.state[f"{name}.proj.bias"]
            x = self.norm(f"{name}.norm", x) if stage else x
            x = F.conv2d(x.movedim(-1, 0)[None], weight, bias, stride, padding)[0].movedim(0, -1)
            x = x if stage else self.norm(f"{name}.norm", x)
            for number in range(depth):
                for kind, attend in (("spatial_block", self.windows), ("channel_block", self.channels)):
                    x = self.block(f"image_encoder.blocks.{stage}.{number}.{kind}", x, attend, stage)
        vector = self.norm("image_encoder.norms", x.flatten(0, 1).mean(0)) @ self.state["image_projection"]
        return vector / vector.norm()

    def block(self, name: str, x: Tensor, attend, stage: int) -> Tensor:
        """(H, W, C) to the same."""
        kind = "window_attn" if "spatial" in name else "channel_attn"
        x = x + self.depthwise(f"{name}.conv1.fn.dw", x)
        x = x + attend(f"{name}.{kind}.fn", self.norm(f"{name}.{kind}.norm", x), stage)
        x = x + self.depthwise(f"{name}.conv2.fn.dw", x)
        inner = F.gelu(self.line(f"{name}.ffn.fn.net.fc1", self.norm(f"{name}.ffn.norm", x)))
        return x + self.line(f"{name}.ffn.fn.net.fc2", inner)

    def depthwise(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return F.conv2d(x.movedim(-1, 0)[None], weight, bias, padding=1, groups=len(bias))[0].movedim(0, -1)

    def windows(self, name: str, x: Tensor, stage: int) -> Tensor:
        """Tokens attend to those of their window; the image is filled up with zeros."""
        height, width = x.shape[:2]
        filled = F.pad(x, (0, 0, 0, -width % WINDOW, 0, -height % WINDOW))
        found = torch.zeros_like(filled)
        for top in range(0, filled.shape[0], WINDOW):
            for left in range(0, filled.shape[1], WINDOW):
                place = (slice(top, top + WINDOW), slice(left, left + WINDOW))
                q, k, v = self.line(f"{name}.qkv", filled[place].flatten(0, 1)).chunk(3, dim=1)
                heads = [
                    self.attend(*parts) for parts in zip(*(t.chunk(HEADS[stage], 1) for t in (q, k, v)), strict=True)
                ]
                found[place] = self.line(f"{name}.proj", torch.cat(heads, 1)).view(WINDOW, WINDOW, -1)
        return found[:height, :width]

    def channels(self, name: str, x: Tensor, stage: int) -> Tensor:
        """Channels attend to those of their group, as vectors over all tokens."""
        q, k, v = self.line(f"{name}.qkv", x.flatten(0, 1)).chunk(3, dim=1)
        groups = [
            self.attend(*(t.T for t in parts)).T
            for parts in zip(*(t.chunk(GROUPS[stage], 1) for t in (q, k, v)), strict=True)
        ]
        return self.line(f"{name}.proj", torch.cat(groups, 1)).view_as(x)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.T / q.shape[1] ** 0.5).softmax(1) @ v

    def text(self, tokens: list[int]) -> Tensor:
        """A sentence without what fills it up, to a unit vector; the last token speaks for all."""
        x = self.state["lang_encoder.token_embedding.weight"][tokens]
        x = x + self.state["lang_encoder.positional_embedding"][: len(tokens)]
        for number in range(2):
            name = f"lang_encoder.resblocks.{number}"
            seen = self.norm(f"{name}.ln_1", x, 1e-12)
            qkv = seen @ self.state[f"{name}.attn.in_proj_weight"].T + self.state[f"{name}.attn.in_proj_bias"]
            heads = [self.attend(*parts) for parts in zip(*(t.chunk(3, 1) for t in qkv.chunk(3, 1)), strict=True)]
            x = x + self.line(f"{name}.attn.out_proj", torch.cat(heads, 1))
            inner = self.line(f"{name}.mlp.c_fc", self.norm(f"{name}.ln_2", x, 1e-12))
            x = x + self.line(f"{name}.mlp.c_proj", inner * torch.sigmoid(1.702 * inner))
        vector = self.norm("lang_encoder.ln_final", x, 1e-12)[-1] @ self.state["lang_projection"]
        return vector / vector.norm()


def write(folder: Path, state: dict[str, Tensor]) -> Path:
    """A checkpoint in the published layout: the weights are safetensors, though the file is called `.pt`."""
    (folder / "vision_model").mkdir(parents=True)
    (folder / TOKENIZER).mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(tiny_config()), encoding="utf-8")
    save_file(state, folder / "vision_model" / "medimageinsigt-v1.0.0.pt")
    words = ", ".join(f'"{word}": {number}' for number, word in enumerate(VOCABULARY))
    (folder / TOKENIZER / "vocab.json").write_text(f"{{{words}}}", encoding="utf-8")
    (folder / TOKENIZER / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    end = ", ".join(f'"{name}_token": "<|endoftext|>"' for name in ("unk", "pad", "eos"))
    marks = f'{{{end}, "bos_token": "<|startoftext|>", "do_lower_case": true}}'
    (folder / TOKENIZER / "tokenizer_config.json").write_text(marks, encoding="utf-8")
    return folder
