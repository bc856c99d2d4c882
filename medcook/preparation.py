"""Between a case's own grid and the network's: cut out a window, paste the prediction back."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medcook.data.case import IGNORE, Case


@dataclass(frozen=True)
class Window:
    """A regular grid of `size` points around `centre` (voxel coordinates), `scale` points to a voxel.

    Point i of an axis lies at voxel coordinate centre + (i - (size - 1) / 2) / scale.
    """

    centre: tuple[float, ...]
    scale: float
    size: tuple[int, ...]

    def points(self) -> list[Tensor]:
        """Voxel coordinates of the grid's points, one vector per axis."""
        return [
            centre + (torch.arange(size) - (size - 1) / 2) / self.scale
            for centre, size in zip(self.centre, self.size, strict=True)
        ]

    def positions(self, shape: tuple[int, ...]) -> list[Tensor]:
        """The inverse: where each voxel of an image of `shape` lies on the grid, one vector per axis."""
        return [
            (torch.arange(voxels) - centre) * self.scale + (size - 1) / 2
            for centre, size, voxels in zip(self.centre, self.size, shape, strict=True)
        ]

    def crop(self, volume: Tensor, mode: str = "bilinear", padding: str = "border") -> Tensor:
        """Sample (N, C, *shape) at the grid's points: (N, C, *size), float32."""
        return sampled(volume.float(), self.points(), mode, padding)

    def paste(self, probabilities: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Take (N, classes, *size) back to (N, classes, *shape); outside the window everything is background."""
        structures = sampled(probabilities.float()[:, 1:], self.positions(shape), "bilinear", "zeros")
        return torch.cat([1 - structures.sum(1, keepdim=True), structures], dim=1)


def sampled(volume: Tensor, coordinates: list[Tensor], mode: str, padding: str) -> Tensor:
    """Read `volume` (N, C, *shape) on the product grid of per-axis voxel coordinates."""
    shape = volume.shape[2:]
    unit = [(2 * points + 1) / voxels - 1 for points, voxels in zip(coordinates, shape, strict=True)]
    grid = torch.stack(torch.meshgrid(*unit, indexing="ij")[::-1], dim=-1).float()
    grid = grid.expand(len(volume), *grid.shape)
    return F.grid_sample(volume, grid, mode=mode, padding_mode=padding, align_corners=False)


@dataclass(frozen=True)
class Preparation:
    """How a data set's cases become network input.

    size        the network's grid; two axes make a slice network, three a volume network
    long_side   rescale so that the image's longest in-window side would have this many points;
                None keeps the stored resolution
    centre      `image`: the middle; `roi`: the case's attribute roi_centre, found without labels
    smooth      before an image is shrunk, average it over the distance between grid points; else single voxels
                are picked, and where that distance is much more than two voxels their noise comes along
    """

    size: tuple[int, ...]
    long_side: int | None = None
    centre: Literal["image", "roi"] = "image"
    smooth: bool = False

    @property
    def dims(self) -> int:
        """2 for a slice network, 3 for a volume network."""
        return len(self.size)

    def window(self, case: Case) -> Window:
        """The window of this case, over its last `dims` axes."""
        shape = case.spatial[-self.dims :]
        middle = tuple((voxels - 1) / 2 for voxels in shape)
        centre = tuple(case.attributes["roi_centre"]) if self.centre == "roi" else middle
        scale = self.long_side / max(shape) if self.long_side else 1.0
        if scale == 1:
            centre = tuple(on_voxels(middle, size) for middle, size in zip(centre, self.size, strict=True))
        return Window(centre, scale, self.size)

    def images(self, case: Case) -> Tensor:
        """(N, C, *size) float32, zero mean and unit variance over the case; N is 1, or the slices of a volume."""
        window, images = self.window(case), _stack(torch.from_numpy(case.image), self.dims)
        if self.smooth:
            images = box_mean(images, window.scale)
        return zscore(window.crop(images))

    def labels(self, case: Case, values: np.ndarray | None = None) -> Tensor:
        """(N, *size) uint8, nearest neighbour; outside the image is background. `values` replaces case.label."""
        label = torch.from_numpy(case.label if values is None else values)
        stacked = _stack(label[None], self.dims)
        return self.window(case).crop(stacked, mode="nearest", padding="zeros")[:, 0].to(torch.uint8)

    def restore(self, probabilities: Tensor, case: Case) -> Tensor:
        """(N, classes, *size) back to (classes, *spatial) on the case's own grid."""
        pasted = self.window(case).paste(probabilities, case.spatial[-self.dims :])
        return pasted[0] if len(case.spatial) == self.dims else pasted.transpose(0, 1)


def on_voxels(centre: float, size: int) -> float:
    """The nearest centre for which `size` points, a voxel apart, fall on voxels: nothing is interpolated then."""
    half = (size - 1) / 2
    return round(centre - half) + half


def _stack(volume: Tensor, dims: int) -> Tensor:
    """(C, *spatial) to (N, C, *window axes): slices of a volume become the batch."""
    return volume[None] if volume.ndim == dims + 1 else volume.transpose(0, 1)


def box_mean(images: Tensor, scale: float) -> Tensor:
    """The mean around each voxel of (N, C, *shape), over a box about 1 / scale voxels wide; borders repeat."""
    half = int(0.5 / scale)
    if not half:
        return images
    dims = images.ndim - 2
    pool = F.avg_pool2d if dims == 2 else F.avg_pool3d
    return pool(F.pad(images.float(), [half] * 2 * dims, mode="replicate"), 2 * half + 1, stride=1)


def zscore(images: Tensor) -> Tensor:
    """Zero mean, unit variance over the whole tensor; a constant image becomes zeros."""
    mean, spread = images.mean(), images.std()
    if spread <= 1e-6 * mean.abs().clamp_min(1):  # nothing but rounding
        return torch.zeros_like(images)
    return (images - mean) / spread


PREPARATIONS = {
    "embedded": Preparation(size=(96, 96)),
    "acdc": Preparation(size=(128, 128), long_side=256, centre="roi"),
    "chest_xray": Preparation(size=(128, 128), long_side=128),
    "hippocampus": Preparation(size=(32, 56, 40)),
}
DEFAULT = Preparation(size=(128, 128), long_side=128, smooth=True)


def preparation_for(dataset: str) -> Preparation:
    """The book's preparation of a data set; one that has none (your own folder) is scaled to 128 x 128 slices."""
    return PREPARATIONS.get(dataset, DEFAULT)


__all__ = ["DEFAULT", "IGNORE", "PREPARATIONS", "Preparation", "Window", "preparation_for", "zscore"]
