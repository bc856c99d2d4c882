"""Chained augmentation mixing (AugMix: Hendrycks et al., ICLR 2020), for segmentation: only brightness changes.

An image x between 0 and 1 goes through several chains c_i of one to three random operations each, and

    x' = m x + (1 - m) sum_i w_i c_i(x),    w from Dirichlet(1, ..., 1), m from Beta(1, 1)

so that it is changed a lot, but seldom far from what it was. The operations and how strong they are follow Pillow's
and the reference code's: the first four of the list are the paper's lighter set, all eight but for colour the other.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Beta, Dirichlet

LEVELS = 256
DEPTHS = 3
"""Most operations of a chain."""


def autocontrast(image: Tensor, level: float) -> Tensor:
    """From darkest to brightest becomes 0 to 1."""
    low, high = image.aminmax()
    return (image - low) / (high - low) if high > low else image


def equalize(image: Tensor, level: float) -> Tensor:
    """Every brightness becomes about as frequent."""
    place = (image * (LEVELS - 1)).round().long()
    counts = torch.bincount(place.flatten(), minlength=LEVELS)
    step = (place.numel() - counts[counts.nonzero()[-1, 0]]) // (LEVELS - 1)
    if step == 0:
        return image
    below = torch.cumsum(counts, 0) - counts
    return ((below + step // 2) // step).clamp(max=LEVELS - 1)[place].to(image) / (LEVELS - 1)


def posterize(image: Tensor, level: float) -> Tensor:
    """Four bits of brightness remain, or one less where the level is high."""
    width = LEVELS // 2 ** (4 - int(level * 4 / 10))
    return torch.floor(image * (LEVELS - 1) / width) * width / (LEVELS - 1)


def solarize(image: Tensor, level: float) -> Tensor:
    """What is brighter than a threshold is turned into its negative."""
    return torch.where(image * (LEVELS - 1) >= LEVELS - int(level * LEVELS / 10), 1 - image, image)


def share(level: float) -> float:
    """How much of an image is left where a chain makes it grey, dark or blurred."""
    return level * 1.8 / 10 + 0.1


def contrast(image: Tensor, level: float) -> Tensor:
    """Nearer to its mean."""
    return image.mean().lerp(image, share(level))


def brightness(image: Tensor, level: float) -> Tensor:
    """Darker."""
    return image * share(level)


def sharpness(image: Tensor, level: float) -> Tensor:
    """Nearer to its own blurred version; the border stays."""
    kernel = image.new_ones(3, 3)
    kernel[1, 1] = 5
    blurred = image.clone()
    blurred[..., 1:-1, 1:-1] = F.conv2d(image[None], (kernel / kernel.sum())[None, None])[0]
    return blurred.lerp(image, share(level))


OPERATIONS = (autocontrast, equalize, posterize, solarize, contrast, brightness, sharpness)


def chain(image: Tensor, most: float) -> Tensor:
    """One to `DEPTHS` random operations on an image (1, H, W) between 0 and 1, at levels up to `most` (of 10)."""
    for _ in range(int(torch.randint(1, DEPTHS + 1, ()))):
        operation = OPERATIONS[int(torch.randint(len(OPERATIONS), ()))]
        image = operation(image, 0.1 + (most - 0.1) * float(torch.rand(())))
    return image


def mixed(image: Tensor, chains: int, most: float) -> Tensor:
    """x' (1, H, W) of an image between 0 and 1; everything random comes from torch's own generator."""
    weights = Dirichlet(torch.ones(chains)).sample().to(image)
    kept = Beta(torch.ones(()), torch.ones(())).sample().to(image)
    changed = sum(weight * chain(image, most) for weight in weights)
    return kept * image + (1 - kept) * changed
