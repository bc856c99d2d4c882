"""Lesion segmentation with SAM 3, a study (Jiang et al., 2026): which prompt, which prior, how much to tune.

A structure is shown by a box, by its learnt name, or by an exemplar, a token pooled from another patient's
image in which it is marked. In a volume the neighbouring slice says nearly the same; its mask is the mask prompt,
    m_k = decoder(encoder(x_k), [q + t_c], prior = m_{k-1}),
from the middle slice outwards, each answer the prior of the next. And the decoder, adapters, or everything may learn.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from medcook.data import IGNORE, Case
from medcook.evaluation import row
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.recipes.sam_adaptation._concepts import (
    ConceptSam,
    embedded,
    given_logits,
    network_of,
    pooled,
    tight_boxes,
    volume_dice,
    volume_of,
)
from medcook.recipes.sam_adaptation._prompting import scales
from medcook.recipes.sam_adaptation.sam_med2d import adapted
from medcook.recipes.uncertainty._validation import once
from medcook.sam.adapting import fitted_in
from medcook.sam.model import DENSE, Embedding, SmallSam
from medcook.sam.zero_shot import SMALLEST
from medcook.tasks import Samples, Task

DECODER = ("prompts", "decoder")


@dataclass(frozen=True)
class NeighbourTask(Task):
    """Training slices come with the labels of the slice before and the slice after; `IGNORE` where there is none."""

    def samples(self, role: str) -> Samples:
        found = super().samples(role)
        if role == "unlabelled":
            return found
        neighbours = torch.stack([beside(found.labels, found.case_of, step) for step in (1, -1)], dim=1)
        return Samples(found.images, found.labels, found.case_of, neighbours)


def beside(labels: Tensor, case_of: Tensor, step: int) -> Tensor:
    """Labels (N, H, W) moved by `step` slices within each case; `IGNORE` where nothing moved in."""
    moved = torch.full_like(labels, IGNORE)
    mine, theirs = (slice(step, None), slice(None, -step)) if step > 0 else (slice(None, step), slice(-step, None))
    same = case_of[mine] == case_of[theirs]
    moved[mine][same] = labels[theirs][same]
    return moved


@dataclass
class LesionSam(ConceptSam):
    """One way to prompt and to tune.

    adapters  in every block of the encoder, beside what `tuned` names
    """

    tuned: tuple[str, ...] = DECODER
    adapters: bool = False

    def adapt(self, model: SmallSam) -> SmallSam:
        return adapted(model) if self.adapters else model

    def volume(
        self, model: SmallSam, embedding: Embedding, value: int, shape: tuple[int, int], boxes: Tensor, mark: Tensor
    ) -> Tensor:
        """(N, *shape) bool: a structure in all slices of a volume, prompted in this method's way.

        boxes (N, 4), NaN where there is nothing to box; mark (hidden,) what is pooled from the exemplar
        """
        count, kind = len(embedding.coarse), self.asked.split("+")
        values = torch.full((count,), value)
        if "box" in kind:
            there = (~boxes.isnan().any(1)).nonzero()[:, 0]
            found = torch.zeros(count, *shape, dtype=torch.bool)
            known = dict(concept="concept" in kind, boxes=boxes[there])
            found[there] = given_logits(model, embedding.at(there), values[there], shape, **known) > 0
            return found
        marks = mark.expand(count, -1) if "exemplar" in kind else None
        ask = lambda rows, priors: given_logits(  # noqa: E731
            model,
            embedding.at(rows),
            values[rows],
            shape,
            concept="concept" in kind,
            marks=None if marks is None else marks[rows],
            priors=priors,
        )
        alone = ask(torch.arange(count), None) > 0
        return outwards(alone, ask) if "prior" in kind else alone


def outwards(alone: Tensor, ask) -> Tensor:
    """Answers (N, H, W) bool, the middle slice's as it is alone, each further one with its neighbour's as prior."""
    found, middle = alone.clone(), len(alone) // 2
    for order, before in ((range(middle + 1, len(alone)), -1), (range(middle - 1, -1, -1), 1)):
        for k in order:
            large = fitted_in(found[k + before][None, None].float())
            prior = F.adaptive_avg_pool2d(large, DENSE)[:, 0] * 2 - 1
            found[k] = (ask(torch.tensor([k]), prior) > 0)[0]
    return found


@once
@torch.no_grad()
def exemplars(fitted) -> dict[int, Tensor]:
    """{value: (hidden,)} pooled from the labelled slice that shows most of a structure, once a training."""
    model, samples = network_of(fitted), fitted.task.samples("labelled")
    found = {}
    for value in fitted.task.structures:
        masks = samples.labels == value
        k = masks.flatten(1).sum(1).argmax()
        embedding = model.embed(fitted_in(samples.images[k][None]))
        found[value] = pooled(embedding, fitted_in(masks[k][None, None].float())[:, 0] > 0.5)[0]
    return found


@torch.no_grad()
def volume_rows(fitted, case: Case) -> list[dict]:
    """Dice of each structure over all slices of a case, on the prepared grid."""
    marks, model = exemplars(fitted), network_of(fitted)
    images, labels = volume_of(fitted, case)
    embedding, shape, rows = embedded(model, images), tuple(images.shape[2:]), []
    for value, name in fitted.task.structures.items():
        truth = labels == value
        if truth.flatten(1).sum(1).max() >= SMALLEST:
            answer = fitted.method.volume(model, embedding, value, shape, tight_boxes(truth), marks[value])
            rows.append(row(case, name, dice=volume_dice(answer, truth)))
    return rows


EVERYTHING = ("encoder", *DECODER)
PRIOR = ("concept", "concept+prior", "concept+prior")

recipe = Recipe(
    paper="lesion-sam3",
    title="Prompts, priors and tuning depth for SAM 3: a study",
    claim="A structure asked for by its name alone is found better in a volume when the answer in the neighbouring "
    "slice is given as prior (the small SAM, fully tuned on ten patients).",
    arms={
        "box": Arm(LesionSam(kinds=("box",), asked="box")),
        "exemplar": Arm(LesionSam(tuned=EVERYTHING, kinds=("exemplar",), asked="exemplar")),
        "name, decoder": Arm(LesionSam()),
        "name, adapters": Arm(LesionSam(adapters=True)),
        "name, full": Arm(LesionSam(tuned=EVERYTHING)),
        "name and neighbour": Arm(LesionSam(tuned=EVERYTHING, kinds=PRIOR, asked="concept+prior")),
        "name, not the neighbour": Arm(LesionSam(tuned=EVERYTHING, kinds=PRIOR)),
    },
    compare=("name and neighbour", "name, full"),
    ablation=("name and neighbour", "name, not the neighbour"),
    scales=scales(
        quick=NeighbourTask("embedded", labelled=3),
        full=NeighbourTask("acdc", labelled=10, evaluation="test"),
        steps=120,
    ),
    score=volume_rows,
    components=(
        Component("boxes", "implemented", "tight boxes of the truth, in every slice that shows the structure"),
        Component(
            "text prompts",
            "simplified",
            "each class name learnt, as what it adds to the mask token, in place of SAM 3's text encoder",
        ),
        Component(
            "image prompts",
            "implemented",
            "a token pooled from one labelled image inside the structure; in training from another image of the batch",
        ),
        Component(
            "adjacent-slice predictions",
            "implemented",
            "given as mask prompt, from the middle slice outwards; in training the true neighbour, so that errors that "
            "are carried along were never seen",
        ),
        Component(
            "decoder, adapter and full tuning",
            "implemented",
            "adapters are those of SAM-Med2D",
        ),
        Component("multiparametric information", "absent", "one sequence a patient"),
        Component("lesions, 13 sets", "absent", "structures of the heart: no set of lesions is at hand"),
    ),
)
