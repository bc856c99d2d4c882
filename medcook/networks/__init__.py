"""Networks by name: builders over our U-Net and MONAI's."""

from torch import nn

from medcook.errors import MedcookError
from medcook.networks.unet import UNet

__all__ = ["UNet", "build_network", "parameters"]


def build_network(name: str, *, inputs: int, classes: int, channels: tuple[int, ...], dims: int) -> nn.Module:
    """A network that maps (B, inputs, *size) to logits (B, classes, *size).

    `unet` is ours; `monai-unet` MONAI's residual UNet with strided convolutions, `monai-basic` its BasicUNet.
    """
    if name == "unet":
        return UNet(inputs=inputs, classes=classes, channels=channels, dims=dims)
    if name == "monai-unet":
        from monai.networks.nets import UNet as MonaiUNet

        strides = (2,) * (len(channels) - 1)
        return MonaiUNet(dims, inputs, classes, channels, strides, num_res_units=2, norm="batch")
    if name == "monai-basic":
        from monai.networks.nets import BasicUNet

        if len(channels) != 5:
            raise MedcookError("monai-basic needs five channel counts.", f"Got {channels}.")
        return BasicUNet(dims, inputs, classes, features=(*channels, channels[0]), norm="batch")
    raise MedcookError(f"Unknown network {name!r}.", "Known: unet, monai-unet, monai-basic.")


def parameters(module: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
