"""The autoencoder of Stable Diffusion 1 (Rombach et al., CVPR 2022), and the parts that its U-Net is built of, too.

Parts are called here as the published weights are, in the format of diffusers.
"""

import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS = (128, 256, 512, 512)
SCALE = 0.18215
"""What latents are multiplied by, so that their variance is about 1."""


class Resnet(nn.Module):
    """Norm, SiLU, convolution, twice; an embedding of the time is added between, where there is one."""

    def __init__(self, inputs: int, outputs: int, time: int | None, groups: int, eps: float):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, inputs, eps), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, outputs, eps), nn.Conv2d(outputs, outputs, 3, padding=1)
        if time:
            self.time_emb_proj = nn.Linear(time, outputs)
        if inputs != outputs:
            self.conv_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        found = self.conv1(F.silu(self.norm1(x)))
        if time is not None:
            found = found + self.time_emb_proj(F.silu(time))[:, :, None, None]
        found = self.conv2(F.silu(self.norm2(found)))
        return found + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Sampler(nn.Module):
    """A convolution after the map was doubled, or one that halves it; `uneven`: only right and below are filled up."""

    def __init__(self, channels: int, down: bool, uneven: bool = False):
        super().__init__()
        self.down, self.uneven = down, uneven
        self.conv = nn.Conv2d(channels, channels, 3, stride=2 if down else 1, padding=0 if uneven else 1)

    def forward(self, x: Tensor) -> Tensor:
        if not self.down:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.uneven else x)


def level(**parts: list[nn.Module]) -> nn.Module:
    """A level of a network: lists of parts by their published names; empty lists are left out."""
    found = nn.Module()
    for name, members in parts.items():
        if members:
            setattr(found, name, nn.ModuleList(members))
    return found


class Looking(nn.Module):
    """Attention of all places of a map to each other, with one head."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, 1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)
        found = F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + self.to_out[0](found).transpose(1, 2).reshape(x.shape)


class Coder(nn.Module):
    """One side of the autoencoder: down from images to moments of latents, or up from latents to images."""

    def __init__(self, inputs: int, outputs: int, channels: tuple[int, ...], groups: int, up: bool):
        super().__init__()
        order, deep, last = channels[::-1] if up else channels, 3 if up else 2, len(channels) - 1
        self.conv_in = nn.Conv2d(inputs, order[0], 3, padding=1)
        resnet = lambda before, after: Resnet(before, after, None, groups, 1e-6)  # noqa: E731
        self.up, blocks = up, []
        for number, (before, count) in enumerate(zip((order[0], *order), order, strict=False)):
            resnets = [resnet(count if k else before, count) for k in range(deep)]
            samplers = [Sampler(count, down=not up, uneven=not up)] if number < last else []
            blocks.append(level(resnets=resnets, **{"upsamplers" if up else "downsamplers": samplers}))
        setattr(self, "up_blocks" if up else "down_blocks", nn.ModuleList(blocks))
        middle = channels[-1]
        self.mid_block = level(resnets=[resnet(middle, middle) for _ in range(2)], attentions=[Looking(middle, groups)])
        self.conv_norm_out = nn.GroupNorm(groups, order[-1], 1e-6)
        self.conv_out = nn.Conv2d(order[-1], outputs, 3, padding=1)

    def middle(self, x: Tensor) -> Tensor:
        return self.mid_block.resnets[1](self.mid_block.attentions[0](self.mid_block.resnets[0](x)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        x = self.middle(x) if self.up else x
        for block in self.up_blocks if self.up else self.down_blocks:
            for resnet in block.resnets:
                x = resnet(x)
            for sampler in getattr(block, "upsamplers" if self.up else "downsamplers", ()):
                x = sampler(x)
        x = x if self.up else self.middle(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Autoencoder(nn.Module):
    """Images (B, 3, H, W), -1 to 1, to latents (B, 4, H / 8, W / 8) and back."""

    def __init__(self, channels=CHANNELS, groups: int = 32, latents: int = 4):
        super().__init__()
        self.encoder = Coder(3, 2 * latents, channels, groups, up=False)
        self.decoder = Coder(latents, 3, channels, groups, up=True)
        self.quant_conv = nn.Conv2d(2 * latents, 2 * latents, 1)
        self.post_quant_conv = nn.Conv2d(latents, latents, 1)

    def latents(self, images: Tensor) -> Tensor:
        """The means of the latents' distributions, scaled to a variance of about 1."""
        return SCALE * self.quant_conv(self.encoder(images)).chunk(2, dim=1)[0]

    def images(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latents / SCALE))
