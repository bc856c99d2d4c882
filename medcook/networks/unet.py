"""The U-Net of Ronneberger et al. (MICCAI 2015), in two or three dimensions, with batch normalisation."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DoubleConv(nn.Sequential):
    """Two 3 x 3 convolutions, each followed by batch normalisation and a ReLU."""

    def __init__(self, inputs: int, outputs: int, dims: int):
        conv, norm = (nn.Conv2d, nn.BatchNorm2d) if dims == 2 else (nn.Conv3d, nn.BatchNorm3d)
        super().__init__(
            conv(inputs, outputs, 3, padding=1, bias=False),
            norm(outputs),
            nn.ReLU(inplace=True),
            conv(outputs, outputs, 3, padding=1, bias=False),
            norm(outputs),
            nn.ReLU(inplace=True),
        )


class UNet(nn.Module):
    """Down, across, up: (B, inputs, *size) to logits (B, classes, *size).

    Every side of the image must be at least 2 ** (len(channels) - 1); odd sides are rounded down on the way.
    """

    def __init__(
        self, *, inputs: int = 1, classes: int = 4, channels: tuple[int, ...] = (16, 32, 64, 128, 128), dims: int = 2
    ):
        super().__init__()
        self.pool = F.max_pool2d if dims == 2 else F.max_pool3d
        self.mode = "bilinear" if dims == 2 else "trilinear"
        self.down = nn.ModuleList(DoubleConv(i, o, dims) for i, o in zip((inputs, *channels), channels, strict=False))
        self.up = nn.ModuleList(
            DoubleConv(deep + skip, skip, dims) for skip, deep in zip(channels, channels[1:], strict=False)
        )
        self.head = (nn.Conv2d if dims == 2 else nn.Conv3d)(channels[0], classes, 1)

    def descend(self, image: Tensor) -> list[Tensor]:
        """The feature maps of every level on the way down, the finest first."""
        maps = [self.down[0](image)]
        for block in self.down[1:]:
            maps.append(block(self.pool(maps[-1], 2)))
        return maps

    def ascend(self, maps: list[Tensor]) -> list[Tensor]:
        """The feature maps of every level on the way up from those on the way down; both have the finest first."""
        found = [maps[-1]]
        for block, skip in zip(reversed(self.up), reversed(maps[:-1]), strict=True):
            x = F.interpolate(found[-1], size=skip.shape[2:], mode=self.mode, align_corners=False)
            found.append(block(torch.cat([skip, x], dim=1)))
        return found[::-1]

    def features(self, image: Tensor) -> Tensor:
        """The last feature map (B, channels[0], *size), before the head."""
        return self.ascend(self.descend(image))[0]

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.features(image))
