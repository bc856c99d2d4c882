"""A comprehensive study of GPT-4V's multimodal capabilities in medical imaging: are reports judged by what counts?

Li, Liu, Wang, Liang, Liu, Wang, Cui, Tu, Wang and Zhou, medRxiv 2023. GPT-4V wrote reports, answered questions and drew
boxes. Its reports read well and had low BLEU; the authors ask for measures of meaning, since BLEU and its like compare
words. That remark needs no GPT-4V to be tested. Each real report of a test patient meets two others: one that says the
same otherwise, and one in which one fact is wrong, in nearly the same words. A judge is right where it holds the first
to be more alike. Judges are BLEU, ROUGE-L, CIDEr, shared words, shared facts, and a text encoder that read X-rays with
their reports.

Both reports are made by rules, and the wrong one keeps more words by design: a judge of words must fail. What a judge
of facts does is not decided beforehand: it knows neither negation nor every synonym. Nothing was looked at before.
"""

from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcook import evaluation
from medcook.data import Case
from medcook.methods import Batch, Method, Moment
from medcook.methods.classification import image_labels
from medcook.recipes.findings import _judging
from medcook.recipes.language._kept import known_reports
from medcook.recipes.language._reading import BRAINS, BUDGET, XRAYS
from medcook.recipes.language._reports import reports_of
from medcook.recipes.language.convirt import ConVIRT
from medcook.recipes.recipe import Arm, Component, Recipe, Scale
from medcook.sampling import once, trained
from medcook.tasks import Budget

JUDGES = {
    "BLEU": _judging.bleu,
    "ROUGE-L": _judging.rouge_l,
    "shared words": _judging.shared_words,
    "shared facts": _judging.shared_facts,
}
"""{name: (report, other report) -> likeness}; CIDEr also needs to know other reports."""


class Share(nn.Module):
    """Sees no image: logits (B, classes) that are the same for all."""

    def __init__(self, classes: int):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(classes))

    def forward(self, images: Tensor) -> Tensor:
        return self.logits.expand(len(images), -1)


@dataclass
class WordJudge(Method):
    """Compares reports by a formula. Of images it learns the share of the outcome alone.

    judge  a name in `JUDGES`, or `CIDEr`
    """

    judge: str = "BLEU"

    axes = 2
    trial = BRAINS

    def build(self, inputs: int, classes: int, dims: int) -> nn.ModuleDict:
        model = Share(classes)
        return nn.ModuleDict({"model": model, "average": deepcopy(model).requires_grad_(False)})

    def training_step(self, nets: nn.ModuleDict, labelled: Batch, unlabelled: Batch | None, now: Moment) -> Tensor:
        logits = nets["model"](labelled.images).float()
        return F.cross_entropy(logits, image_labels(labelled.labels, logits.shape[1]))

    def predict(self, nets: nn.ModuleDict, images: Tensor) -> Tensor:
        """Class probabilities (B, classes, H, W), the same everywhere."""
        found = nets["average"](images).softmax(1)
        return found[:, :, None, None].expand(*found.shape, *images.shape[2:])

    def likeness(self, fitted, found: str, truth: str) -> float:
        """How much a report is like the true one."""
        if self.judge == "CIDEr":
            known = once(fitted, "rarity", lambda: _judging.rarity(known_reports(fitted.task)))
            return _judging.cider(found, truth, known)
        return JUDGES[self.judge](found, truth)


@dataclass
class LearntJudge(ConVIRT):
    """Compares reports by what reading them with their X-rays made of each: the cosine of their vectors."""

    @torch.no_grad()
    def likeness(self, fitted, found: str, truth: str) -> float:
        vectors = self.heard(trained(fitted)["reader"], (found, truth)).float()
        return float(F.cosine_similarity(vectors[:1], vectors[1:]))


