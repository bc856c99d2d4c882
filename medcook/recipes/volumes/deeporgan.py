"""DeepOrgan (Roth, Lu, Farag, Shin, Liu, Turkbey and Summers, MICCAI 2015; arXiv 1506.06448).

From patches to regions. A ConvNet labels the patch around every pixel, which gives a dense probability map. The slice
is cut into superpixels; around each, boxes at several scales are cut out, zooming out, and a second ConvNet says what
the superpixel is: R1 from the CT alone, R2 from the CT and the map together. Its answers, averaged over the scales and
smoothed in three dimensions, are the segmentation.

The paper segments the pancreas; here it is the parotids, soft and of low contrast as well.
The settings of the regions were chosen with the patients of fold 1 in view, whom evidence scores as well.
"""

from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from skimage.segmentation import slic
from torch import Tensor, nn

from medcook.data import IGNORE
from medcook.losses import find_loss
from medcook.methods import Batch, Moment
from medcook.recipes.recipe import Arm, Component, Recipe, Scale
from medcook.recipes.volumes._head_and_neck import BUDGET, LEFT_PAROTID, RIGHT_PAROTID, FocusTask
from medcook.recipes.volumes._settings import BASELINE, QUICK, VolumeNetwork

WIDTH = 24
SIDE = 16
"""Pixels along each side of a box, whatever its size in the slice."""

SCALES = (1.0, 2.0, 4.0)
CHUNK = 1024


def in_plane(inputs: int, outputs: int, side: int = 3) -> list[nn.Module]:
    """A convolution of slices that are a volume each, one voxel deep, batch normalisation and a ReLU."""
    convolution = nn.Conv3d(inputs, outputs, (1, side, side), padding="same", bias=False)
    return [convolution, nn.BatchNorm3d(outputs), nn.ReLU(inplace=True)]


class Patches(nn.Sequential):
    """Slices (N, 1, H, W) to logits (N, classes, H, W): each pixel from the patch of 17 x 17 around it, and no more."""

    def __init__(self, classes: int):
        layers = [layer for inputs in (1, WIDTH, WIDTH, WIDTH) for layer in in_plane(inputs, WIDTH, side=5)]
        layers += [nn.Conv3d(WIDTH, 2 * WIDTH, 1), nn.ReLU(inplace=True), nn.Conv3d(2 * WIDTH, classes, 1)]
        super().__init__(*layers)

    def forward(self, slices: Tensor) -> Tensor:
        return super().forward(slices[:, :, None])[:, :, 0]


