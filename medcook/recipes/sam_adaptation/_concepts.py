"""Concepts, exemplars, boxes and priors as prompts: what medical-sam3 and lesion-sam3 share.

A concept is a class name that the model learns as what it adds to the mask token, in place of SAM 3's text encoder; an
exemplar is a token pooled from another image where the structure is marked; a prior is the mask of a neighbouring
slice, given as SAM's mask prompt. A kind of prompt names what is given, such as `concept` or `concept+prior`.
"""

from copy import deepcopy
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.data import IGNORE, Case
from medcook.errors import MedcookError
from medcook.methods import Batch, Moment
from medcook.sam.adapting import PromptedSam, fitted_in, with_boxes
from medcook.sam.asking import loose_boxes
from medcook.sam.model import DENSE, FINE, SIZE, Embedding, SmallSam, masks_of
from medcook.sam.predictor import restore
from medcook.sam.pretraining import mask_loss

GIVEN = ("concept", "box", "exemplar", "prior")


class Concepts(nn.Module):
    """What a name adds to SAM's mask token: (classes, hidden), nothing for class 0, which stands for unnamed.

    Ten times the weights, which are small beside SAM's tokens and learn as slowly as everything else.
    """

    def __init__(self, classes: int, hidden: int):
        super().__init__()
        self.table = nn.Parameter(0.03 * torch.randn(classes - 1, hidden))

    def forward(self) -> Tensor:
        return F.pad(10 * self.table, (0, 0, 1, 0))


class Asked(NamedTuple):
    """Structures asked for: masks (M, SIZE, SIZE) bool, values (M,), owner (M,) whose image each belongs to, priors
    (M, DENSE, DENSE) from -1 to 1, 0 where there is none."""

    masks: Tensor
    values: Tensor
    owner: Tensor
    priors: Tensor

    def at(self, index: Tensor) -> "Asked":
        return Asked(*(part[index] for part in self))


@dataclass
class ConceptSam(PromptedSam):
    """The small SAM learns what its concepts mean.

    objects every structure of an image is asked for, up to so many
    tuned   which parts learn besides concepts and the exemplars' projection
    kinds   of prompts, one drawn for each structure in training; `asked` the kind that is scored
    """

    rate: float = 1e-3
    objects: int = 3
    tuned: tuple[str, ...] = ("encoder", "prompts", "decoder")
    kinds: tuple[str, ...] = ("concept",)
    asked: str = "concept"

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        if unknown := {part for kind in (*self.kinds, self.asked) for part in kind.split("+")} - set(GIVEN):
            raise MedcookError(f"Nobody can prompt with {unknown.pop()!r}.", f"There is: {', '.join(GIVEN)}.")
        model = super().build(inputs, classes, dims)["model"]
        hidden = model.sam.config.mask_decoder_config.hidden_size
        model.concepts = Concepts(classes, hidden)
        model.exemplars = nn.Linear(hidden, hidden)
        return nn.ModuleDict({"model": model, "average": deepcopy(model).requires_grad_(False)})

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        model = nets["model"]
        asked = ask(labelled, model.classes, self.objects)
        given = drawn(self.kinds, len(asked.masks))
        donors = donor_of(asked)
        there = asked.masks.flatten(1).any(1)
        possible = (there | ~given["box"]) & ((donors >= 0) | ~given["exemplar"])  # an absent structure has no box
        if not possible.any():
            return 0.0 * sum(p.sum() for p in model.parameters() if p.requires_grad)
        image = model.embed(fitted_in(labelled.images))
        marks = pooled(image.at(asked.owner), asked.masks)[donors.clamp_min(0)]
        rows = possible.nonzero()[:, 0]
        asked, given, marks = asked.at(rows), {name: part[rows] for name, part in given.items()}, marks[rows]
        embedding = image.at(asked.owner)
        boxes = torch.where(given["box"][:, None], loose_boxes(asked.masks, torch.default_generator), torch.nan)
        priors = asked.priors * given["prior"][:, None, None]
        tokens, named = shown(model, marks, given["exemplar"]), asked.values * given["concept"]
        low, fine = answers(model, embedding, boxes, priors, tokens, named)
        truth = [F.adaptive_avg_pool2d(asked.masks[:, None].float(), side)[:, 0] for side in (DENSE, FINE)]
        return sum(mask_loss(logits.float(), true).mean() for logits, true in zip((low, fine), truth, strict=True))

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """(B, classes, *size): the answers to every concept; the background is what no concept claims."""
        model = nets["average"]
        embedding = model.embed(fitted_in(images))
        claims = torch.stack(
            [
                given_logits(model, embedding, torch.full((len(images),), value), tuple(images.shape[2:])).sigmoid()
                for value in range(1, model.classes)
            ],
            dim=1,
        )
        everything = torch.cat([1 - claims.amax(1, keepdim=True), claims], dim=1)
        return everything / everything.sum(1, keepdim=True)


def ask(batch: Batch, classes: int, objects: int) -> Asked:
    """`objects` random structures an image, also ones that it does not show; priors where neighbours are known."""
    masks, values, owner, priors = [], [], [], []
    for number, label in enumerate(batch.labels):
        for value in (torch.randperm(classes - 1)[:objects] + 1).tolist():
            masks.append(label == value)
            values.append(value)
            owner.append(number)
            neighbour = None if batch.raters is None else batch.raters[number][torch.randint(2, ()).item()]
            priors.append(torch.zeros(DENSE, DENSE) if neighbour is None else prior_of(neighbour, value))
    large = fitted_in(torch.stack(masks)[:, None].float())[:, 0] > 0.5
    return Asked(large, torch.tensor(values), torch.tensor(owner), torch.stack(priors))


