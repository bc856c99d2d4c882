"""ReXGroundingCT (Baharoon, Luo, Moritz, Kumar, Kim, Zhang, Zhu and others, NEJM AI 2026; arXiv 2507.22030).

Idea: masks of lesions mostly come with a category, one of a few. Here each comes with the sentence of a report that is
about it, so that a network can learn to answer the sentence. With C the category and S what a sentence means,

    a category's mask: all in the image that is C;    a sentence's mask: the instances in S alone
    training:  at most m representative instances of S are drawn, whatever else is there (m = 3 in the data set)
    judging:   all instances of S;  Dice a sentence, and HIT, the share of sentences with a Dice of at least 0.1

The data set has a reader (`medcook data show rexgroundingct`), but is not at hand: the recipe draws findings into real
X-rays, where it is known what each sentence means. Here a sentence means few instances, so that m = 1.
"""

from dataclasses import dataclass
from zlib import crc32

import numpy as np
import torch
from torch import Tensor, nn

from medcook import evaluation
from medcook.data import Case
from medcook.language import Question, one_of, shown_in, words_of
from medcook.methods import Batch
from medcook.recipes.language._findings import FINDINGS as COMBINATIONS
from medcook.recipes.language._findings import KINDS, MANY, Spoken, asked_of, matching, measures
from medcook.recipes.language._settings import (
    BASELINE,
    FINDINGS,
    FINDINGS_BUDGET,
    FINDINGS_QUICK,
    ToldOfFindings,
    scales,
)
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.sampling import trained

HIT = 0.1
"""The Dice from which on a sentence counts as answered, in the benchmark."""
DIFFUSE = "patch"
"""The kind that stands for typically non-focal findings: it has no clear edge. The others are focal."""

SORTS = ("one", "several")
MEASURED = ("dice", "hit", "focal", "diffuse", "instances")


def kinds_of(sentence: str) -> tuple[int, ...]:
    """Places in `KINDS` of the categories that a sentence may be about: one, or all where it names none."""
    words = set(words_of(sentence))
    named = tuple(number for number, kind in enumerate(KINDS) if words & {kind, MANY[kind]})
    return named or tuple(range(len(KINDS)))


def about_kinds(language: Spoken, there: tuple[int, ...], absent: bool) -> Question:
    """A random question about an image that shows the label values `there`, which asks for all of a category."""
    shown = {COMBINATIONS[value - 1].kind for value in there}
    others = tuple(kind for kind in KINDS if kind not in shown)
    kind = one_of(others if others and (absent or not shown) else tuple(sorted(shown)))
    return Question(language.some(kind=kind), matching(kind=kind))


@dataclass
class ToldCategories(ToldOfFindings):
    """Structured labels: masks of categories are all that is learnt. Asked with a sentence, it answers with the
    category that the sentence names, or with all of them."""

    trial = FINDINGS_QUICK

    def questions(self, batch: Batch) -> list[Question]:
        absent = (torch.rand(len(batch.labels)) < self.absent).tolist()
        pairs = zip(batch.labels, absent, strict=True)
        return [about_kinds(self.language, shown_in(label), no) for label, no in pairs]

    def answer(self, nets: nn.ModuleDict, images: Tensor, sentences: tuple[str, ...]) -> Tensor:
        masks = super().answer(nets, images, tuple(self.language.some(kind=kind) for kind in KINDS))
        return torch.stack([masks[:, kinds_of(sentence)].amax(1) for sentence in sentences], dim=1)


def representative(question: Question, there: tuple[int, ...], image: int, most: int) -> Question:
    """The question with at most so many of the instances that it means and that are there.

    Which ones was decided once, when somebody drew them: it depends on the image's number and on what is asked alone.
    """
    instances = [value for value in question.values if value in there]
    rank = {value: crc32(f"image {image}: {value} of {question.values}".encode()) for value in instances}
    return question._replace(values=tuple(sorted(sorted(instances, key=rank.get)[:most])))


@dataclass
class ToldInstances(ToldOfFindings):
    """Sentences whose masks hold at most `most` instances; what else they mean counts as background."""

    most: int = 1

    trial = FINDINGS_QUICK

    def questions(self, batch: Batch) -> list[Question]:
        numbers = range(len(batch.labels)) if batch.index is None else batch.index.tolist()
        asked = zip(super().questions(batch), batch.labels, numbers, strict=True)
        return [representative(question, shown_in(label), image, self.most) for question, label, image in asked]


def sentence_rows(fitted, case: Case) -> list[dict]:
    """A row, `one`, of the sentences that mean one finding, and two columns of those that mean several; means over a
    case's sentences.

    dice            of the answer, above a probability of 0.5, with all that the sentence means
    hit             whether it is at least `HIT`
    focal, diffuse  Dice of the sentences that are about such findings alone; NaN where there are none
    several         Dice of the sentences that mean several; `instances` the share of what these mean of which at least
                    half was answered
    """
    nets, method = trained(fitted), fitted.method
    images, labels = fitted.task.preparation.both(case)
    measured: dict[str, list[dict]] = {}
    for image, label in zip(images, labels, strict=True):
        sorts = asked_of(label, method.language, np.random.default_rng(0))
        questions = [(sort, question) for sort in SORTS for question in sorts[sort]]
        if not questions:
            continue
        with torch.no_grad():
            answers = method.answer(nets, image[None], tuple(question.sentence for _, question in questions))[0]
        for (sort, question), answer in zip(questions, answers, strict=True):
            measured.setdefault(sort, []).append(judged(answer.float().numpy(), label.numpy(), question))
    if "one" not in measured:
        return []
    one, several = ({name: mean([each[name] for each in measured[sort]]) for name in MEASURED} for sort in SORTS)
    return [evaluation.row(case, "one", **one | {"several": several["dice"], "instances": several["instances"]})]