def judging_rows(fitted, case: Case) -> list[dict]:
    """A row for each kind of error that can be made in the case's report; cases without a report have none.

    right           1 where the paraphrase is held to be more like the report than the wrong one is, 0.5 where equally
    paraphrase, wrong   the two likenesses
    nearest_agrees  F1 of facts with the training report, in other words, that the judge likes best
    """
    report = reports_of(fitted.task.data).get(case.case_id)
    if not report:
        return []
    errors = {kind: _judging.with_an_error(report, kind) for kind in _judging.KINDS}
    if not any(error for kind, error in errors.items() if kind != "negation"):
        return []
    judge = fitted.method
    same = judge.likeness(fitted, _judging.said_otherwise(report), report)
    agrees = _judging.shared_facts(nearest(fitted, report), report)
    rows = []
    for kind, error in errors.items():
        if error:
            wrong = judge.likeness(fitted, error, report)
            values = {"right": verdict(same, wrong), "paraphrase": same, "wrong": wrong, "nearest_agrees": agrees}
            rows.append(evaluation.row(case, kind, **values))
    return rows


def verdict(same: float, wrong: float, least: float = 1e-6) -> float:
    """1 where the paraphrase's likeness is higher, 0 where the wrong report's is, 0.5 where they are equal."""
    return 0.5 if abs(same - wrong) <= least else float(same > wrong)


def nearest(fitted, report: str) -> str:
    """Of the training reports in other words, the one that the judge holds to be most alike."""
    known = [other for other in known_reports(fitted.task) if other.lower() != report.lower()]
    return max(known, key=lambda other: fitted.method.likeness(fitted, other, report))


ARMS = {
    "shared facts": Arm(WordJudge(judge="shared facts")),
    "BLEU": Arm(WordJudge()),
    "shared words": Arm(WordJudge(judge="shared words")),
    "ROUGE-L": Arm(WordJudge(judge="ROUGE-L")),
    "CIDEr": Arm(WordJudge(judge="CIDEr")),
    "read with X-rays": Arm(LearntJudge()),
    "read with X-rays, small encoder": Arm(LearntJudge(start="random")),
}

recipe = Recipe(
    paper="gpt4v-study",
    title="What judges of reports notice: words or meaning",
    claim="Between a report in other words and one with a wrong fact in nearly the same words, a judge of facts picks "
    "the right one more often than BLEU.",
    arms=ARMS,
    compare=("shared facts", "BLEU"),
    ablation=("shared facts", "shared words"),
    metric="right",
    score=judging_rows,
    scales={
        "quick": Scale(
            BRAINS,
            Budget(steps=30, batch=6, precision="float32", checks=0),
            replicates=1,
            arms=tuple(name for name in ARMS if name != "read with X-rays"),
        ),
        "full": Scale(XRAYS, BUDGET, arms=tuple(ARMS)[:6]),
    },
    source="abstract; Li et al., 2023",
    components=(
        Component(
            "limits of metrics of words",
            "implemented",
            "BLEU-4, ROUGE-L and CIDEr of real reports of tuberculosis, against their paraphrase and against one with "
            "a wrong side, field, sign or a negation. Reports have one sentence or two, not a page",
        ),
        Component(
            "metrics of meaning",
            "implemented",
            "F1 of sides, fields and signs found by words, as CheXbert's F1 is of findings, and the cosine of a text "
            "encoder that read 340 X-rays with their reports. Facts and paraphrases were written by the same hand, "
            "which favours facts; the encoder is free of that",
        ),
        Component(
            "report generation",
            "simplified",
            "nothing is generated: `nearest_agrees` says what the best-liked report of another patient states. "
            "Generated reports are judged in `cxr-report` and `medregion-ct`",
        ),
        Component("GPT-4V and its prompts", "absent", "a paid service that changes; its answers cannot be reproduced"),
        Component("visual question answering", "absent", "needs the service; small networks answer in chapter 11"),
        Component("visual grounding", "absent", "needs the service; chapter 11 measures boxes of its own networks"),
    ),
)
