"""An encoder of single frames, in the form that networks on flights (B, C, T, H, W) take."""

from torch import Tensor, nn

from medcook.networks.encoder import Encoder
from medcook.recipes.volumes._slices import FLAT, pool_slices


class FrameEncoder(Encoder):
    """The book's encoder in two dimensions, on every frame: flights (B, inputs, T, H, W) to (B, channels[-1], T)."""

    def __init__(self, *, inputs: int = 1, channels: tuple[int, ...] = (16, 32, 64, 128)):
        super().__init__(inputs=inputs, channels=channels, dims=3)
        self.pool = pool_slices
        for block in self.down:
            for place, layer in enumerate(block):
                if isinstance(layer, nn.Conv3d):
                    block[place] = nn.Conv3d(layer.in_channels, layer.out_channels, FLAT, padding=(0, 1, 1), bias=False)

    def forward(self, flights: Tensor) -> Tensor:
        return self.maps(flights).flatten(3).mean(3)
