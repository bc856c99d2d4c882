"""The architecture of MedImageInsight, and the reader of its published checkpoint.

A DaViT (Ding et al., ECCV 2022) sees images; it is the one that transformers has for Florence-2. A transformer reads
sentences in both directions. The mean of the image's tokens, and the sentence's last token, are projected into one
space. The checkpoint is a folder: `config.yaml`, the weights as safetensors (whatever the file's name ends in) in
`vision_model`, and CLIP's tokenizer in `language_model/clip_tokenizer_4.16.2`.
"""

import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTokenizer, Florence2VisionConfig
from transformers.models.florence2.modeling_florence2 import Florence2VisionBackbone

from medcook.errors import MedcookError
from medcook.sam.sam3 import pixels

PUBLISHED = {
    "IMAGE_ENCODER": {
        "IMAGE_SIZE": [480, 480],
        "IMAGE_MEAN": [0.485, 0.456, 0.406],
        "IMAGE_STD": [0.229, 0.224, 0.225],
        "SPEC": {
            "PATCH_SIZE": [7, 3, 3, 3],
            "PATCH_STRIDE": [4, 2, 2, 2],
            "PATCH_PADDING": [3, 1, 1, 1],
            "PATCH_PRENORM": [False, True, True, True],
            "DIM_EMBED": [256, 512, 1024, 2048],
            "NUM_HEADS": [8, 16, 32, 64],
            "NUM_GROUPS": [8, 16, 32, 64],
            "DEPTHS": [1, 1, 9, 1],
            "WINDOW_SIZE": 12,
        },
    },
    "LANG_ENCODER": {"CONTEXT_LENGTH": 77, "WIDTH": 1024, "HEADS": 16, "LAYERS": 16},
    "UNICL_MODEL": {"DIM_PROJECTION": 1024},
}
"""What `config.yaml` of version 2024.09.27 says of the architecture."""
WORDS = 49408
"""Tokens of CLIP's vocabulary; the last is the end of a sentence."""
TOKENIZER = "language_model/clip_tokenizer_4.16.2"
SOURCE = "huggingface.co/lion-ai/MedImageInsights"

OLD = (
    (r"^visual\.", "image_encoder."),
    (r"^text\.", "lang_encoder."),
    (r"^vision_projection$", "image_projection"),
    (r"^text_projection$", "lang_projection"),
    (r"^image_encoder\.conv_embeds\.", "image_encoder.convs."),
    (r"^image_encoder\.main_blocks\.(\d+\.\d+)\.0\.", r"image_encoder.blocks.\1.spatial_block."),
    (r"^image_encoder\.main_blocks\.(\d+\.\d+)\.1\.", r"image_encoder.blocks.\1.channel_block."),
    (r"_block\.cpe\.0\.proj\.", "_block.conv1."),
    (r"_block\.cpe\.1\.proj\.", "_block.conv2."),
    (r"spatial_block\.attn\.", "spatial_block.window_attn."),
    (r"channel_block\.attn\.", "channel_block.channel_attn."),
    (r"_block\.mlp\.", "_block.ffn."),
)
"""Names of an earlier form of the weights, which the published program still reads, as patterns."""
RENAMED = (
    (r"^image_encoder\.norms\.", "norm."),
    (r"^image_encoder\.(convs\.\d+)\.proj\.", r"davit.\1.conv."),
    (r"^image_encoder\.", "davit."),
    (r"\.fn\.dw\.", "."),
    (r"\.(?:window|channel)_attn\.norm\.", ".norm1."),
    (r"\.ffn\.norm\.", ".norm2."),
    (r"(_attn|\.ffn)\.fn\.(?:net\.)?", r"\1."),
    (r"^lang_encoder\.resblocks\.", "language.layers."),
    (r"^lang_encoder\.", "language."),
    (r"^(language\.layers\.\d+)\.attn\.", r"\1.self_attn."),
    (r"^(language\.layers\.\d+)\.ln_", r"\1.norm"),
    (r"\.mlp\.c_fc\.", ".linear1."),
    (r"\.mlp\.c_proj\.", ".linear2."),
)
"""Published names of weights, and what they are called here; all patterns that match apply, in this order."""


def davit(spec: dict) -> Florence2VisionBackbone:
    """The image encoder that a SPEC of `config.yaml` describes; no stochastic depth, which only training would have."""
    names = ("PATCH_SIZE", "PATCH_STRIDE", "PATCH_PADDING", "PATCH_PRENORM", "NUM_HEADS", "NUM_GROUPS", "DEPTHS")
    content = {name.lower(): list(spec[name]) for name in names} | {"embed_dim": list(spec["DIM_EMBED"])}
    return Florence2VisionBackbone(
        Florence2VisionConfig(**content, window_size=spec.get("WINDOW_SIZE", 7), drop_path_rate=0.0)
    )


class Davit(nn.Module):
    """RGB images (B, 3, H, W) to (B, last of DIM_EMBED): the normalised mean over the tokens."""

    def __init__(self, spec: dict):
        super().__init__()
        self.davit, self.norm = davit(spec), nn.LayerNorm(spec["DIM_EMBED"][-1])

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.davit(images).last_hidden_state.flatten(2).mean(2))


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's activation."""
    return x * torch.sigmoid(1.702 * x)


