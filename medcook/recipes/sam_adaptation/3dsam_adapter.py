"""3DSAM-adapter (Gong et al., 2023): SAM's encoder of images sees volumes, most of it frozen.

Slices pass the frozen stem; a depthwise convolution merges neighbouring ones, and a depth position joins SAM's two. The
frozen blocks attend to all tokens of the volume, each after an adapter whose depthwise convolution is 3 x 3 x 3. The
features at the click join the image by attention, and a decoder of 3D convolutions puts four levels together:

    z_0 = merge(stem(x)) + position + depth,   z_i = B_i(A_i(z_{i-1})),   A(z) = z + W2 relu(conv3d(relu(W1 z)))
    mask = decoder(z_2, z_4, z_6, attend(z_8, click), x)
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.methods import Supervised
from medcook.recipes.recipe import Arm, Component, Recipe, Scale
from medcook.recipes.sam_adaptation._volumes import (
    MILD,
    ClickedVolumes,
    PositionCode,
    click_rows,
    drawn,
    resized,
)
from medcook.sam import adapting
from medcook.tasks import Budget, VolumeTask

ZOOM = 2
"""Slices are enlarged so much for the stem, so that a token stands for 8 x 8 voxels."""
MERGED = 4
"""Slices that become one layer of tokens."""
LAYERS = 8
"""Depth positions that are learnt; read between where a volume has another number of layers."""
LEVELS = 4


class Adapter(nn.Module):
    """Tokens (B, D, h, w, width) see their neighbours, with `depth` also those in depth; 0 at first."""

    def __init__(self, width: int, middle: int, depth: bool):
        super().__init__()
        kernel, padding = ((3, 3, 3), (1, 1, 1)) if depth else ((1, 3, 3), (0, 1, 1))
        self.down, self.up = nn.Linear(width, middle), nn.Linear(middle, width)
        self.conv = nn.Conv3d(middle, middle, kernel, padding=padding, groups=middle)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.relu(self.down(tokens)).permute(0, 4, 1, 2, 3)
        return tokens + self.up(F.relu(self.conv(x)).permute(0, 2, 3, 4, 1))


class VolumeEncoder(nn.Module):
    """SAM's frozen encoder on volumes (B, 1, D, H, W): tokens (B, D / 4, H / 8, W / 8, width) at four levels.

    depth  False: every layer of tokens is an image of its own, as in two dimensions
    """

    def __init__(self, encoder: nn.Module, middle: int, depth: bool):
        super().__init__()
        width = encoder.config.hidden_size
        self.encoder, self.depth = encoder.requires_grad_(False), depth
        for layer in encoder.layers:
            layer.layer_norm1.requires_grad_(True)
            layer.layer_norm2.requires_grad_(True)
        self.merge = nn.Conv3d(width, width, (MERGED, 1, 1), (MERGED, 1, 1), groups=width, bias=False)
        nn.init.constant_(self.merge.weight, 1 / MERGED)
        self.depth_position = nn.Parameter(torch.zeros(1, width, LAYERS)) if depth else None
        self.adapters = nn.ModuleList(Adapter(width, middle, depth) for _ in encoder.layers)
        self.finer: list[Tensor] = []

    def forward(self, volumes: Tensor) -> list[Tensor]:
        tokens, levels = self.tokens(volumes), []
        for number, (adapter, layer) in enumerate(zip(self.adapters, self.encoder.layers, strict=True), start=1):
            tokens = self.attend(layer, adapter(tokens))
            if number % (len(self.adapters) // LEVELS) == 0:
                levels.append(tokens)
        return levels

    def tokens(self, volumes: Tensor) -> Tensor:
        """(B, D / 4, H / 8, W / 8, width) before the first block; sides are filled up to whole tokens.

        Keeps the stem's finer features of the last volumes, (B, channels, D, H / step, W / step) for steps 1, 2 and 4.
        """
        fill = [
            side for size, unit in zip(volumes.shape[:1:-1], (8, 8, MERGED), strict=True) for side in (0, -size % unit)
        ]
        volumes = F.pad(volumes, fill, mode="replicate")
        slices = F.interpolate(volumes.transpose(1, 2).flatten(0, 1), scale_factor=ZOOM, mode="bilinear")
        with torch.no_grad():
            tokens = self.encoder.patch_embed(slices)
        self.finer = [each.unflatten(0, (len(volumes), -1)).transpose(1, 2) for each in self.encoder.patch_embed.finer]
        tokens = tokens.unflatten(0, (len(volumes), -1)).permute(0, 4, 1, 2, 3)
        tokens = self.merge(tokens)
        place = self.encoder.pos_embed.permute(0, 3, 1, 2)
        place = F.interpolate(place, tokens.shape[3:], mode="bilinear", align_corners=False)[:, :, None]
        if self.depth_position is not None:
            place = place + F.interpolate(self.depth_position, tokens.shape[2], mode="linear")[..., None, None]
        return (tokens + place).permute(0, 2, 3, 4, 1)

    def attend(self, layer: nn.Module, tokens: Tensor) -> Tensor:
        """A block of SAM on tokens (B, D, h, w, width): all of a volume see each other, or all of a layer."""
        if self.depth:
            return layer(tokens.flatten(1, 2)).view_as(tokens)
        return layer(tokens.flatten(0, 1)).view_as(tokens)


class ClickAttention(nn.Module):
    """The image learns of the click: its features and a few free queries talk, then the image looks at them."""

    def __init__(self, hidden: int, queries: int = 10, heads: int = 4):
        super().__init__()
        self.queries = nn.Parameter(0.1 * torch.randn(1, queries, hidden))
        self.among, self.towards = (nn.MultiheadAttention(hidden, heads, batch_first=True) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(2))

    def forward(self, image: Tensor, codes: Tensor, clicks: Tensor) -> Tensor:
        """image (M, T, hidden), position codes (T, hidden), clicks (M, N, hidden) with their codes; like `image`."""
        asked = torch.cat([self.queries.expand(len(image), -1, -1).to(clicks.dtype), clicks], dim=1)
        asked = self.norms[0](asked + self.among(asked, asked, asked, need_weights=False)[0])
        return self.norms[1](image + self.towards(image + codes, asked, asked, need_weights=False)[0])


class VolumeDecoder(nn.Module):
    """Four levels (M, hidden, d, h, w), the stem's features at half and full resolution and the volume to logits.

    The drawn click joins at half the resolution; a mask is background where nothing was learnt.
    """

    def __init__(self, hidden: int, stem: tuple[int, int], middle: int = 16, fine: int = 8):
        super().__init__()
        conv = lambda i, o: nn.Sequential(nn.Conv3d(i, o, 3, padding=1), nn.GroupNorm(4, o), nn.GELU())  # noqa: E731
        self.join = nn.Conv3d(LEVELS * hidden, middle, 1)
        self.skips = nn.ModuleList([nn.Conv3d(stem[0], middle, 1), nn.Conv3d(stem[1], fine, 1)])
        self.coarse, self.full = conv(2 * middle + 1, middle), conv(middle + fine + 1, fine)
        self.head = nn.Conv3d(fine, 1, 1)
        nn.init.constant_(self.head.bias, -3.0)

    def forward(
        self, levels: list[Tensor], stem: list[Tensor], volume: Tensor, points: Tensor, marks: Tensor
    ) -> Tensor:
        """stem (M, channels, D, H / 2, W / 2) and (M, channels, D, H, W); volume (M, 1, D, H, W); to (M, D, H, W)."""
        size = volume.shape[2:]
        half = tuple((count + 1) // 2 for count in size)
        skips = [skip(each) for skip, each in zip(self.skips, stem, strict=True)]
        x = resized(self.join(torch.cat(levels, dim=1)), half)
        x = self.coarse(torch.cat([x, resized(skips[0], half), drawn(points, marks, half, size)], dim=1))
        x = self.full(torch.cat([resized(x, size), resized(skips[1], size), volume], dim=1))
        return self.head(x)[:, 0]


class AdaptedVolumes(nn.Module):
    """The small SAM for volumes: see `ClickedVolumes.make`."""

    def __init__(self, sam: nn.Module, depth: bool, middle: int = 48, hidden: int = 64):
        super().__init__()
        self.encoder = VolumeEncoder(sam.sam.vision_encoder, middle, depth)
        width = self.encoder.encoder.config.hidden_size
        norm = lambda: nn.GroupNorm(1, hidden)  # noqa: E731
        self.necks = nn.ModuleList(nn.Sequential(nn.Conv3d(width, hidden, 1), norm()) for _ in range(LEVELS))
        self.codes, self.attention = PositionCode(hidden), nn.ModuleList(ClickAttention(hidden) for _ in range(2))
        steps = self.encoder.encoder.patch_embed.steps
        self.decoder = VolumeDecoder(hidden, (steps[1][0].out_channels, steps[0][0].out_channels))

    def encode(self, volumes: Tensor) -> tuple[Tensor, ...]:
        """Features (B, hidden, d, h, w) of four levels, the stem's at half and full resolution, and the volumes."""
        levels = self.encoder(volumes)
        necks = [neck(level.permute(0, 4, 1, 2, 3)) for neck, level in zip(self.necks, levels, strict=True)]
        fine, half, _ = self.encoder.finer
        return (*necks, half, fine, volumes)

    def answer(self, embedding: tuple[Tensor, ...], points: Tensor, marks: Tensor, earlier: None) -> Tensor:
        """Logits (M, D, H, W) from a click (M, 1, 3) on each structure; one click, so nothing is corrected."""
        *levels, deep, half, fine, volume = embedding
        size = torch.tensor(volume.shape[2:], device=points.device)
        places = (points + 0.5) / size
        sampled = F.grid_sample(deep.float(), (2 * places - 1).flip(-1)[:, None, None], align_corners=False)
        clicks = sampled[:, :, 0, 0].transpose(1, 2) + self.codes(places)
        codes, image = self.codes.grid(deep.shape[2:]).flatten(0, 2), deep.flatten(2).transpose(1, 2)
        for layer in self.attention:
            image = layer(image, codes, clicks)
        deep = image.transpose(1, 2).view_as(deep)
        return self.decoder([*levels, deep], [half, fine], volume, points, marks)


