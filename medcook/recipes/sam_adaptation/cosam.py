"""CoSAM: Self-Correcting SAM for Domain Generalization in 2D Medical Image Segmentation (Fu et al., 2024, 2411.10136).

Nobody prompts, and no generator of prompts is trusted. SAM first segments without prompts; an error decoder says where
that mask is likely to be wrong; the corrected mask is turned into points, a box and a mask, and SAM answers these. Its
answer is corrected again. On images of another site, where the first mask is worse than it ever was in training, the
correction is what is to carry over: so the error decoder also learns from true masks that were spoilt at random.

    m_0 = SAM(x)                                   no prompts
    e_t = error(x, m_t)                            probability that m_t is wrong at a pixel
    c_t = m_t (1 - e_t) + (1 - m_t) e_t            corrected
    m_{t+1} = SAM(x, points, box and mask of c_t)

    loss = loss(m_0) + mean over t of  BCE(e_t, wrong) + BCE + Dice(m_{t+1})
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook import metrics
from medcook.cohorts import CohortTask, meets
from medcook.data import Case
from medcook.data.case import IGNORE
from medcook.evaluation import row
from medcook.losses import find_loss
from medcook.methods import Batch, Moment, Supervised
from medcook.recipes.recipe import Arm, Component, Recipe, Scale
from medcook.sam.adapting import AdaptedSam, Segmenter, fitted_in, with_boxes
from medcook.sam.asking import draw_points
from medcook.sam.model import DENSE, FINE, SIZE, Embedding, Prompts
from medcook.sam.predictor import restore
from medcook.tasks import Budget

CELL = SIZE / DENSE
"""Input pixels to a pixel of the masks."""


class ErrorDecoder(nn.Module):
    """Embedding of images and probabilities m (M, 1, DENSE, DENSE) of a mask of each, to logits of m being wrong."""

    def __init__(self, hidden: int, width: int = 32):
        super().__init__()
        block = lambda inputs: nn.Sequential(nn.Conv2d(inputs, width, 3, padding=1), nn.GroupNorm(8, width), nn.GELU())  # noqa: E731
        self.coarse, self.eighth = block(hidden + 2), block(width + hidden // 4 + 2)
        self.quarter, self.last = block(width + hidden // 8 + 2), nn.Conv2d(width, 1, 1)
        nn.init.constant_(self.last.bias, -2.0)  # most pixels are right

    def forward(self, embedding: Embedding, mask: Tensor) -> Tensor:
        seen = torch.cat([2 * mask - 1, 4 * mask * (1 - mask)], dim=1)  # what it says, and how unsure it is
        x = None
        for block, features in zip(
            (self.coarse, self.eighth, self.quarter),
            (embedding.coarse, embedding.eighth, embedding.quarter),
            strict=True,
        ):
            side = features.shape[-1]
            known = [features, F.adaptive_avg_pool2d(seen, side)]
            if x is not None:
                known.append(F.interpolate(x, (side, side), mode="bilinear", align_corners=False))
            x = block(torch.cat(known, dim=1))
        return self.last(x)


def correct(mask: Tensor, error: Tensor) -> Tensor:
    """c = m (1 - e) + (1 - m) e, of probabilities of any shape: where an error is sure, the mask is turned over."""
    return mask * (1 - error) + (1 - mask) * error


def prompts_of(mask: Tensor, error: Tensor, count: int = 2) -> Prompts:
    """Points, box and mask that the corrected masks (M, 1, DENSE, DENSE) give, and where errors were corrected.

    Points are the `count` surest ones of each kind, sure of the mask and of an error there: foreground and background,
    as the corrected mask says. A mask with nothing in it has no box and no foreground points.
    """
    inside = mask[:, 0] > 0.5
    prompts = with_boxes(boxes_of(inside))
    for k, here in enumerate((inside, ~inside)):
        weight = ((mask[:, 0] - 0.5).abs() * (0.1 + error[:, 0]) * here).flatten(1)
        best = weight.topk(count, dim=1)
        there = best.values > 0
        row_, column = best.indices // DENSE, best.indices % DENSE
        points = (torch.stack([column, row_], dim=-1) + 0.5) * CELL
        where = slice(k * count, (k + 1) * count)
        prompts.points[:, where] = points.to(prompts.points.dtype)
        prompts.labels[:, where] = torch.where(there, 1 - k, prompts.labels[:, where])
    draw_points(prompts.dense, prompts.points, prompts.labels)
    prompts.dense[:, 0] = (mask[:, 0].clamp(1e-4, 1 - 1e-4).logit() / 8).clamp(-1, 1)
    return prompts


def boxes_of(inside: Tensor) -> Tensor:
    """Tight boxes (M, 4), in input pixels, of masks (M, DENSE, DENSE) bool; NaN where a mask is empty."""
    ends = []
    for axis in (1, 2):  # columns, then rows
        line = inside.any(axis)
        first, last = line.float().argmax(1), DENSE - line.flip(1).float().argmax(1)
        ends.append(torch.stack([first, last], dim=1) * CELL)
    boxes = torch.stack([ends[0][:, 0], ends[1][:, 0], ends[0][:, 1], ends[1][:, 1]], dim=1)
    return torch.where(inside.flatten(1).any(1)[:, None], boxes, torch.nan)


def spoilt(truth: Tensor) -> Tensor:
    """True masks (M, 1, S, S) in 0..1 with faults: moved, grown or shrunk, with holes and additions, blurred."""
    side = truth.shape[-1]
    found = torch.stack([one.roll(torch.randint(-2, 3, (2,)).tolist(), (1, 2)) for one in truth])
    size = int(torch.randint(0, 2, ())) * 2 + 1
    grown = (
        F.max_pool2d(found, size, 1, size // 2) if torch.rand(()) < 0.5 else -F.max_pool2d(-found, size, 1, size // 2)
    )
    rough = F.interpolate(torch.rand(len(truth), 1, 6, 6), (side, side), mode="bicubic", align_corners=False)
    turned = torch.where(rough.to(truth.device) > 0.75, 1 - grown, grown)
    return F.avg_pool2d(turned, 3, 1, 1).clamp(0.02, 0.98)


class SelfCorrecting(nn.Module):
    """A segmenter, the error decoder, and the loop between them.

    rounds   how often a mask is corrected and SAM answers; `errors` False: the mask prompts uncorrected
    """

    def __init__(self, first: Segmenter, rounds: int = 2, errors: bool = True):
        super().__init__()
        self.first, self.rounds, self.errors = first, rounds, errors
        self.error = ErrorDecoder(first.sam.sam.config.mask_decoder_config.hidden_size)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes, H, W): those of the last answer for each structure, 0 for the background."""
        embedding = self.first.embed(fitted_in(images))
        answers = self.loop(embedding, self.first.masks(embedding))[1]
        found = answers[-1].view(len(images), -1, FINE, FINE)
        logits = torch.cat([torch.zeros_like(found[:, :1]), found], dim=1)
        return restore(logits, tuple(images.shape[2:]))

    def loop(self, embedding: Embedding, logits: Tensor) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
        """From prompt-free logits (B, classes, FINE, FINE): each round's (mask, error logits) at DENSE and its answer.

        Masks are detached: a round learns to correct what it is given. M = B * structures rows, image by image.
        """
        structures = logits.shape[1] - 1
        owner = torch.arange(len(logits), device=logits.device).repeat_interleave(structures)
        mask = F.avg_pool2d(logits.detach().float().softmax(1)[:, 1:], FINE // DENSE).reshape(-1, 1, DENSE, DENSE)
        embedding, checked, answers = embedding.at(owner), [], []
        for _ in range(self.rounds):
            wrong = self.error(embedding, mask).float()
            checked.append((mask, wrong))
            error = wrong.detach().sigmoid() if self.errors else torch.zeros_like(mask)
            said, _ = self.first.sam.decode(embedding, prompts_of(correct(mask, error), error))
            answers.append(self.first.sam.refine(said[:, :1], embedding).float())
            mask = F.avg_pool2d(answers[-1].detach().sigmoid(), FINE // DENSE)
        return checked, answers


@dataclass
class CoSam(AdaptedSam):
    """The small SAM that corrects itself; see `SelfCorrecting` for `rounds` and `errors`."""

    tuned: tuple[str, ...] = ("prompts", "decoder")
    rounds: int = 2
    errors: bool = True

    def adapt(self, model: Segmenter) -> nn.Module:
        return SelfCorrecting(model, self.rounds, self.errors)

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        model, shape = nets["model"], tuple(labelled.labels.shape[1:])
        embedding = model.first.embed(fitted_in(labelled.images))
        coarse = model.first.masks(embedding)
        loss = find_loss(self.loss)(restore(coarse, shape), labelled.labels)
        truth, structures = structures_of(labelled.labels, coarse.shape[1])
        checked, answers = model.loop(embedding, coarse)
        if self.errors:
            small = F.adaptive_avg_pool2d(truth, DENSE)
            examples = spoilt((small > 0.5).float())
            rows = torch.arange(len(coarse), device=coarse.device).repeat_interleave(structures)
            checked.append((examples, model.error(embedding.at(rows), examples).float()))
            loss = loss + sum(error_loss(*pair, small) for pair in checked) / len(checked)
        return loss + sum(answer_loss(answer, truth) for answer in answers) / len(answers)


def structures_of(labels: Tensor, classes: int) -> tuple[Tensor, int]:
    """Labels (B, H, W) to the masks (B * structures, 1, FINE, FINE) in 0..1 of their structures; how many these are."""
    known = torch.where(labels == IGNORE, 0, labels).long()
    masks = F.one_hot(known, classes).movedim(-1, 1)[:, 1:].float().flatten(0, 1)[:, None]
    return F.adaptive_avg_pool2d(fitted_in(masks), FINE), classes - 1


def error_loss(mask: Tensor, wrong: Tensor, truth: Tensor) -> Tensor:
    """BCE of error logits against where the mask, cut at one half, differs from the truth; all (M, 1, S, S)."""
    return F.binary_cross_entropy_with_logits(wrong, ((mask > 0.5) != (truth > 0.5)).float())


def answer_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """BCE and soft Dice of masks (M, 1, S, S), pooled over the batch."""
    soft = logits.sigmoid()
    dice = 1 - (2 * (soft * truth).sum() + 1) / (soft.sum() + truth.sum() + 1)
    return F.binary_cross_entropy_with_logits(logits, truth) + dice


def external_rows(fitted, case: Case) -> list[dict]:
    """Dice of a case from another site than the training's; none for a case of the training's site."""
    if meets(case.attributes, fitted.task.keep):
        return []
    guess = fitted.predict(case)
    return [
        row(case, name, dice=float(metrics.dice(guess == value, case.label == value)))
        for value, name in fitted.task.structures.items()
    ]


MONTGOMERY = CohortTask("chest_xray", evaluation="test", keep=(("site", "Montgomery"),))
NORTH = CohortTask("embedded", evaluation="test", keep=(("site", "north"),))

recipe = Recipe(
    paper="cosam",
    title="CoSAM: a mask that is checked, corrected and asked about again",
    claim="Trained at one site's X-rays and scored at another's, a SAM that corrects its own mask gives a higher Dice "
    "than the same SAM without prompts.",
    arms={
        "prompt-free": Arm(AdaptedSam(tuned=("prompts", "decoder"))),
        "cosam": Arm(CoSam()),
        "without error decoder": Arm(CoSam(errors=False)),
        "one pass": Arm(CoSam(rounds=1)),
        "u-net": Arm(Supervised(channels=(8, 16, 32, 64, 64))),
    },
    compare=("cosam", "prompt-free"),
    ablation=("cosam", "without error decoder"),
    score=external_rows,
    scales={
        "quick": Scale(NORTH, Budget(steps=15, batch=4, checks=0), replicates=1),
        "full": Scale(
            MONTGOMERY,
            Budget(steps=120, batch=4, checks=0),
            arms=("prompt-free", "cosam", "without error decoder", "one pass", "u-net"),
        ),
    },
    source="the paper's abstract, which names no figures; the loop as in arXiv 2411.10136",
    components=(
        Component(
            "prompt-free coarse masks",
            "implemented",
            "the segmenter with a token for each class; the frozen image encoder (the paper adapts it too)",
        ),
        Component(
            "generalized error decoder",
            "implemented",
            "convolutions from the embedding and the mask up to 40 x 40, trained on the loop's own masks and on true "
            "masks spoilt at random (the latter is our reading of generalised)",
        ),
        Component(
            "prompts from corrected masks",
            "implemented",
            "two points of each kind where a correction is surest, a box, and the mask, through SAM's prompt encoder",
        ),
        Component("self-correcting loop", "implemented", "two rounds; no gradient between rounds (ours)"),
        Component("two benchmarks, many sites", "simplified", "two chest X-ray sites, in one direction"),
    ),
)
