"""What recipes share that follow a structure through a flight: augmentation, what is asked for, and the score."""

import torch
import torch.nn.functional as F
from torch import Tensor

from medcook.data import IGNORE
from medcook.data.transforms import Augment
from medcook.language import shown_in
from medcook.methods import Batch
from medcook.recipes.video._tracker import Answer, overlaps, region_and_contour


def augmented(batch: Batch, augmentation: Augment, rng: torch.Generator) -> Batch:
    """Flights (B, C, T, H, W) and labels (B, T, H, W), of which all frames are changed alike."""
    frames = batch.images.flatten(1, 2)
    grid = augmentation.grid(frames, rng)
    moved = F.grid_sample(frames, grid, padding_mode="border", align_corners=False)
    labels = F.grid_sample(batch.labels.float(), grid, mode="nearest", align_corners=False).to(torch.uint8)
    return batch._replace(images=augmentation.intensity(moved, rng).view_as(batch.images), labels=labels)


def asked_values(labels: Tensor, classes: int) -> Tensor:
    """(B,) int64: a random structure of each flight's labels (B, T, H, W), by torch's own generator; any where there is
    none."""
    found = []
    for label in labels:
        there = shown_in(label) or tuple(range(1, classes))
        found.append(there[int(torch.randint(len(there), ()))])
    return torch.tensor(found)


def truths(labels: Tensor, values: Tensor) -> Tensor:
    """(B, T, H, W) uint8: 1 where labels have the flight's value (B,), 0 elsewhere, `IGNORE` where that is unknown."""
    masks = (labels == values.to(labels)[:, None, None, None]).to(torch.uint8)
    return masks.masked_fill(labels == IGNORE, IGNORE)


def taken(flights: Tensor, numbers: Tensor) -> Tensor:
    """Frames (B, F, ...) with these numbers (B, F) of flights (B, T, ...)."""
    return flights[torch.arange(len(flights))[:, None], numbers]


def repeated(names: tuple[str, ...], times: int) -> tuple[str, ...]:
    """Each of them so many times in a row."""
    return tuple(name for name in names for _ in range(times))


def joined(answers: list[Answer]) -> Answer:
    """The answers to frames, one after the other, as one."""
    return Answer(*(torch.cat(part) for part in zip(*answers, strict=True)))


def claimed(answers: Answer) -> Tensor:
    """(N, H, W): probabilities of masks, none above one half where the object is not believed to be there."""
    found = answers.logits.sigmoid()
    return torch.where((answers.presence > 0)[:, None, None], found, found.clamp_max(0.49))


def one_of_all(claims: Tensor) -> Tensor:
    """Class probabilities (B, 1 + S, ...) of claims (B, S, ...): background is what no structure claims."""
    everything = torch.cat([1 - claims.amax(1, keepdim=True), claims], dim=1)
    return everything / everything.sum(1, keepdim=True)


def followed(masks: Tensor, truth: Tensor) -> dict[str, float]:
    """How well a structure was followed: masks (T, H, W) bool, and the truth (T, H, W) bool.

    jf, j, f  means over all frames, see `region_and_contour`;   dice: over the frames that show it
    present   the share of frames in which it was rightly found to be there, or not
    """
    region, contour = region_and_contour(masks, truth)
    shown, found = truth.flatten(1).any(1), masks.flatten(1).any(1)
    overlap = overlaps(masks, truth)[shown]
    values = {"j": region.mean(), "f": contour.mean(), "present": (shown == found).float().mean()}
    values |= {"jf": (values["j"] + values["f"]) / 2, "dice": (2 * overlap / (1 + overlap)).mean()}
    return {name: float(value) for name, value in values.items()}