@dataclass
class VolumeAdapter(ClickedVolumes):
    """Adapters, norms, depth position, click attention and decoder learn; SAM's encoder stays.

    pretrained  start from the book's weights, else from random ones
    depth       False: neither adapters nor attention nor positions know of depth; the decoder still does
    """

    rate: float = 4e-3
    pretrained: bool = True
    depth: bool = True

    def make(self) -> AdaptedVolumes:
        return AdaptedVolumes(adapting.start(self.pretrained), self.depth)


HIPPOCAMPUS = VolumeTask("hippocampus", labelled=12, evaluation="test")

recipe = Recipe(
    paper="3dsam-adapter",
    title="3DSAM-adapter: SAM's image encoder sees volumes",
    claim="With one click a structure, the small SAM adapted to volumes segments the hippocampus better than a 3D "
    "U-Net trained on the same twelve patients without clicks.",
    arms={
        "3D U-Net": Arm(Supervised(channels=(16, 32, 64, 64), augmentation=MILD)),
        "3dsam-adapter": Arm(VolumeAdapter()),
        "without depth": Arm(VolumeAdapter(depth=False)),
        "from scratch": Arm(VolumeAdapter(pretrained=False)),
    },
    compare=("3dsam-adapter", "3D U-Net"),
    ablation=("3dsam-adapter", "without depth"),
    replicate="draw",
    score=click_rows,
    scales={
        "quick": Scale(
            VolumeTask("embedded", labelled=4, evaluation="test"), Budget(steps=20, batch=2, checks=0), replicates=1
        ),
        "full": Scale(
            HIPPOCAMPUS,
            Budget(steps=120, batch=2, checks=0),
            arms=("3D U-Net", "3dsam-adapter", "without depth"),
        ),
    },
    published={
        "kidney tumour, gain over the best class model": 0.0825,
        "pancreas tumour, gain": 0.2987,
        "colon cancer, gain": 0.1011,
    },
    source="the paper's abstract; adapter, depth position and click attention follow the official code, "
    "github.com/med-air/3DSAM-adapter",
    components=(
        Component(
            "2D encoder turned 3D",
            "implemented",
            "slices pass the frozen stem, a depthwise convolution merges four, a depth position is learnt, and the "
            "frozen blocks attend to all tokens of the volume (8 x 7 x 5, one window of the official code)",
        ),
        Component(
            "spatial adapters",
            "implemented",
            "before every block, with a depthwise 3 x 3 x 3 convolution; they start as the identity (our choice)",
        ),
        Component("most parameters frozen", "implemented", "the blocks' norms learn, as in the official code"),
        Component(
            "one click prompt",
            "implemented",
            "features at the click join the image by attention; the click is also drawn, as in the small SAM (ours)",
        ),
        Component(
            "volumetric decoder",
            "simplified",
            "four levels, the stem's finer features (as in the small SAM) and the volume itself, joined by two 3D "
            "convolutions",
        ),
        Component("tumour data sets", "absent", "not at hand; the two parts of the hippocampus are no tumours"),
    ),
)
