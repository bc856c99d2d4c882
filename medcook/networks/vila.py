"""VILA 1.5 (Lin et al., CVPR 2024), which VILA-M3 is made of, the reader of its checkpoints, and talks with experts.

A SigLIP sees images; four neighbouring patches at a time become one picture token of the language model's width; a
Llama reads words and picture tokens in one row, and writes. A checkpoint is a folder with one folder for each part:
`vision_tower`, `mm_projector` and `llm`, each with `config.json` and safetensors.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from medcook.errors import MedcookError
from medcook.methods.frozen import PHOTOGRAPH
from medcook.networks.squeezenet import FEATURES, load_squeezenet
from medcook.sam.sam3 import pixels

SIGLIP = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
SIGLIP |= {"image_size": 384, "patch_size": 14}
LLAMA = {"rms_norm_eps": 1e-5, "tie_word_embeddings": False, "vocab_size": 32000}
LLAMAS = {
    "3B": {"hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 20, "intermediate_size": 6912},
    "8B": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336},
    "13B": {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "intermediate_size": 13824},
}
LLAMAS["8B"] |= {"num_key_value_heads": 8, "vocab_size": 128256, "rope_parameters": {"rope_theta": 5e5}}
LLAMAS = {size: LLAMA | config for size, config in LLAMAS.items()}
"""Sizes of the published models Llama3-VILA-M3-3B, -8B and -13B; all have the same SigLIP."""
PARTS = ("vision_tower", "mm_projector", "llm")
SOURCE = "huggingface.co/MONAI/Llama3-VILA-M3-3B, -8B or -13B"
IMAGE, IGNORED = -1, -100
"""The place of a picture in a row of tokens; what no loss is taken of."""

CALL = re.compile(r"<(?!image>)(\w+)(?:\(([^()<>]*)\))?>")

Line = list[int]
Expert = Callable[[np.ndarray, str], tuple[str, np.ndarray | None]]
"""(image, argument) -> what it found in words, and a picture of it, which the words call `<image>`."""


class Siglip(nn.Module):
    """Images (B, 3, H, W), -1 to 1, to the patches (B, N, width) of the last layer but one."""

    def __init__(self, config: dict):
        super().__init__()
        self.net = SiglipVisionModel(SiglipVisionConfig(**config))
        self.width, self.side = config["hidden_size"], config["image_size"]

    def forward(self, images: Tensor) -> Tensor:
        square = F.interpolate(images, (self.side, self.side), mode="bilinear", align_corners=False, antialias=True)
        return self.net(square, output_hidden_states=True).hidden_states[-2]


class Photographs(nn.Module):
    """SqueezeNet as photographs left it: z-scored RGB images (B, 3, H, W) to patches (B, N, width)."""

    width = FEATURES

    def __init__(self):
        super().__init__()
        self.net = load_squeezenet().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return self.net.features(PHOTOGRAPH * images).flatten(2).transpose(1, 2)


class FourToOne(nn.Module):
    """Patches (B, N, width) of a square grid, row by row, to (B, ceil(side / 2)^2, 4 width).

    One row after the other, left before right; where the side is odd, zeros are added below and on the right.
    """

    def forward(self, patches: Tensor) -> Tensor:
        side = round(patches.shape[1] ** 0.5)
        grid = patches.unflatten(1, (side, side))
        odd = side % 2
        grid = F.pad(grid, (0, 0, 0, odd, 0, odd)).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
        return grid.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)


class Projector(nn.Module):
    """Patches (B, N, inputs) to picture tokens (B, about N / 4, outputs)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        lines = nn.Linear(4 * inputs, outputs), nn.GELU(), nn.Linear(outputs, outputs)
        self.layers = nn.Sequential(FourToOne(), nn.LayerNorm(4 * inputs), *lines)

    def forward(self, patches: Tensor) -> Tensor:
        return self.layers(patches)


