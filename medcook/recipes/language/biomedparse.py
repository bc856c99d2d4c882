"""BiomedParse: a foundation model for joint segmentation, detection and recognition of biomedical objects across nine
modalities (Zhao, Gu, Yang, Usuyama, Lee, Kiblawi, Naumann, Gao, Crabtree, Abel, Moung-Wen, Piening, Bifulco, Wei, Poon
and Wang, Nature Methods 2025; arXiv 2405.12971, "image parsing of everything everywhere all at once").

A prompt of words is enough to segment an object; nobody draws a box. The network learns at the same time to segment
what a name means, to tell what kind of object it is, and that it is not there. Afterwards a test on the answer's
probabilities says whether the prompt fits the image, so all names can be tried and those kept that an image shows.

  loss = mask loss + weight * cross-entropy(K q, kind of the object, or none)        q: the query after asking the image

The network is the one of `_queries.py`; the tests on answers are in `_parsing.py`. Text is set against the book's small
SAM, as it ships, with a tight box of the truth around each structure in each slice.

How well it does was not looked at before the test, but for a short run on the embedded brains.
"""

from dataclasses import dataclass, replace
from math import nan
from typing import NamedTuple
from zlib import crc32

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook.data import Case
from medcook.evaluation import row
from medcook.language import Told, one_of, shown_in
from medcook.methods import Batch, Moment
from medcook.recipes.language._attributes import LEAST, dice, showing
from medcook.recipes.language._parsing import Expected, expected, f1, means, p_value, recognised, regularity
from medcook.recipes.language._queries import Queried, QueriedUNet, dotted, sheet, sheet_loss
from medcook.recipes.language._settings import BRAIN, EVERYTHING, NAMED, NAMED_BUDGET, NAMED_QUICK, own_values, scales
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.sam.checkpoints import load_small
from medcook.sam.predictor import Predictor
from medcook.sam.prompts import Prompt, box_of
from medcook.sampling import once, trained

SLICES, KNOWN = 3, 30
"""Of each structure: slices of a case that are scored; training images that show how answers look which are right."""
LEVEL = 0.05
"""An answer with a smaller p-value is rejected."""


