"""Pre-screening of frames, and labels of several observers (Chalcroft et al., ASMUS 2021).

Many frames of an ultrasound sweep show no prostate, and a segmentation network finds one in some of them all the same.
A classifier looks at each frame first; where it sees no target, nothing is segmented. Observers disagree, so that
both networks can learn from the label of a random observer, from the consensus, or from the mean of all. With s the
classifier's probability for a frame, q the segmentation's and t a threshold:

    answer   q where s >= t, background where s < t
    random   the label of one observer r, drawn anew at every step      mean   1/R sum_r of the labels
    vote     argmax of the mean                                         mixed  vote or random, drawn anew at every step

Here a frame is a window of a microscopy image with ten annotations (five experts, two tools), with or without some of
the cell in it. Two of the ten, both of one expert, are the gold standard itself; all arms learn from them alike.
The gate opens at t = 1/2, where a calibrated classifier makes the fewest errors, so that nothing is tuned. What
screening costs and brings is compared with a gate that asks no classifier but the size of what was segmented.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.cohorts import RaterTask
from medcook.data import IGNORE, Case
from medcook.data.transforms import Augment
from medcook.evaluation import row
from medcook.methods import Batch, Method, Moment, follow
from medcook.networks.encoder import Encoder
from medcook.preparation import Preparation, preparation_for
from medcook.recipes.recipe import Arm, Component, Recipe, Scale
from medcook.sampling import trained
from medcook.tasks import Budget

LEAST = 0.01
"""Share of a frame. With less of the target in it, whether there is a target is a matter of degree; not scored."""


@dataclass(frozen=True)
class Frames(Preparation):
    """Windows of side `frame`, a `stride` apart, take the place of the image; predictions are put together again."""

    frame: int = 64
    stride: int = 32

    def images(self, case: Case) -> Tensor:
        """(N, C, frame, frame); N is the number of frames of all slices."""
        return self.cut(super().images(case))

    def labels(self, case: Case, values: np.ndarray | None = None) -> Tensor:
        """(N, frame, frame) uint8."""
        return self.cut(super().labels(case, values)[:, None].float())[:, 0].to(torch.uint8)

    def restore(self, probabilities: Tensor, case: Case) -> Tensor:
        """(N, classes, frame, frame) to (classes, *spatial): the mean where frames overlap."""
        return super().restore(self.mosaic(probabilities), case)

    def cut(self, images: Tensor) -> Tensor:
        """(slices, C, *size) to (slices * frames, C, frame, frame), row by row."""
        columns = F.unfold(images, self.frame, stride=self.stride).transpose(1, 2)
        return columns.reshape(-1, images.shape[1], self.frame, self.frame)

    def mosaic(self, frames: Tensor) -> Tensor:
        """The inverse of `cut`: (slices, C, *size)."""
        count = int(np.prod([(size - self.frame) // self.stride + 1 for size in self.size]))
        columns = frames.reshape(-1, count, frames[0].numel()).transpose(1, 2)
        whole, times = (
            F.fold(values, self.size, self.frame, stride=self.stride) for values in (columns, torch.ones_like(columns))
        )
        return whole / times


@dataclass(frozen=True)
class FrameTask(RaterTask):
    """Frames of images with several raters.

    window  (grid, long side) that an image has before it is cut, see `Preparation`; frames overlap by half
    """

    window: tuple[tuple[int, int], int | None] = ((96, 128), 128)
    frame: int = 32

    @cached_property
    def preparation(self) -> Frames:
        base = preparation_for(self.dataset)
        return Frames(*self.window, base.centre, base.smooth, frame=self.frame, stride=self.frame // 2)


@dataclass
class Prescreen(Method):
    """A segmentation network, behind a gate.

    gate    what opens it: a `classifier` of the whole frame, from `threshold` on; the `area` that the segmentation
            itself finds, from 1% of the frame on; `none`: it is always open
    labels  what is learnt from raters: one at `random`, their `vote`, `mixed` (either, at random), their `mean`
    """

    channels: tuple[int, ...] = (8, 16, 32, 64, 64)
    gate: Literal["classifier", "area", "none"] = "classifier"
    labels: Literal["random", "vote", "mixed", "mean"] = "random"
    threshold: float = 0.5
    augmentation: Augment = field(default_factory=lambda: Augment(rotate=180, flip=True))

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        nets = super().build(inputs, classes, dims)
        if self.gate == "classifier":
            for name in ("screen", "average screen"):
                encoder = Encoder(inputs=inputs, channels=self.channels[:-1], dims=dims)
                nets[name] = nn.Sequential(encoder, nn.Dropout(0.2), nn.Linear(self.channels[-2], 1))
            nets["average screen"].load_state_dict(nets["screen"].state_dict())
            nets["average screen"].requires_grad_(False)
        return nets

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        logits = nets["model"](labelled.images).float()
        raters = labelled.labels[:, None] if labelled.raters is None else labelled.raters
        target = sample(raters, logits.shape[1], self.labels)
        loss = soft_loss(logits, target)
        if self.gate == "classifier":
            seen = nets["screen"](labelled.images)[:, 0].float()
            loss = loss + F.binary_cross_entropy_with_logits(seen, holds_target(target))
        return loss

    def after_step(self, nets: nn.ModuleDict, now: Moment) -> None:
        super().after_step(nets, now)
        if self.gate == "classifier":
            follow(nets["average screen"], nets["screen"], now.decay(self.average))

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """Class probabilities (B, classes, *size), behind the gate."""
        probabilities = super().predict(nets, images)
        if self.gate == "none":
            return probabilities
        if self.gate == "area":
            return screened(probabilities, found_share(probabilities) >= LEAST)
        return screened(probabilities, nets["average screen"](images)[:, 0].float().sigmoid() >= self.threshold)


def screened(probabilities: Tensor, is_open: Tensor) -> Tensor:
    """(B, classes, *size) with certain background in every frame whose gate (B,) bool is shut."""
    nothing = torch.zeros_like(probabilities)
    nothing[:, 0] = 1
    return torch.where(is_open.view(-1, *[1] * (probabilities.ndim - 1)), probabilities, nothing)


def found_share(probabilities: Tensor) -> Tensor:
    """(B,) share of each frame where some structure is the likeliest class."""
    return (probabilities.argmax(1) > 0).flatten(1).float().mean(1)


def sample(raters: Tensor, classes: int, how: str) -> Tensor:
    """Class probabilities (B, classes, *size) to learn from, of raters (B, R, *size) of whom some may be missing."""
    known = ~(raters == IGNORE).flatten(2).any(2)
    known |= ~known.any(1, keepdim=True)
    everyone = F.one_hot(torch.where(raters == IGNORE, 0, raters).long(), classes).movedim(-1, 2).float()
    one = everyone[torch.arange(len(raters)), known.float().multinomial(1)[:, 0]]
    if how == "random":
        return one
    share = known.float() / known.sum(1, keepdim=True)
    mean = (everyone * share.view(*share.shape, *[1] * (everyone.ndim - 2))).sum(1)
    if how == "mean":
        return mean
    vote = F.one_hot(mean.argmax(1), classes).movedim(-1, 1).float()
    if how == "vote":
        return vote
    heads = torch.rand(len(raters), device=one.device) < 0.5
    return torch.where(heads.view(-1, *[1] * (vote.ndim - 1)), vote, one)


def holds_target(target: Tensor) -> Tensor:
    """(B,) 0 to 1, how far a frame holds the target: 1 from `LEAST` of it on, in proportion below."""
    return ((1 - target[:, 0]).flatten(1).mean(1) / LEAST).clamp(0, 1)


def soft_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy and Dice as in `medcook.losses`, of labels that are probabilities (B, classes, *size)."""
    cross_entropy = -(target * logits.log_softmax(1)).sum(1).mean()
    soft, truth = logits.softmax(1)[:, 1:], target[:, 1:]
    axes = (0, *range(2, logits.ndim))
    overlap, size = (soft * truth).sum(axes), (soft + truth).sum(axes)
    return cross_entropy + 1 - ((2 * overlap + 1) / (size + 1)).mean()