class Vila(nn.Module):
    """vision  images (B, 3, H, W) to patches (B, N, `vision.width`);   llama  sizes of the language model."""

    def __init__(self, vision: nn.Module, llama: dict):
        super().__init__()
        self.vision_tower = vision
        self.llm = LlamaForCausalLM(LlamaConfig(**llama))
        self.mm_projector = Projector(vision.width, self.llm.config.hidden_size)

    def pictures(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to picture tokens (B, T, width)."""
        return self.mm_projector(self.vision_tower(images))

    def spliced(self, lines: list[Line], pictures: Tensor) -> Tensor:
        """(B, L, width): the words of rows of tokens, and for every `IMAGE` the next of pictures (P, T, width).

        Shorter rows are filled up at their end, where nothing before it can see it.
        """
        wide = filled([widened(line, pictures.shape[1]) for line in lines], 0).to(pictures.device)
        found = self.llm.get_input_embeddings()(wide.clamp_min(0))
        return found.masked_scatter((wide == IMAGE)[..., None], pictures.to(found.dtype))

    def forward(self, lines: list[Line], pictures: Tensor) -> Tensor:
        """Logits (B, L, words) float32 of the word after each of the places of `spliced`."""
        return self.llm(inputs_embeds=self.spliced(lines, pictures)).logits.float()

    def loss(self, lines: list[Line], told: list[list[bool]], pictures: Tensor) -> Tensor:
        """The mean cross-entropy of the words that are `told`, each from everything before it."""
        many = pictures.shape[1]
        kept = [
            [word if tell or word == IMAGE else IGNORED for word, tell in zip(line, tells, strict=True)]
            for line, tells in zip(lines, told, strict=True)
        ]
        wanted = filled([widened(line, many) for line in kept], IGNORED).to(pictures.device)[:, 1:]
        logits = self(lines, pictures)[:, :-1]
        return F.cross_entropy(logits.transpose(1, 2), wanted.where(wanted != IMAGE, IGNORED), ignore_index=IGNORED)

    def next_words(self, lines: list[Line], pictures: Tensor) -> Tensor:
        """Logits (B, words) float32 of what comes after each row."""
        found = self(lines, pictures)
        last = [len(widened(line, pictures.shape[1])) - 1 for line in lines]
        return found[torch.arange(len(lines)), torch.tensor(last)]


def widened(line: Line, many: int) -> Line:
    """A row of tokens in which every picture has so many places."""
    return [word for word in line for _ in range(many if word == IMAGE else 1)]


def filled(lines: list[Line], value: int) -> Tensor:
    """(B, longest) int64: rows, filled up at their end."""
    longest = max(map(len, lines))
    return torch.tensor([line + [value] * (longest - len(line)) for line in lines])


def called(text: str) -> tuple[str, str] | None:
    """The expert that a text calls, `<NAME>` or `<NAME(argument)>`, and the argument; None where not exactly one is."""
    found = CALL.findall(text)
    return found[0] if len(found) == 1 else None


def load_vila(folder: str | Path, dtype: torch.dtype = torch.float32) -> Vila:
    """The model of a downloaded checkpoint, in evaluation mode; MedcookError naming what is missing or does not fit."""
    folder = Path(folder)
    if missing := [part for part in PARTS if not (folder / part / "config.json").exists()]:
        raise MedcookError(f"{folder} holds no VILA checkpoint ({missing[0]} is missing).", f"Take one from {SOURCE}.")
    try:
        configs = {part: json.loads((folder / part / "config.json").read_text(encoding="utf-8")) for part in PARTS}
        kind = configs["mm_projector"].get("mm_projector_type")
        if kind != "mlp_downsample":
            raise MedcookError(f"{folder}: a projector of kind {kind!r} is not known.", f"Take one from {SOURCE}.")
        with torch.device("meta"):
            model = Vila(Siglip(configs["vision_tower"]), configs["llm"])
        state = {f"{part}.{name}": tensor for part in PARTS for name, tensor in weights(folder / part).items()}
        state = {re.sub(r"^vision_tower\.(vision_model\.)?", "vision_tower.net.", k): v for k, v in state.items()}
        model.load_state_dict({name: state[name].to(dtype) for name in model.state_dict()}, assign=True)
    except (OSError, KeyError, RuntimeError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:160]
        raise MedcookError(f"{folder}: the checkpoint cannot be read ({reason}).", "Download it again.") from error
    model.llm.model.rotary_emb = LlamaRotaryEmbedding(model.llm.config)  # these two are in no checkpoint
    places = model.vision_tower.net.embeddings
    places.position_ids = torch.arange(places.num_positions)[None]
    return model.eval()


def weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a part, from one file or from those that its index lists."""
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return {name: tensor for file in files for name, tensor in load_file(folder / file).items()}


def prompt_of(messages: list[str], system: str, llama_3: bool) -> str:
    """Turns of user and model, the user's first, as one text that ends where the model is to go on.

    llama_3  as Llama 3 has it (8B), else as Vicuna has it (3B, 13B)
    """
    if llama_3:
        turn = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>"
        roles = ("user", "assistant")
        said = [turn.format(roles[k % 2], message) for k, message in enumerate(messages)]
        return turn.format("system", system) + "".join(said) + "<|start_header_id|>assistant<|end_header_id|>\n\n"
    said = [f"ASSISTANT: {text}</s>" if k % 2 else f"USER: {text} " for k, text in enumerate(messages)]
    return f"{system} {''.join(said)}ASSISTANT:"


class VilaM3:
    """A checkpoint's model and tokenizer: images are asked about, and experts are at hand."""

    def __init__(self, folder: str | Path, dtype: torch.dtype = torch.float32):
        self.model = load_vila(folder, dtype)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(Path(folder) / "llm", local_files_only=True)
        except (OSError, ValueError, ImportError) as error:
            hint = "Download all of `llm`; a `tokenizer.model` needs the package sentencepiece."
            raise MedcookError(f"{folder}: no tokenizer that can be read.", hint) from error

    def tokens(self, text: str) -> Line:
        """The text's tokens; `<image>` is one place, whatever the tokenizer makes of it."""
        first, *others = (part.strip() if number else part for number, part in enumerate(text.split("<image>")))
        line = self.tokenizer(first)["input_ids"]
        for part in others:
            line += [IMAGE, *self.tokenizer(part, add_special_tokens=False)["input_ids"]]
        return line

    @torch.no_grad()
    def say(self, messages: list[str], images: list[np.ndarray], system: str = "", longest: int = 256) -> str:
        """What the model says next, each word the most probable one; images (height, width) are those in the texts."""
        llama_3 = self.model.llm.config.vocab_size > 100_000
        line = self.tokens(prompt_of(messages, system, llama_3))
        seen = torch.cat([pixels(image, self.model.vision_tower.side) for image in images])
        pictures = self.model.pictures(seen.to(self.model.llm.dtype))
        given = self.model.spliced([line], pictures)
        end = self.tokenizer.eos_token_id
        ends = [end, self.tokenizer.convert_tokens_to_ids("<|eot_id|>")] if llama_3 else [end]
        limits = {"max_new_tokens": longest, "do_sample": False, "pad_token_id": end, "eos_token_id": ends}
        found = self.model.llm.generate(inputs_embeds=given, attention_mask=torch.ones(given.shape[:2]), **limits)
        return self.tokenizer.decode(found[0], skip_special_tokens=True).strip()

    def ask(self, image: np.ndarray, question: str, experts: Mapping[str, Expert], cards: str = "") -> list[str]:
        """The messages, the last of which is the answer. An expert that is called is heard once, then asked again.

        cards  what the model is told of the experts
        """
        messages, images = [f"{cards}<image>{question}"], [image]
        messages.append(self.say(messages, images))
        call = called(messages[-1])
        if call is None or call[0] not in experts:
            return messages
        text, picture = experts[call[0]](image, call[1])
        images += [] if picture is None else [picture]
        messages.append(f"{text}\n{question}")
        return [*messages, self.say(messages, images)]
