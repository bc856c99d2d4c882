"""SAM 2 in robotic surgery: an empirical evaluation of robustness and generalisation in surgical video segmentation
(Yu, Wang, Dong, Xu, Islam, Wang, Bai and Ren, 2024; arXiv 2408.04593).

A study of a promptable model in a domain that it was not trained on: a point or a box in each image, or a point in the
first frame of a video alone, and the same after corruption of several strengths, against SAM, which knows no memory,
and against specialists, which were trained on what is asked for and need no prompt.

None of this is done with Meta's weights, which are not at hand. Here `sam` and `sam 2` are one small network (see
`_tracker`), trained alike and as long on regions that nobody drew, as a watershed finds them in the volumes of training
patients; the first without a memory, the second with one. Asked for are structures that neither has ever been shown.

What was looked at on 8 patients of val, with a seed that is not scored: a box in each frame had a Dice of 0.77 with
both, the specialist 0.76; a point 0.28 with `sam 2` and 0.44 with `sam`; and a box in the first frame 0.06 and 0.30:
the memory loses what was never seen. On the way there the promptable models learnt on flights through hearts, where
points came to nothing, and frames that are prompted heard their banks, too.
"""

from copy import deepcopy
from dataclasses import dataclass, field
from zlib import crc32

import numpy as np
import torch
from torch import Tensor, nn

from medcook import evaluation
from medcook.data import Case
from medcook.data.transforms import Augment
from medcook.methods import Batch, Method, Moment
from medcook.preparation import zscore
from medcook.recipes.findings._corruptions import STRENGTHS, corrupt
from medcook.recipes.language._slice_memory import Memory, small
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.recipes.video import _following as following
from medcook.recipes.video import _tracker
from medcook.recipes.video._flights import disturbed
from medcook.recipes.video._prompted import KINDS, Kind, shown, shown_at_random
from medcook.recipes.video._settings import AUGMENT, UNSEEN, UNSEEN_BUDGET, UNSEEN_QUICK, scales
from medcook.recipes.video._specialist import Asked, Specialist
from medcook.recipes.video._tracker import LONG, NOW, RECENT, Answer, Tracker, answer_loss, at
from medcook.sam.zero_shot import SMALLEST
from medcook.sampling import trained

CORRUPTIONS = ("gaussian noise", "shot noise", "impulse noise", "blur")
"""Noise as in `findings`; blur as on flights, since that of `findings` is not felt in frames of 32 pixels a side.
Brightness and contrast are normalised away."""
SEVERITIES = (1, 3, 5)
"""Of five."""


def corrupted(frames: Tensor, kind: str, severity: int, name: str) -> Tensor:
    """Frames (T, H, W), all corrupted alike, with zero mean and unit variance again; severity 0 leaves them."""
    if not severity:
        return frames
    rng = np.random.default_rng(crc32(f"{kind} {severity} in {name}".encode()))
    change, strength = (disturbed, severity / 5) if kind == "blur" else (corrupt, STRENGTHS[kind][severity - 1])
    low, high = frames.min(), frames.max()
    scaled = ((frames - low) / (high - low).clamp_min(1e-6)).double().numpy()
    found = [change(frame, kind, strength, rng) for frame in scaled]
    return zscore(torch.from_numpy(np.stack(found)).float())


@dataclass(frozen=True)
class Question:
    """A structure is shown by prompts of a kind in each frame, or in the first one alone (`once`), at a severity."""

    kind: Kind
    once: bool = False
    severity: int = 0

    @property
    def column(self) -> str:
        return f"{'first_' * self.once}{self.kind}{f'_{self.severity}' * (self.severity > 0)}"


QUESTIONS = (
    *(Question(kind) for kind in KINDS),
    *(Question(kind, once=True) for kind in ("point", "box")),
    *(Question("point", severity=severity) for severity in SEVERITIES),
    *(Question("box", severity=severity) for severity in SEVERITIES),
    *(Question("box", once=True, severity=severity) for severity in SEVERITIES),
)


def believed(found: Answer, prompts: Tensor) -> Tensor:
    """Masks (N, H, W) bool. Where a prompt (N, 3, H, W) shows it, nobody doubts that the structure is there."""
    prompted = prompts.flatten(1).any(1)
    return (found.logits > 0) & ((found.presence > 0) | prompted)[:, None, None]


def unless_prompted(bank: Memory, prompts: Tensor) -> Memory:
    """The bank, empty for frames that are prompted themselves, as in SAM 2."""
    return bank._replace(there=bank.there & ~prompts.flatten(1).any(1)[:, None])


