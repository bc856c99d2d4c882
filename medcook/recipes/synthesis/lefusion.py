"""LeFusion (Zhang, Liu, Yang, Wan, Wang, Peng and Fua, ICLR 2025; arXiv 2403.14066).

Idea: to have more images with lesions, do not make images, make lesions: a diffusion model that is asked for nothing
but lesions fills a mask in a real image without one, and what surrounds the mask stays real. With x the image, m_k the
mask of lesion class k = 1 .. K, x_t the noised image, h_k the histogram of brightness in m_k:

    loss   sum_k |m_k (x - f_k(x_t, t, h))|^2    a noised copy of the image and an output of f for each class
    back   x_t,k <- m_k x_t,k + (1 - m_k) (x noised to t)    before every step: what is around a lesion is real
    end    sum_k m_k f_k + (1 - sum_k m_k) x

A network that is asked for whole images fills a mask with what usually is there: healthy tissue. h is the centre of a
cluster of the training lesions' histograms, so that of several kinds of lesions none is made that lies between them.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.data.transforms import warp
from medcook.methods import Batch, Moment
from medcook.pretraining import nothing
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.recipes.synthesis._denoiser import Denoiser
from medcook.recipes.synthesis._diffusion import Diffusion, Net
from medcook.recipes.synthesis._scars import ScarTask, moved_lesions, scar_rows, walls, with_lesions
from medcook.recipes.synthesis._settings import LABELLED, scales
from medcook.synthesis import RealOnly, Synthesising
from medcook.tasks import Budget

BINS, LOW, HIGH = 16, -2.0, 6.0
"""Of a histogram; in the paper 16, from the darkest to the brightest. Images here have mean 0 and variance 1."""
CLUSTERS = 3
DIFFUSION = Diffusion(target="image")
SHARE, RATE = 0.4, 1e-2
"""Of every arm: lesions are small, and a segmenter needs more and larger steps than for the heart itself."""
KEPT = 256
"""How many lesions a generator remembers the histograms of."""


def lesion_masks(labels: Tensor, kinds: int) -> Tensor:
    """m (B, K, H, W) float32 of labels (B, H, W); K is the number of `kinds` of lesions."""
    return torch.stack([labels == k for k in range(1, kinds + 1)], dim=1).float()


def histograms(images: Tensor, masks: Tensor) -> Tensor:
    """h (B, K, BINS): shares of the pixels of each mask (B, K, H, W) of images (B, 1, H, W); zeros if there are none.

    What is darker or brighter than the range counts in the first or last bin.
    """
    place = ((images - LOW) / (HIGH - LOW) * BINS).long().clamp(0, BINS - 1)
    inside = F.one_hot(place[:, 0], BINS).movedim(-1, 1).float()
    counts = (inside[:, None] * masks[:, :, None]).sum((3, 4))  # no matrix product, which autocast would round
    return counts / masks.sum((2, 3))[..., None].clamp_min(1)


def focused_loss(diffusion: Diffusion, net: Net, images: Tensor, masks: Tensor, focused: bool = True) -> Tensor:
    """The mean loss over the pixels of masks (B, K, H, W), each class in its own copy of images (B, 1, H, W).

    focused  False: over all pixels of every copy
    """
    return diffusion.loss(net, images.expand_as(masks).contiguous(), masks if focused else None)


@torch.no_grad()
def fill(diffusion: Diffusion, net: Net, images: Tensor, masks: Tensor, count: int) -> Tensor:
    """Real images (B, 1, H, W) with lesions in masks (B, K, H, W), from `count` steps back; outside they stay real.

    Before every step what lies around a mask is noised anew: the real image, and what is known of other masks.
    """
    around = images

    def among_real(x: Tensor, t: Tensor) -> Tensor:
        context = diffusion.noised(around.expand_as(x), torch.randn_like(x), t)
        return net(torch.where(masks > 0, x, context), t)

    def composed(clean: Tensor, t: int) -> Tensor:
        nonlocal around
        around = torch.where(masks.sum(1, keepdim=True) > 0, (masks * clean).sum(1, keepdim=True), images)
        return around.expand_as(clean)

    return diffusion.sample(among_real, torch.randn_like(masks), count, change=composed, limit=HIGH)[:, :1]


def clusters(points: Tensor, count: int, rounds: int = 10) -> Tensor:
    """Centres (count, D) of points (N, D) by k-means: it begins with points that are far from each other."""
    centres = points[:1]
    while len(centres) < count:
        centres = torch.cat([centres, points[torch.cdist(points, centres).amin(1).argmax()][None]])
    for _ in range(rounds):
        nearest = F.one_hot(torch.cdist(points, centres).argmin(1), count).float()
        means = (nearest[:, :, None] * points[:, None]).sum(0) / nearest.sum(0)[:, None].clamp_min(1)
        centres = torch.where(nearest.sum(0)[:, None] > 0, means, centres)
    return centres


class LesionMaker(nn.Module):
    """A denoiser of lesions, and the histograms that were seen in training."""

    def __init__(self, classes: int):
        super().__init__()
        self.kinds = kinds = classes - 1
        self.texture = Denoiser(kinds, kinds, told=kinds * BINS)
        self.register_buffer("histograms", torch.zeros(KEPT, kinds * BINS))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, t: Tensor, told: Tensor) -> Tensor:
        """What `DIFFUSION` asks for, of x (B, K, H, W) with lesions of histograms told (B, K * BINS)."""
        return self.texture(x, t, told=told)

    def remember(self, told: Tensor) -> None:
        """Histograms (B, K * BINS); the oldest are forgotten."""
        place = (self.count + torch.arange(len(told), device=told.device)) % KEPT
        self.histograms[place] = told
        self.count += len(told)

    def seen(self) -> Tensor:
        """(N, K * BINS): what is remembered."""
        return self.histograms[: min(int(self.count), KEPT)]


@dataclass
class MadeLesions(Synthesising):
    """What arms that make lesions share: the wall moves with the image."""

    share: float = SHARE
    rate: float = RATE

    trial = ScarTask("embedded", labelled=2, side=32)

    def augment(self, batch: Batch, rng: torch.Generator) -> Batch:
        grid = self.augmentation.grid(batch.images, rng)
        images, labels = warp(batch.images, batch.labels, grid)
        if batch.raters is not None:
            wall = warp(batch.images[:, :0], batch.raters[:, 0], grid)[1]
            batch = batch._replace(raters=wall[:, None])
        return batch._replace(images=images, labels=labels)


@dataclass
class LeFusion(MadeLesions):
    """Lesions are diffused into lesion-free hearts, in masks that come from the training patients.

    focused     False: the loss is over whole images
    told        False: no histogram says what a lesion is like
    steps_back  of the sampler
    """

    focused: bool = True
    told: bool = True
    steps_back: int = 20

    def generator(self, inputs: int, classes: int) -> nn.Module:
        return LesionMaker(classes)

    def telling(self, histogram: Tensor) -> Tensor:
        """What the network is told of histograms (B, D), with values around 1."""
        return BINS / 4 * histogram if self.told else torch.zeros_like(histogram)

    def learn(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        """From images with lesions alone."""
        chosen, maker = with_lesions(labelled), nets["generator"]
        if not len(chosen):
            return nothing()
        images, masks = labelled.images[chosen, :1], lesion_masks(labelled.labels[chosen], maker.kinds)
        histogram = histograms(images, masks).flatten(1)
        maker.remember(histogram)
        return focused_loss(DIFFUSION, partial(maker, told=self.telling(histogram)), images, masks, self.focused)

    def make(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None) -> tuple[Tensor, Tensor]:
        """Each lesion-free image gets a lesion like one of the clusters; before any was seen, none."""
        maker, images = nets["sampler"], unlabelled.images
        moved = moved_lesions(labelled, walls(unlabelled))
        if moved is None or not maker.count:
            return images, torch.zeros_like(unlabelled.labels)
        chosen = torch.randint(CLUSTERS, (len(images),), device=images.device)
        told = self.telling(perturbed(clusters(maker.seen(), CLUSTERS)[chosen]))
        masks = lesion_masks(moved[1], maker.kinds)
        return fill(DIFFUSION, partial(maker, told=told), images, masks, self.steps_back), moved[1]


def perturbed(told: Tensor, share: float = 0.1) -> Tensor:
    """Histograms (B, D) of which each value changes by at most a `share` of itself."""
    noise = torch.randn_like(told)
    return told * (1 + share * noise / noise.abs().amax(1, keepdim=True))


@dataclass
class CopyPaste(MadeLesions):
    """Training lesions as they are, turned and scaled from one wall to another. Nothing learns how to make them."""

    def generator(self, inputs: int, classes: int) -> nn.Module:
        return nn.Identity()

    def learn(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        return nothing()

    def make(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None) -> tuple[Tensor, Tensor]:
        moved = moved_lesions(labelled, walls(unlabelled))
        if moved is None:
            return unlabelled.images, torch.zeros_like(unlabelled.labels)
        images, labels = moved
        return torch.where(labels[:, None] > 0, images, unlabelled.images), labels


recipe = Recipe(
    paper="lefusion",
    title="Lesions diffused into real hearts without any",
    claim="Lesions that a lesion-focused diffusion model makes in lesion-free hearts raise the Dice of infarct and "
    "no-reflow above that of training on three labelled patients alone.",
    arms={
        "real only": Arm(RealOnly(share=SHARE, rate=RATE)),
        "real only, all steps": Arm(RealOnly(share=0.0, rate=RATE)),
        "lefusion": Arm(LeFusion()),
        "without lesion focus": Arm(LeFusion(focused=False)),
        "without histograms": Arm(LeFusion(told=False)),
        "copy-paste": Arm(CopyPaste()),
    },
    compare=("lefusion", "real only"),
    ablation=("lefusion", "without lesion focus"),
    replicate="draw",
    score=scar_rows,
    scales=scales(
        ScarTask("embedded", labelled=LABELLED),
        ScarTask("acdc", labelled=LABELLED, evaluation="test"),
        "real only",
        "lefusion",
        "without lesion focus",
        "copy-paste",
        budget=Budget(steps=1000, batch=8, checks=3),
    ),
    source="official code, github.com/M3DV/LeFusion (LeFusion/ddpm/diffusion.py, dataset/emidec_hist.py, "
    "inference/inference.py, DiffMask/); abstract, arXiv 2403.14066",
    components=(
        Component(
            "lesion-focused loss",
            "implemented",
            "squared, of the clean image, averaged over the pixels of lesions. The official code takes the absolute "
            "error of the noise, over all pixels with zeros outside: what is asked for is the same. As there, the "
            "network is not told where the lesion is",
        ),
        Component(
            "forward-diffused background",
            "implemented",
            "noised anew before each of 20 DDIM steps; there 300 steps of DDPM, each passage gone back and forth "
            "several times as in RePaint",
        ),
        Component(
            "histogram-based texture control",
            "implemented",
            "16 bins for each class, beside the time, as there; 3 clusters of the last 256 training lesions, and a "
            "centre's values change by up to a tenth. The official code clusters lung nodules only, not Emidec",
        ),
        Component(
            "multi-channel decomposition",
            "implemented",
            "infarct and no-reflow, a copy of the image each. One thing is added: on the way back a copy sees in the "
            "other's mask what the other has made, as in training. In the official code it sees what it makes there "
            "itself, which it was never asked for; infarcts became too dark and cores too bright so",
        ),
        Component(
            "lesion mask diffusion",
            "simplified",
            "masks of training lesions, turned by any angle and scaled from one heart's wall to another's, and cut off "
            "at the wall. A second network that diffused masks from the wall and a disc, as in the official code, was "
            "tried with this budget: its masks were speckled and nearly without cores",
        ),
        Component("pairs from lesion-free images", "implemented", "of patients without labels; their wall is known"),
        Component(
            "cardiac lesion MRI and lung nodule CT",
            "simplified",
            "no set with masks of lesions is at hand. Real hearts in cine MR, two-dimensional; their scars are "
            "simulated (see _scars.py), and so are the two kinds of patients, with bright and with faint scars",
        ),
        Component(
            "nnU-Net and SwinUNETR",
            "simplified",
            "the chapter's small U-Net, with 600 of 1000 steps and a peak rate of 0.01 in every arm. What was looked "
            "at: with the chapter's settings and fainter, smaller scars the baseline found nearly none in validation "
            "patients (Dice 0.03); it finds them now (0.55). Made lesions stand out, a little less than real ones; "
            "without lesion focus, seen with the fainter scars alone, the masks were filled with healthy wall. All "
            "this in one draw that is not scored",
        ),
    ),
)
