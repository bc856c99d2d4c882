"""Coupling AI and citizen science (Syahmi, Lu, Li, Yao, Jiang and others, arXiv 2409.03087, 2024).

Idea: where expert labels are few, let a crowd draw them, helped by a promptable model; merge what it drew, so that who
agrees with the others counts for more; and enlarge the small set with pairs of a new mask and the image that pix2pix
(Isola, Zhu, Zhou and Efros, CVPR 2017) makes of it. Annotator r of an image drew y_r; G is the generator, D the judge:

    merging    m = sum_r w_r y_r / sum_r w_r,  w_r = Dice(y_r, m) in turns, w_r = 1 at first; the label is argmax m
    pix2pix    G* = arg min_G max_D  E log D(y, x) + E log(1 - D(y, G(y))) + lambda E |x - G(y)|_1
    new pairs  (bent y, G(bent y)); the ablation takes (bent y, bent x), copies by plain augmentation

There is one optimiser. The judge's loss sees a constant G(y), the generator's a judge with constant weights, and both
are added to the segmentation loss; synthetic images are constants for the network that learns to segment them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.cohorts import RaterTask
from medcook.data import IGNORE, Case
from medcook.data.transforms import Augment, warp
from medcook.losses import find_loss
from medcook.methods import Batch, Method, Moment
from medcook.methods.uncertainty import add_dropout
from medcook.networks import UNet
from medcook.recipes.imperfect_labels._adversarial import frozen
from medcook.recipes.imperfect_labels._settings import CHANNELS, scales
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.sam.checkpoints import load_small
from medcook.sam.predictor import Predictor
from medcook.sam.prompts import Prompt, box_of
from medcook.tasks import Samples

LAMBDA = 100.0
"""Weight of the L1 loss over the adversarial one, as in pix2pix."""


@dataclass(frozen=True)
class CrowdTask(RaterTask):
    """A few training images with a crowd's annotations; the label of a sample is still the expert's.

    Who drew exactly the expert's label is the expert, and does not belong to the crowd.

    few       how many of a fold's training patients there are, the first in the split's order
    assisted  an annotator draws boxes alone, and the small SAM answers with a mask
    """

    few: int = 6
    assisted: bool = False

    @cached_property
    def labelled_patients(self) -> tuple[str, ...]:
        return super().labelled_patients[: self.few]

    def samples(self, role: str) -> Samples:
        """The crowd annotates what is learnt from, and nothing else."""
        return super().samples(role) if role == "labelled" else super(RaterTask, self).samples(role)

    def _raters(self, case: Case, most: int) -> Tensor:
        """(slices, most, *size) uint8 of one case."""
        drawn = super()._raters(case, most)
        expert = [number for number, mask in enumerate(case.raters) if np.array_equal(mask, case.label)]
        drawn[:, expert] = IGNORE
        if self.assisted and drawn.ndim == 4:
            for image, masks in zip(self.preparation.images(case), drawn, strict=True):
                masks[:] = torch.stack([boxed(image[0].numpy(), mask, small_sam()) for mask in masks])
        return drawn


@lru_cache(maxsize=1)
def small_sam() -> Predictor:
    """The book's promptable model, once a process."""
    return Predictor(load_small())


def boxed(image: np.ndarray, mask: Tensor, ask: Callable) -> Tensor:
    """A label map (H, W) of what `ask` answers to the box around each structure of a mask (H, W); no one: as it is."""
    if (mask == IGNORE).all():
        return mask
    found = torch.zeros_like(mask)
    for value in mask[(mask > 0) & (mask != IGNORE)].unique().tolist():
        answer = ask(image, Prompt(box=box_of((mask == value).numpy()))).mask
        found[torch.from_numpy(answer)] = value
    return found


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """(..., H, W) to (..., classes, H, W) float; nothing where unlabelled."""
    return torch.stack([labels == value for value in range(classes)], dim=-3).float()


def merged(raters: Tensor, turns: int = 3) -> Tensor:
    """One label map (B, H, W) of a crowd's (B, R, H, W), by the vote of the module's docstring.

    Missing annotations have no say; where nobody says anything, nothing is labelled.
    """
    known = raters != IGNORE
    if not known.any():
        return raters[:, 0]
    votes = one_hot(raters, int(raters[known].max()) + 1)
    weights = known.flatten(2).any(2).float()
    for turn in range(turns + 1):
        total = torch.einsum("br,brchw->bchw", weights, votes)
        if turn < turns:
            weights = agreement(votes, known.float(), total / total.sum(1, keepdim=True).clamp_min(1e-6))
    return torch.where(known.any(1), total.argmax(1).to(raters.dtype), IGNORE)


