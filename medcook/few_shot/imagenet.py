"""Frozen ImageNet features of slices: two levels of SqueezeNet, one fine and one that has seen more of the image."""

import torch
import torch.nn.functional as F
from torch import Tensor

from medcook.methods.frozen import PHOTOGRAPH
from medcook.networks.squeezenet import FIRES, POOLED, SqueezeNet

FINE, DEEP = "fire3", "fire7"
WIDTHS = {FINE: 128, DEEP: 384}
LAYERS = ("conv1", *tuple(FIRES)[: list(FIRES).index(DEEP) + 1])


@torch.no_grad()
def imagenet_maps(encoder: SqueezeNet, images: Tensor) -> dict[str, Tensor]:
    """{layer: maps} of z-scored slices (B, C, H, W): fine ones at about H / 4, deep ones at about H / 8."""
    x = PHOTOGRAPH * images[:, :1].expand(-1, 3, -1, -1)
    found = {}
    for name in LAYERS:
        x = F.relu(encoder.conv1(x)) if name == "conv1" else getattr(encoder, name)(x)
        if name in WIDTHS:
            found[name] = x
        if name in POOLED:
            x = F.max_pool2d(x, 3, stride=2, ceil_mode=True)
    return found