class Boxes(nn.Sequential):
    """Boxes (R, inputs, 16, 16) to logits (R, classes): a ConvNet that knows where in the box it saw something."""

    def __init__(self, inputs: int, classes: int):
        layers = []
        for width in (8, 16, 32):
            layers += [*in_plane(inputs, width), nn.MaxPool3d((1, 2, 2))]
            inputs = width
        super().__init__(*layers, nn.Flatten(), nn.Linear(32 * (SIDE // 8) ** 2, classes))

    def forward(self, boxes: Tensor) -> Tensor:
        return super().forward(boxes[:, :, None])


class Regions(NamedTuple):
    """The superpixels of N slices, numbered through.

    ids     (N, H, W) int64, the number of each pixel's superpixel, 0 to R - 1
    middle  (R, 3) slice, row and column of the middle of each one's bounding box
    extent  (R, 2) rows and columns of the bounding box
    """

    ids: Tensor
    middle: Tensor
    extent: Tensor


def superpixels(slices: Tensor, area: int) -> Tensor:
    """(N, H, W) to numbers (N, H, W) int64 of superpixels of about `area` pixels (SLIC, Achanta et al. 2012)."""
    cut = partial(slic, n_segments=max(1, slices[0].numel() // area), compactness=0.1, channel_axis=None, start_label=0)
    each = [torch.from_numpy(cut(image)).long() for image in slices.float().cpu().numpy()]
    first = accumulate([int(ids.max()) + 1 for ids in each], initial=0)
    return torch.stack([ids + start for ids, start in zip(each, first, strict=False)]).to(slices.device)


def regions_of(ids: Tensor) -> Regions:
    """The superpixels (N, H, W) with their bounding boxes."""
    count = int(ids.max()) + 1
    where = torch.stack(torch.meshgrid(*[torch.arange(side, device=ids.device) for side in ids.shape], indexing="ij"))
    flat, where = ids.flatten().expand(3, -1), where.flatten(1).float()
    low = where.new_zeros(3, count).scatter_reduce(1, flat, where, "amin", include_self=False)
    high = where.new_zeros(3, count).scatter_reduce(1, flat, where, "amax", include_self=False)
    return Regions(ids, ((low + high) / 2).T, (high - low + 1)[1:].T)


def mean_over(ids: Tensor, values: Tensor) -> Tensor:
    """The mean of values (N, K, H, W) over each superpixel: (R, K)."""
    size = ids.flatten().bincount().float()
    sums = values.new_zeros(len(size), values.shape[1])
    return sums.index_add(0, ids.flatten(), values.movedim(1, -1).flatten(0, 2)) / size[:, None]


def labels_of(ids: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The most frequent label (N, H, W) in each superpixel, (R,) int64; `IGNORE` where none is labelled."""
    known = torch.where(labels == IGNORE, classes, labels).long()
    votes = mean_over(ids, F.one_hot(known, classes + 1).movedim(-1, 1).float())
    votes = votes[:, :classes]
    return torch.where(votes.sum(1) > 0, votes.argmax(1), IGNORE)


def zoom_out(channels: Tensor, regions: Regions, chosen: Tensor, scale: float) -> Tensor:
    """Boxes (len(chosen), C, 16, 16) of slices (N, C, H, W): `scale` times as large as a superpixel's bounding box."""
    steps = (torch.arange(SIDE, device=channels.device) - (SIDE - 1) / 2) / SIDE * scale
    middle, extent = regions.middle[chosen], regions.extent[chosen]
    rows, columns = (middle[:, 1 + k, None] + steps * extent[:, k, None] for k in (0, 1))
    shape = (len(chosen), SIDE, SIDE)
    places = [
        columns[:, None, :].expand(shape),
        rows[:, :, None].expand(shape),
        middle[:, 0, None, None].expand(shape),
    ]
    sizes = (channels.shape[3], channels.shape[2], channels.shape[0])
    grid = torch.stack([(2 * place + 1) / size - 1 for place, size in zip(places, sizes, strict=True)], dim=-1)
    stack = channels.float().transpose(0, 1)[None]  # slices as depth: each box lies in one of them
    return F.grid_sample(stack, grid[None], padding_mode="border", align_corners=False)[0].transpose(0, 1)


def smoothed(volume: Tensor, sigma: float) -> Tensor:
    """(B, C, D, H, W) under a Gaussian of `sigma` voxels, cut at three of these; the border repeats."""
    if not sigma:
        return volume
    reach = round(3 * sigma)
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=volume.device) / sigma) ** 2)
    kernel = (weights / weights.sum()).expand(volume.shape[1], 1, -1)
    with torch.autocast(volume.device.type, enabled=False):
        for axis in (2, 3, 4):
            moved = volume.movedim(axis, -1)
            lines = F.pad(moved.flatten(2, 3), (reach, reach, 0, 0), mode="replicate")
            lines = F.conv2d(lines, kernel[:, :, None], groups=len(kernel))
            volume = lines.unflatten(2, moved.shape[2:4]).movedim(-1, axis)
    return volume


@dataclass
class Organ(VolumeNetwork):
    """Patches first, regions afterwards, slice by slice along the first axis of a volume.

    regions   False: the smoothed map of the patches is the segmentation
    stacked   the region network sees that map beside the image (R2), else the image alone (R1)
    scales    sizes of the boxes around a superpixel, in bounding boxes
    area      pixels of a superpixel, about
    floor     a superpixel with less than this mean probability of structures in the map is background
    start     share of the training after which regions are learnt
    slices    of each volume in a step
    boxes     of all slices in a step
    sigma     of the smoothing, in voxels
    """

    regions: bool = True
    stacked: bool = True
    scales: tuple[float, ...] = SCALES
    area: int = 6
    floor: float = 0.02
    start: float = 0.25
    slices: int = 8
    boxes: int = 768
    sigma: float = 0.5

    def model(self, inputs: int, classes: int) -> nn.ModuleDict:
        parts = {"patches": Patches(classes)}
        if self.regions:
            parts["boxes"] = Boxes(1 + self.stacked * (classes - 1), classes)
        return nn.ModuleDict(parts)

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        """The loss of the patches, and from `start` on the same loss of the boxes, each of which is like a pixel."""
        slices, labels = some_slices(labelled.images, labelled.labels, self.slices)
        logits = nets["model"]["patches"](slices).float()
        loss = find_loss(self.loss)(logits, labels)
        if not self.regions or now.fraction < self.start:
            return loss
        density = logits.detach().softmax(1)
        regions, candidates = self.find(slices, density)
        truth = labels_of(regions.ids, labels, logits.shape[1])
        candidates = candidates[truth[candidates] != IGNORE]
        few = torch.randperm(len(candidates))[: self.boxes // len(self.scales)].to(candidates.device)
        if not len(few):
            return loss
        chosen = candidates[few]
        found = self.answers(nets["model"]["boxes"], slices, density, regions, chosen)
        return loss + find_loss(self.loss)(found.flatten(0, 1), truth[chosen].repeat(len(self.scales)).to(labels.dtype))

    def find(self, slices: Tensor, density: Tensor) -> tuple[Regions, Tensor]:
        """The superpixels of slices, and the numbers of those that the map leaves as candidates."""
        regions = regions_of(superpixels(slices[:, 0], self.area))
        return regions, (1 - mean_over(regions.ids, density)[:, 0] > self.floor).nonzero()[:, 0]

    def answers(self, network: nn.Module, slices: Tensor, density: Tensor, regions: Regions, chosen: Tensor) -> Tensor:
        """The region network's logits (scales, len(chosen), classes); the boxes of all scales are one batch."""
        channels = torch.cat([slices, density[:, 1:]], dim=1) if self.stacked else slices
        boxes = torch.cat([zoom_out(channels, regions, chosen, scale) for scale in self.scales])
        return network(boxes).float().unflatten(0, (len(self.scales), -1))

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        return torch.cat([self.segment(nets["average"], volume) for volume in images])

    def segment(self, model: nn.ModuleDict, volume: Tensor) -> Tensor:
        """Probabilities (1, classes, D, H, W) of a volume (C, D, H, W)."""
        slices = volume[:1].transpose(0, 1)
        density = model["patches"](slices).float().softmax(1)
        if self.regions:
            regions, candidates = self.find(slices, density)
            certain = F.one_hot(torch.zeros_like(regions.middle[:, 0]).long(), density.shape[1]).float()
            for chosen in candidates.split(CHUNK):
                certain[chosen] = self.answers(model["boxes"], slices, density, regions, chosen).softmax(2).mean(0)
            density = certain[regions.ids].movedim(-1, 1)
        return smoothed(density.transpose(0, 1)[None], self.sigma)


def some_slices(images: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`count` slices of every volume (B, C, D, H, W), as (B * count, 1, H, W) and labels (B * count, H, W).

    One that shows a structure is four times as likely as one that does not; none comes twice.
    """
    count = min(count, images.shape[2])
    there = ((labels > 0) & (labels != IGNORE)).flatten(2).any(2)
    chosen = (1.0 + 3 * there).multinomial(count)
    rows = torch.arange(len(images), device=images.device)[:, None]
    return images[rows, 0, chosen].flatten(0, 1)[:, None], labels[rows, chosen].flatten(0, 1)


PAROTIDS = dict(targets=(RIGHT_PAROTID, LEFT_PAROTID), guided=False, axial=True)

recipe = Recipe(
    paper="deeporgan",
    title="From patches to regions",
    claim="Superpixels judged at several scales of context, on top of a map of patches, raise Dice over the map alone.",
    arms={
        "patches": Arm(Organ(regions=False)),
        "r1": Arm(Organ(stacked=False)),
        "r2": Arm(Organ()),
        "r2 without zooming out": Arm(Organ(scales=(1.0,))),
        "unet": Arm(BASELINE),
    },
    compare=("r2", "patches"),
    ablation=("r2", "r2 without zooming out"),
    replicate="fold",
    scales={
        "quick": Scale(FocusTask("embedded", folds=12, targets=(3,), guided=False), QUICK.budget, replicates=1),
        "full": Scale(FocusTask("openkbp", **PAROTIDS), BUDGET, arms=("patches", "r1", "r2", "r2 without zooming out")),
    },
    published={"pancreas, 4-fold, Dice": 0.718},
    source="the abstract; 82 CTs",
    components=(
        Component(
            "dense patch labelling",
            "implemented",
            "a ConvNet whose pixels see 17 x 17 voxels of an axial slice, run on the whole slice at once",
        ),
        Component("nearest-neighbour fusion", "absent", "axial patches alone; the paper fuses three orthogonal views"),
        Component(
            "superpixels",
            "implemented",
            "SLIC, of about 6 pixels: with voxels of 4 to 5 mm, what their true majority labels can reach is a Dice of "
            "about 0.8. Those that the map calls background are not looked at (the paper: a cascade of random forests)",
        ),
        Component(
            "zoom-out boxes",
            "implemented",
            "1, 2 and 4 bounding boxes wide, at 16 x 16 pixels, through one network; answers are averaged. "
            "Deformed copies of the boxes are not made, since whole volumes are augmented",
        ),
        Component(
            "stacking on the map",
            "implemented",
            "R2 sees the probability of each structure beside the CT; trained in the same run, after a quarter of it",
        ),
        Component("3D Gaussian smoothing", "implemented", "of 0.5 voxels, for every arm but the U-Net"),
        Component("2D conditional random fields", "absent", "an alternative to the smoothing in the paper"),
        Component("pancreas", "absent", "parotids of 9 patients; abdominal CTs are not at hand"),
    ),
)
