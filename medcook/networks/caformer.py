"""CAFormer (Yu, Si, Zhou, Luo, Zhou, Feng, Yan and Wang: MetaFormer Baselines for Vision, TPAMI 2024), SurgeNet's.

Four stages of blocks; in a block tokens are mixed, then each token passes a small network on its own, both residual.
In the first two stages separable convolutions mix, in the last two attention does. All parts are named as in the
published code, so its checkpoints load. SurgeNet has ReLU where the original has s ReLU(x)^2 + b.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.errors import MedcookError

DIMS, DEPTHS = (64, 128, 320, 512), (3, 3, 9, 3)
"""Of CAFormer-S18: channels and blocks of each stage."""
HEAD = 32
"""Channels of an attention head."""


class SeparableConvolution(nn.Module):
    """Mixes tokens (B, H, W, C): twice the channels, a 7 x 7 convolution of each, and back."""

    def __init__(self, dim: int):
        super().__init__()
        self.pwconv1 = nn.Linear(dim, 2 * dim, bias=False)
        self.dwconv = nn.Conv2d(2 * dim, 2 * dim, 7, padding=3, groups=2 * dim, bias=False)
        self.pwconv2 = nn.Linear(2 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.pwconv1(x)).permute(0, 3, 1, 2)
        return self.pwconv2(self.dwconv(x).permute(0, 2, 3, 1))


class Attention(nn.Module):
    """Mixes tokens (B, H, W, C): each attends to all others, in heads of 32 channels."""

    def __init__(self, dim: int):
        super().__init__()
        self.heads = max(1, dim // HEAD)
        self.qkv = nn.Linear(dim, 3 * self.heads * HEAD, bias=False)
        self.proj = nn.Linear(self.heads * HEAD, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        queries, keys, values = self.qkv(x.flatten(1, 2)).unflatten(2, (3, self.heads, HEAD)).permute(2, 0, 3, 1, 4)
        told = F.scaled_dot_product_attention(queries, keys, values)
        return self.proj(told.transpose(1, 2).flatten(2).unflatten(1, (height, width)))


class Scale(nn.Module):
    """A factor for each channel."""

    def __init__(self, dim: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Perceptron(nn.Module):
    """Two layers for each token, with four times the channels between."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim, bias=False), nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x)))


class Block(nn.Module):
    """Mix tokens, then each on its own: (B, H, W, C) to the same. With `scaled` the way around has factors."""

    def __init__(self, dim: int, mixer: type[nn.Module], scaled: bool):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-6, bias=False) for _ in range(2))
        self.token_mixer, self.mlp = mixer(dim), Perceptron(dim)
        self.res_scale1, self.res_scale2 = (Scale(dim) if scaled else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.res_scale1(x) + self.token_mixer(self.norm1(x))
        return self.res_scale2(x) + self.mlp(self.norm2(x))


class Down(nn.Module):
    """A strided convolution: (B, H, W, inputs) to (B, H', W', outputs); normalised before, or as the stem after it."""

    def __init__(self, inputs: int, outputs: int, stem: int | None = None):
        super().__init__()
        size = (
            {"kernel_size": 7, "stride": stem, "padding": 2} if stem else {"kernel_size": 3, "stride": 2, "padding": 1}
        )
        self.pre_norm = nn.Identity() if stem else nn.LayerNorm(inputs, eps=1e-6, bias=False)
        self.conv = nn.Conv2d(inputs, outputs, **size)
        self.post_norm = nn.LayerNorm(outputs, eps=1e-6, bias=False) if stem else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.pre_norm(x).permute(0, 3, 1, 2))
        return self.post_norm(x.permute(0, 2, 3, 1))


class CAFormer(nn.Module):
    """Images (B, inputs, H, W) to the last feature map (B, dims[-1], H / (8 stem), W / (8 stem)).

    stem  how many pixels a token of the first stage is apart from the next, down and right; 4 as published
    """

    def __init__(
        self, *, inputs: int = 3, dims: tuple[int, ...] = DIMS, depths: tuple[int, ...] = DEPTHS, stem: int = 4
    ):
        super().__init__()
        pairs = zip((inputs, *dims), dims, strict=False)
        self.downsample_layers = nn.ModuleList(Down(i, o, None if k else stem) for k, (i, o) in enumerate(pairs))
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(dim, Attention if k > 1 else SeparableConvolution, k > 1) for _ in range(depth)))
            for k, (dim, depth) in enumerate(zip(dims, depths, strict=True))
        )
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def levels(self, images: Tensor) -> list[Tensor]:
        """The map of each stage, finest first."""
        x, found = images.permute(0, 2, 3, 1), []
        for down, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(down(x))
            found.append(x.permute(0, 3, 1, 2))
        return found

    def forward(self, images: Tensor) -> Tensor:
        return self.levels(images)[-1]


def load_surgenet(path: Path | str) -> CAFormer:
    """CAFormer-S18 with the weights of a published SurgeNet teacher (a .pth file); the classifier's are left out.

    Raises MedcookError naming the file where it is missing, is none, or holds another network's weights.
    """
    path = Path(path)
    if not path.is_file():
        raise MedcookError(f"{path}: no such file.", "Download a teacher's checkpoint, see the authors' repository.")
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged archive makes torch raise
        raise MedcookError(f"{path}: not a checkpoint ({error}).", "Download it again.") from error
    with torch.device("meta"):
        network = CAFormer()
    weights = {name: weight for name, weight in dict(stored).items() if not name.startswith("head.")}
    try:
        network.load_state_dict(weights, assign=True)
    except (RuntimeError, AttributeError) as error:
        hint = "It takes the weights of a teacher's backbone, not a full DINO checkpoint."
        raise MedcookError(f"{path}: not the weights of SurgeNet's CAFormer-S18 ({error}).", hint) from error
    return network
