"""What recipes about single nodules share: the patch around one, and an answer that is the same all over the image."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.recipes.findings._nodules import patches

SHARE = 1 / 3
"""A patch's side as a share of the image's: 32 of 96 pixels. The longest ray of a nodule ends 15 from its middle."""


def lesions(images: Tensor, labels: Tensor, size: int | None = None) -> Tensor:
    """(B, C, size, size): the patch around each nodule of images (B, C, H, W), enlarged along straight lines.

    size  None: as large as it is, a third of the image's height
    """
    found = patches(images, labels, 2 * round(images.shape[2] * SHARE / 2))
    if size in (None, found.shape[2]):
        return found
    return F.interpolate(found.float(), (size, size), mode="bilinear", align_corners=False)


def all_over(malignancy: Tensor, images: Tensor) -> Tensor:
    """(B, 3, H, W) probabilities, the same all over each image: no nodule (0), a benign one, a malignant one (B,)."""
    found = torch.stack([torch.zeros_like(malignancy), 1 - malignancy, malignancy], dim=1)
    return found[:, :, None, None].expand(*found.shape, *images.shape[2:])


class AllOver:
    """For methods that score nodules whose place is known (`scores`): without a place, the middle of the image."""

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """(B, 3, H, W): see `all_over`."""
        return all_over(self.scores(nets, images, torch.zeros_like(images[:, 0])), images)
