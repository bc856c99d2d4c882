"""A background image can be all you need (Wang, Islam, Xu and Ren, MICCAI 2022; arXiv 2206.11804).

Idea: for a training set one need not collect images: a single background and a few foregrounds that were cut out, each
changed in many ways and then blended, are enough to learn to segment real images. With a the cut-out's blurred mask,

    x = a F + (1 - a) B,    y the mask of F;    F, B: random views of a cut-out and of the background, each its own

and x then goes through chained augmentation mixing (see _chains.py). There, the background is tissue and the foreground
are surgical instruments; here a cell culture and the cells in it, seen by phase contrast, with a cell in each image.
Nobody has photographed the culture without a cell: the background is an image whose cell is painted over.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor, nn

from medcook.data import IGNORE
from medcook.data.transforms import Augment, warp
from medcook.methods import Batch, Moment, Supervised, own_generator
from medcook.recipes.recipe import Arm, Component, Recipe, Scale
from medcook.recipes.synthesis._chains import mixed
from medcook.recipes.synthesis._settings import CHANNELS, LABELLED
from medcook.tasks import Budget, Samples, Task

MARGIN, SOFT, STEP = 4, 6.0, 8
"""Pixels around a mask that are painted over as well, since cells shine; the width over which brightness is fitted to
the surroundings; between two places where the texture may come from."""
BLACK, WHITE = -3.0, 5.0
"""Standard deviations from an image's mean between which chains see it; few pixels lie outside."""
ANY_WAY_UP = Augment(rotate=180.0, flip=True)
"""Of all arms: a cell in a dish may lie in any direction."""


