"""Medical SAM3 (Jiang et al., 2026): tune the whole model, so that it finds a structure by its name alone.

A promptable model that has seen few medical images looks able as long as somebody who knows the answer draws the box;
named only, it fails, and better words do not help: the whole model has to learn what they mean. Here a name is learnt,
t_c, and joins the mask token, q, with which the mask decoder reads the image and the box:
    mask = decoder(encoder(x), [q + t_c, box or nothing]);   learnt: t_c alone, or t_c and decoder, or everything.
`medcook.sam.sam3` opens a real checkpoint of SAM 3, or of one tuned from it, where it was downloaded.
"""

import torch
from torch import Tensor

from medcook.data import Case
from medcook.evaluation import row
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.recipes.sam_adaptation._concepts import (
    ConceptSam,
    embedded,
    given_logits,
    network_of,
    tight_boxes,
    volume_dice,
    volume_of,
)
from medcook.recipes.sam_adaptation._prompting import scales
from medcook.sam.model import SIZE
from medcook.sam.zero_shot import SMALLEST

WIDER = 0.25
"""How far each side of a box moves outwards, of the box's own side, where the box is less than exact."""

KINDS = ("concept", "concept", "concept", "box")


def wider(boxes: Tensor, share: float = WIDER) -> Tensor:
    """Boxes (M, 4) with every side moved outwards by a share of the box's own side, cut at the image's border."""
    slack = share * (boxes[:, 2:] - boxes[:, :2])
    return torch.cat([boxes[:, :2] - slack, boxes[:, 2:] + slack], dim=1).clamp(0, SIZE)


@torch.no_grad()
def named_rows(fitted, case: Case) -> list[dict]:
    """Dice over a case's volume, on the prepared grid: `dice` from the name alone, in all slices; `box` from the tight
    box of each slice that shows the structure, and `wide_box` from a wider one, both unnamed."""
    model, (images, labels) = network_of(fitted), volume_of(fitted, case)
    embedding, shape, rows = embedded(model, images), tuple(images.shape[2:]), []
    for value, name in fitted.task.structures.items():
        truth = labels == value
        there = (truth.flatten(1).sum(1) >= SMALLEST).nonzero()[:, 0]
        if not len(there):
            continue
        answer = given_logits(model, embedding, torch.full((len(images),), value), shape) > 0
        found = {"dice": volume_dice(answer, truth)}
        boxes = tight_boxes(truth[there])
        for column, given in (("box", boxes), ("wide_box", wider(boxes))):
            known = dict(concept=False, boxes=given)
            answer = given_logits(model, embedding.at(there), torch.full((len(there),), value), shape, **known) > 0
            found[column] = volume_dice(answer, truth[there])
        rows.append(row(case, name, **found))
    return rows


recipe = Recipe(
    paper="medical-sam3",
    title="Medical SAM3: found by name",
    claim="Named only, without a box, heart structures are found better after tuning the whole small SAM on ten "
    "patients than with names learnt for the frozen model.",
    arms={
        "names alone": Arm(ConceptSam(tuned=(), kinds=KINDS)),
        "decoder tuning": Arm(ConceptSam(tuned=("prompts", "decoder"), kinds=KINDS)),
        "full tuning": Arm(ConceptSam(kinds=KINDS)),
    },
    compare=("full tuning", "names alone"),
    ablation=("full tuning", "decoder tuning"),
    scales=scales(labelled=10, steps=120),
    score=named_rows,
    components=(
        Component(
            "full fine-tuning",
            "implemented",
            "encoder, prompt encoder and decoder learn; the arms freeze the encoder, or all but the names",
        ),
        Component(
            "text prompts",
            "simplified",
            "each class name learnt, as what it adds to the mask token, in place of SAM 3's text encoder: no new names",
        ),
        Component(
            "reliance on ground-truth boxes",
            "implemented",
            "Dice from the tight box, and from one whose sides lie a quarter further out, beside Dice from the name",
        ),
        Component(
            "architecture",
            "simplified",
            "the evidence tunes the small SAM, which has no words to begin with; SAM 3 itself is transformers', takes "
            "words and boxes, and is tested at a thousandth of its size",
        ),
        Component(
            "checkpoint",
            "simplified",
            "`load_sam3` opens a folder of SAM 3 or Medical SAM3; tested with small random weights in that layout: "
            "the real ones are given out on request only",
        ),
        Component("33 sets of 10 modalities", "absent", "one set of heart MR, slice by slice"),
    ),
)
