"""A small vision transformer that segments, what predicts beside it, and a masked autoencoder of it.

Its tokens take the way up of a U-Net; a pretext can hide some of them.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.methods import Batch, Moment
from medcook.networks.unet import DoubleConv
from medcook.pretraining import Pretrained

AREA, RATIO = (0.3, 1.0), (3 / 4, 4 / 3)
"""Of a crop, as a share of the image's area, and width over height."""


def between(low: float, high: float, count: int) -> Tensor:
    """(count,) uniform numbers of torch's own generator."""
    return low + (high - low) * torch.rand(count)


def crops(images: Tensor) -> tuple[Tensor, Tensor]:
    """Two crops of the same size of each image (B, C, H, W), scaled to the image's size: (2 B, C, H, W), all first ones
    first; and D (B, 2), where the second lies, seen from the first."""
    count = len(images)
    area, ratio = between(*AREA, count), between(*map(math.log, RATIO), count).exp()
    sides = torch.stack([area / ratio, area * ratio], dim=1).sqrt().clamp_max(1)
    corners = [torch.rand(count, 2) * (1 - sides) for _ in range(2)]
    views = torch.cat([cut_out(images, corner, sides) for corner in corners])
    return views, ((corners[1] - corners[0]) / sides).to(images.device)


def cut_out(images: Tensor, corners: Tensor, sides: Tensor) -> Tensor:
    """The window of each image with a top left corner (B, 2) and sides (B, 2), in shares of height and width."""
    matrix = torch.zeros(len(images), 2, 3)
    matrix[:, [1, 0], [1, 0]] = sides
    matrix[:, [1, 0], 2] = 2 * corners + sides - 1
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False).to(images.device)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def grid_places(size: tuple[int, int]) -> Tensor:
    """Row and column (H W, 2) of every token of a grid."""
    return torch.cartesian_prod(*(torch.arange(float(side)) for side in size)).view(-1, 2)


