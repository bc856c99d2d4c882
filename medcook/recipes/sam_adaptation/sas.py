"""SAS: Segment Anything Small (Ferreira et al., 2025): training images whose organs are small and grainy.

A promptable model is fine-tuned on images of which some are shrunk to a thumbnail on a black background, the mask with
them, and some get noise inside the mask alone, so that an organ may have any scale and texture:
    x' = black + place(shrink(x, s)),   y' = place(shrink(y, s)),   x'' = x' + 1[y' > 0] * sigma * noise.
Nothing is generated: every shape and border is a real one.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from medcook.data import IGNORE, Case
from medcook.methods import Batch
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.recipes.sam_adaptation._prompting import ZERO_SHOT, every_prompt, mean_rows, scales
from medcook.sam.adapting import PromptedSam, predictor_of
from medcook.sam.zero_shot import SMALLEST, Target

SMALL = 0.025
"""A structure is small in a slice where it takes at most this share of the prepared image (acdc: the lowest third)."""
MOST = 4
"""Slices of small structures that are asked for in a case, for each structure."""


def thumbnails(images: Tensor, labels: Tensor, factors: Tensor, corners: Tensor) -> tuple[Tensor, Tensor]:
    """Images (B, C, H, W) and labels (B, H, W) shrunk and placed on black; the background there is class 0.

    factors  (B,) sides relative to the image's; 1 changes nothing
    corners  (B, 2) in 0 to 1: where in the room that is left the thumbnail lies (down, to the right)
    """
    new_images = images.amin((2, 3), keepdim=True).expand_as(images).clone()
    new_labels = torch.zeros_like(labels)
    height, width = images.shape[2:]
    for k, factor in enumerate(factors.tolist()):
        rows, columns = max(8, round(height * factor)), max(8, round(width * factor))
        top, left = (
            int(share * room) for share, room in zip(corners[k], (height - rows, width - columns), strict=True)
        )
        area = (slice(top, top + rows), slice(left, left + columns))
        small = F.interpolate(images[k : k + 1], (rows, columns), mode="bilinear", antialias=True)
        new_images[(k, slice(None), *area)] = small[0]
        new_labels[(k, *area)] = F.interpolate(labels[k : k + 1, None].float(), (rows, columns))[0, 0].to(labels.dtype)
    return new_images, new_labels


def grainy(images: Tensor, labels: Tensor, levels: Tensor, noise: Tensor) -> Tensor:
    """Images (B, C, H, W) with noise of the given standard deviation (B,) inside their structures alone."""
    inside = ((labels > 0) & (labels != IGNORE))[:, None]
    return images + inside * levels.view(-1, 1, 1, 1) * noise


@dataclass
class Sas(PromptedSam):
    """Fine-tuning with thumbnails and noise inside structures, on top of the book's augmentation.

    shrink      share of images that become a thumbnail; `sides` the range of its side, of the image's
    noise       share of images with noise in their structures; `level` its most, in standard deviations of the image
    """

    shrink: float = 0.5
    sides: tuple[float, float] = (0.3, 0.8)
    noise: float = 0.5
    level: float = 0.5

    def augment(self, batch: Batch, rng: torch.Generator) -> Batch:
        batch = super().augment(batch, rng)
        draw = lambda *shape: torch.rand(*shape, generator=rng)  # noqa: E731
        count, (low, high) = len(batch.images), self.sides
        factors = torch.where(draw(count) < self.shrink, low + (high - low) * draw(count), 1.0)
        images, labels = thumbnails(batch.images, batch.labels, factors, draw(count, 2))
        levels = torch.where(draw(count) < self.noise, self.level * draw(count), 0.0)
        images = grainy(images, labels, levels, torch.randn(images.shape, generator=rng))
        return batch._replace(images=images, labels=labels)


def small_targets(task, case: Case) -> Iterator[Target]:
    """Real slices on which a structure is small: at most `MOST` of each, spread over those of the case."""
    images, labels = task.preparation.images(case)[:, 0].numpy(), task.preparation.labels(case).numpy()
    for value, name in task.structures.items():
        area = (labels == value).sum((1, 2))
        there = ((area >= SMALLEST) & (area <= SMALL * labels[0].size)).nonzero()[0]
        for k in there[:: max(1, -(-len(there) // MOST))]:
            yield Target(task.dataset, case.patient_id, name, images[k], labels[k] == value)


def small_rows(fitted, case: Case) -> list[dict]:
    """Mean `dice` over box, one click and three, and each alone, of the small structures of a case."""
    predictor = predictor_of(fitted)
    answer = lambda image, prompt: predictor(image, prompt).mask  # noqa: E731
    return mean_rows(case, small_targets(fitted.task, case), lambda target: every_prompt(answer, target))


recipe = Recipe(
    paper="sas",
    title="Segment Anything Small: thumbnails and noise as augmentation",
    claim="Thumbnails on black and noise inside the organ, on five labelled patients, raise the Dice of the fine-tuned "
    "promptable model on real slices where a heart structure is small.",
    arms={
        "zero-shot": Arm(ZERO_SHOT),
        "fine-tuned": Arm(Sas(shrink=0.0, noise=0.0)),
        "sas": Arm(Sas()),
        "noise without shrinking": Arm(Sas(shrink=0.0)),
        "shrinking without noise": Arm(Sas(noise=0.0)),
    },
    compare=("sas", "fine-tuned"),
    ablation=("sas", "noise without shrinking"),
    replicate="draw",
    scales=scales("zero-shot", "fine-tuned", "sas", "noise without shrinking"),
    score=small_rows,
    published={"mean gain in Dice over six sets": 0.16},
    source="abstract",
    components=(
        Component(
            "organ thumbnails on a black background",
            "implemented",
            "the whole image shrinks with its mask, to 30 to 80% of its side (our range), and lies anywhere; black is "
            "the image's lowest value",
        ),
        Component(
            "noise in regions of interest",
            "implemented",
            "Gaussian, up to half a standard deviation of the image (our choice), on all annotated structures",
        ),
        Component(
            "iterative point prompts",
            "implemented",
            "the chapter's correcting clicks in training; one click and three in the score",
        ),
        Component(
            "ultrasound, one internal and five external sets",
            "absent",
            "heart MR: no ultrasound set is at hand, and the gain on unseen sites is not tested",
        ),
    ),
)
