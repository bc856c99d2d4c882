"""Label maps as images: each structure has a colour of its own, so that one network works on images and on labels."""

import torch
import torch.nn.functional as F
from torch import Tensor


def painted(labels: Tensor, classes: int) -> Tensor:
    """Labels (B, *size), 0 to classes - 1, as images (B, classes - 1, *size): 1 in the structure's colour, else -1.

    Three structures are red, green and blue on black.
    """
    return F.one_hot(labels.long(), classes).movedim(-1, 1)[:, 1:].float() * 2 - 1


def shares(colours: Tensor) -> Tensor:
    """Images of label maps (B, classes - 1, *size) as probabilities (B, classes, *size).

    A colour's brightness, from -1 to 1, is the share of its structure; what is left is background, and where there is
    more than 1 of them together, they divide it.
    """
    structures = ((colours + 1) / 2).clamp(0, 1)
    total = structures.sum(1, keepdim=True)
    return torch.cat([(1 - total).clamp_min(0), structures / total.clamp_min(1)], dim=1)


def grey(images: Tensor, colours: int) -> Tensor:
    """The first channel of images (B, C, *size) in each of so many colours."""
    return images[:, :1].expand(-1, colours, *images.shape[2:])