def judged(answer: np.ndarray, label: np.ndarray, question: Question) -> dict[str, float]:
    """The measures of `sentence_rows` of one answer: probabilities (H, W), and a label map (H, W) that shows some of
    what the question means."""
    shown = [value for value in question.values if (label == value).any()]
    dice = measures(answer, np.isin(label, shown))["dice"]
    kinds = {COMBINATIONS[value - 1].kind for value in question.values}
    focal, diffuse = dice if DIFFUSE not in kinds else np.nan, dice if kinds == {DIFFUSE} else np.nan
    instances = float(np.mean([(answer[label == value] > 0.5).mean() >= 0.5 for value in shown]))
    return dict(zip(MEASURED, (dice, float(dice >= HIT), focal, diffuse, instances), strict=True))


def mean(values: list[float]) -> float:
    """Of those that are numbers; NaN where none is."""
    there = [value for value in values if not np.isnan(value)]
    return float(np.mean(there)) if there else float("nan")


recipe = Recipe(
    paper="rexgroundingct",
    title="Masks that come with a sentence, and not with a category",
    claim="A network that was trained on sentences with their masks answers the sentence about a finding with a "
    "higher Dice than one that was trained on masks of categories.",
    arms={
        "categories": Arm(ToldCategories()),
        "sentences": Arm(BASELINE),
        "one instance drawn": Arm(ToldInstances()),
    },
    compare=("sentences", "categories"),
    ablation=("sentences", "one instance drawn"),
    metric="dice",
    score=sentence_rows,
    scales=scales(FINDINGS_QUICK, FINDINGS, budget=FINDINGS_BUDGET),
    published={
        "private test, SAT fine-tuned, global Dice": 0.209,
        "private test, SAT fine-tuned, HIT": 0.473,
        "private test, SAT as it was, global Dice": 0.0,
        "private test, BiomedParse v2, global Dice": 0.025,
    },
    source="abstract; the data set's card, huggingface.co/datasets/rajpurkarlab/ReXGroundingCT; the leaderboard, "
    "rexrank.ai/ReXGroundingCT; categories, github.com/rajpurkarlab/ReXGroundingCT (src/categorize.py)",
    components=(
        Component(
            "sentences linked with masks",
            "implemented",
            "a step asks about each image with one sentence, whose mask holds the findings that it means and no "
            "others: the chapter's baseline. The same sentences, of one finding or of several, are asked in the score",
        ),
        Component(
            "structured labels",
            "implemented",
            "the other way to label, against which the data set is put: masks of three categories, as many steps and "
            "the same network, which hears the category's name. It answers a sentence with the category that the "
            "sentence names; the challenge rules out such answers, since they cannot part two findings of a kind. On "
            "validation images, with a seed that is not scored, its Dice was 0.42, and 0.66 after sentences. Nothing "
            "was tuned",
        ),
        Component(
            "representative instances in training",
            "implemented",
            "at most so many of the findings that a sentence means are drawn, always the same for an image and a "
            "sentence. There at most three: 1.95 on average, and 3.71 in the challenge's validation scans, where all "
            "were drawn. Here one, since an image has two to four findings; only plurals have less drawn, and yet in "
            "the same look Dice fell from 0.66 to 0.54 for sentences about one finding; for plurals, from 0.63 to 0.45",
        ),
        Component(
            "exhaustive labels in evaluation",
            "implemented",
            "the truth of a score is all that a sentence means, whatever was drawn for training; `instances` is the "
            "share of it that was found. There, precision of instances, too, from connected parts",
        ),
        Component(
            "Dice and HIT a sentence",
            "implemented",
            "the benchmark's: the mean over sentences, and the share with a Dice of at least 0.1. There sentences of "
            "one finding and of several are one mean; here what is compared is the Dice of one, and that of several "
            "is in a column of its own",
        ),
        Component(
            "focal and non-focal findings",
            "simplified",
            "columns of the score. Nodules and cavities are focal; patches, which have no edge, stand for what is not. "
            "There eight and six categories, 79% and 21% of the findings",
        ),
        Component(
            "findings of free text",
            "simplified",
            "three forms of full descriptions, and plurals that leave something open: sentences are made with the "
            "findings. There GPT-4 took them from radiologists' reports",
        ),
        Component(
            "3D segmentations in chest CT",
            "simplified",
            "a reader takes the data set's files, which could not be opened; findings drawn into X-rays of 64 x 64 "
            "pixels stand for it in the comparison",
        ),
        Component(
            "manual annotation and its quality control",
            "absent",
            "what is drawn into an image is known to the pixel, so nobody has to draw it again",
        ),
    ),
)