def agreement(votes: Tensor, known: Tensor, mean: Tensor) -> Tensor:
    """(B, R) soft Dice of annotators' votes (B, R, classes, H, W) and their mean (B, classes, H, W), 0 to 1.

    All structures count together, where the annotator said something, `known` (B, R, H, W) 0 or 1; nowhere: 0.
    """
    overlap = torch.einsum("brchw,bchw->br", votes[:, :, 1:], mean[:, 1:])
    size = votes[:, :, 1:].sum((2, 3, 4)) + torch.einsum("brhw,bhw->br", known, mean[:, 1:].sum(1))
    return (2 * overlap + 1) / (size + 1) * known.flatten(2).any(2)


def one_of(raters: Tensor, index: Tensor) -> Tensor:
    """(B, H, W): of each sample's annotators (B, R, H, W) one, always the same; `index` (B,): which samples."""
    chosen = []
    for number, masks in zip(index.tolist(), raters, strict=True):
        there = (masks != IGNORE).flatten(1).any(1).nonzero().flatten()
        draw = torch.randint(2**31, (), generator=torch.Generator().manual_seed(number))
        chosen.append(masks[there[draw % len(there)] if len(there) else 0])
    return torch.stack(chosen)


def bend(images: Tensor, labels: Tensor, strength: float, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (B, C, H, W) and labels (B, H, W) under a smooth random map: a new shape from a real one.

    strength  standard deviation of the displacements on a grid of 4 x 4 points, in half images
    """
    size = labels.shape[1:]
    theta = torch.eye(2, 3, device=images.device).expand(len(images), 2, 3)
    with torch.autocast(images.device.type, enabled=False):
        moves = torch.randn(len(images), 2, 4, 4, generator=rng).to(images.device) * strength
        moves = F.interpolate(moves, size, mode="bicubic", align_corners=True).movedim(1, -1)
        grid = F.affine_grid(theta, [len(images), 1, *size], align_corners=False)
        return warp(images.float(), labels, grid + moves)


class Judge(nn.Sequential):
    """pix2pix's judge of patches, 34 pixels wide each: (B, inputs, H, W) to logits for `real` (B, 1, H / 4, W / 4)."""

    def __init__(self, inputs: int, width: int = 12):
        layers, channels = [], (inputs, width, 2 * width, 2 * width)
        for k, (before, after) in enumerate(zip(channels, channels[1:], strict=False)):
            layers.append(nn.Conv2d(before, after, 4, stride=2 if k < 2 else 1, padding=1))
            layers += [nn.InstanceNorm2d(after)] if k else []
            layers.append(nn.LeakyReLU(0.2))
        super().__init__(*layers, nn.Conv2d(channels[-1], 1, 4, padding=1))


def adversarial(generator: nn.Module, judge: nn.Module, masks: Tensor, images: Tensor) -> Tensor:
    """The losses of judge and generator, of which each moves its own weights alone.

    masks (B, classes, H, W), images (B, C, H, W). The objective of the generator is divided by lambda: AdamW does not
    see the scale, but the gradients are clipped together with those of the segmentation.
    """
    made = generator(masks).float()
    real, fake = torch.cat([masks, images], dim=1), torch.cat([masks, made], dim=1)
    says_real, says_fake = judge(torch.cat([real, fake.detach()])).float().chunk(2)
    judged = (F.softplus(-says_real).mean() + F.softplus(says_fake).mean()) / 2
    fooled = F.softplus(-frozen(judge, fake).float()).mean()
    return judged + (made - images).abs().mean() + fooled / LAMBDA


@dataclass
class Crowd(Method):
    """Supervised training on a crowd's labels, and on pairs that enlarge the set.

    labels     `merged`: the crowd's, merged; `one`: one annotator's, another one for every image; `expert`: the label
    extra      pairs besides the real ones: `pix2pix` makes their images; `copies` are real ones bent like their masks
    share      extra pairs of a step, of the real ones; from as many real ones pix2pix learns
    start      share of the training after which they come: before, the generator has nothing to say
    strength   of the bending, see `bend`
    generator  widths of pix2pix's generator, a U-Net; its noise is dropout, as in pix2pix
    """

    channels: tuple[int, ...] = CHANNELS
    augmentation: Augment = Augment(rotate=180.0, flip=True)
    labels: Literal["merged", "one", "expert"] = "merged"
    extra: Literal["pix2pix", "copies", "nothing"] = "pix2pix"
    share: float = 0.5
    start: float = 0.4
    strength: float = 0.1
    generator: tuple[int, ...] = (8, 16, 32, 32)

    axes = 2
    trial = CrowdTask("embedded", few=2)

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        """With pix2pix, also its `generator` and its `judge`."""
        nets = super().build(inputs, classes, dims)
        if self.extra == "pix2pix":
            nets["generator"] = UNet(inputs=classes, classes=inputs, channels=self.generator)
            add_dropout(nets["generator"], 0.5, 2, dims)
            nets["judge"] = Judge(classes + inputs)
        return nets

    def augment(self, batch: Batch, rng: torch.Generator) -> Batch:
        """Labels are made of the crowd's, then all is moved; intensities change in the step, after pix2pix."""
        if batch.raters is not None and self.labels != "expert":
            found = merged(batch.raters) if self.labels == "merged" else one_of(batch.raters, batch.index)
            batch = batch._replace(labels=found)
        images, labels = warp(batch.images, batch.labels, self.augmentation.grid(batch.images, rng))
        return batch._replace(images=images, labels=labels, raters=None)

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        rng = torch.Generator().manual_seed(int(torch.randint(2**62, ())))  # the same view in every arm
        images, labels = labelled.images, labelled.labels
        views = self.augmentation.intensity(images, rng)
        if self.extra != "nothing" and now.fraction >= self.start:
            more, masks = self.enlarge(nets, images, labels, rng)
            views = torch.cat([views, self.augmentation.intensity(more, rng)])
            labels = torch.cat([labels, masks])
        logits = nets["model"](views.contiguous(memory_format=torch.channels_last)).float()
        loss = find_loss(self.loss)(logits, labels)
        if self.extra == "pix2pix":
            few = slice(self.count(images))
            masks = one_hot(labelled.labels[few], logits.shape[1])
            loss = loss + adversarial(nets["generator"], nets["judge"], masks, images[few])
        return loss

    def count(self, images: Tensor) -> int:
        """How many of a step's samples pix2pix learns from, and are bent."""
        return max(1, round(self.share * len(images)))

    @torch.no_grad()
    def enlarge(self, nets: nn.ModuleDict, images: Tensor, labels: Tensor, rng) -> tuple[Tensor, Tensor]:
        """Extra images and masks of a step, from the first of its real ones."""
        few = slice(self.count(images))
        copies, masks = bend(images[few], labels[few], self.strength, rng)
        if self.extra == "copies":
            return copies, masks
        classes = nets["generator"].down[0][0].in_channels
        return nets["generator"](one_hot(masks, classes)).float(), masks


recipe = Recipe(
    paper="citizen-science",
    title="A crowd's labels, merged, and a set enlarged by pix2pix",
    claim="With six training images whose labels are merged from a crowd, pairs that pix2pix makes raise Dice.",
    arms={
        "merged labels": Arm(Crowd(extra="nothing")),
        "enlarged": Arm(Crowd()),
        "copies": Arm(Crowd(extra="copies")),
        "expert labels": Arm(Crowd(labels="expert", extra="nothing")),
        "one annotator": Arm(Crowd(labels="one", extra="nothing")),
        "assisted annotators": Arm(Crowd(extra="nothing"), {"assisted": True}),
    },
    compare=("enlarged", "merged labels"),
    ablation=("enlarged", "copies"),
    replicate="fold",
    scales=scales(
        CrowdTask("embedded", few=2),
        CrowdTask("bubil", folds=3),
        "merged labels",
        "enlarged",
        "copies",
        "expert labels",
    ),
    source="abstract; pix2pix: Isola et al., CVPR 2017. The paper's code and the text of its methods were not at hand",
    components=(
        Component(
            "merging of crowd-labelled images",
            "simplified",
            "the abstract names an algorithm and does not say which: here a vote in which each annotator weighs as "
            "much as he agrees with the merged mask, in three turns. The crowd are four experts with two tools each "
            "(a fifth, whose masks are the gold standard, is left out). On the training images of the three folds the "
            "merged masks have a Dice of 0.89 to 0.91 with the gold standard, one annotator's 0.85 to 0.88. Expert "
            "labels are an arm at `full`; one annotator an image is one that `full` does not run",
        ),
        Component(
            "MedSAM-assisted annotation",
            "simplified",
            "an arm that `full` does not run: annotators draw boxes, those around their masks, and the book's small "
            "SAM answers. It is no MedSAM: on three training images of fold 0 its masks overlap with the gold standard "
            "by a Dice of 0.52 to 0.74, the masks of the annotator whose boxes these were by 0.84 to 0.95",
        ),
        Component(
            "pix2pix",
            "implemented",
            "a conditional GAN with L1 loss, lambda 100, dropout for noise, a U-Net of narrow widths and a judge of "
            "34-pixel patches; masks are real ones, bent. It learns from half of each batch, beside the segmentation "
            "network and with its AdamW and rate; its images join from 40% of the training on, where a pipeline would "
            "train it first. The judge sees constant images and the generator a judge with constant weights, since "
            "there is one loss. Seen once, on training images: the cell's halo, and a background without texture",
        ),
        Component(
            "enlarged training set",
            "implemented",
            "every step has half as many synthetic pairs on top of its real ones. The ablation is about the generator, "
            "since more pairs alone might help: the same bent masks, with the real images bent alike",
        ),
        Component("online annotation platform", "absent", "a website; the annotations here are a data set's"),
        Component("different modalities", "absent", "microscopy alone: 25 images, all of which are scored in a fold"),
    ),
)