def prior_of(neighbour: Tensor, value: int) -> Tensor:
    """(DENSE, DENSE) from -1 to 1: where a neighbouring slice (H, W) shows a structure; 0 where there is no slice."""
    if (neighbour == IGNORE).any():  # also where augmentation moved a border in
        return torch.zeros(DENSE, DENSE)
    large = fitted_in((neighbour == value)[None, None].float())
    return F.adaptive_avg_pool2d(large, DENSE)[0, 0] * 2 - 1


def drawn(kinds: tuple[str, ...], count: int) -> dict[str, Tensor]:
    """{what: (count,) bool}: what is given to each of `count` structures, of a kind drawn for each."""
    choice = torch.randint(len(kinds), (count,)).tolist()
    return {what: torch.tensor([what in kinds[k].split("+") for k in choice], dtype=torch.bool) for what in GIVEN}


def donor_of(asked: Asked) -> Tensor:
    """(M,) the row whose image serves as exemplar: same structure, another image where there is one; -1 for none."""
    there = asked.masks.flatten(1).any(1)
    same = (asked.values[:, None] == asked.values) & there
    other = same & (asked.owner[:, None] != asked.owner)
    chosen = torch.where(other.any(1, keepdim=True), other, same)
    return torch.where(chosen.any(1), chosen.float().argmax(1), -1)


def pooled(embedding: Embedding, masks: Tensor) -> Tensor:
    """(M, hidden) mean of the coarse features inside masks (M, SIZE, SIZE), one embedding a mask."""
    weight = F.adaptive_avg_pool2d(masks[:, None].float(), embedding.coarse.shape[-1])
    return (embedding.coarse.float() * weight).sum((2, 3)) / weight.sum((2, 3)).clamp_min(1e-6)


def shown(model: SmallSam, marks: Tensor, given: Tensor) -> Tensor:
    """(M, 1, hidden) tokens of exemplars where these are given (M,), else SAM's token for nothing."""
    nothing = model.sam.prompt_encoder.not_a_point_embed.weight
    return torch.where(given[:, None], model.exemplars(marks).float(), nothing)[:, None]


def answers(
    model: SmallSam, embedding: Embedding, boxes: Tensor, priors: Tensor, tokens: Tensor, named: Tensor
) -> tuple[Tensor, Tensor]:
    """SAM's single mask: logits (M, DENSE, DENSE) and (M, FINE, FINE).

    boxes (M, 4), NaN for none; priors (M, DENSE, DENSE); further tokens (M, N, hidden); named (M,) values, 0 for
    unnamed. The mask token is there once for each name, and each row's own gives its mask.
    """
    prompts = with_boxes(boxes)
    prompts.dense[:, 0] = priors
    embedding, sparse = model.prompted(embedding, prompts)
    decoder = model.sam.mask_decoder
    queries = decoder.mask_tokens.weight[:1] + model.concepts()
    heads = [decoder.output_hypernetworks_mlps[0]] * len(queries)
    every, _ = masks_of(model.sam, embedding, torch.cat([sparse, tokens[:, None]], dim=2), queries, heads)
    low = every[torch.arange(len(named)), named][:, None]
    return low[:, 0], model.refine(low, embedding)[:, 0]


def given_logits(
    model: SmallSam,
    embedding: Embedding,
    values: Tensor,
    shape: tuple[int, int],
    *,
    concept: bool = True,
    boxes: Tensor | None = None,
    marks: Tensor | None = None,
    priors: Tensor | None = None,
) -> Tensor:
    """(M, *shape) logits of structures `values` (M,) from what is given; boxes in input pixels."""
    count = len(values)
    boxes = torch.full((count, 4), torch.nan) if boxes is None else boxes
    priors = torch.zeros(count, DENSE, DENSE) if priors is None else priors
    known = torch.full((count,), marks is not None)
    marks = torch.zeros(count, model.exemplars.in_features) if marks is None else marks
    named = values if concept else torch.zeros_like(values)
    _, fine = answers(model, embedding, boxes, priors, shown(model, marks, known), named)
    return restore(fine[:, None], shape)[:, 0]


def network_of(fitted) -> SmallSam:
    """The moving average after the last step."""
    fitted.nets.load_state_dict(fitted.weights["last"])
    return fitted.nets["average"].eval()


@torch.no_grad()
def embedded(model: SmallSam, images: Tensor) -> Embedding:
    """The embedding of all slices (N, 1, H, W) of a case, sixteen at a time."""
    parts = [model.embed(fitted_in(part)) for part in images.split(16)]
    return Embedding(*(torch.cat(each) for each in zip(*parts, strict=True)))


def tight_boxes(masks: Tensor) -> Tensor:
    """(M, 4) boxes in input pixels that hold masks (M, H, W); NaN for empty ones."""
    height, width = masks.shape[1:]
    rows, columns = masks.any(2), masks.any(1)
    left, top = columns.float().argmax(1), rows.float().argmax(1)
    right, bottom = width - columns.flip(1).float().argmax(1), height - rows.flip(1).float().argmax(1)
    boxes = torch.stack([left, top, right, bottom], dim=1).float() * (SIZE / max(height, width))
    return torch.where(masks.flatten(1).any(1, keepdim=True), boxes, torch.nan)


def volume_of(fitted, case: Case) -> tuple[Tensor, Tensor]:
    """Images (N, 1, H, W) and labels (N, H, W) of a case, as the network sees it."""
    return fitted.task.preparation.images(case), fitted.task.preparation.labels(case)


def volume_dice(guess: Tensor, truth: Tensor) -> float:
    """Dice of two bool volumes, one of which shows the structure."""
    return float(2 * (guess & truth).sum() / (guess.sum() + truth.sum()))