def sinusoids(places: Tensor, width: int) -> Tensor:
    """PE (..., width) of places (..., 2), which may be fractions: sine and cosine of row, then of column."""
    rates = 10_000 ** -(torch.arange(width // 4, device=places.device) / (width // 4))
    turns = places[..., None] * rates
    return torch.cat([turns.sin(), turns.cos()], dim=-1).flatten(-2)


def picked(tokens: Tensor, numbers: Tensor) -> Tensor:
    """Those of tokens (B, N, C) that have these numbers (B, K)."""
    return tokens.gather(1, numbers[..., None].expand(-1, -1, tokens.shape[2]))


def layers(width: int, depth: int, heads: int) -> nn.Sequential:
    """Transformer layers on tokens (B, N, width), normalised before each part."""
    layer = dict(dim_feedforward=4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
    return nn.Sequential(*(nn.TransformerEncoderLayer(width, heads, **layer) for _ in range(depth)))


class Encoder(nn.Module):
    """A small ViT: images (B, inputs, H, W) to tokens (B, H W / patch^2, width), or to those `kept` (B, K)."""

    def __init__(self, inputs: int, width: int, depth: int, heads: int, patch: int):
        super().__init__()
        self.embed = nn.Conv2d(inputs, width, patch, stride=patch)
        self.layers, self.norm = layers(width, depth, heads), nn.LayerNorm(width)

    def forward(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        maps = self.embed(images)
        places = grid_places(maps.shape[2:]).to(maps.device)
        tokens = maps.flatten(2).transpose(1, 2) + sinusoids(places, maps.shape[1])
        return self.norm(self.layers(tokens if kept is None else picked(tokens, kept)))


class Predictor(nn.Module):
    """g: from tokens (B, K, inputs) at places (B, K, 2) to what is there (B, M, outputs) at other places (B, M, 2).

    With `actions` it is also told one for each image (B, actions), which a small network joins with each question.
    """

    def __init__(self, inputs: int, width: int, depth: int, heads: int, outputs: int, actions: int = 0):
        super().__init__()
        self.width = width
        self.enter, self.leave = nn.Linear(inputs, width), nn.Linear(width, outputs)
        self.mask = nn.Parameter(torch.randn(width) * 0.02)
        self.layers, self.norm = layers(width, depth, heads), nn.LayerNorm(width)
        three = [nn.Linear(width + actions, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        self.policy = nn.Sequential(*three, nn.Linear(width, width)) if actions else None

    def forward(self, tokens: Tensor, places: Tensor, asked: Tensor, actions: Tensor | None = None) -> Tensor:
        known = self.enter(tokens) + sinusoids(places, self.width)
        questions = self.mask + sinusoids(asked, self.width)
        if self.policy is not None:
            told = actions[:, None].expand(-1, questions.shape[1], -1)
            questions = self.policy(torch.cat([questions, told], dim=2))
        found = self.layers(torch.cat([known, questions.to(known.dtype)], dim=1))
        return self.leave(self.norm(found[:, known.shape[1] :]))


class TokenUNet(nn.Module):
    """The encoder's tokens, scaled to four sizes, and the image itself take the way up of a U-Net: logits
    (B, classes, H, W), any H and W."""

    def __init__(self, encoder: Encoder, inputs: int, classes: int, channels: tuple[int, ...]):
        super().__init__()
        width, patch = encoder.embed.out_channels, encoder.embed.stride[0]
        self.encoder, self.patch, (first, *finer, same, deep) = encoder, patch, channels
        self.image = DoubleConv(inputs, first, 2)
        scaled = [nn.ConvTranspose2d(width, c, patch >> k, stride=patch >> k) for k, c in enumerate(finer, start=1)]
        scaled += [nn.Conv2d(width, same, 1), nn.Conv2d(width, deep, 3, stride=2, padding=1)]
        self.scaled = nn.ModuleList(
            nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels), nn.ReLU(inplace=True)) for layer in scaled
        )
        self.up = nn.ModuleList(DoubleConv(d + s, s, 2) for s, d in zip(channels, channels[1:], strict=False))
        self.head = nn.Conv2d(first, classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[2:]
        image = padded(image, self.patch)
        rows = image.shape[2] // self.patch
        tokens = self.encoder(image).transpose(1, 2).unflatten(2, (rows, -1))
        x, skips = None, [self.image(image), *(scale(tokens) for scale in self.scaled)]
        x = skips.pop()
        for block, skip in zip(reversed(self.up), reversed(skips), strict=True):
            x = F.interpolate(x, size=skip.shape[2:], mode="bilinear", align_corners=False)
            x = block(torch.cat([skip, x], dim=1))
        return self.head(x)[..., :height, :width]


def padded(images: Tensor, patch: int) -> Tensor:
    """Images, continued to the right and below by their border until whole patches fit."""
    height, width = images.shape[2:]
    return F.pad(images, [0, -width % patch, 0, -height % patch], mode="replicate")


@dataclass
class TokenPretrained(Pretrained):
    """A network of tokens instead of a U-Net; with a share of 0 it starts from nothing.

    A token is as large as a pixel of a U-Net's last but one map.

    width, depth, heads  of the transformer
    narrow, short        width and depth of the one beside it that predicts, with as many heads
    """

    width: int = 64
    depth: int = 3
    heads: int = 2
    narrow: int = 32
    short: int = 2

    axes = 2

    @property
    def patch(self) -> int:
        """Side of a patch, in pixels."""
        return 2 ** (len(self.channels) - 2)

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of the tokens of images."""
        return images.shape[2] // self.patch, images.shape[3] // self.patch

    def model(self, inputs: int, classes: int, dims: int) -> nn.Module:
        encoder = Encoder(inputs, self.width, self.depth, self.heads, self.patch)
        return TokenUNet(encoder, inputs, classes, self.channels)


@dataclass
class MaskedAutoencoder(TokenPretrained):
    """The comparison (He et al., CVPR 2022): from the same encoder's tokens of what is left, the pixels of the patches
    that are hidden, each patch with mean 0 and variance 1.

    hides  share of the patches
    """

    hides: float = 0.75

    def pretext_parts(self, model: TokenUNet, inputs: int, dims: int) -> nn.Module:
        return Predictor(self.width, self.narrow, self.short, self.heads, inputs * self.patch**2)

    def pretext(self, nets: nn.ModuleDict, images: Batch, now: Moment) -> Tensor:
        with torch.autocast(images.images.device.type, enabled=False):
            views = crops(images.images)[0]
        places = grid_places(self.grid(views)).to(views.device)
        order = torch.rand(len(views), len(places)).argsort(1).to(views.device)
        hidden, kept = order.tensor_split([round(self.hides * len(places))], dim=1)
        known = nets["model"].encoder(views, kept)
        guess = nets["pretext"](known, places[kept], places[hidden])
        pixels = picked(F.unfold(views, self.patch, stride=self.patch).transpose(1, 2), hidden)
        return F.mse_loss(guess.float(), F.layer_norm(pixels, pixels.shape[-1:]))
