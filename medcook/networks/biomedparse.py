"""The architecture of BiomedParse, and the reader of its published checkpoint.

It is SEEM in the released setting (configs/biomedparse_inference.yaml): a FocalNet sees the image, a transformer that
reads forwards, as CLIP's, gives a token for each piece of the names, and 101 queries of SEEM's decoder hear both. A
name takes the mask of the query whose vector is most like its own; the vectors of kinds' names tell what a query found.

Parts are named as in the published weights: one dictionary of tensors, `biomedparse_v1.pt`. Left out are what answers
strokes, and a PubMedBERT, which the released setting carries along and does not ask. The words of the tokenizer come
with openai/clip-vit-base-patch32.
"""

import pickle
import re
from pathlib import Path
from zipfile import BadZipFile

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.errors import MedcookError
from medcook.networks.focalnet import FocalNet
from medcook.networks.seem import PixelDecoder, Predictor
from medcook.networks.unicl import quick_gelu

SOURCE = "huggingface.co/microsoft/BiomedParse"
WORDS, LENGTH = 49408, 77
"""Pieces of words in CLIP's vocabulary, the last of which is the end of a text; pieces of a text."""
SIDE, MEAN, SPREAD = 1024, (123.675, 116.280, 103.530), (58.395, 57.120, 57.375)
"""Pixels of a side, and of the three colours, 0 to 255, what is taken off and divided by."""


class TextBlock(nn.Module):
    """Attention and perceptron, each on what is normalised before."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1, self.ln_2 = nn.LayerNorm(width, eps=1e-12), nn.LayerNorm(width, eps=1e-12)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor, later: Tensor) -> Tensor:
        seen = self.ln_1(x)
        x = x + self.attn(seen, seen, seen, attn_mask=later, need_weights=False)[0]
        return x + self.mlp["c_proj"](quick_gelu(self.mlp["c_fc"](self.ln_2(x))))


class Text(nn.Module):
    """Numbers of pieces (N, L) to (N, L, width); no piece hears of a later one."""

    def __init__(self, words: int, length: int, width: int, heads: int, layers: int):
        super().__init__()
        self.token_embedding = nn.Embedding(words, width)
        self.positional_embedding = nn.Parameter(torch.zeros(length, width))
        self.resblocks = nn.ModuleList(TextBlock(width, heads) for _ in range(layers))
        self.ln_final = nn.LayerNorm(width, eps=1e-12)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        later = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)
        x = self.token_embedding(tokens) + self.positional_embedding[:length]
        for block in self.resblocks:
            x = block(x, later)
        return self.ln_final(x)


class Language(nn.Module):
    """Names to what the decoder hears: a token for each piece, and a vector for each name, that of its end."""

    def __init__(self, words: int, length: int, text: int, width: int, heads: int, layers: int):
        super().__init__()
        self.lang_encoder = Text(words, length, text, heads, layers)
        self.lang_proj = nn.Parameter(torch.zeros(text, width))
        self.logit_scale = nn.Parameter(torch.ones([]))

    def forward(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers of pieces and mask (N, L), to tokens (T, width) of all pieces that are there, and (N, width)."""
        found = self.lang_encoder(tokens) @ self.lang_proj
        return found[mask.bool()], found[torch.arange(len(found)), tokens.argmax(1)]

    def similar(self, vectors: Tensor, texts: Tensor) -> Tensor:
        """Logits (B, Q, N): cosines of vectors (B, Q, width) with those of texts (N, width), scaled."""
        return self.logit_scale.exp() * F.normalize(vectors, dim=-1) @ F.normalize(texts, dim=-1).T