class Parser(QueriedUNet):
    """The network of queries; a linear layer also tells what kind of object each has found, or that it is none."""

    def __init__(self, inputs: int, channels: tuple[int, ...], width: int, layers: int, kinds: int):
        super().__init__(inputs, channels, width, layers, apart=True)
        self.kind = nn.Linear(width, 1 + kinds)

    def parse(self, images: Tensor, queries: Tensor, nobody: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of masks (B, S, H, W), and of kinds (B, S, 1 + kinds), the first of which is: not there."""
        maps = self.encode(images)
        found = self.ask(maps, queries, nobody)
        return dotted(self.pixels(maps), self.mask(found)), self.kind(found).float()


def kinds_of(values: Tensor, there: Tensor, sets: tuple[int, ...]) -> Tensor:
    """The kind (B, S) of every value of a sheet: 0 where it is not there, else 1 + the number of its set."""
    known = torch.tensor([0, *sets], device=values.device) if sets else torch.zeros(256, dtype=torch.long)
    return torch.where(there, 1 + known[values], 0)


@dataclass
class BiomedParse(Queried):
    """Text prompts; masks, kinds and absence are learnt together.

    joint   weight of the kinds' cross-entropy; 0: masks alone are learnt, and nothing that is absent is asked for
    absent  the share of images that are also asked for something which is certainly not there
    """

    joint: float = 0.1
    absent: float = 0.5

    def network_for(self, inputs: int) -> Parser:
        return Parser(inputs, self.channels, self.width, self.layers, 1 + max(self.language.sets, default=0))

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        values, known = sheet(self.language, labelled)
        if self.joint:
            values, known = self.with_absent(labelled, values, known)
        queries = nets["model"].text(self.named(values))[(values - 1).clamp_min(0)]
        logits, kinds = nets["model"].parse(labelled.images, queries, values == 0)
        there = (labelled.labels[:, None] == values[..., None, None]).flatten(2).any(2) & known
        truth = kinds_of(values, there, self.language.sets)
        recognition = F.cross_entropy(kinds[known], truth[known]) if known.any() else 0.0 * kinds.sum()
        return sheet_loss(logits, labelled.labels, values, known) + self.joint * recognition

    def with_absent(self, labelled: Batch, values: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """A sheet with one more column: in some rows a name that fits nothing in the image."""
        groups = [None] * len(values) if labelled.groups is None else labelled.groups.tolist()
        more = torch.zeros_like(values[:, :1])
        for cell, label, group, asked in zip(more, labelled.labels, groups, torch.rand(len(values)), strict=True):
            others = self.language.absent(shown_in(label), group)
            if others and asked < self.absent:
                cell[0] = one_of(others)
        return torch.cat([values, more], dim=1), torch.cat([known, more > 0], dim=1)


class BoxedSam(nn.Module):
    """The book's small SAM, as it ships. `idle` is for the loop, which must have something to move."""

    def __init__(self):
        super().__init__()
        self.sam = load_small().requires_grad_(False)
        self.idle = nn.Parameter(torch.ones(()))


@dataclass
class BoxPrompted(Told):
    """Answers boxes and hears no words. Nothing learns."""

    def network_for(self, inputs: int) -> BoxedSam:
        return BoxedSam()

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        return nets["model"].idle.square()

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """Without a box there is nothing to answer: everything is background."""
        found = images.new_zeros(len(images), nets["average"].classes, *images.shape[2:])
        found[:, 0] = 1
        return found


def boxed(fitted, images: Tensor, masks: Tensor) -> Tensor:
    """Answers (N, H, W) bool of SAM to the tight boxes of masks (N, H, W) in images (N, C, H, W)."""
    predictor = once(fitted, "predictor", lambda: Predictor(trained(fitted)["average"].sam))
    pairs = zip(images[:, 0].numpy(), masks.numpy(), strict=True)
    return torch.from_numpy(np.stack([predictor(image, Prompt(box=box_of(mask))).mask for image, mask in pairs]))


@torch.no_grad()
def expectations(fitted) -> dict[int, Expected | None]:
    """{label value: how right answers look}, from training images that show it."""
    method, nets, samples, found = fitted.method, trained(fitted), fitted.task.samples("labelled"), {}
    for value, name in enumerate(method.language.names, 1):
        chosen = showing(samples.labels == value, KNOWN) if name else ()
        if len(chosen):
            images = samples.images[chosen]
            answers = method.answer(nets, images, (method.language.name(value),))[:, 0]
            pairs = (means(answer, image) for answer, image in zip(answers, images[:, 0], strict=True))
            found[value] = expected([pair for pair in pairs if pair])
    return found


class Parsed(NamedTuple):
    """Of one slice: the label values that it shows, and {value: (probabilities, p-value)} of all that was asked."""

    there: tuple[int, ...]
    found: dict[int, tuple[Tensor, float]]


@torch.no_grad()
def parsed(fitted, image: Tensor, label: Tensor) -> Parsed:
    """A slice (C, H, W) with its label map (H, W), asked for every name of the language."""
    method, known = fitted.method, once(fitted, "expectations", lambda: expectations(fitted))
    values = [value for value, name in enumerate(method.language.names, 1) if name]
    answers = method.answer(trained(fitted), image[None], tuple(method.language.name(value) for value in values))[0]
    pairs = zip(values, answers, strict=True)
    found = {value: (answer, p_value(means(answer, image[0]), known.get(value))) for value, answer in pairs}
    return Parsed(shown_in(label, LEAST), found)


def judged(slices: list[Parsed], value: int, wrong: list[int | None]) -> dict[str, float]:
    """Of the slices that show a structure: how often its name is kept, and a name that fits nothing is rejected.

    wrong     of each slice, a label value of which it certainly shows nothing, or None
    kept      the right name's p-value is at least `LEVEL`;   rejected  the wrong one's is below
    silent    the wrong name's answer is empty anyhow;   p_right, p_wrong  mean p-values
    """
    right = [each.found[value][1] for each in slices]
    false = [each.found[other] for each, other in zip(slices, wrong, strict=True) if other is not None]
    mean = lambda values: float(np.mean(values)) if len(values) else nan  # noqa: E731
    return {
        "kept": mean([p >= LEVEL for p in right]),
        "rejected": mean([p < LEVEL for _, p in false]),
        "silent": mean([not (answer > 0.5).any() for answer, _ in false]),
        "p_right": mean(right),
        "p_wrong": mean([p for _, p in false]),
    }


def recognition(each: Parsed, unsure: set[int]) -> float:
    """F1 of the structures recognised in a slice; of `unsure` ones that are not drawn nothing is known."""
    values = list(each.found)
    answers, ps = torch.stack([each.found[value][0] for value in values]), [each.found[value][1] for value in values]
    found = {values[number] for number in recognised(answers, ps, LEVEL)}
    return f1(found - (unsure - set(each.there)), set(each.there) & set(values))


def parsed_rows(fitted, case: Case) -> list[dict]:
    """A row for each structure that is named: means over up to `SLICES` slices that show it, on the network's grid.

    dice         of the answer to its name, or to its tight box
    box_ratio, convex_ratio, inertia_ratio   of the truth, see `regularity`
    And where words are heard: what `judged` tells, and `recognised`, the F1 of all that is recognised in these slices.
    """
    method, task = fitted.method, fitted.task
    images, labels = task.preparation.images(case), task.preparation.labels(case)
    language, group, rows = method.language, case.attributes.get("modality"), []
    unsure = set(own_values(task, case)) if group in language.partial else set()
    seen: dict[int, Parsed] = {}
    for value in case.attributes.get("annotated", own_values(task, case)):
        chosen = showing(labels == value, SLICES)
        if not len(chosen) or not language.plain(value):
            continue
        masks = labels[chosen] == value
        shapes = [regularity(mask.numpy()) for mask in masks]
        columns = {name: float(np.mean([shape[name] for shape in shapes])) for name in shapes[0]}
        if isinstance(method, BoxPrompted):
            columns["dice"] = dice(boxed(fitted, images[chosen], masks), masks)
        else:
            numbers = chosen.tolist()
            seen |= {n: parsed(fitted, images[n], labels[n]) for n in numbers if n not in seen}
            slices, wrong = [seen[n] for n in numbers], []
            for n in numbers:
                others = language.absent(shown_in(labels[n]), group)
                wrong.append(others[crc32(f"{case.case_id} {n}".encode()) % len(others)] if others else None)
            columns |= judged(slices, value, wrong)
            columns["recognised"] = float(np.mean([recognition(each, unsure) for each in slices]))
            columns["dice"] = dice(torch.stack([each.found[value][0] > 0.5 for each in slices]), masks)
        rows.append(row(case, task.structures[value], set=case.attributes.get("set", ""), **columns))
    return rows


ARMS = {
    "text": BiomedParse(),
    "box-prompted SAM": BoxPrompted(language=EVERYTHING),
    "text, masks alone": BiomedParse(joint=0.0),
}

recipe = Recipe(
    paper="biomedparse",
    title="BiomedParse: words in place of boxes, and what an image does not show",
    claim="On five data sets a network that hears the name of a structure alone segments it better than a SAM that was "
    "never trained on them and is given a tight box around it in every slice.",
    arms={name: Arm(method) for name, method in ARMS.items()},
    compare=("text", "box-prompted SAM"),
    ablation=("text", "text, masks alone"),
    score=parsed_rows,
    scales=scales(
        NAMED_QUICK,
        NAMED,
        *ARMS,
        budget=NAMED_BUDGET,
        methods={name: replace(method, language=BRAIN) for name, method in ARMS.items()},
    ),
    source="the abstract; inference_utils/output_processing.py, inference_utils/inference.py, modeling/modules/"
    "criterion.py, figures/main_figure_3b.py to 3d.py and the network of configs/biomedparse_inference.yaml in the "
    "authors' repository, github.com/microsoft/BiomedParse",
    components=(
        Component(
            "architecture",
            "implemented",
            "the released one, 340 million weights, in `medcook.networks`: `focalnet.py` (FocalNet-L, four levels), "
            "`seem.py` (transformer and feature pyramid, nine layers of 101 queries and the text's tokens) and "
            "`biomedparse.py` (text as CLIP reads it, a query for each name). Backbone and text are tested against "
            "those of transformers, the decoder against an implementation of its own. Not built: strokes as prompts, "
            "the matching loss, and PubMedBERT, which the released setting carries and does not ask",
        ),
        Component(
            "checkpoint",
            "implemented",
            "biomedparse_v1.pt is read by its names of weights, which follow from the authors' code, and tested on a "
            "small one; the published weights are not at hand, so none of their figures is tested here",
        ),
        Component(
            "segmentation from a text prompt",
            "simplified",
            "a U-Net and SAT's query decoder, see `_queries.py`, in place of SEEM's; a name does not hear of the "
            "others that are asked for. Five sets and 14 structures, in place of 45 sets, 82 objects, nine modalities",
        ),
        Component(
            "joint learning of masks and kinds",
            "simplified",
            "as their meta-object classifier: cross-entropy on what kind of object a query has found, here the five "
            "sets' (heart, hippocampus, head and neck, lungs, cells), or that it is not there; half of the images are "
            "also asked for something absent. The ablation learns masks of what its set names, and nothing else",
        ),
        Component(
            "rejection of prompts that fit nothing",
            "simplified",
            "their test: a Beta distribution for each structure, the Kolmogorov-Smirnov test of one value, the "
            "geometric mean of the p-values. Of mean probability and mean brightness, where they have three colors; "
            "from at most 30 training images of each structure; a level of 0.05 is ours. Columns `kept`, `rejected`, "
            "`silent`, `p_right`, `p_wrong`",
        ),
        Component(
            "recognition of all objects",
            "simplified",
            "all names are tried, what is rejected is dropped, and of answers that overlap by half the surest stays, "
            "as in their code; column `recognised`. All 14 names are tried, not those of the image's modality alone",
        ),
        Component(
            "irregular shapes",
            "implemented",
            "columns `box_ratio`, `convex_ratio` and `inertia_ratio` of the truth, against which the gain over the "
            "box can be set, as in their figure 3",
        ),
        Component(
            "box-prompted SAM",
            "simplified",
            "the book's small SAM, which saw synthetic scenes alone, looks closer at each box; one box a structure and "
            "slice, also around both lungs or all cells. It knows none of the sets, as their SAM did not; the boxes "
            "are the truth's. MedSAM's weights are not at hand",
        ),
        Component("harmonised descriptions by GPT-4", "absent", "no language model is at hand; names are written"),
        Component("detection", "absent", "boxes around answers: masks are scored here"),
    ),
)
