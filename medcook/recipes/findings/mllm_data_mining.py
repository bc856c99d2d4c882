"""Potential of multimodal large language models for data mining of medical images and free-text reports (Zhang, Pan,
Zhong et al., Meta-Radiology 2024; arXiv 2407.05758).

Gemini, GPT-4 and four others were asked about 14 sets of images and three of reports. None was best at everything:
Gemini at reports and at finding lesions, GPT at outlines and places, and neither at naming the disease. What can be
tested without these services is how models are asked and judged (`_harness`, for any callable), and whether their order
depends on the task. With s the score of an answer, 0 to 1, and c the mean score of who sees nothing and says what is
commonest in training,

  skill = (s - c) / (1 - c)
  leaning of a model = mean skill in findings and reports - mean skill in boxes and outlines,

which differs between two models where their order in one differs from that in the other. Four small models (`_miners`)
learn from the same X-rays, lungs and reports: a language model that writes every answer, a segmenter, a linear map of
features of photographs, and the most similar known case.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from medcook import evaluation
from medcook.data import Case
from medcook.recipes.fairness.mask_of_truth import apart
from medcook.recipes.findings import _mined as mined
from medcook.recipes.findings._harness import judge
from medcook.recipes.findings._mined import KINDS, MinedTask
from medcook.recipes.findings._miners import BRAINS, Nearest, Probe, Segmenter, Writer
from medcook.recipes.findings._settings import scales
from medcook.recipes.language._reports import reports_of
from medcook.recipes.recipe import Arm, Component, Recipe
from medcook.sampling import once
from medcook.tasks import Budget

XRAYS = MinedTask("chest_xray", evaluation="test")
BUDGET = Budget(steps=300, batch=12, checks=0)
STATUSES = {
    "answered": ("answered",),
    "malformed": ("malformed",),
    "refused": ("refused",),
    "failed": ("failed", "late"),
}


@torch.no_grad()
def mined_rows(fitted, case: Case) -> list[dict]:
    """A row for each kind of question that has a true answer; means over the case's images. Cases without a report have
    none.

    score, skill    what the answer is worth, and on the scale where nothing known is 0
    leaning         skill times a weight, so that a patient's mean is skill in reports less skill in places
    answered, malformed, refused, failed   what became of the questions;   words  how long the answers are
    """
    task, report = fitted.task, reports_of(fitted.task.data).get(case.case_id)
    outcome = case.attributes.get(task.outcome)
    if not report or outcome is None:
        return []
    known = once(fitted, "known", lambda: mined.known_of(task))
    chances = once(fitted, "chances", lambda: mined.chances(known))
    model = once(fitted, "model", lambda: fitted.method.model(fitted, known))
    images, lungs = (part[:, 0].numpy() for part in apart(task.preparation.images(case)))
    truths = [mined.truths_of(mask > 0.5, task.is_positive(case.attributes), report) for mask in lungs]
    kinds = [kind for kind in KINDS if all(kind in truth for truth in truths)]
    weights, rows = mined.leanings(kinds), []
    for kind in kinds:
        found = [
            judge(model, KINDS[kind], mined.asked(kind, image, report), truth[kind])
            for image, truth in zip(images, truths, strict=True)
        ]
        score = float(np.mean([each.score for each in found]))
        skill = mined.skill(score, chances[kind])
        values = {name: float(np.mean([each.status in some for each in found])) for name, some in STATUSES.items()}
        values |= {"score": score, "skill": skill, "leaning": weights[kind] * skill}
        rows.append(evaluation.row(case, kind, **values, words=float(np.mean([each.words for each in found]))))
    return rows


def ranked(frames: Mapping[str, pd.DataFrame], column: str = "score") -> pd.DataFrame:
    """Kinds by models: the rank of each mean in frames of `mined_rows`; 1 is best, and equal ones share theirs."""
    means = pd.DataFrame({name: frame.groupby("structure")[column].mean() for name, frame in frames.items()})
    return means.loc[[kind for kind in KINDS if kind in means.index]].rank(axis=1, ascending=False)


def concordance(ranks: pd.DataFrame) -> float:
    """Kendall's W of ranks (kinds, models) without ties: 1 if all kinds order the models alike, 0 if they agree on
    nothing."""
    kinds, models = ranks.shape
    spread = ((ranks.sum() - ranks.to_numpy().sum() / models) ** 2).sum()
    return float(12 * spread / (kinds**2 * (models**3 - models)))


ARMS = {
    "language model": Writer(),
    "segmenter": Segmenter(),
    "linear map": Probe(),
    "nearest case": Nearest(),
}
SCALES = scales(BRAINS, XRAYS, budget=BUDGET)
SCALES["quick"] = replace(
    SCALES["quick"], methods={name: replace(method, encoder="random") for name, method in ARMS.items()}
)

recipe = Recipe(
    paper="mllm-data-mining",
    title="Mining images and reports: the best model depends on the question",
    claim="Models rank differently by task: a small language model, less a segmenter, has more skill in findings and "
    "reports of real X-rays than in boxes and outlines of lungs.",
    arms={name: Arm(method) for name, method in ARMS.items()},
    compare=("language model", "segmenter"),
    metric="leaning",
    score=mined_rows,
    scales=SCALES,
    source="abstract; Zhang et al., 2024",
    components=(
        Component(
            "a harness for any model",
            "implemented",
            "a model is a callable that gets a prompt with an image or a text, and gives text; it may take a limited "
            "time, and be asked again. Prompts say in which form to answer",
        ),
        Component(
            "answers that cannot be used",
            "implemented",
            "refusals, answers in another form, failures and late ones are counted apart, and score nothing; columns "
            "`refused`, `malformed` and `failed`. A model at hand seldom fails, but the segmenter refuses reports, "
            "and what the language model writes may have any form",
        ),
        Component(
            "tasks on images and on reports",
            "implemented",
            "classification, detection (on which side, on how many), boxes, outlines and reports from real X-rays, and "
            "what a report states in other words. Lungs take the place of lesions, which nobody outlined here; "
            "diagnosis is classification, as there is one disease",
        ),
        Component(
            "models rank differently by task",
            "implemented",
            "`leaning` puts it into one number for a pair of models. `ranked` has every kind, and `concordance` says "
            "how far kinds agree. The pair was chosen beforehand, by what they are made of: a segmenter that cannot "
            "read must lean to places; by how much either is better at its own is what is measured",
        ),
        Component(
            "six and more large models",
            "simplified",
            "four small ones, trained here on 340 patients, where Gemini, GPT-4, Claude, Yi and LLaMA were asked "
            "without training. These are paid services or large, and change; a test asks a made-up one of them, which "
            "refuses, talks, breaks and is late",
        ),
        Component(
            "14 sets of images and three of reports",
            "simplified",
            "one of each: X-rays of Montgomery and Shenzhen with lungs, and their radiologists' reports; no skin, "
            "teeth, eyes or endoscopy",
        ),
        Component("generation efficiency", "simplified", "column `words`: how much is written, not how fast"),
        Component("judgement of reports by their words", "absent", "by their facts here; `gpt4v-study` compares both"),
    ),
)
