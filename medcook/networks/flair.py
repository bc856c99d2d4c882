"""FLAIR's own architecture, and the reader of its published checkpoint.

A ResNet-50 sees photographs of the retina, a BERT of clinical notes (Bio_ClinicalBERT) reads what they show; linear
projections bring both into one space. The checkpoint is one file, `flair_resnet.pth` of the authors or
`model.safetensors` of the Hub; the words of the tokenizer, `vocab.txt`, come with Bio_ClinicalBERT.
"""

import math
import pickle
import re
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
import torch.nn.functional as F
from monai.networks.nets.resnet import ResNet
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel, BertTokenizer

from medcook.errors import MedcookError

SOURCE = "github.com/jusiro/FLAIR or huggingface.co/jusiro2/FLAIR"
FILES = ("flair_resnet.pth", "model.safetensors")
CAPTION = "A fundus photograph of {}"
SIDE, LONGEST = 512, 77
"""Pixels of an image's side, and tokens of a sentence."""
RENAMED = (
    (r"^vision_model\.model\.", "vision."),
    (r"^text_model\.model\.", "text."),
    (r"^(?:vision|text)_model\.projection_head_(vision|text)\.projection\.", r"to_space.\1.linear."),
)
"""Published names of weights, and what they are called here."""


class Projection(nn.Module):
    """(B, inputs) to unit vectors (B, outputs): what comes in is brought to length one, too."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False)

    def forward(self, vectors: Tensor) -> Tensor:
        return F.normalize(self.linear(F.normalize(vectors.float(), dim=1)).float(), dim=1)


class Flair(nn.Module):
    """Both encoders.

    blocks, planes  of the ResNet's four stages;  words, width, layers  of the BERT;  space  numbers of a unit vector
    """

    def __init__(
        self,
        *,
        blocks: tuple[int, ...] = (3, 4, 6, 3),
        planes: tuple[int, ...] = (64, 128, 256, 512),
        words: int = 28996,
        width: int = 768,
        layers: int = 12,
        space: int = 512,
    ):
        super().__init__()
        shape = {"spatial_dims": 2, "n_input_channels": 3, "conv1_t_stride": 2}
        plain = {"feed_forward": False, "bias_downsample": False}
        self.vision = ResNet("bottleneck", list(blocks), list(planes), **shape, **plain)
        config = {"vocab_size": words, "hidden_size": width, "num_hidden_layers": layers}
        config |= {"num_attention_heads": max(1, width // 64), "intermediate_size": 4 * width}
        self.text = BertModel(BertConfig(**config))
        self.to_space = nn.ModuleDict({"vision": Projection(4 * planes[-1], space), "text": Projection(width, space)})
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(0.07)))

    @property
    def scale(self) -> Tensor:
        """What similarities are multiplied by: from 1 to 100."""
        return self.logit_scale.clamp(0, math.log(100)).exp()

    def images(self, images: Tensor) -> Tensor:
        """(B, 3, H, W), 0 to 1, to unit vectors (B, space)."""
        return self.to_space["vision"](self.vision(images))

    def texts(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Tokens and mask (B, N) to unit vectors (B, space).

        A sentence is the mean over the first, the second and the last layer, and over all N places: also, as in the
        published program, over those that fill it up.
        """
        states = self.text(input_ids=tokens, attention_mask=mask, output_hidden_states=True).hidden_states
        return self.to_space["text"](torch.stack([states[1], states[2], states[-1]]).mean((0, 2)))


def renamed(name: str) -> str:
    """What a published weight is called here."""
    for pattern, new in RENAMED:
        name = re.sub(pattern, new, name)
    return name


def sizes_of(state: dict[str, Tensor]) -> dict:
    """The sizes of the model that these weights are of."""
    stages = range(1, 5)
    blocks = [len({name.split(".")[2] for name in state if name.startswith(f"vision.layer{n}.")}) for n in stages]
    words, width = state["text.embeddings.word_embeddings.weight"].shape
    layers = {name.split(".")[3] for name in state if name.startswith("text.encoder.layer.")}
    planes = [len(state[f"vision.layer{n}.0.conv1.weight"]) for n in stages]
    space = len(state["to_space.text.linear.weight"])
    return {"blocks": blocks, "planes": planes, "words": words, "width": width, "layers": len(layers), "space": space}


def load_flair(folder: str | Path) -> Flair:
    """The model of a downloaded checkpoint, in evaluation mode; MedcookError naming what is missing or does not fit.

    Weights that the model has no use for are left out, as the published program does.
    """
    folder = Path(folder)
    path = next((folder / name for name in FILES if (folder / name).exists()), None)
    if path is None:
        raise MedcookError(f"{folder} holds no FLAIR checkpoint ({' or '.join(FILES)}).", f"Take it from {SOURCE}.")
    try:
        safe = path.suffix == ".safetensors"
        saved = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
        state = {renamed(name): tensor.float() for name, tensor in saved.items() if tensor.is_floating_point()}
        model = Flair(**sizes_of(state))
        own = {name: tensor for name, tensor in model.state_dict().items() if not tensor.is_floating_point()}
        model.load_state_dict({name: state[name] for name in model.state_dict() if name not in own} | own)
    except (OSError, KeyError, RuntimeError, EOFError, BadZipFile, pickle.UnpicklingError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:160]
        raise MedcookError(f"{path}: the checkpoint cannot be read ({reason}).", "Download it again.") from error
    return model.eval()


def on_canvas(image: np.ndarray, side: int = SIDE) -> Tensor:
    """A photograph (H, W, 3), 0 to 255, as (3, side, side), 0 to 1, from the first corner; black where it ends."""
    pixels = torch.from_numpy(np.ascontiguousarray(image)).float().movedim(-1, 0)[None] / 255
    size = [int(length * side / max(pixels.shape[2:])) for length in pixels.shape[2:]]
    small = F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=True)[0]
    return F.pad(small, (0, side - size[1], 0, side - size[0]))


class Retina:
    """A checkpoint's model and tokenizer: photographs are compared with categories."""

    def __init__(self, folder: str | Path):
        self.model, words = load_flair(folder), Path(folder) / "vocab.txt"
        if not words.exists():
            raise MedcookError(f"{folder} holds no vocab.txt.", "Take that of emilyalsentzer/Bio_ClinicalBERT.")
        self.tokenizer = BertTokenizer(str(words), model_max_length=LONGEST)

    @torch.no_grad()
    def category(self, descriptions: tuple[str, ...]) -> Tensor:
        """The vector of a category: the mean over its descriptions."""
        said = [CAPTION.format(description) for description in descriptions]
        tokens = self.tokenizer(said, padding=True, truncation=True, return_tensors="pt")
        return self.model.texts(tokens["input_ids"], tokens["attention_mask"]).mean(0)

    @torch.no_grad()
    def zero_shot(self, image: np.ndarray, categories: dict[str, tuple[str, ...]], side: int = SIDE):
        """{category: how probable it is, against the others, by its descriptions}."""
        texts = torch.stack([self.category(descriptions) for descriptions in categories.values()])
        vector = self.model.images(on_canvas(image, side)[None])[0]
        return dict(zip(categories, (self.model.scale * texts @ vector).softmax(0).tolist(), strict=True))
