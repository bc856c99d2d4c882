"""Two-dimensional networks on volumes, and what lies beside a slice; slices are those along the first axis."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.networks.unet import UNet

FLAT = (1, 3, 3)
"""A convolution of this kernel is the 3 x 3 convolution of every slice, so that slices need not become a batch."""


def pool_slices(volume: Tensor, size: int) -> Tensor:
    """Max pooling within every slice: (B, C, D, H, W) to (B, C, D, H / size, W / size)."""
    return F.max_pool3d(volume, (1, size, size))


def neighbours(volume: Tensor, count: int) -> Tensor:
    """(B, C, D, H, W) to (B, count * C, D, H, W): each slice's `count` nearest, itself the middle one, as channels.

    Beyond the ends the last slice is repeated.
    """
    last = volume.shape[2] - 1
    places = torch.arange(last + 1, device=volume.device)
    moved = [volume[:, :, (places + step).clamp(0, last)] for step in range(-(count // 2), count // 2 + 1)]
    return torch.cat(moved, dim=1)


class SliceUNet(UNet):
    """The book's U-Net in two dimensions, on every slice: (B, inputs, D, H, W) to logits (B, classes, D, H, W)."""

    def __init__(self, *, inputs: int, classes: int, channels: tuple[int, ...]):
        super().__init__(inputs=inputs, classes=classes, channels=channels, dims=3)
        self.pool = pool_slices
        for block in [*self.down, *self.up]:
            for place, layer in enumerate(block):
                if isinstance(layer, nn.Conv3d):
                    block[place] = nn.Conv3d(layer.in_channels, layer.out_channels, FLAT, padding=(0, 1, 1), bias=False)
