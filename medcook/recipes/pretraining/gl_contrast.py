"""Contrastive learning of global and local features (Chaitanya, Erdil, Karani and Konukoglu, NeurIPS 2020; arXiv
2006.10511).

Idea: volumes of one organ show the same anatomy in the same order. So slices of the same part of two volumes belong
together, and are never each other's negatives. First the encoder learns this of whole slices, then, with the encoder
frozen, the first blocks of the decoder learn to tell regions of a slice apart. With sim the cosine over the
temperature, and a volume cut into S parts of as many slices:

    pair     l(a, p) = -log( exp sim(a, p) / (exp sim(a, p) + sum over negatives n of exp sim(a, n)) )
    global   G^R: p is another view of a's slice, n all else in the batch (SimCLR)
             G^D: p is also a view of a slice of the same part of another volume, n a slice of another part
    local    L^R: a and p are the same region in two intensity-transformed views of a slice, n its other regions in both
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.image_pool import CASES, origin
from medcook.losses import find_loss
from medcook.methods import Batch, Moment, own_generator
from medcook.pretraining import Projector, encoded, info_nce
from medcook.recipes.pretraining._settings import BASELINE, BRAINS, CHANNELS, HEARTS, LONGER, scales
from medcook.recipes.pretraining._stages import Staged
from medcook.recipes.recipe import Arm, Component, Recipe

HEAT = 0.1
"""The temperature of both losses, as in the official code."""

WIDTH = 128
"""Numbers in the vector of a slice or a region, as in the official code."""

CELLS = 4
"""A whole slice is this many cells squared of the encoder's last map, side by side in one vector."""

CORNERS = [(y, x) for y in (0, 0.5, 1) for x in (0, 0.5, 1)]
REGIONS = CORNERS + [(y, x) for y in (0.25, 0.75) for x in (0.25, 0.75)]
"""The 13 regions of the official code: where in a feature map, from 0 (first row or column) to 1 (last)."""

NEVER = -1e4
"""The similarity of what is no negative: exp of it is 0, and so is its gradient."""


def parts(groups: Tensor | None, count: int, size: int) -> tuple[Tensor, Tensor]:
    """Of `size` slices: the part of its volume that each is of, 0 to count - 1, and the number of this volume.

    Where nothing is known of slices, or count is 0, each is a part of its own.
    """
    alone = torch.arange(size)
    if groups is None:
        return alone, alone
    where = origin(groups)
    volume = where.set * CASES + where.case
    return ((where.place * count).long() if count else alone.to(groups)), volume


def partners(part: Tensor, volume: Tensor) -> tuple[Tensor, Tensor]:
    """Positives and negatives (2 B, 2 B) bool among all first and all second views of slices, of part and volume (B,).

    A slice's own other view and the same part of other volumes are positives, other parts negatives. Another slice of
    the same part and volume is neither.
    """
    here, other_volume = part == part[:, None], volume != volume[:, None]
    same = torch.eye(len(part), dtype=torch.bool, device=part.device)
    positive = (same | here & other_volume).repeat(2, 2).fill_diagonal_(False)
    return positive, ~here.repeat(2, 2)


def contrast(vectors: Tensor, positive: Tensor, negative: Tensor, heat: float = HEAT) -> Tensor:
    """The mean of l over all pairs (a, p) of `positive` (N, N), of vectors (N, D); row a of `negative` holds its n."""
    with torch.autocast(vectors.device.type, enabled=False):
        vectors = F.normalize(vectors.float(), dim=1)
        similarity = vectors @ vectors.T / heat
        against = similarity.masked_fill(~negative, NEVER).logsumexp(1, keepdim=True)
        return F.softplus(against - similarity)[positive].mean()


def regions(maps: Tensor) -> Tensor:
    """The 3 x 3 windows (B, 13, 9 C) at `REGIONS` of feature maps (B, C, H, W)."""
    rows, columns = maps.shape[2] - 2, maps.shape[3] - 2
    chosen = [round(y * (rows - 1)) * columns + round(x * (columns - 1)) for y, x in REGIONS]
    return F.unfold(maps, 3)[:, :, chosen].transpose(1, 2)


