"""Seven kinds of questions about X-rays and their reports, what is true of an image, and what who knows nothing says.

Truths are real: tuberculosis, the lungs as people drew them, and what a radiologist's report states (`facts_of`).
Images are those that networks get; coordinates are their pixels. Reports are asked about in other words.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from medcook.language import words_of
from medcook.recipes.fairness.mask_of_truth import RegionTask, apart
from medcook.recipes.findings import _harness as harness
from medcook.recipes.findings._asked import right_lung
from medcook.recipes.findings._harness import Kind, Question
from medcook.recipes.findings._judging import said_otherwise, shared_facts
from medcook.recipes.language._reports import FIELDS, SIGNS, ReportTask, facts_of, said

SIDES = ("right", "left")
FACTS = (*SIDES, *sorted(set(FIELDS.values())), *SIGNS)
"""What a report may state."""


def report(text: str, size: tuple[int, int]) -> str | None:
    """A parser for reports: anything with words."""
    return text if words_of(text) else None


KINDS = {
    "classification": Kind(
        "Does this chest X-ray show tuberculosis? Answer yes or no.", harness.one_of("yes", "no"), harness.same
    ),
    "detection": Kind(
        "In which lungs does this chest X-ray show a finding? Answer right, left, both of these words, or none.",
        harness.any_of(*SIDES),
        harness.overlap,
    ),
    "counting": Kind(
        "In how many lungs does this chest X-ray show a finding? Answer with a number.",
        harness.whole_number,
        harness.same,
    ),
    "localisation": Kind(
        "Give the boxes of the patient's right and left lung in this order, each as [left, top, right, bottom] in "
        "pixels of this image of {width} x {height}.",
        harness.boxes(2),
        harness.box_overlap,
    ),
    "segmentation": Kind(
        "Outline both lungs, each as a polygon [[x, y], [x, y], ...] in pixels of this image of {width} x {height}.",
        harness.outlines,
        harness.mask_overlap,
    ),
    "generation": Kind("Write a report on this chest X-ray.", report, shared_facts),
    "mining": Kind(
        f"What does this report state? Answer with any of these words, or none: {', '.join(FACTS)}.",
        harness.any_of(*FACTS),
        harness.overlap,
        about="text",
    ),
}
"""{name: kind}. The study has six tasks on images and reports; counting is a second form of detection."""
REPORTS, PLACES = ("detection", "counting", "generation", "mining"), ("localisation", "segmentation")
"""What Gemini was good at in the study, findings and reports, and what GPT was; neither was at classification."""


def asked(kind: str, image: np.ndarray, text: str) -> Question:
    """A question about an image (H, W), or about its report, said otherwise."""
    height, width = image.shape
    prompt = KINDS[kind].prompt.format(width=width, height=height)
    if KINDS[kind].about == "text":
        return Question(kind, prompt, None, said_otherwise(text))
    return Question(kind, prompt, image)


def lungs_of(lungs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The right and the left lung (H, W) bool of a mask of both."""
    mask = torch.from_numpy(lungs)[None, None]
    right = right_lung(mask)[0, 0].numpy()
    return right, lungs & ~right


def boxes_of(lungs: np.ndarray) -> np.ndarray | None:
    """(2, 4): left, top, right and bottom of the right and the left lung in a mask (H, W); None if one is not there."""
    parts = lungs_of(lungs)
    if not all(part.any() for part in parts):
        return None
    found = []
    for part in parts:
        rows, columns = np.nonzero(part)
        found.append((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
    return np.array(found, dtype=float)


def truths_of(lungs: np.ndarray, outcome: bool, text: str) -> dict[str, object]:
    """{kind: truth} of an image, its lungs (H, W) bool, its outcome and its report, for the kinds that have one.

    Where there is tuberculosis, and the report names no side, nobody knows in which lungs.
    """
    facts = facts_of(text)
    found: dict[str, object] = {"classification": "yes" if outcome else "no"}
    if facts.sides or not outcome:
        found |= {"detection": facts.sides, "counting": len(facts.sides)}
    if (boxes := boxes_of(lungs)) is not None:
        found |= {"localisation": boxes, "segmentation": lungs}
    return found | {"generation": text, "mining": frozenset().union(*facts)}


@dataclass(frozen=True)
class MinedTask(ReportTask, RegionTask):
    """X-rays with the lungs as second channel, outcome and report."""


class Known(NamedTuple):
    """What is known of training images (N, 1, H, W): {kind: truth} of each, and its report."""

    images: Tensor
    truths: list[dict[str, object]]
    reports: tuple[str, ...]


def known_of(task: MinedTask) -> Known:
    """Everything that a model may know."""
    samples = task.samples("labelled")
    images, lungs = apart(samples.images)
    outcomes, reports = samples.labels.flatten(1).amax(1) == 1, said(samples.groups)
    rows = zip((lungs[:, 0] > 0.5).numpy(), outcomes.tolist(), reports, strict=True)
    return Known(images, [truths_of(*row) for row in rows], reports)


def ignorant(truths: list[Mapping[str, object]]) -> dict[str, str]:
    """{kind: answer} of a model that sees nothing: what is commonest, or the mean, among these truths.

    A kind of which none of them is known has no answer.
    """
    of = {kind: [truth[kind] for truth in truths if kind in truth] for kind in KINDS}
    found = {}
    for kind, values in of.items():
        if values:
            one = np.mean(values, axis=0) if kind in PLACES else Counter(values).most_common(1)[0][0]
            found[kind] = said_answer(kind, one > 0.5 if kind == "segmentation" else one)
    return found


def said_answer(kind: str, value: object) -> str:
    """A truth, or what a model holds for one, as an answer."""
    if kind == "localisation":
        return " ".join(harness.said_box(box) for box in value)
    if kind == "segmentation":
        return harness.said_outline(value)
    if isinstance(value, frozenset):
        return ", ".join(word for word in FACTS if word in value) or "none"
    return str(value)


def chances(known: Known) -> dict[str, float]:
    """{kind: mean score} that `ignorant` answers have on the very images that they are of."""
    answers, size = ignorant(known.truths), tuple(known.images.shape[2:])
    found = {}
    for kind, text in answers.items():
        value = KINDS[kind].parse(text, size)
        scores = [KINDS[kind].score(value, truth[kind]) for truth in known.truths if kind in truth]
        found[kind] = float(np.mean(scores))
    return found


def skill(score: float, chance: float) -> float:
    """A score on the scale on which who knows nothing has 0, and who is always right 1."""
    return (score - chance) / max(1 - chance, 0.05)


def leanings(kinds: list[str]) -> dict[str, float]:
    """{kind: weight} by which the mean over these kinds of a patient is skill in reports less skill in places."""
    counts = {group: sum(kind in group for kind in kinds) for group in (REPORTS, PLACES)}
    signs = {kind: (1, REPORTS) if kind in REPORTS else (-1, PLACES) for kind in (*REPORTS, *PLACES)}
    return {kind: signs[kind][0] * len(kinds) / counts[signs[kind][1]] if kind in signs else 0.0 for kind in kinds}
