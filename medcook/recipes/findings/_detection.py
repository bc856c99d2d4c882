"""A small detector of boxes, and what it is measured by: average precision, and sensitivity at false-positive rates.

The detector has no anchors. A heat map for each kind says where middles of findings are (CenterNet: Zhou, Wang and
Kraehenbuehl, arXiv 1904.07850, 2019), and at every place four distances say where the sides of the box are (FCOS: Tian,
Shen, Chen and He, ICCV 2019). Boxes are (top, left, bottom, right) in pixels of the image, the last two exclusive.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.data import IGNORE
from medcook.networks.unet import DoubleConv
from medcook.recipes.language._boxes import Box, average_precision, matched
from medcook.recipes.language._findings import FINDINGS, KINDS
from medcook.recipes.synthesis._regions import box_iou, boxes_of

RATES = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)
"""False positives per image at which LUNA16 asks for the sensitivity; its mean is the competition metric, CPM."""

Found = list[tuple[float, Box]]
"""Detections of an image: (score, box)."""
Images = list[tuple[Found, list[Box]]]
"""For each image what was found and the true boxes."""
KindOf = Callable[[Tensor], Tensor]
"""Label values (N,) to numbers of kinds (N,), from 0."""


def kinds_of_findings(values: Tensor) -> Tensor:
    """The number in `KINDS` of each label value (N,) of a task on findings."""
    return ((values.long() - 1) // (len(FINDINGS) // len(KINDS))).clamp_max(len(KINDS) - 1)


def one_kind(values: Tensor) -> Tensor:
    """Whatever is labelled is of the same kind."""
    return torch.zeros_like(values, dtype=torch.long)


class Branch(nn.Sequential):
    """A branch of the head: (B, width, h, w) to (B, outputs, h, w); `memory` makes a block between its convolutions."""

    HIDDEN = 16

    def __init__(self, width: int, outputs: int, memory: Callable[[int], nn.Module] | None = None):
        first = nn.Conv2d(width, self.HIDDEN, 3, padding=1, bias=False)
        between = memory(self.HIDDEN) if memory else nn.Identity()
        last = nn.Conv2d(self.HIDDEN, outputs, 1)
        super().__init__(first, nn.BatchNorm2d(self.HIDDEN), nn.ReLU(inplace=True), between, last)


class Head(nn.Module):
    """Features (B, width, h, w) to logits of the heat (B, kinds, h, w) and log distances (B, 4, h, w), in float32."""

    def __init__(self, width: int, kinds: int, memory: Callable[[int], nn.Module] | None = None):
        super().__init__()
        self.heat, self.sides = (Branch(width, count, memory) for count in (kinds, 4))
        nn.init.constant_(self.heat[-1].bias, -2.2)  # a tenth, as in CenterNet: at first there is almost nothing

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.heat(features).float(), self.sides(features).float()


class Detector(nn.Module):
    """Convolutions with pooling between, a feature pyramid (Lin et al., CVPR 2017), a head on its finest level.

    channels  of each level down, the first at full resolution;   width  of the pyramid
    skip      levels that the pyramid leaves out at the fine end: 1 gives the head every second pixel
    memory    makes a block for each branch of the head, from a number of channels
    """

    def __init__(self, inputs: int, kinds: int, channels: tuple[int, ...], width: int, skip: int = 1, memory=None):
        super().__init__()
        self.down = nn.ModuleList(DoubleConv(i, o, 2) for i, o in zip((inputs, *channels), channels, strict=False))
        self.across = nn.ModuleList(nn.Conv2d(count, width, 1) for count in channels[skip:])
        self.smooth = nn.Conv2d(width, width, 3, padding=1)
        self.head = Head(width, kinds, memory)
        self.skip = skip

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """Feature maps (B, width, h, w) of every level, the finest, which alone is smoothed, first."""
        maps = [self.down[0](images)]
        for block in self.down[1:]:
            maps.append(block(F.max_pool2d(maps[-1], 2)))
        found = []
        for across, each in zip(self.across[::-1], maps[self.skip :][::-1], strict=True):
            level = across(each)
            found.insert(0, level + F.interpolate(found[0], size=level.shape[2:]) if found else level)
        return [self.smooth(found[0]), *found[1:]]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Heat (B, kinds, h, w) and log distances (B, 4, h, w) of images (B, inputs, H, W)."""
        return self.head(self.pyramid(images)[0])