@dataclass
class Prompted(Method):
    """A promptable model of frames; with a memory, it also answers where it was prompted once.

    own  share of the masks in training banks that are the network's own answers to prompts
    """

    channels: tuple[int, ...] = (12, 24, 48)
    rate: float = 3e-3
    augmentation: Augment = field(default_factory=lambda: AUGMENT)
    memory: bool = True
    own: float = 0.5

    axes = 3
    trial = UNSEEN_QUICK

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        model = Tracker(inputs, self.channels, self.memory)
        model.classes = classes
        return nn.ModuleDict({"model": model, "average": deepcopy(model).requires_grad_(False)})

    def augment(self, batch: Batch, rng: torch.Generator) -> Batch:
        return following.augmented(batch, self.augmentation, rng)

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        """All frames of clips are answered as images are; then some again, by another prompt, or, with a memory, half
        of the flights by their banks alone."""
        model, count = nets["model"], len(labelled.images)
        truth = following.truths(labelled.labels, following.asked_values(labelled.labels, model.classes))
        clip = _tracker.drawn_clip((truth == 1).flatten(2).any(2)).every()
        frames, truth = following.taken(labelled.images.movedim(2, 1), clip), following.taken(truth, clip)
        maps, every = model.encode(frames.flatten(0, 1)[:, :, None]), truth.flatten(0, 1)
        prompts = shown_at_random(every == 1, truth.shape[1])
        alone = model.answer(maps, prompts=prompts)
        answered = torch.arange(len(every)).view(count, -1)[:, -NOW:].flatten()
        asked, bank = shown_at_random(every[answered] == 1, NOW), None
        if self.memory:
            own = torch.rand(*truth.shape[:2], 1, 1) < self.own
            masks = torch.where(own, believed(alone, prompts).unflatten(0, truth.shape[:2]), truth == 1).float()
            asked = asked * (torch.rand(count, 1, 1, 1) < 0.5).repeat_interleave(NOW, 0)
            bank = unless_prompted(_tracker.bank_of(model.looks(maps).unflatten(0, (count, -1)), masks), asked)
        again = model.answer(at(maps, answered), bank, asked)
        return answer_loss(alone, every) + answer_loss(again, every[answered])

    @torch.no_grad()
    def answers(self, nets: nn.ModuleDict, flights: Tensor, asked: list[Asked]) -> Tensor:
        """Masks (R, T, H, W) bool of R questions about flights (V, T, H, W)."""
        net, of = nets["average"], [one.flight for one in asked]
        maps = [torch.stack(each) for each in zip(*(net.encode(one[:, None, None]) for one in flights), strict=True)]
        looks, masks = maps[-1][:, :, :, 0].float()[of], torch.zeros(len(of), *flights.shape[1:], dtype=torch.bool)
        prompts, firsts = torch.stack([one.prompts for one in asked]), torch.tensor([one.first for one in asked])
        for number in range(masks.shape[1]):
            bank = self.bank(looks, masks, number, firsts) if self.memory else None
            bank = bank and unless_prompted(bank, prompts[:, number])
            found = net.answer([each[of, number] for each in maps], bank, prompts[:, number])
            masks[:, number] = believed(found, prompts[:, number]) & (firsts <= number)[:, None, None]
        return masks

    @staticmethod
    def bank(looks: Tensor, masks: Tensor, number: int, firsts: Tensor) -> Memory:
        """The banks of frame `number`: the first frame, and recent ones after it."""
        recent = torch.arange(number - 1, number - 1 - RECENT, -1).expand(len(firsts), -1)
        places = torch.cat([firsts[:, None], recent, recent.new_full((len(firsts), LONG), -1)], 1)
        there = (places >= firsts[:, None]) & (places < number)
        there[:, 1:] &= places[:, 1:] > firsts[:, None]
        rows, places = torch.arange(len(firsts))[:, None], places.clamp_min(0)
        return Memory(looks[rows, places], small(masks[rows, places], looks), there)

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """(B, classes, T, H, W) where nobody prompts: the answer to a box around each frame, taken as class 1."""
        net, (count, _, length, *size) = nets["average"], images.shape
        box = shown(torch.ones(1, *size, dtype=torch.bool), "box").expand(length, -1, -1, -1)
        found = [
            following.claimed(net.answer(net.encode(one.transpose(0, 1)[:, :, None]), prompts=box)) for one in images
        ]
        others = images.new_zeros(count, net.classes - 2, length, *size)
        return following.one_of_all(torch.cat([torch.stack(found)[:, None], others], 1))


def prompts_of(truth: Tensor, first: int, question: Question, memory: bool) -> Tensor:
    """(T, 3, H, W) for a structure (T, H, W) bool. A model that has no memory takes the prompt of the first frame
    along, unchanged, where another one is shown it once."""
    if not question.once:
        return shown(truth, question.kind)
    only = shown(truth[[first]], question.kind)
    prompts = torch.zeros(len(truth), *only.shape[1:])
    prompts[first : first + 1 if memory else None] = only
    return prompts


