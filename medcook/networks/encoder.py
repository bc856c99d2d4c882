"""The U-Net's way down on its own: an image in, one feature vector out."""

import torch.nn.functional as F
from torch import Tensor, nn

from medcook.networks.unet import DoubleConv


class Encoder(nn.Module):
    """(B, inputs, *size) to (B, channels[-1]): double convolutions with pooling between, then the mean over the image.

    Every side of the image must be at least 2 ** (len(channels) - 1).
    """

    def __init__(self, *, inputs: int = 1, channels: tuple[int, ...] = (16, 32, 64, 128), dims: int = 2):
        super().__init__()
        self.pool = F.max_pool2d if dims == 2 else F.max_pool3d
        self.down = nn.ModuleList(DoubleConv(i, o, dims) for i, o in zip((inputs, *channels), channels, strict=False))

    def maps(self, image: Tensor) -> Tensor:
        """The last feature map (B, channels[-1], *size / 2 ** (len(channels) - 1))."""
        x = self.down[0](image)
        for block in self.down[1:]:
            x = block(self.pool(x, 2))
        return x

    def forward(self, image: Tensor) -> Tensor:
        return self.maps(image).flatten(2).mean(2)
