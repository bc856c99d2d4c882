"""What several architectures of the chapter are built from."""

import torch
import torch.nn.functional as F
from torch import Tensor


def resized(x: Tensor, size: torch.Size | list[int]) -> Tensor:
    """A map (B, C, H, W), bilinearly at any height and width."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