@torch.no_grad()
def frame_rows(fitted, case: Case) -> list[dict]:
    """Shares of a case's frames, and Dice of those with a target that are segmented; on the network's grid.

    frame_error    something is segmented in a frame without the target, or nothing in one with it
    false_frames   the former among frames without, missed_frames the latter among frames with the target
    """
    nets, preparation = trained(fitted), fitted.task.preparation
    images, truth = preparation.images(case), preparation.labels(case) > 0
    share = truth.flatten(1).float().mean(1)
    scored = (share == 0) | (share >= LEAST)
    answer, truth = fitted.method.predict(nets, images[scored]).argmax(1) > 0, truth[scored]
    found, present = (mask.flatten(1).any(1) for mask in (answer, truth))
    overlap, size = (answer & truth).flatten(1).sum(1), answer.flatten(1).sum(1) + truth.flatten(1).sum(1)
    values = {
        "frame_error": mean(found != present),
        "false_frames": mean(found[~present]),
        "missed_frames": mean(~found[present]),
        "dice": mean((2 * overlap / size)[found & present]),
    }
    return [row(case, "frames", **values)]


def mean(values: Tensor) -> float:
    return float(values.float().mean())


recipe = Recipe(
    paper="ius-prescreen",
    title="A classifier screens frames before they are segmented",
    claim="Screening frames before segmenting them lowers the share of frames with false detections or misses.",
    arms={
        "segmentation alone": Arm(Prescreen(gate="none")),
        "pre-screened": Arm(Prescreen()),
        "smallest area": Arm(Prescreen(gate="area")),
        "pre-screened, vote": Arm(Prescreen(labels="vote")),
        "pre-screened, mixed": Arm(Prescreen(labels="mixed")),
        "pre-screened, mean": Arm(Prescreen(labels="mean")),
    },
    compare=("pre-screened", "segmentation alone"),
    ablation=("pre-screened", "smallest area"),
    replicate="fold",
    metric="frame_error",
    score=frame_rows,
    scales={
        "quick": Scale(
            FrameTask("embedded", fold=0, keep=(("site", "island"),), window=((160, 160), None)),
            Budget(steps=60, checks=1),
            replicates=1,
            arms=("segmentation alone", "pre-screened", "smallest area"),
        ),
        "full": Scale(
            FrameTask("bubil", fold=0),
            Budget(steps=1000, checks=1),
            replicates=5,
            arms=("segmentation alone", "pre-screened", "smallest area"),
        ),
    },
    source="the definitions follow the official code, github.com/liamchalcroft/RectAngle",
    components=(
        Component(
            "pre-screening classifier",
            "simplified",
            "a network of its own, as in the paper; a small encoder from a random start for the pre-trained DenseNet. "
            "It learns from the sampled label, where the official code always takes the vote; frames with less than "
            "1% of target count in part (ours)",
        ),
        Component(
            "screening before segmentation",
            "implemented",
            "a frame that the classifier rejects has no segmentation; both networks are trained on all frames, as in "
            "the official code, which picks the threshold from a sweep where we keep 1/2",
        ),
        Component(
            "label sampling",
            "implemented",
            "random, vote and mean as in the official code; mixed is our reading of random sampling combined with "
            "consensus: a coin decides for each image and step",
        ),
        Component("ensemble of segmentation networks", "absent", "five networks would cost five times as much"),
        Component("negative frames", "implemented", "windows of real images with none of the target in them"),
    ),
)
