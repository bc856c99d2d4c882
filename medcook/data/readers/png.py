"""PNG: 8-bit images and masks."""

from pathlib import Path

import numpy as np
from PIL import Image

from medcook.data.readers.damage import readable
from medcook.errors import MedcookError


def read_gray(path: Path) -> np.ndarray:
    """The image as (H, W) float32 in its stored units; colour is averaged to grey."""
    pixels = read_pixels(path).astype(np.float32)
    return pixels[..., :3].mean(-1) if pixels.ndim == 3 else pixels


def read_mask(path: Path, inverted: bool = False) -> np.ndarray:
    """A black-and-white mask as (H, W) uint8 of 0 and 1; `inverted` where black marks the structure."""
    pixels = read_pixels(path)
    gray = pixels[..., 0] if pixels.ndim == 3 else pixels
    return ((gray > gray.max() / 2) != inverted).astype(np.uint8)


def read_labels(path: Path) -> np.ndarray:
    """A label map as (H, W) integers, as stored; MedcookError for a colour image."""
    pixels = read_pixels(path)
    if pixels.ndim != 2:
        raise MedcookError(
            f"{path}: a label map needs one channel, not {pixels.shape[-1]}.", "Store the class as grey."
        )
    return pixels


def read_pixels(path: Path) -> np.ndarray:
    """All stored channels: (H, W) or (H, W, C); palettes give their indices."""
    with readable(path, "PNG", "Fetch or export it again."), Image.open(path) as image:
        pixels = np.asarray(image)
    return pixels.astype(np.uint8) if pixels.dtype == bool else pixels
