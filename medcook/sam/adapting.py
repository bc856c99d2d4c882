"""Adapting the small SAM to a task: what the recipes of chapter 03 share.

Two ways to use it. `AdaptedSam` asks nothing: a mask token for each class, as in SAMed (Zhang and Liu, 2023), and all
classes are segmented at once. `PromptedSam` goes on answering prompts, drawn from the labels while it learns and from
the truth when it is scored.
"""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.data import Case
from medcook.errors import MedcookError
from medcook.evaluation import row
from medcook.methods import Batch, Method, Moment
from medcook.sam.asking import draw_box, draw_points, first_prompts, loose_boxes, pick
from medcook.sam.checkpoints import load_small
from medcook.sam.model import DENSE, MOST_POINTS, PADDING, SIZE, Embedding, Prompts, SmallSam, masks_of
from medcook.sam.predictor import Predictor, restore
from medcook.sam.pretraining import answering_loss
from medcook.sam.prompts import Prompt, box_of
from medcook.sam.zero_shot import SLICES, SMALLEST, Target, dice, from_clicks

PARTS = {
    "encoder": ("sam.vision_encoder",),
    "prompts": ("sam.prompt_encoder", "drawn"),
    "decoder": ("sam.mask_decoder", "skips", "mixer", "refiner", "trust", "prior"),
}
"""The small SAM's parts, and the modules and weights that they are made of."""

APART = 0.5
"""Standard deviation of the noise on new class tokens."""


def start(pretrained: bool = True) -> SmallSam:
    """The small SAM: as it ships, or with random weights."""
    return load_small() if pretrained else SmallSam()


def tune(model: SmallSam, parts: tuple[str, ...]) -> SmallSam:
    """Let the named parts of `PARTS` learn, and nothing else."""
    if unknown := set(parts) - set(PARTS):
        raise MedcookError(f"The small SAM has no part {unknown.pop()!r}.", f"It has: {', '.join(PARTS)}.")
    learning = tuple(name for part in parts for name in PARTS[part])
    for name, weight in model.named_parameters():
        weight.requires_grad_(name.startswith(learning))
    model.sam.shared_image_embedding.requires_grad_(False)  # position codes, which the prompt encoder shares
    return model


def average_of(model: nn.Module) -> nn.Module:
    """A copy for the moving average. What is frozen never moves, so that both share it."""
    shared = {id(weight): weight for weight in model.parameters() if not weight.requires_grad}
    return deepcopy(model, shared).requires_grad_(False)


def fitted_in(images: Tensor) -> Tensor:
    """(B, C, H, W) to what the small SAM takes (B, 1, SIZE, SIZE): the first channel, its long side SIZE, padded."""
    height, width = images.shape[2:]
    factor = SIZE / max(height, width)
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    images = F.interpolate(images[:, :1], size, mode="bilinear", align_corners=False, antialias=factor < 1)
    return F.pad(images, (0, SIZE - size[1], 0, SIZE - size[0]), mode="replicate")


def no_prompts(count: int, device=None) -> Prompts:
    """`count` rows that ask nothing."""
    points, boxes = torch.zeros(count, 1, 2, device=device), torch.full((count, 4), torch.nan, device=device)
    dense = torch.zeros(count, 3, DENSE, DENSE, device=device)
    return Prompts(points, torch.full((count, 1), PADDING, device=device), boxes, dense)


class Segmenter(nn.Module):
    """The small SAM without prompts: images (B, C, H, W) to logits (B, classes, H, W), a mask token for each class.

    Tokens and their heads start as copies of SAM's single mask; noise of `APART` tells the tokens apart (with little
    noise they stay together for long: on validation patients of acdc 150 steps gave Dice 0.37 instead of 0.56).
    """

    def __init__(self, sam: SmallSam, classes: int):
        super().__init__()
        self.sam = sam
        decoder = sam.sam.mask_decoder
        single = decoder.mask_tokens.weight[:1].detach().repeat(classes, 1)
        self.tokens = nn.Parameter(single + APART * torch.randn_like(single))
        self.heads = nn.ModuleList(deepcopy(decoder.output_hypernetworks_mlps[0]) for _ in range(classes))
        self.heads.requires_grad_(True)

    def forward(self, images: Tensor) -> Tensor:
        return restore(self.masks(self.embed(fitted_in(images))), tuple(images.shape[2:]))

    def embed(self, images: Tensor) -> Embedding:
        """(B, 1, SIZE, SIZE) to their embedding; adaptations of the encoder come in here."""
        return self.sam.embed(images)

    def masks(self, embedding: Embedding, prompts: Prompts | None = None) -> Tensor:
        """(B, classes, FINE, FINE) logits."""
        coarse = embedding.coarse
        prompts = prompts or no_prompts(len(coarse), coarse.device)
        embedding, sparse = self.sam.prompted(embedding, prompts)
        logits, _ = masks_of(self.sam.sam, embedding, sparse, self.tokens, self.heads)
        return self.sam.refine(logits, embedding)