def objects_of(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What label maps (B, H, W) show: the image (N,), label value (N,) and box (N, 4) of each value in each image."""
    numbers, values, boxes = [], [], []
    for number, label in enumerate(labels):
        there = label.unique()
        there = there[(there > 0) & (there != IGNORE)]
        numbers.append(torch.full((len(there),), number, device=labels.device))
        values.append(there.long())
        boxes.append(boxes_of(label == there[:, None, None]).view(-1, 4))
    return torch.cat(numbers), torch.cat(values), torch.cat(boxes)


def cells(size: tuple[int, int], stride: int, device=None) -> tuple[Tensor, Tensor]:
    """Rows (h, 1) and columns (1, w) of the middles of the cells of a map, in pixels of the image."""
    rows, columns = ((torch.arange(count, device=device) + 0.5) * stride for count in size)
    return rows[:, None], columns[None]


def heat_of(objects: tuple[Tensor, Tensor, Tensor], shape: torch.Size, stride: int) -> Tensor:
    """The heat (B, kinds, h, w) that is to be found: 1 in the cell of each middle, a Gaussian around it.

    objects  image, kind and box of each; the Gaussian's deviation is a sixth of the shorter side, at least half a cell
    """
    image, kind, boxes = objects
    middle = ((boxes[:, :2] + boxes[:, 2:]) / 2 / stride).floor()
    row, column = (middle[:, axis].clamp_max(shape[2 + axis] - 1)[:, None, None] for axis in (0, 1))
    rows, columns = (torch.arange(count, device=boxes.device) for count in shape[2:])
    spread = ((boxes[:, 2:] - boxes[:, :2]).amin(1) / stride / 6).clamp_min(0.5)[:, None, None]
    near = torch.exp(-((rows[:, None] - row) ** 2 + (columns - column) ** 2) / (2 * spread**2))
    heat = near.new_zeros(shape)
    for place, each in zip(zip(image.tolist(), kind.tolist(), strict=True), near, strict=True):
        heat[place] = torch.maximum(heat[place], each)
    return heat


def heat_loss(logits: Tensor, target: Tensor, known: Tensor) -> Tensor:
    """CenterNet's focal loss for a finding (equation 1): logits and target (B, kinds, h, w), `known` (B, 1, h, w)."""
    p, middle = logits.sigmoid(), target == 1
    there = (1 - p) ** 2 * F.logsigmoid(logits) * middle
    elsewhere = (1 - target) ** 4 * p**2 * F.logsigmoid(-logits) * ~middle
    return -((there + elsewhere) * known).sum() / middle.sum().clamp_min(1)


def distances(boxes: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(N, 4, h, w) from cells up to the top, left, bottom and right side of boxes (N, 4); negative outside of a box."""
    top, left, bottom, right = boxes[:, :, None, None].unbind(1)
    rows, columns = rows + 0 * columns, columns + 0 * rows
    return torch.stack([rows - top, columns - left, bottom - rows, right - columns], 1)


def sides_loss(sides: Tensor, objects: tuple[Tensor, Tensor, Tensor], stride: int) -> Tensor:
    """The mean of -log IoU of the boxes that cells at most one step from a middle propose (Yu et al., MM 2016)."""
    image, _, boxes = objects
    if not len(boxes):
        return 0.0 * sides.sum()
    rows, columns = cells(sides.shape[2:], stride, sides.device)
    true = distances(boxes, rows, columns)
    away = (true[:, :2] - true[:, 2:]).abs().amax(1) / 2
    near = (away < 1.5 * stride) & (true.amin(1) > 0)
    number, row, column = near.nonzero(as_tuple=True)
    if not len(number):
        return 0.0 * sides.sum()
    found, true = reach(sides[image[number], :, row, column], stride), true[number, :, row, column]
    both = torch.minimum(found, true)
    shared = (both[:, 0] + both[:, 2]) * (both[:, 1] + both[:, 3])
    sizes = [(each[:, 0] + each[:, 2]) * (each[:, 1] + each[:, 3]) for each in (found, true)]
    return -(shared / (sum(sizes) - shared)).log().mean()


def reach(sides: Tensor, stride: int) -> Tensor:
    """Distances in pixels of what the head says of them."""
    return stride * sides.clamp(-5, 5).exp()


def detection_loss(heads: list[tuple[tuple[Tensor, Tensor], int]], labels: Tensor, kind_of: KindOf) -> Tensor:
    """The summed loss of heads for label maps (B, H, W): ((heat, sides), pixels from cell to cell) of each."""
    image, values, boxes = objects_of(labels)
    objects, loss = (image, kind_of(values), boxes), 0.0
    for (heat, sides), stride in heads:
        known = F.interpolate((labels != IGNORE)[:, None].float(), size=heat.shape[2:])
        loss = loss + heat_loss(heat, heat_of(objects, heat.shape, stride), known) + sides_loss(sides, objects, stride)
    return loss


def suppressed(boxes: Tensor, scores: Tensor, overlap: float) -> list[int]:
    """Non-maximum suppression: the numbers of boxes (N, 4) that overlap no surer one by more; the surest first."""
    order, kept = scores.argsort(descending=True, stable=True).tolist(), []
    shared = box_iou(boxes[:, None], boxes[None])
    for number in order:
        if not kept or shared[number, kept].max() <= overlap:
            kept.append(number)
    return kept


@torch.no_grad()
def peaks(heat: Tensor, sides: Tensor, stride: int, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of one image the `most` surest local maxima of its heat (kinds, h, w): scores, kinds and boxes (N, 4)."""
    scores = heat.sigmoid()
    highest = F.max_pool2d(scores[None], 3, stride=1, padding=1)[0] == scores
    ordered = torch.where(highest, scores, -1.0).flatten().sort(descending=True, stable=True)
    scores, place = ordered.values[:most], ordered.indices[:most]
    scores, place = scores[scores >= 0], place[scores >= 0]
    area = heat.shape[1] * heat.shape[2]
    row, column = place % area // heat.shape[2], place % heat.shape[2]
    top, left, bottom, right = reach(sides[:, row, column], stride)
    down, across = (row + 0.5) * stride, (column + 0.5) * stride
    return scores, place // area, torch.stack([down - top, across - left, down + bottom, across + right], 1)


def detections(heat: Tensor, sides: Tensor, stride: int, most: int = 10, overlap: float = 0.3) -> list[Found]:
    """For each kind the detections of one image, from its heat (kinds, h, w) and log distances (4, h, w)."""
    scores, kinds, boxes = peaks(heat, sides, stride, most)
    found = []
    for kind in range(len(heat)):
        mine = kinds == kind
        kept = suppressed(boxes[mine], scores[mine], overlap)
        found.append([(float(scores[mine][k]), tuple(boxes[mine][k].tolist())) for k in kept])
    return found


def true_boxes(label: Tensor, kind_of: KindOf, kinds: int) -> list[list[Box]]:
    """For each kind the boxes in a label map (H, W)."""
    _, values, boxes = objects_of(label[None])
    numbers = kind_of(values)
    return [[tuple(box) for box in boxes[numbers == kind].tolist()] for kind in range(kinds)]


def mean_average_precision(kinds: list[Images], least: float = 0.5) -> float:
    """The mean over kinds of the average precision of their images; kinds that are nowhere are left out."""
    found = [average_precision(images, least) for images in kinds]
    return float(np.nanmean(found)) if np.isfinite(found).any() else float("nan")


def froc(images: Images, least: float = 0.1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The free-response curve: levels, the highest first, and at each the false positives per image and sensitivity.

    A detection counts at levels that its score reaches. It is right if it overlaps a box that is free by `least`.
    """
    rows = [row for found, true in images for row in matched(found, true, least)]
    scores, right = np.array([score for score, _ in rows]), np.array([is_right for _, is_right in rows], bool)
    levels = np.unique(scores)[::-1]
    total = max(sum(len(true) for _, true in images), 1)
    false = np.array([(~right & (scores >= level)).sum() for level in levels]) / max(len(images), 1)
    return levels, false, np.array([(right & (scores >= level)).sum() for level in levels]) / total


def levels_at(images: Images, rates: tuple[float, ...] = RATES, least: float = 0.1) -> tuple[float, ...]:
    """For each rate the lowest level at which there are at most so many false positives per image; above all scores
    where there is none."""
    levels, false, _ = froc(images, least)
    return tuple(float(min(levels[false <= rate], default=np.inf)) for rate in rates)


def cpm(images: Images, levels: tuple[float, ...], least: float = 0.1) -> float:
    """The mean sensitivity over levels: the competition performance metric where these are `levels_at` its rates."""
    curve, _, sensitivity = froc(images, least)
    return float(np.mean([max(sensitivity[curve >= level], default=0.0) for level in levels]))


def spread(heat: Tensor, classes: int, kind_of: KindOf) -> Tensor:
    """Class probabilities (B, classes, H, W) of a heat (B, kinds, H, W) from 0 to 1; a kind's values share alike."""
    kinds = kind_of(torch.arange(1, classes, device=heat.device))
    counts = torch.bincount(kinds, minlength=heat.shape[1])[:, None, None]
    heat = heat * (counts > 0)
    nothing = (1 - heat).prod(1, keepdim=True)
    shares = (1 - nothing) * heat / heat.sum(1, keepdim=True).clamp_min(1e-12) / counts.clamp_min(1)
    return torch.cat([nothing, shares[:, kinds]], 1)
