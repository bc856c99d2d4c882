"""What reading reports left behind, kept for what is asked without labels: which report fits an X-ray best."""

from copy import deepcopy
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.cohorts import outcome_rows
from medcook.data import Case
from medcook.language import TextEncoder
from medcook.methods import Moment
from medcook.methods.method import follow
from medcook.precision import autocast
from medcook.recipes.language._reading import BUDGET, ReportPretrained, scales
from medcook.recipes.language._reports import Facts, facts_of, reports_of
from medcook.recipes.recipe import Scale
from medcook.sampling import once, trained

READING = 2 / 3
"""The share of the steps that read reports."""
LONGER = replace(BUDGET, steps=540)
"""As many steps with labels as in `BUDGET`, and twice as many before them."""


@dataclass
class Remembering(ReportPretrained):
    """The labels change the encoder; `nets["reader"]` stays what reading made of it.

    It is the moving average, at the end of the reading, of the encoder and of all parts that read: `seen` and `heard`
    work on it and on the networks that still learn alike, since both have `model` and `pretext`.
    """

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        nets = super().build(inputs, classes, dims)
        if "pretext" in nets:
            nets["reader"] = deepcopy(reading_parts(nets)).requires_grad_(False)
        return nets

    def after_pretext(self, nets: nn.ModuleDict, now: Moment) -> None:
        follow(nets["reader"], reading_parts(nets), now.decay(self.average))

    def seen(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """Vectors (B, width) of images (B, C, H, W), before they are normalised."""
        return nets["pretext"]["see"](nets["model"].features(images))

    def heard(self, nets: nn.ModuleDict, sentences: tuple[str, ...]) -> Tensor:
        """Vectors (B, width) of sentences."""
        return nets["pretext"]["hear"](strongest(nets["pretext"]["text"], sentences))


def reading_parts(nets: nn.ModuleDict) -> nn.ModuleDict:
    """The networks that reading trains."""
    return nn.ModuleDict({"model": nets["model"], "pretext": nets["pretext"]})


def strongest(text: TextEncoder, sentences: tuple[str, ...]) -> Tensor:
    """(B, width): the largest value of each number over a sentence's words."""
    vectors, empty = text.tokens(sentences)
    return vectors.masked_fill(empty[..., None], -torch.inf).amax(1)


def overlap(one: Facts, other: Facts) -> float:
    """Of the facts that one of two reports states, the share that both do; 1 where neither states any."""
    mine, theirs = frozenset().union(*one), frozenset().union(*other)
    return len(mine & theirs) / len(mine | theirs) if mine | theirs else 1.0


@torch.no_grad()
def retrieved(fitted, case: Case) -> str:
    """The report, among all of training patients, that fits a case's image best by what was read."""
    method, reader = fitted.method, trained(fitted)["reader"]
    known = once(fitted, "known reports", lambda: known_reports(fitted.task))
    with autocast(fitted.cost):
        texts = once(fitted, "heard reports", lambda: F.normalize(method.heard(reader, known).float(), dim=1))
        image = method.seen(reader, fitted.task.preparation.images(case)).float()
    return known[int((F.normalize(image, dim=1) @ texts.T).mean(0).argmax())]


def known_reports(task) -> tuple[str, ...]:
    """Every report of training patients once."""
    said = reports_of(task.data)
    cases = (case for patient in task.unlabelled_patients for case in task.data.patients[patient])
    return tuple(sorted({said[case] for case in cases}))


def reading_rows(fitted, case: Case) -> list[dict]:
    """As `outcome_rows`; where reports were read, `facts` says how far the best-fitting report agrees with the case's
    own (`overlap`). A case without a report has none."""
    own = reports_of(fitted.task.data).get(case.case_id)
    facts = float("nan")
    if own and getattr(fitted.method, "has_pretext", False):
        facts = overlap(facts_of(own), facts_of(retrieved(fitted, case)))
    return [row | {"facts": facts} for row in outcome_rows(fitted, case)]


def longer_scales(*arms: str, quick_arms: tuple[str, ...]) -> dict[str, Scale]:
    """`scales`, of which `full` takes `LONGER`."""
    found = scales(*arms, quick_arms=quick_arms)
    return found | {"full": replace(found["full"], budget=LONGER)}
