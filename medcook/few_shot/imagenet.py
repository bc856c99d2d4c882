"""Frozen ImageNet features of slices: two levels of SqueezeNet, one fine and one that has seen more of the image."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.methods.frozen import PHOTOGRAPH
from medcook.networks.squeezenet import FIRES, POOLED, SqueezeNet, load_squeezenet

FINE, DEEP = "fire3", "fire7"
WIDTHS = {FINE: 128, DEEP: 384}
WIDTH, RANK = sum(WIDTHS.values()), 32
LAYERS = ("conv1", *tuple(FIRES)[: list(FIRES).index(DEEP) + 1])


class ImageNetFeatures(nn.Module):
    """(B, C, H, W) to features (B, WIDTH, H / 4, W / 4): both levels of a frozen SqueezeNet, side by side.

    The features of a place have length one in each level. What learns is a linear change of low rank, which is none at
    first: training begins with ImageNet's own features. Every side of the image must be at least 24.
    """

    def __init__(self):
        super().__init__()
        self.frozen = load_squeezenet().requires_grad_(False)
        self.change = nn.Sequential(nn.Conv2d(WIDTH, RANK, 1, bias=False), nn.Conv2d(RANK, WIDTH, 1, bias=False))
        nn.init.zeros_(self.change[1].weight)

    def forward(self, images: Tensor) -> Tensor:
        size = [side // 4 for side in images.shape[2:]]
        levels = [F.normalize(maps, dim=1) for maps in imagenet_maps(self.frozen, images).values()]
        grown = [F.interpolate(maps, size=size, mode="bilinear", align_corners=False) for maps in levels]
        maps = torch.cat(grown, dim=1)
        return maps + self.change(maps)


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
