"""The architecture of FLAIR, and the reader of its published checkpoint (flair_resnet.pth).

A ResNet-50 (He et al., CVPR 2016) sees images, a BERT reads sentences; both are those of transformers. A text is the
mean of its words over the first, the second and the last layer. Vectors are made of length one before their projection
and after it. The checkpoint holds both encoders by the names of torchvision and transformers, but not the words that
BERT knows: these are `vocab.txt` of Bio_ClinicalBERT.
"""

import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertModel, BertTokenizer, ResNetConfig, ResNetModel

from medcook.errors import MedcookError

SOURCE = "github.com/jusiro/FLAIR"
WORDS = "huggingface.co/emilyalsentzer/Bio_ClinicalBERT"
CAPTION = "A fundus photograph of {}"
SIDE, MOST_WORDS = 512, 77
"""Pixels of an image's longer side, and tokens of a sentence."""
LAYERS = (1, 2, -1)
"""Whose words are averaged; 0 would be what goes into the first."""
WIDTH = 512

RESNET = {"embedding_size": 64, "hidden_sizes": [256, 512, 1024, 2048], "depths": [3, 4, 6, 3]}
"""ResNet-50, with the stride in the middle convolution, as torchvision has it."""
BERT = {"vocab_size": 28996}
"""BERT-base, cased."""

RENAMED = (
    (r"^vision_model\.model\.conv1\.", "resnet.embedder.embedder.convolution."),
    (r"^vision_model\.model\.bn1\.", "resnet.embedder.embedder.normalization."),
    (r"^vision_model\.model\.layer([1-4])\.(\d+)\.", r"resnet.encoder.stages.\1.layers.\2."),
    (r"\.downsample\.0\.", ".shortcut.convolution."),
    (r"\.downsample\.1\.", ".shortcut.normalization."),
    (r"(\.layers\.\d+)\.conv([1-3])\.", r"\1.layer.\2.convolution."),
    (r"(\.layers\.\d+)\.bn([1-3])\.", r"\1.layer.\2.normalization."),
    (r"^vision_model\.projection_head_vision\.projection\.", "see."),
    (r"^text_model\.model\.", "bert."),
    (r"^text_model\.projection_head_text\.projection\.", "hear."),
)
"""Published names of weights, and what they are called here; numbers of stages and layers then begin with 0."""


def renamed(name: str) -> str:
    """What a published weight is called here."""
    for pattern, new in RENAMED:
        name = re.sub(pattern, new, name)
    less = lambda match: f"{match[1]}{int(match[2]) - 1}."  # noqa: E731
    return re.sub(r"(\.stages\.|\.layer\.(?=\d\.(?:conv|norm)))(\d+)\.", less, name)