def painted_over(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(H, W) without what is in `mask`: another part of the same image, as bright as what surrounds the hole.

    The part is the one, a multiple of `STEP` pixels away, that fits the hole's surroundings best. A blurred version of
    the difference, of which only what lies outside of both masks is known, is added.
    """
    hole = ndimage.binary_dilation(mask, iterations=MARGIN)
    rim = ndimage.binary_dilation(hole, iterations=2 * MARGIN) & ~hole

    def misfit(shift: tuple[int, int]) -> tuple[int, float]:
        torn = np.roll(hole, shift, (0, 1))
        return int((torn & hole).sum()), float(np.abs(image - np.roll(image, shift, (0, 1)))[rim & ~torn].mean())

    places = [(down, right) for down in range(0, image.shape[0], STEP) for right in range(0, image.shape[1], STEP)]
    best = min(places[1:], key=misfit)
    other, known = np.roll(image, best, (0, 1)), ~(hole | np.roll(hole, best, (0, 1)))
    share = np.maximum(ndimage.gaussian_filter(known.astype(float), SOFT), 1e-3)
    apart = ndimage.gaussian_filter(np.where(known, image - other, 0.0), SOFT) / share
    return np.where(hole, other + apart, image).astype(np.float32)


@dataclass(frozen=True)
class SeedTask(Task):
    """The labelled images are the seeds, and of the first there is a version without foreground: the one unlabelled
    sample, which is the background."""

    @cached_property
    def unlabelled_patients(self) -> tuple[str, ...]:
        return self.labelled_patients[:1]

    def samples(self, role: str) -> Samples:
        if role != "unlabelled":
            return super().samples(role)
        seeds = super().samples("labelled")
        shown = (seeds.case_of == 0) & (seeds.labels != 0).flatten(1).any(1)
        first = int(shown.nonzero()[0])
        mask = (seeds.labels[first] != 0).numpy()
        clean = [torch.from_numpy(painted_over(channel.numpy(), mask)) for channel in seeds.images[first]]
        blank = torch.full_like(seeds.labels[:1], IGNORE)
        return Samples(torch.stack(clean)[None], blank, torch.zeros(1, dtype=torch.int64))


def blend(front: Tensor, labels: Tensor, back: Tensor, soft: float) -> Tensor:
    """x (B, C, H, W): `front` where labels (B, H, W) show something, `back` elsewhere.

    soft  standard deviation in pixels of the blur of the border between; 0: pasted
    """
    inside = ((labels != 0) & (labels != IGNORE)).float()[:, None]
    share = gaussian_blur(inside, soft) if soft else inside
    return share * front + (1 - share) * back


def gaussian_blur(masks: Tensor, width: float) -> Tensor:
    """(B, 1, H, W) blurred by a Gaussian of this standard deviation in pixels."""
    places = torch.arange(-int(3 * width + 0.5), int(3 * width + 0.5) + 1, device=masks.device)
    kernel = torch.exp(-(places**2) / (2 * width**2))
    kernel = kernel / kernel.sum()
    half = len(kernel) // 2
    for shape, pad in (((1, 1, -1, 1), (0, 0, half, half)), ((1, 1, 1, -1), (half, half, 0, 0))):
        masks = F.conv2d(F.pad(masks, pad, mode="replicate"), kernel.view(shape))
    return masks


def standardised(images: Tensor) -> Tensor:
    """Each image (B, C, H, W) with mean 0 and variance 1, as any image that is prepared."""
    dims = tuple(range(1, images.ndim))
    return (images - images.mean(dims, keepdim=True)) / images.std(dims, keepdim=True).clamp_min(1e-6)


@dataclass
class Blended(Supervised):
    """Nothing real is trained on: every image is a background and one or two foregrounds.

    soft     see `blend`
    second   how often there are two foregrounds
    chains   of augmentation mixing; 0: none
    level    of the operations in them, of 10
    """

    channels: tuple[int, ...] = CHANNELS
    augmentation: Augment = field(default_factory=lambda: ANY_WAY_UP)
    soft: float = 1.0
    second: float = 0.2
    chains: int = 3
    level: float = 3.0

    uses_unlabelled = True
    axes = 2
    trial = SeedTask("embedded", labelled=2)

    def augment(self, batch: Batch, rng: torch.Generator) -> Batch:
        """Foregrounds and backgrounds are moved each on their own; the background's brightness changes, too."""
        images, labels = warp(batch.images, batch.labels, self.augmentation.grid(batch.images, rng))
        if (batch.labels == IGNORE).all():
            images = replace(self.augmentation, noise=0.0).intensity(images, rng)
        return batch._replace(images=images, labels=labels)

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        rng = own_generator()
        images, labels = self.compose(labelled, unlabelled.images)
        if self.chains:
            images = self.chained(images)
        images = self.augmentation.intensity(images, rng).contiguous(memory_format=torch.channels_last)
        return super().training_step(nets, labelled._replace(images=images, labels=labels), None, now)

    def compose(self, front: Batch, back: Tensor) -> tuple[Tensor, Tensor]:
        """Images and labels of a step: where there is a second foreground, it lies below the first."""
        two = torch.rand(len(back), device=back.device) < self.second
        below = torch.where(two[:, None, None], front.labels.roll(1, 0), 0)
        images = blend(front.images.roll(1, 0), below, back, self.soft)
        images = blend(front.images, front.labels, images, self.soft)
        return standardised(images), torch.where(front.labels != 0, front.labels, below)

    def chained(self, images: Tensor) -> Tensor:
        """Chained augmentation mixing of images (B, C, H, W), from the black to the white of a picture."""
        units = ((images - BLACK) / (WHITE - BLACK)).clamp(0, 1)
        found = [torch.cat([mixed(one[None], self.chains, self.level) for one in unit]) for unit in units]
        return standardised(torch.stack(found) * (WHITE - BLACK) + BLACK)


SEEDS = Supervised(channels=CHANNELS, augmentation=ANY_WAY_UP)

recipe = Recipe(
    paper="surgical-background",
    title="A training set from one background and a few cut-outs",
    claim="A U-Net that has seen nothing but one background with three cut-out cells blended into it segments real "
    "images better than one that was trained on the three images themselves.",
    arms={
        "seed images": Arm(SEEDS),
        "blended": Arm(Blended()),
        "without chained mixing": Arm(Blended(chains=0)),
        "all images": Arm(SEEDS, {"labelled": None}),
        "pasted": Arm(Blended(soft=0.0)),
    },
    compare=("blended", "seed images"),
    ablation=("blended", "without chained mixing"),
    replicate="draw",
    scales={
        "quick": Scale(SeedTask("embedded", labelled=2), Budget(steps=30, batch=4, precision="float32", checks=1), 1),
        "full": Scale(
            SeedTask("bubil", labelled=LABELLED, evaluation="test"),
            Budget(steps=300, batch=8, checks=3),
            arms=("seed images", "blended", "without chained mixing", "all images"),
        ),
    },
    source="official code, github.com/lofrienger/Single_SurgicalScene_For_Segmentation (data_gen/, src/dataset.py, "
    "src/augmentations.py); abstract, arXiv 2206.11804",
    components=(
        Component(
            "one background image",
            "implemented",
            "the first of the three seed images, its cell and what shines around it painted over with another part of "
            "the same image; there, a frame of tissue without instruments. Dust and rounded cells of other dishes are "
            "in no training image then",
        ),
        Component(
            "a few foreground images",
            "implemented",
            "three cells, cut out along the experts' masks; there, two or three images of each of seven instruments. "
            "One foreground in an image, or two in a fifth of them, as there",
        ),
        Component(
            "augmentation of background and foreground",
            "simplified",
            "each turned, flipped, scaled and moved on its own by the book's augmentation, with which the baseline's "
            "images are moved as well; the background's brightness changes, too. There, also shear, perspective, "
            "crops, cut-outs and blur. All views are made anew in every step; there, 50 of each seed, and 20 "
            "backgrounds for each foreground",
        ),
        Component(
            "blending",
            "implemented",
            "the cut-out's mask, blurred by one pixel, says how much of it is seen; the official code pastes, and has "
            "blurred and pyramid versions beside. Pasting is an arm that `full` does not run",
        ),
        Component(
            "chained augmentation mixing",
            "implemented",
            "three chains of one to three operations, levels up to 3, of contrast, brightness, sharpness and the "
            "official code's lighter four; colour is left out of a grey image. The augmentation of brightness that "
            "every arm has follows in this arm and in its ablation alike",
        ),
        Component(
            "comparison with a real training set",
            "simplified",
            "all 20 training images, an arm with the same steps; nothing is tested against it",
        ),
        Component("novel instruments", "absent", "there is one kind of cell"),
        Component(
            "EndoVis 2017 and 2018",
            "absent",
            "no surgical images are at hand. Smooth muscle cells in culture instead, which are thin and faint; their "
            "backgrounds differ from dish to dish more than tissue does within an operation. What was looked at, in "
            "one draw that is not scored: images that were composed, and Dice on the validation images, 0.67 after the "
            "seed images and 0.54 after blended ones. With a learning rate of 0.01 it was 0.58 after the seed images, "
            "so the usual one stayed",
        ),
    ),
)