@dataclass
class AdaptedSam(Method):
    """Segments all classes at once with the small SAM and no prompts.

    pretrained  start from the book's weights, else from random ones
    tuned       which of `PARTS` learn, besides the class tokens, their heads and what `adapt` adds
    """

    rate: float = 2e-3
    pretrained: bool = True
    tuned: tuple[str, ...] = ("decoder",)

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        if dims != 2:
            raise MedcookError("The small SAM sees images, not volumes.", "Take a data set prepared as slices.")
        model = self.adapt(Segmenter(tune(start(self.pretrained), self.tuned), classes))
        return nn.ModuleDict({"model": model, "average": average_of(model)})

    def adapt(self, model: Segmenter) -> nn.Module:
        """The segmenter with what a paper adds to it; what is added learns. Does nothing here."""
        return model

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """As any method, a few images at a time: sixteen at once take 150 MB more."""
        return torch.cat([super(AdaptedSam, self).predict(nets, part) for part in images.split(4)])


@dataclass
class PromptedSam(Method):
    """The small SAM goes on learning to answer prompts, with SAM's losses and correcting clicks.

    objects     structures asked for in each image of a batch
    rounds      answers to a prompt: the first, and those after a correcting click
    prompts     `mixed` kinds as in pre-training, or always a `box`, or always one `click`
    """

    rate: float = 5e-4
    pretrained: bool = True
    tuned: tuple[str, ...] = ("prompts", "decoder")
    objects: int = 2
    rounds: int = 2
    prompts: str = "mixed"

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        if dims != 2:
            raise MedcookError("The small SAM sees images, not volumes.", "Take a data set prepared as slices.")
        model = self.adapt(tune(start(self.pretrained), self.tuned))
        model.classes = classes
        return nn.ModuleDict({"model": model, "average": average_of(model)})

    def adapt(self, model: SmallSam) -> SmallSam:
        """The model with what a paper adds to it; what is added learns. Does nothing here."""
        return model

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        masks, owner = asked_for(labelled.labels, self.objects)
        if not len(masks):  # a batch without a structure: nothing to ask for
            return 0.0 * sum(p.sum() for p in nets["model"].parameters() if p.requires_grad)
        prompts, single = self.ask(masks)
        embedding = nets["model"].embed(fitted_in(labelled.images)).at(owner)
        return answering_loss(nets["model"], embedding, masks, prompts, single, self.rounds, torch.default_generator)[0]

    def ask(self, masks: Tensor) -> tuple[Prompts, Tensor]:
        """Prompts for masks (M, SIZE, SIZE) bool, and (M,) bool: which are one click, which may mean several things."""
        if self.prompts == "mixed":
            return first_prompts(masks, torch.default_generator)
        single = torch.full((len(masks),), self.prompts == "click")
        return (click_prompts(masks) if self.prompts == "click" else box_prompts(masks)), single

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """(B, classes, *size) where nobody prompts: the answer to a box around the whole image, taken as class 1.

        A promptable model knows no classes; recipes score its answers to prompts with `prompted_rows`.
        """
        whole = torch.tensor([0.0, 0.0, SIZE, SIZE]).expand(len(images), 4)
        model = nets["average"]
        embedding = model.embed(fitted_in(images))
        logits, _ = model.decode(embedding, with_boxes(whole))
        answer = restore(model.refine(logits[:, :1], embedding), tuple(images.shape[2:])).sigmoid()
        others = answer.new_zeros(len(images), nets["model"].classes - 2, *images.shape[2:])
        return torch.cat([1 - answer, answer, others], dim=1)


