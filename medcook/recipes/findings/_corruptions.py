"""What goes wrong with an image between patient and network: the kinds and strengths of MedMNIST-C for chest X-rays.

MedMNIST-C (Di Salvo, Doerrich and Ledig, arXiv 2406.17536, 2024; code github.com/francescodisalvo05/medmnistc-api)
corrupts test images alone. Its strengths are for images of 224 x 224 with values from 0 to 1; what is measured in
pixels is scaled here. Compression as JPEG is left out.
"""

from zlib import crc32

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from medcook.preparation import zscore

PIXELS = 224
"""Side of the images that strengths are for."""

UP, DOWN = (1.1, 1.2, 1.3, 1.4, 1.6), (0.9, 0.8, 0.7, 0.6, 0.4)
STRENGTHS = {
    "gaussian noise": (0.04, 0.08, 0.12, 0.18, 0.26),
    "speckle noise": (0.05, 0.15, 0.2, 0.35, 0.45),
    "impulse noise": (0.01, 0.03, 0.06, 0.09, 0.17),
    "shot noise": (60, 25, 18, 10, 5),
    "blur": (0.8, 1.1, 1.4, 1.7, 2.0),
    "pixelate": (0.3, 0.25, 0.2, 0.15, 0.1),
    "brightness up": (1.1, 1.2, 1.3, 1.4, 1.5),
    "brightness down": (0.9, 0.8, 0.7, 0.6, 0.5),
    "contrast up": UP,
    "contrast down": DOWN,
    "gamma up": UP,
    "gamma down": DOWN,
}
"""{kind: five strengths, the mildest first}. Of noise its standard deviation, in speckles times the value; the share of
pixels that become black or white; counts in a white pixel. Of blur a standard deviation in pixels (the one that a
kernel of 3 to 11 pixels has by default there), of pixels how many are left, else a factor or a power."""
KINDS = tuple(STRENGTHS)


def corrupt(x: np.ndarray, kind: str, strength: float, rng: np.random.Generator) -> np.ndarray:
    """An image (H, W) with values from 0 to 1, corrupted; the values stay in this range."""
    match kind:
        case "gaussian noise":
            x = x + rng.normal(0, strength, x.shape)
        case "speckle noise":
            x = x + x * rng.normal(0, strength, x.shape)
        case "impulse noise":
            hit = rng.random(x.shape)
            x = np.where(hit < strength / 2, 0, np.where(hit > 1 - strength / 2, 1, x))
        case "shot noise":
            x = rng.poisson(x * strength) / strength
        case "blur":
            x = ndimage.gaussian_filter(x, strength * x.shape[0] / PIXELS, mode="mirror")
        case "pixelate":
            x = pixelated(x, round(strength * PIXELS))
        case "brightness up" | "brightness down":
            x = x * strength
        case "contrast up" | "contrast down":
            x = (x - x.mean()) * strength + x.mean()
        case "gamma up" | "gamma down":
            x = x**strength
        case _:
            raise ValueError(f"There is no corruption {kind!r}; known: {', '.join(KINDS)}.")
    return np.clip(x, 0, 1)


def pixelated(x: np.ndarray, side: int) -> np.ndarray:
    """An image (H, W) of which so many means a side are left, at most as many as it has pixels."""
    image = torch.from_numpy(x)[None, None]
    few = F.interpolate(image, [min(side, length) for length in x.shape], mode="area")
    return F.interpolate(few, x.shape, mode="nearest-exact")[0, 0].numpy()


def corrupted(images: Tensor, kind: str, name: str) -> Tensor:
    """Prepared images (N, 1, H, W), each corrupted in a strength that the name decides, and prepared again (z-scored).

    So brightness and contrast alone change nothing but what is cut off at black and white.
    """
    found = []
    for number, image in enumerate(images[:, 0].double().numpy()):
        rng = np.random.default_rng(crc32(f"{kind} of {name}, image {number}".encode()))
        strength = STRENGTHS[kind][rng.integers(len(STRENGTHS[kind]))]
        low, high = image.min(), image.max()
        x = (image - low) / (high - low) if high > low else np.zeros_like(image)
        found.append(zscore(torch.from_numpy(corrupt(x, kind, strength, rng)).float()))
    return torch.stack(found)[:, None]