def part_decoded(net: nn.Module, images: Tensor, blocks: int) -> Tensor:
    """The feature map of a U-Net after the first `blocks` blocks on the way up, over an encoder that does not learn."""
    with torch.no_grad():
        skips = [net.down[0](images)]
        for block in net.down[1:]:
            skips.append(block(net.pool(skips[-1], 2)))
    x = skips.pop()
    for block, skip in list(zip(reversed(net.up), reversed(skips), strict=True))[:blocks]:
        x = F.interpolate(x, size=skip.shape[2:], mode=net.mode, align_corners=False)
        x = block(torch.cat([skip, x], dim=1))
    return x


class SliceHead(nn.Module):
    """g1: the encoder's last maps (B, C, H, W) to vectors (B, WIDTH) that still know where in the slice what was."""

    def __init__(self, channels: int):
        super().__init__()
        self.vector = Projector(channels * CELLS**2, WIDTH, WIDTH)

    def forward(self, maps: Tensor) -> Tensor:
        return self.vector(F.adaptive_avg_pool2d(maps.float(), CELLS).flatten(1))


class RegionHead(nn.Module):
    """g2: feature maps (B, C, H, W) to a vector of each region (B, 13, WIDTH); two 1 x 1 convolutions, then a layer."""

    def __init__(self, channels: int):
        super().__init__()
        first, last = (nn.Conv2d(channels, channels, 1, bias=False) for _ in range(2))
        self.maps = nn.Sequential(first, nn.BatchNorm2d(channels), nn.ReLU(inplace=True), last)
        self.vector = nn.Linear(9 * channels, WIDTH, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        return self.vector(regions(self.maps(maps)))


@dataclass
class GlobalLocal(Staged):
    """The encoder by the global loss, then blocks of the decoder by the local one, then training on labels.

    partitions  S: parts that a volume is cut into (G^D); 0: every slice is a part of its own (G^R)
    local       share of the pretext that goes to the decoder; 0: none
    blocks      how many of the decoder's blocks learn from it; the others start from nothing
    mixup       parameter of the Beta distribution from which mixup draws, in training on labels; 0: none
    """

    channels: tuple[int, ...] = CHANNELS
    pretext_rate: float = 1e-3
    partitions: int = 4
    local: float = 0.5
    blocks: int = 2
    mixup: float = 0.0

    axes = 2
    trial = BRAINS

    def pretext_parts(self, model: nn.Module, inputs: int, dims: int) -> nn.Module:
        heads = {"whole": SliceHead(self.channels[-1])}
        if self.local:
            heads["regions"] = RegionHead(self.channels[-1 - self.blocks])
        return nn.ModuleDict(heads)

    def stages(self) -> tuple[float, ...]:
        return 1 - self.local, self.local

    def pretext(self, nets: nn.ModuleDict, images: Batch, now: Moment) -> Tensor:
        return self.local_loss(nets, images) if self.stage(now)[0] == 1 else self.global_loss(nets, images)

    def global_loss(self, nets: nn.ModuleDict, images: Batch) -> Tensor:
        """G of two augmented views of the slices."""
        views = torch.cat([self.view(images.images), self.view(images.images)])
        vectors = nets["pretext"]["whole"](encoded(nets["model"], views))
        part, volume = parts(images.groups, self.partitions, len(images.images))
        positive, negative = partners(part.to(vectors.device), volume.to(vectors.device))
        return contrast(vectors, positive, negative)

    def local_loss(self, nets: nn.ModuleDict, images: Batch) -> Tensor:
        """L^R: intensity alone differs between views, so that a region stays where it is."""
        rng = own_generator()
        views = torch.cat([self.augmentation.intensity(images.images, rng) for _ in range(2)])
        vectors = nets["pretext"]["regions"](part_decoded(nets["model"], views, self.blocks))
        with torch.autocast(vectors.device.type, enabled=False):
            pairs = zip(*vectors.chunk(2), strict=True)
            return torch.stack([info_nce(one, other, HEAT) for one, other in pairs]).mean()

    def supervised(self, nets: nn.ModuleDict, labelled: Batch, now: Moment) -> Tensor:
        """As ever; with mixup, of images that are mixed with others of the batch, by both annotations."""
        if not self.mixup:
            return super().supervised(nets, labelled, now)
        share = float(torch.distributions.Beta(self.mixup, self.mixup).sample())
        other = torch.randperm(len(labelled.images)).to(labelled.images.device)
        mixed = share * labelled.images + (1 - share) * labelled.images[other]
        logits, loss = nets["model"](mixed).float(), find_loss(self.loss)
        return share * loss(logits, labelled.labels) + (1 - share) * loss(logits, labelled.labels[other])


FULL_ARMS = ("scratch", "scratch, all steps", "gl-contrast", "simclr")

recipe = Recipe(
    paper="gl-contrast",
    title="Contrast of slices by their part of the volume, and of regions within a slice",
    claim="With two labelled volumes of acdc (one patient's) and all others without labels, pre-training by the global "
    "and the local contrastive loss gives a higher Dice than training from scratch with as many steps on the labels.",
    arms={
        "scratch": Arm(BASELINE),
        "scratch, all steps": Arm(LONGER),
        "gl-contrast": Arm(GlobalLocal()),
        "simclr": Arm(GlobalLocal(partitions=0, local=0.0)),
        "global only": Arm(GlobalLocal(local=0.0)),
        "with mixup": Arm(GlobalLocal(mixup=0.1)),
    },
    compare=("gl-contrast", "scratch"),
    ablation=("gl-contrast", "simclr"),
    replicate="draw",
    scales=scales(replace(BRAINS, labelled=1), replace(HEARTS, labelled=1), *FULL_ARMS),
    source="official code, github.com/krishnabits001/domain_specific_cl",
    components=(
        Component(
            "contrast by the part of the volume (domain-specific cue)",
            "implemented",
            "G^D with four parts, temperature 0.1. A batch is eight slices at random, each in two views, where the "
            "official code draws a slice of each part of a few volumes; what a batch holds of the same part is "
            "positive. The encoder's last map is averaged to 4 x 4 cells before it is flattened, so that any size "
            "fits, and the head is narrower. Views are the book's affine maps and intensity changes for crops and "
            "intensity changes",
        ),
        Component(
            "local contrastive loss (problem-specific cue)",
            "implemented",
            "L^R on 13 regions of 3 x 3 at a quarter of the resolution, the encoder frozen, as in the official code; "
            "that is after two of four blocks here and three of five there. All twelve other regions are negatives; "
            "the code takes five near ones for want of memory",
        ),
        Component(
            "pre-training in stages, then fine-tuning",
            "implemented",
            "half of the steps of the run go to the pretext, half of these to each stage of it; the paper gives each "
            "of the three stages 10,000 steps. On validation patients of one draw, the only look before the "
            "evaluation, a first version was below training from scratch. Its pretext's loss hardly fell, at the rate "
            "of the chapter and with maps averaged to one number; both became the official code's after that. This is "
            "the second evaluation: in the first (Dice 0.60, simclr 0.53) the optimiser kept the moments of the "
            "pretext's gradients while it trained on labels",
        ),
        Component(
            "with a simple data augmentation",
            "simplified",
            "mixup with one mixing factor for a batch, where the official code draws one for each image; an arm that "
            "`full` does not run",
        ),
        Component("G^D-", "absent", "positives as in SimCLR, negatives of other parts; the step between both"),
        Component("L^D", "absent", "regions of the same part of two volumes as positives; L^R is the paper's choice"),
        Component(
            "other pre-training and semi-supervised methods",
            "absent",
            "SimCLR, which is G^R, is the ablation; others are recipes of their own",
        ),
        Component("three MRI data sets", "absent", "acdc alone"),
        Component(
            "within 8% of the benchmark",
            "absent",
            "the upper bound with all labels is not an arm. Widths are half of the paper's, from 8 to 64 channels",
        ),
    ),
)