class BiomedParse(nn.Module):
    """The whole network. Its defaults are the published sizes.

    width  of features, queries and tokens;  inner  of the decoders' perceptrons;  text  width of the language encoder
    """

    def __init__(
        self,
        *,
        image: dict | None = None,
        width: int = 512,
        heads: int = 8,
        inner: int = 2048,
        layers: tuple[int, int] = (6, 9),
        queries: int = 101,
        words: int = WORDS,
        length: int = LENGTH,
        text: int = 512,
        text_layers: int = 12,
    ):
        super().__init__()
        self.backbone = FocalNet(**image or {})
        language = Language(words, length, text, width, heads, text_layers)
        self.sem_seg_head = nn.Module()
        self.sem_seg_head.pixel_decoder = PixelDecoder(self.backbone.widths, width, heads, inner, layers[0])
        self.sem_seg_head.predictor = Predictor(language, queries, width, heads, inner, layers[1])

    @property
    def language(self) -> Language:
        return self.sem_seg_head.predictor.lang_encoder

    def forward(self, images: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """RGB images (B, 3, H, W), 0 to 255, sides multiples of 32, and tokens (T, width) of all names.

        To logits (B, Q, H / 4, W / 4) of every query's mask, and vectors (B, Q, width).
        """
        if images.shape[2] % 32 or images.shape[3] % 32:
            raise MedcookError(f"images of {tuple(images.shape[2:])} pixels: sides must be multiples of 32.")
        mean, spread = (images.new_tensor(each)[:, None, None] for each in (MEAN, SPREAD))
        features, maps = self.sem_seg_head.pixel_decoder(self.backbone((images - mean) / spread))
        return self.sem_seg_head.predictor(features, maps, words)

    def parse(self, images: Tensor, tokens: Tensor, mask: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Probabilities (B, N, *size) of N names, given as pieces and mask (N, L): each of the query most like it.

        size  that the images had before they were brought to `SIDE` x `SIDE`; theirs now, if None
        """
        words, names = self.language(tokens, mask)
        masks, vectors = self(images, words)
        best = self.language.similar(vectors, names).argmax(1)
        chosen = masks.gather(1, best[..., None, None].expand(-1, -1, *masks.shape[2:]))
        return F.interpolate(chosen, size or images.shape[2:], mode="bilinear").sigmoid()


def sizes_of(state: dict[str, Tensor]) -> dict:
    """The sizes of the model that these weights are of, but for the number of heads."""

    def count(pattern: str) -> int:
        return len({found[1] for name in state if (found := re.match(pattern, name))})

    stem, decoder = "sem_seg_head.predictor", "sem_seg_head.pixel_decoder"
    text = f"{stem}.lang_encoder.lang_encoder"
    first = "backbone.layers.0.blocks.0.modulation.focal_layers"
    stages = count(r"backbone\.layers\.(\d+)\.")
    words, text_width = state[f"{text}.token_embedding.weight"].shape
    queries, width = state[f"{stem}.query_feat.weight"].shape
    return {
        "image": {
            "width": len(state["backbone.patch_embed.norm.weight"]),
            "depths": tuple(count(rf"backbone\.layers\.{stage}\.blocks\.(\d+)\.") for stage in range(stages)),
            "levels": count(re.escape(first) + r"\.(\d+)\."),
            "window": state[f"{first}.0.0.weight"].shape[-1],
        },
        "width": width,
        "inner": len(state[f"{stem}.transformer_ffn_layers.0.linear1.weight"]),
        "layers": (
            count(re.escape(decoder) + r"\.transformer\.encoder\.layers\.(\d+)\."),
            count(re.escape(stem) + r"\.transformer_ffn_layers\.(\d+)\."),
        ),
        "queries": queries,
        "words": words,
        "length": len(state[f"{text}.positional_embedding"]),
        "text": text_width,
        "text_layers": count(re.escape(text) + r"\.resblocks\.(\d+)\."),
    }


def load_biomedparse(weights: str | Path, heads: int = 8) -> BiomedParse:
    """The model of a downloaded checkpoint, in evaluation mode; its sizes are those of the weights.

    MedcookError naming what is missing or does not fit. Weights that the model has no use for are left out.
    """
    weights = Path(weights)
    if not weights.is_file():
        raise MedcookError(f"{weights}: there is no BiomedParse checkpoint.", f"Take biomedparse_v1.pt from {SOURCE}.")
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
        with torch.device("meta"):
            model = BiomedParse(heads=heads, **sizes_of(state))
        model.load_state_dict({name: state[name].float() for name in model.state_dict()}, assign=True)
    except (OSError, KeyError, IndexError, RuntimeError, EOFError, BadZipFile, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:160]
        raise MedcookError(f"{weights}: the checkpoint cannot be read ({reason}).", "Download it again.") from error
    return model.eval()