class Language(nn.Module):
    """Tokens (B, N) of sentences, and a mask (B, N) that is 0 where they are over, to (B, WIDTH) of the last token."""

    def __init__(self, config: dict, words: int):
        super().__init__()
        width = config["WIDTH"]
        self.token_embedding = nn.Embedding(words, width)
        self.positional_embedding = nn.Parameter(torch.zeros(config["CONTEXT_LENGTH"], width))
        shape = {"d_model": width, "nhead": config["HEADS"], "dim_feedforward": 4 * width}
        kind = {"activation": quick_gelu, "layer_norm_eps": 1e-12, "batch_first": True, "norm_first": True}
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(**shape, **kind, dropout=0.0) for _ in range(config["LAYERS"])
        )
        self.ln_final = nn.LayerNorm(width, eps=1e-12)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=mask == 0)
        return self.ln_final(x)[torch.arange(len(x)), tokens.argmax(1)]


class UniCL(Davit):
    """Both towers; `config` as in `config.yaml`."""

    def __init__(self, config: dict, words: int = WORDS):
        super().__init__(config["IMAGE_ENCODER"]["SPEC"])
        width = config["UNICL_MODEL"]["DIM_PROJECTION"]
        self.language = Language(config["LANG_ENCODER"], words)
        self.image_projection = nn.Parameter(torch.zeros(self.norm.weight.shape[0], width))
        self.lang_projection = nn.Parameter(torch.zeros(config["LANG_ENCODER"]["WIDTH"], width))
        self.logit_scale = nn.Parameter(torch.ones([]))

    def images(self, images: Tensor) -> Tensor:
        """(B, 3, H, W), normalised as photographs are, to unit vectors (B, DIM_PROJECTION)."""
        return F.normalize(self(images) @ self.image_projection, dim=1)

    def texts(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Tokens and mask (B, N) to unit vectors (B, DIM_PROJECTION)."""
        return F.normalize(self.language(tokens, mask) @ self.lang_projection, dim=1)


def renamed(name: str) -> str:
    """What a published weight is called here."""
    for pattern, new in (*OLD, *RENAMED):
        name = re.sub(pattern, new, name)
    return name


def load_unicl(folder: str | Path) -> UniCL:
    """The model of a downloaded checkpoint, in evaluation mode; MedcookError naming what is missing or does not fit.

    Weights that the model has no use for are left out, as the published program does.
    """
    folder = Path(folder)
    weights = sorted((folder / "vision_model").glob("*.*"))
    if not (folder / "config.yaml").exists() or not weights:
        hint = f"Take it from Azure's model catalogue or from {SOURCE} (folder 2024.09.27)."
        raise MedcookError(f"{folder} holds no MedImageInsight checkpoint.", hint)
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        state = {renamed(name): tensor for name, tensor in load_file(weights[0]).items()}
        words = len(state["language.token_embedding.weight"])
        with torch.device("meta"):
            model = UniCL(config, words)
        known = {name: state[name].float() for name in model.state_dict()}
        model.load_state_dict(known, assign=True)
    except (OSError, KeyError, RuntimeError, yaml.YAMLError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:160]
        raise MedcookError(f"{folder}: the checkpoint cannot be read ({reason}).", "Download it again.") from error
    return model.eval()


class MedImageInsight:
    """A checkpoint's model and tokenizer: images and sentences become vectors, and are compared."""

    def __init__(self, folder: str | Path):
        self.model, words = load_unicl(folder), Path(folder) / TOKENIZER
        if not (words / "vocab.json").exists():
            raise MedcookError(f"{folder} holds no tokenizer ({TOKENIZER}).", "Download the whole folder.")
        self.tokenizer = CLIPTokenizer.from_pretrained(words, local_files_only=True)
        encoder = yaml.safe_load((Path(folder) / "config.yaml").read_text(encoding="utf-8"))["IMAGE_ENCODER"]
        self.side = encoder["IMAGE_SIZE"][0]
        self.mean, self.spread = (torch.tensor(encoder[name])[:, None, None] for name in ("IMAGE_MEAN", "IMAGE_STD"))

    @torch.no_grad()
    def image(self, image: np.ndarray) -> Tensor:
        """The unit vector of a grey image (height, width)."""
        seen = (pixels(image, self.side) + 1) / 2
        return self.model.images((seen - self.mean) / self.spread)[0]

    @torch.no_grad()
    def texts(self, sentences: list[str]) -> Tensor:
        """Unit vectors (len(sentences), D)."""
        length = self.model.language.positional_embedding.shape[0]
        found = self.tokenizer(sentences, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return self.model.texts(found["input_ids"], found["attention_mask"])

    def zero_shot(self, image: np.ndarray, sentences: list[str]) -> Tensor:
        """How probable each sentence is, against the others."""
        return (self.model.logit_scale.exp() * self.texts(sentences) @ self.image(image)).softmax(0)
