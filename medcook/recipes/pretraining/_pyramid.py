"""A feature pyramid (Lin et al., CVPR 2017) on an encoder, as the segmentation networks of SurgeNet have it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PyramidNet(nn.Module):
    """An encoder with a feature pyramid on top: (B, inputs, H, W) to logits (B, classes, H, W).

    Each level becomes `width` channels, and is added to the coarser one, enlarged; the finest makes the logits.

    encoder   has `levels(images)`: maps of any sizes, finest first; called, it gives the coarsest
    channels  of these maps
    """

    def __init__(self, encoder: nn.Module, channels: tuple[int, ...], classes: int, width: int = 32):
        super().__init__()
        self.encoder, self.channels = encoder, channels
        self.norms = nn.ModuleList(nn.GroupNorm(8, count) for count in channels)
        self.lateral = nn.ModuleList(nn.Conv2d(count, width, 1) for count in channels)
        self.smooth = nn.ModuleList(self._block(width) for _ in channels)
        self.head = nn.Conv2d(width, classes, 1)

    @staticmethod
    def _block(width: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.ReLU(inplace=True))

    def forward(self, images: Tensor) -> Tensor:
        levels = zip(self.lateral, self.norms, self.encoder.levels(images), strict=True)
        maps = [lateral(norm(level)) for lateral, norm, level in levels]
        x = torch.zeros_like(maps[-1])
        for fine, smooth in zip(reversed(maps), reversed(self.smooth), strict=True):
            x = smooth(fine + F.interpolate(x, size=fine.shape[2:], mode="bilinear", align_corners=False))
        return F.interpolate(self.head(x).float(), size=images.shape[2:], mode="bilinear", align_corners=False)
