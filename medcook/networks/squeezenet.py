"""SqueezeNet 1.0 (Iandola et al. 2016), and the reader of its deep-compressed ImageNet weights (Han et al. 2016).

The file holds 26 counts of non-zero weights (uint32), then for each layer, in the order of `LAYERS`: a codebook of 256
float32, the bias, one byte for each non-zero weight (its entry in the codebook), and four bits for each (how many zeros
come before it; the low half of a byte first). Where more than 15 zeros follow each other, an entry of value zero stands
between them.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.data import fetch
from medcook.errors import MedcookError

FIRES = {  # inputs, squeezed, expanded by each of the two paths
    "fire2": (96, 16, 64),
    "fire3": (128, 16, 64),
    "fire4": (128, 32, 128),
    "fire5": (256, 32, 128),
    "fire6": (256, 48, 192),
    "fire7": (384, 48, 192),
    "fire8": (384, 64, 256),
    "fire9": (512, 64, 256),
}
POOLED = ("conv1", "fire4", "fire8")
FEATURES, IMAGENET_CLASSES = 512, 1000
FILE = ("weights", "compressed_SqueezeNet.net")
CODES = 256

Shape = tuple[int, int, int, int]


class Fire(nn.Module):
    """(B, inputs, H, W) to (B, 2 * expanded, H, W): fewer channels, then 1 x 1 and 3 x 3 convolutions side by side."""

    def __init__(self, inputs: int, squeezed: int, expanded: int):
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.expand1x1(x)), F.relu(self.expand3x3(x))], dim=1)


class SqueezeNet(nn.Module):
    """RGB images (B, 3, H, W), 0 to 255 minus `MEAN`, to logits (B, 1000); every side has at least 17 pixels.

    features_only  leave the last layer (conv10) out: then images become `features`
    """

    MEAN = (123.0, 117.0, 104.0)

    def __init__(self, *, features_only: bool = False):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 96, 7, stride=2)
        for name, sizes in FIRES.items():
            self.add_module(name, Fire(*sizes))
        self.conv10 = None if features_only else nn.Conv2d(FEATURES, IMAGENET_CLASSES, 1)

    def features(self, images: Tensor) -> Tensor:
        """The last feature map (B, 512, H / 16, W / 16), about."""
        x = images
        for name in ("conv1", *FIRES):
            layer = getattr(self, name)
            x = F.relu(layer(x)) if name == "conv1" else layer(x)
            if name in POOLED:
                x = F.max_pool2d(x, 3, stride=2, ceil_mode=True)
        return x

    def forward(self, images: Tensor) -> Tensor:
        x = self.features(images)
        return x if self.conv10 is None else F.relu(self.conv10(x)).mean((2, 3))


def layers(network: SqueezeNet) -> list[nn.Conv2d]:
    """The convolutions in the order of the file: conv1, of each fire squeeze, expand1x1 and expand3x3, conv10."""
    found = [network.conv1]
    for name in FIRES:
        fire = getattr(network, name)
        found += [fire.squeeze, fire.expand1x1, fire.expand3x3]
    return found + ([network.conv10] if network.conv10 is not None else [])


def load_squeezenet(*, features_only: bool = True) -> SqueezeNet:
    """SqueezeNet with its ImageNet weights, fetched on first use (0.7 MB), in evaluation mode."""
    whole = SqueezeNet()
    with torch.no_grad():
        for layer, (weight, bias) in zip(layers(whole), _pretrained(), strict=True):
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
        whole.conv1.weight.copy_(whole.conv1.weight.flip(1))  # the file's network takes blue, green, red
    if features_only:
        whole.conv10 = None
    return whole.eval()


@lru_cache(maxsize=1)
def _pretrained() -> list[tuple[Tensor, Tensor]]:
    path = fetch.file(*FILE)
    with torch.device("meta"):  # shapes alone: no random numbers are drawn, so the first call is like every other
        shapes = [tuple(layer.weight.shape) for layer in layers(SqueezeNet())]
    return read_compressed(path, shapes)


def read_compressed(path: Path, shapes: list[Shape]) -> list[tuple[Tensor, Tensor]]:
    """(weight, bias) of each layer of a deep-compressed file; MedcookError naming a file that is not one."""
    try:
        return decode(path.read_bytes(), shapes)
    except (ValueError, IndexError) as error:
        hint = "Delete the file and fetch it again."
        raise MedcookError(f"{path}: not deep-compressed weights of this network ({error}).", hint) from error


def decode(content: bytes, shapes: list[Shape]) -> list[tuple[Tensor, Tensor]]:
    """(weight, bias) of layers with weights of `shapes`; ValueError where the bytes do not fit them exactly."""
    stream = Bytes(content)
    counts = stream.take("<u4", len(shapes))
    decoded = [_layer(stream, int(count), shape) for count, shape in zip(counts, shapes, strict=True)]
    if stream.left:
        raise ValueError(f"{stream.left} bytes are left over")
    return decoded


def _layer(stream: "Bytes", count: int, shape: Shape) -> tuple[Tensor, Tensor]:
    codebook, bias = stream.take("<f4", CODES), stream.take("<f4", shape[0])
    codes, packed = stream.take("u1", count), stream.take("u1", (count + 1) // 2)
    zeros = np.stack([packed & 15, packed >> 4], axis=1).ravel()[:count].astype(np.int64)
    weight = np.zeros(np.prod(shape), dtype=np.float32)
    weight[np.cumsum(zeros + 1) - 1] = codebook[codes]
    return torch.from_numpy(weight.reshape(shape)), torch.from_numpy(bias.astype(np.float32))


class Bytes:
    """Bytes to be taken from the front, as numbers; ValueError where they run out."""

    def __init__(self, content: bytes):
        self.content, self.position = content, 0

    def take(self, kind: str, count: int) -> np.ndarray:
        """The next `count` numbers of a NumPy dtype."""
        size = np.dtype(kind).itemsize * count
        if size > self.left:
            raise ValueError(f"it ends {size - self.left} bytes too early")
        found = np.frombuffer(self.content, kind, count, self.position)
        self.position += size
        return found

    @property
    def left(self) -> int:
        return len(self.content) - self.position