@torch.no_grad()
def prompted_rows(fitted, case: Case) -> list[dict]:
    """A row for each structure of each flight: Dice over the frames that show it, from the first large one on.

    point, points, box  prompts in each frame;   first_point, first_box: in that first frame alone
    point_1, point_3, point_5, ...  the same after corruption of a severity; the flight's name decides which kind
    change, box_change, first_change  mean over severities (of point, box, first_box), minus what it is without
    corrupted  mean over severities of first_box
    """
    nets, task, rows = trained(fitted), fitted.task, []
    for number, flight in enumerate(task.preparation.flights(case), 1):
        name = f"{case.case_id} {number}"
        kind = CORRUPTIONS[crc32(name.encode()) % len(CORRUPTIONS)]
        flights = torch.stack([corrupted(flight.frames, kind, severity, name) for severity in (0, *SEVERITIES)])
        for value, structure in task.structures.items():
            truth = flight.labels == value
            large = (truth.flatten(1).sum(1) >= SMALLEST).nonzero().flatten().tolist()
            if large:
                values = answered(fitted.method, nets, flights, truth, value, large[0])
                rows.append(evaluation.row(case, f"{structure}, flight {number}", corruption=kind, **values))
    return rows


def answered(
    method: Prompted | Specialist, nets: nn.ModuleDict, flights: Tensor, truth: Tensor, value: int, first: int
):
    """The numbers of a row of `prompted_rows`."""
    levels, memory = (0, *SEVERITIES), getattr(method, "memory", False)
    asked = [
        Asked(levels.index(one.severity), value, first, prompts_of(truth, first, one, memory)) for one in QUESTIONS
    ]
    frames = [k for k in range(first, len(truth)) if truth[k].any()]
    values = {}
    for question, masks in zip(QUESTIONS, method.answers(nets, flights, asked), strict=True):
        overlap = _tracker.overlaps(masks[frames], truth[frames])
        values[question.column] = float((2 * overlap / (1 + overlap)).mean())
    for name, column in (("change", "point"), ("box_change", "box"), ("first_change", "first_box")):
        values[name] = float(np.mean([values[f"{column}_{severity}"] for severity in SEVERITIES])) - values[column]
    return values | {"corrupted": values["first_change"] + values["first_box"]}


recipe = Recipe(
    paper="sam2-robotic",
    title="SAM 2 in robotic surgery: prompts, memory and corruption where nothing was learnt",
    claim="On structures that it has never seen, a promptable model with a box in each frame has a higher Dice than a "
    "specialist that was trained on them and needs no prompt.",
    arms={
        "sam": Arm(Prompted(memory=False)),
        "sam 2": Arm(Prompted()),
        "specialist": Arm(Specialist(), {"seen": True}),
    },
    compare=("sam 2", "specialist"),
    metric="box",
    score=prompted_rows,
    scales=scales(UNSEEN_QUICK, UNSEEN, budget=UNSEEN_BUDGET),
    source="abstract and introduction, arXiv 2408.04593",
    components=(
        Component(
            "point and box prompts",
            "implemented",
            "a point deep in the structure, three points in it, or the tight box, drawn as for the book's small SAM; "
            "columns `point`, `points`, `box`. Three points are not in the paper",
        ),
        Component(
            "prompts in each image, or in the first frame alone",
            "implemented",
            "the first is a frame that shows at least 30 pixels. Without a memory its prompt is taken along to the "
            "other frames, unchanged. A frame that is prompted hears of no other, as in SAM 2. There the first frame's "
            "prompt is a point; here also a box, since a point says little to so small a network",
        ),
        Component(
            "zero-shot segmentation",
            "implemented",
            "both promptable models learn from regions of a watershed, of 20, 40 or 80 in a volume, in flights through "
            "training patients; no label of anatomy is used. They are asked for both parts of the hippocampus",
        ),
        Component(
            "corruption",
            "implemented",
            "four kinds, one for each flight, at severities 1, 3 and 5 of five, of images between 0 and 1; all frames "
            "of a flight alike. There more kinds, of ImageNet-C. Whether `sam 2` loses less than `sam` is told by the "
            "columns `change`, `box_change` and `first_change`",
        ),
        Component(
            "state of the art without prompts",
            "implemented",
            "a U-Net that was trained on flights through hippocampi, with as many frames in a step",
        ),
        Component(
            "SAM and SAM 2",
            "simplified",
            "not Meta's models or weights: one small network, trained here in 300 steps, with and without a memory. So "
            "it tells of the memory alone, not of a better encoder or of more data",
        ),
        Component("EndoVis 2017 and 2018", "simplified", "flights of 48 frames through real volumes; no instruments"),
        Component("inference speed", "absent", "both models have one encoder here"),
    ),
)