def asked_for(labels: Tensor, objects: int, smallest: int = SMALLEST) -> tuple[Tensor, Tensor]:
    """Random structures of labels (B, H, W): their masks (M, SIZE, SIZE) bool, and (M,) whose image each belongs to.

    At most `objects` an image; none with fewer than `smallest` pixels.
    """
    masks, owner = [], []
    for number, label in enumerate(labels.cpu()):
        values, counts = label.unique(return_counts=True)
        there = values[(counts >= smallest) & (values > 0) & (values < 255)]
        for value in there[torch.randperm(len(there))[:objects]]:
            masks.append(label == value)
            owner.append(number)
    if not masks:
        return torch.zeros(0, SIZE, SIZE, dtype=torch.bool), torch.zeros(0, dtype=torch.long)
    return fitted_in(torch.stack(masks)[:, None].float())[:, 0] > 0.5, torch.tensor(owner)


def box_prompts(masks: Tensor) -> Prompts:
    """Loose boxes of masks (M, SIZE, SIZE)."""
    return with_boxes(loose_boxes(masks, torch.default_generator))


def with_boxes(boxes: Tensor) -> Prompts:
    """Prompts of boxes (M, 4) left, top, right, bottom in input pixels."""
    prompts = no_prompts(len(boxes))
    draw_box(prompts.dense, boxes)
    points, labels = torch.zeros(len(boxes), MOST_POINTS, 2), torch.full((len(boxes), MOST_POINTS), PADDING)
    return prompts._replace(points=points, labels=labels, boxes=boxes)


def click_prompts(masks: Tensor, count: int = 1) -> Prompts:
    """`count` random clicks inside each of masks (M, SIZE, SIZE)."""
    prompts = with_boxes(torch.full((len(masks), 4), torch.nan))
    prompts.points[:, :count], prompts.labels[:, :count] = pick(masks, count, torch.default_generator), 1
    draw_points(prompts.dense, prompts.points, prompts.labels)
    return prompts


def targets_of(task, case: Case) -> Iterator[Target]:
    """What is asked for in a case, as the network sees it: up to `SLICES` slices of each structure, spread over it."""
    images, labels = task.preparation.images(case)[:, 0].numpy(), task.preparation.labels(case).numpy()
    for value, name in task.structures.items():
        there = np.flatnonzero((labels == value).sum((1, 2)) >= SMALLEST)
        if len(there):
            chosen = sorted({round(q) for q in np.linspace(0, len(there) - 1, SLICES + 2)[1:-1]})
            for k in there[chosen]:
                yield Target(task.dataset, case.patient_id, name, images[k], labels[k] == value)


def predictor_of(fitted) -> Predictor:
    """What a fitted `PromptedSam` answers with: the moving average after the last step."""
    fitted.nets.load_state_dict(fitted.weights["last"])
    return Predictor(fitted.nets["average"].eval(), zoom=False)


def box_rows(fitted, case: Case) -> list[dict]:
    """Mean Dice over the slices of each structure of a case, from the tight box."""
    predictor = predictor_of(fitted)
    ask = lambda target: dice(predictor(target.image, Prompt(box=box_of(target.mask))).mask, target.mask)  # noqa: E731
    return _rows(fitted, case, lambda target: {"dice": ask(target)})


def prompted_rows(fitted, case: Case) -> list[dict]:
    """As `box_rows`, and from clicks: columns dice (from the box), click_1, click_3 and click_5."""
    predictor = predictor_of(fitted)
    mask = lambda image, prompt: predictor(image, prompt).mask  # noqa: E731

    def ask(target: Target) -> dict[str, float]:
        box = dice(mask(target.image, Prompt(box=box_of(target.mask))), target.mask)
        return {"dice": box} | {f"click_{k}": value for k, value in from_clicks(mask, target).items()}

    return _rows(fitted, case, ask)


def _rows(fitted, case: Case, ask) -> list[dict]:
    """A row a structure: the mean of what `ask(target)` measures over its slices."""
    found: dict[str, list[dict]] = {}
    for target in targets_of(fitted.task, case):
        found.setdefault(target.structure, []).append(ask(target))
    mean = lambda many: {name: float(np.mean([one[name] for one in many])) for name in many[0]}  # noqa: E731
    return [row(case, name, **mean(many)) for name, many in found.items()]
