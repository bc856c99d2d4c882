"""SAM 3 itself (Carion et al., 2025), for those who have its weights: a structure by its name, by a box, or both.

The model is that of transformers, whose image processor wants torchvision, and so does one function of the model, the
pooling of features in a box. The few lines that are needed of both stand here, so that the book does without it.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoTokenizer, Sam3Model
from transformers.models.sam3 import modeling_sam3

from medcook.errors import MedcookError
from medcook.sam.predictor import check_image
from medcook.sam.prompts import Prompt

WORDS = 32
"""Tokens of a text; shorter ones are padded."""
UNNAMED = "visual"
"""What SAM 3 is told where a box is all that is asked."""
RANGE = (0.5, 99.5)
"""Percentiles of an image that become black and white."""


def load_sam3(folder: str | Path) -> Sam3Model:
    """A real checkpoint, of SAM 3 or of a model tuned from it, laid out in a folder as on the Hugging Face hub."""
    folder = Path(folder)
    if not (folder / "config.json").exists():
        hint = "Ask for access at huggingface.co/facebook/sam3, then: hf download facebook/sam3 --local-dir FOLDER."
        raise MedcookError(f"{folder} holds no SAM 3 checkpoint (no config.json).", hint)
    if not hasattr(modeling_sam3, "torchvision"):
        modeling_sam3.torchvision = SimpleNamespace(ops=SimpleNamespace(roi_align=roi_align))
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        if kind not in ("sam3", "sam3_video"):
            raise MedcookError(f"{folder} holds a {kind!r} model, not SAM 3.", "Take a checkpoint of type sam3.")
        model, found = Sam3Model.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:160]
        hint = "Delete the folder and download it again."
        raise MedcookError(f"{folder}: the checkpoint cannot be read ({reason}).", hint) from error
    for name in sorted(found["missing_keys"]):
        raise MedcookError(f"{folder}: of another architecture (no {name}).", "Take a checkpoint of SAM 3.")
    return model.eval()


class Sam3:
    """A checkpoint's model and its tokenizer; calling it segments a slice."""

    def __init__(self, folder: str | Path):
        self.model = load_sam3(folder)
        if not any((Path(folder) / name).exists() for name in ("tokenizer.json", "vocab.json")):
            hint = "Download the whole folder: the words of SAM 3 lie beside its weights."
            raise MedcookError(f"{folder} holds no tokenizer.", hint)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    @torch.no_grad()
    def __call__(
        self, image: np.ndarray, words: str = UNNAMED, box: tuple[float, float, float, float] | None = None
    ) -> np.ndarray:
        """Mask (height, width) bool of all that `words` name; box (left, top, right, bottom) in the image's pixels."""
        check_image(image)
        side = self.model.config.vision_config.backbone_config.image_size
        asked = self.tokenizer(words, return_tensors="pt", padding="max_length", max_length=WORDS, truncation=True)
        if box is not None:
            asked["input_boxes"] = centred(box, image.shape)
            asked["input_boxes_labels"] = torch.ones(1, 1, dtype=torch.long)
        logits = self.model(pixel_values=pixels(image, side), **asked).semantic_seg
        return (F.interpolate(logits, image.shape, mode="bilinear", align_corners=False)[0, 0] > 0).numpy()


def pixels(image: np.ndarray, side: int) -> Tensor:
    """(1, 3, side, side) in -1 to 1: an image (height, width), its range cut to `RANGE`, stretched to a square."""
    low, high = np.percentile(image, RANGE)
    grey = torch.from_numpy(((image - low) / max(high - low, 1e-6)).clip(0, 1).astype(np.float32))
    square = F.interpolate(grey[None, None], (side, side), mode="bilinear", align_corners=False, antialias=True)
    return (square * 2 - 1).expand(1, 3, side, side)


def centred(box: tuple[float, ...], shape: tuple[int, int]) -> Tensor:
    """(1, 1, 4): a box (left, top, right, bottom) as centre, width and height, in shares of an image's sides."""
    Prompt(box=box).check(shape)
    left, top, right, bottom = box
    height, width = shape
    found = ((left + right) / 2 / width, (top + bottom) / 2 / height, (right - left) / width, (bottom - top) / height)
    return torch.tensor([[found]])


def roi_align(features: Tensor, boxes: tuple[Tensor, ...], size: int) -> Tensor:
    """Features (B, C, H, W) pooled in boxes, for each image (K, 4) in its pixels: (all boxes, C, size, size).

    As torchvision's function of this name with its defaults (He et al. 2017, Mask R-CNN): the mean over evenly spread,
    bilinear samples of each of size x size parts, one sample a pixel or more.
    """
    found = [_pooled(image, box, size) for image, mine in zip(features, boxes, strict=True) for box in mine]
    return torch.stack(found) if found else features.new_zeros(0, features.shape[1], size, size)


def _pooled(image: Tensor, box: Tensor, size: int) -> Tensor:
    axes = []
    for start, end, count in zip(box[:2].tolist(), box[2:].tolist(), (image.shape[2], image.shape[1]), strict=True):
        length = max(end - start, 1.0)
        samples = size * -int(-length // size)
        at = start + (torch.arange(samples) + 0.5) * length / samples
        axes.append(at.clamp(0, count - 1) * 2 / max(count - 1, 1) - 1)
    grid = torch.stack(torch.meshgrid(*axes, indexing="xy"), dim=-1).to(image)
    seen = F.grid_sample(image[None], grid[None], mode="bilinear", padding_mode="border", align_corners=True)
    return F.adaptive_avg_pool2d(seen, size)[0]
