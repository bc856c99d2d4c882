"""What both versions of MedViT (Manzari et al., 2023, 2025) are made of: convolutions and attention to everything."""

import torch.nn.functional as F
from torch import Tensor, nn

HEAD = 8
"""Channels of a head."""


def in_heads(x: Tensor) -> Tensor:
    """(..., C) to (..., heads, HEAD)."""
    return x.unflatten(-1, (-1, HEAD))


def heads_of(x: Tensor) -> Tensor:
    """(B, C, H, W) to (B, heads, H W, HEAD)."""
    return x.flatten(2).unflatten(1, (-1, HEAD)).transpose(2, 3)


class GlobalAttention(nn.Module):
    """Maps (B, width, H, W) to the same: each place attends to all others, which are averaged `shrink` x `shrink`."""

    def __init__(self, width: int, shrink: int):
        super().__init__()
        self.shrink = shrink
        self.query, self.known, self.out = (nn.Conv2d(width, many * width, 1) for many in (1, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        few = F.avg_pool2d(x, self.shrink, ceil_mode=True) if self.shrink > 1 else x
        key, value = (heads_of(part) for part in self.known(few).chunk(2, dim=1))
        found = F.scaled_dot_product_attention(heads_of(self.query(x)), key, value)
        return self.out(found.transpose(2, 3).reshape(x.shape))


def convolution(inputs: int, outputs: int, side: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution and batch normalisation."""
    conv = nn.Conv2d(inputs, outputs, side, stride, side // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


def head_convolution(width: int) -> nn.Sequential:
    """Multi-head convolutional attention of the first version: 3 x 3, each head on its own, then all together."""
    parts = convolution(width, width, 3, groups=width // HEAD), nn.ReLU(inplace=True), nn.Conv2d(width, width, 1)
    return nn.Sequential(*parts)


def embedding(inputs: int, outputs: int, shrink: bool) -> nn.Module:
    """Maps with other channels and, if they shrink, half the sides, rounded up."""
    if not shrink and inputs == outputs:
        return nn.Identity()
    pool = nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False) if shrink else nn.Identity()
    return nn.Sequential(pool, convolution(inputs, outputs))
