"""ConVIRT: Contrastive Learning of Medical Visual Representations from Paired Images and Text.

Zhang, Jiang, Miura, Manning and Langlotz, Machine Learning for Healthcare 2022 (PMLR 182; arXiv 2010.00747, 2020).
X-rays come with reports, which cost nothing. An image encoder learns to tell which report belongs to which image,
before it learns from labels. With v = g_v(f_v(image)) and u = g_u(f_u(sentence)), for the N pairs of a batch,

  image to text   l_i = -log( exp(<v_i, u_i> / tau) / sum_k exp(<v_i, u_k> / tau) )                        (eq. 2)
  text to image   the same with u and v exchanged                                                         (eq. 3)
  loss            the mean over i of lambda l_i(image to text) + (1 - lambda) l_i(text to image)          (eq. 4)

<.,.> is the cosine, tau = 0.1, lambda = 0.75. The sentence is drawn from the report, anew each time. Here the reports
are those of 340 training patients of Montgomery and Shenzhen; 36 of them, a tenth, have a label. On validation
patients, with a draw of labels that is not scored, the AUC was 0.75 after 180 steps of reading, 0.79 after 360, which
are taken here, and 0.90 with all labels; nothing else was looked at.
"""

import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from medcook.language import one_of, words_of
from medcook.methods import Moment
from medcook.recipes.language._kept import READING, Remembering, longer_scales, reading_rows
from medcook.recipes.language._reading import FEW, Unread, pairs
from medcook.recipes.recipe import Arm, Component, Recipe

HEAT, LAMBDA = 0.1, 0.75
MARGIN = 0.05
"""By how much an AUC may be lower and still count as good as the other."""


def sentences_in(report: str) -> tuple[str, ...]:
    """The sentences of a report, between full stops and semicolons; those without a word are left out."""
    return tuple(part.strip() for part in re.split(r"[.;]\s+", report) if words_of(part))


def drawn_from(report: str) -> str:
    """A sentence of a report, each as probable as the others, by torch's own generator."""
    return one_of(sentences_in(report))


@dataclass
class ConVIRT(Remembering):
    """Pairs of X-ray and report are told from others of the batch.

    heat, image_weight  tau and lambda; with an image weight of 1 only images look for their text
    shuffled            every image gets the report of some image of its batch
    """

    share: float = READING
    heat: float = HEAT
    image_weight: float = LAMBDA
    shuffled: bool = False

    def reading(self, nets: nn.ModuleDict, images: Tensor, reports: tuple[str, ...], now: Moment) -> Tensor:
        said = tuple(drawn_from(report) for report in reports)
        if self.shuffled:
            said = tuple(said[place] for place in torch.randperm(len(said)).tolist())
        vectors, texts = self.seen(nets, images), self.heard(nets, said)
        with torch.autocast(images.device.type, enabled=False):
            return pairs(vectors, texts, said, self.heat, self.image_weight)


def arms(method: ConVIRT, few: int, suffix: str = "") -> dict[str, Arm]:
    """The arms that start from what the method starts from; `few` labels are a tenth."""
    unread, tenth = Unread(start=method.start, share=method.share), {"labelled": few}
    found = {
        "reports, a tenth of the labels": Arm(method, tenth),
        "no reports, all labels": Arm(unread),
        "no reports, a tenth of the labels": Arm(unread, tenth),
        "shuffled reports, a tenth of the labels": Arm(replace(method, shuffled=True), tenth),
        "one way, a tenth of the labels": Arm(replace(method, image_weight=1.0), tenth),
    }
    return {name + suffix: arm for name, arm in found.items()}


LARGE = arms(ConVIRT(), FEW)
SMALL = arms(ConVIRT(start="random"), 4, ", small encoder")
FULL_ARMS = tuple(LARGE)[:4]

recipe = Recipe(
    paper="convirt",
    title="ConVIRT: images and their reports, told from others in both directions",
    claim="After reading X-rays and reports, SqueezeNet learns to tell tuberculosis from a tenth of the labels as well "
    "as from all of them without reading, by AUC.",
    arms=LARGE | SMALL,
    compare=FULL_ARMS[:2],
    ablation=(FULL_ARMS[0], FULL_ARMS[3]),
    replicate="draw",
    metric="auc",
    expect="non-inferior",
    margin=MARGIN,
    score=reading_rows,
    scales=longer_scales(*FULL_ARMS, quick_arms=tuple(SMALL)),
    source="abstract; Zhang et al., 2022",
    components=(
        Component(
            "bidirectional contrast of image and text",
            "implemented",
            "equations 2 to 4, tau 0.1 and lambda 0.75. Images of a batch whose sentence is the very same share their "
            "probability, where the paper would call them negatives: half of these reports say `normal`. The "
            "ablation takes the pairing away and keeps images, reports and loss. `one way`, an arm that `full` does "
            "not run, leaves the second direction out",
        ),
        Component(
            "random sentences and random views",
            "implemented",
            "one sentence of the report, as probable as the others; most reports have one. The view is rotated, "
            "scaled, moved and changed in intensity, never mirrored, since reports say left and right; no blur",
        ),
        Component(
            "encoders and projections",
            "simplified",
            "SqueezeNet with ImageNet weights for ResNet-50, and 64 numbers for 512. Words get their meaning here, by "
            "one transformer block from random weights, for a BERT that had read clinical notes; as there, a sentence "
            "is the largest value over its words, and a projection has one hidden layer",
        ),
        Component(
            "a tenth of the labels",
            "implemented",
            f"{FEW} labelled patients, half with tuberculosis, against all 340; every arm has 180 steps with labels, "
            f"and may lose {MARGIN} AUC. Reports of all 340 are read, and say of most whether tuberculosis was seen",
        ),
        Component(
            "retrieval without labels",
            "simplified",
            "column `facts`: the training report nearest to an X-ray, by what was read, and how far its facts (side, "
            "field, signs) are those of the X-ray's own report. The paper searches images, by image and by text",
        ),
        Component(
            "four classification tasks",
            "absent",
            "one outcome; musculoskeletal images and other sets are not at hand",
        ),
        Component("comparison with image-only contrastive learning", "absent", "SimCLR is an arm of `benchx`"),
    ),
)