class Flair(nn.Module):
    """Images and sentences as unit vectors (B, width); `resnet` and `bert` are settings of transformers' encoders."""

    def __init__(self, resnet: dict = RESNET, bert: dict = BERT, width: int = WIDTH):
        super().__init__()
        self.resnet = ResNetModel(ResNetConfig(**resnet, layer_type="bottleneck"))
        self.bert = BertModel(BertConfig(**bert))
        self.see = nn.Linear(resnet["hidden_sizes"][-1], width, bias=False)
        self.hear = nn.Linear(self.bert.config.hidden_size, width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def images(self, images: Tensor) -> Tensor:
        """RGB images (B, 3, H, W), 0 to 1, to unit vectors (B, width)."""
        return projected(self.resnet(images).pooler_output.flatten(1), self.see)

    def texts(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Tokens and mask (B, N) to unit vectors (B, width); as published, what fills a sentence up counts, too."""
        states = self.bert(input_ids=tokens, attention_mask=mask, output_hidden_states=True).hidden_states
        return projected(torch.stack([states[layer].mean(1) for layer in LAYERS]).mean(0), self.hear)


def projected(vectors: Tensor, line: nn.Module) -> Tensor:
    """Vectors (B, D) of length one, projected, and again of length one."""
    return F.normalize(line(F.normalize(vectors, dim=1)), dim=1)


def load_flair(weights: str | Path, heads: int = 12) -> Flair:
    """The model of a downloaded checkpoint, in evaluation mode; MedcookError naming what is missing or does not fit.

    The encoders' sizes are those of the weights; `heads` of BERT's attention they do not tell.
    """
    weights = Path(weights)
    if not weights.is_file():
        raise MedcookError(f"{weights}: there is no FLAIR checkpoint.", f"Take flair_resnet.pth from {SOURCE}.")
    try:
        stored = torch.load(weights, map_location="cpu", weights_only=True)
        state = {renamed(name): tensor.float() for name, tensor in stored.items()}
        with torch.device("meta"):
            model = Flair(*sizes_of(state, heads), width=len(state["see.weight"]))
        known = {name: state[name] for name in model.state_dict() if name in state}
        known |= {name: torch.zeros(()) for name in model.state_dict() if name.endswith("num_batches_tracked")}
        model.load_state_dict(known, assign=True)
        places = torch.arange(model.bert.config.max_position_embeddings)[None]
        model.bert.embeddings.position_ids = places  # these two are never stored
        model.bert.embeddings.token_type_ids = torch.zeros_like(places)
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise MedcookError(f"{weights}: the checkpoint cannot be read ({reason}).", "Download it again.") from error
    return model.eval()


def sizes_of(state: dict[str, Tensor], heads: int) -> tuple[dict, dict]:
    """Settings of ResNet and BERT that fit their weights."""
    count = lambda pattern: 1 + max(int(found[1]) for name in state if (found := re.match(pattern, name)))  # noqa: E731
    stages = range(count(r"resnet\.encoder\.stages\.(\d+)\."))
    depths = [count(rf"resnet\.encoder\.stages\.{stage}\.layers\.(\d+)\.") for stage in stages]
    last = "resnet.encoder.stages.{}.layers.0.layer.2.convolution.weight"
    resnet = {
        "embedding_size": len(state["resnet.embedder.embedder.convolution.weight"]),
        "hidden_sizes": [len(state[last.format(stage)]) for stage in stages],
        "depths": depths,
    }
    words, width = state["bert.embeddings.word_embeddings.weight"].shape
    bert = {
        "vocab_size": words,
        "hidden_size": width,
        "num_hidden_layers": count(r"bert\.encoder\.layer\.(\d+)\."),
        "num_attention_heads": heads,
        "intermediate_size": len(state["bert.encoder.layer.0.intermediate.dense.weight"]),
        "max_position_embeddings": len(state["bert.embeddings.position_embeddings.weight"]),
    }
    return resnet, bert


def prepared(image: np.ndarray, side: int = SIDE) -> Tensor:
    """An image (H, W) or (H, W, 3), 0 to 255, as (1, 3, side, side), 0 to 1; zeros fill up its shorter side."""
    found = torch.from_numpy(np.asarray(image, np.float32) / 255)
    found = found[None].expand(3, -1, -1) if found.ndim == 2 else found.movedim(2, 0)
    scale = max(found.shape[1:]) / side
    size = [int(length / scale) for length in found.shape[1:]]
    small = F.interpolate(found[None], size=size, mode="bilinear", antialias=True)
    return F.pad(small, (0, side - size[1], 0, side - size[0]))


class Published:
    """A checkpoint's model and its tokenizer: which of several sentences fits an image best."""

    def __init__(self, weights: str | Path, vocabulary: str | Path, heads: int = 12):
        self.model, vocabulary = load_flair(weights, heads), Path(vocabulary)
        if not vocabulary.is_file():
            raise MedcookError(f"{vocabulary}: there is no vocabulary.", f"Take vocab.txt from {WORDS}.")
        self.tokenizer = BertTokenizer(str(vocabulary), do_lower_case=False)

    @torch.no_grad()
    def texts(self, descriptions: list[str]) -> Tensor:
        """Unit vectors (len(descriptions), width), each put into the caption that was trained with."""
        captions = [CAPTION.format(description) for description in descriptions]
        found = self.tokenizer(captions, padding=True, truncation=True, max_length=MOST_WORDS, return_tensors="pt")
        return self.model.texts(found["input_ids"], found["attention_mask"])

    @torch.no_grad()
    def zero_shot(self, image: np.ndarray, categories: dict[str, list[str]]) -> dict[str, float]:
        """{category: how probable it is}; a category is the mean of its descriptions, which experts wrote."""
        known = torch.stack([self.texts(descriptions).mean(0) for descriptions in categories.values()])
        logits = self.model.logit_scale.clamp(0, 4.6052).exp() * self.model.images(prepared(image)) @ known.T
        return dict(zip(categories, logits.softmax(1)[0].tolist(), strict=True))
