"""Findings drawn into real X-rays, so that it is known which one a sentence means: the referring tasks of chapter 11.

X-rays, lungs and everything else in the image are real; findings are simulated. Each is a nodule, a cavity or a patch,
small or large, in the upper, middle or lower field of the right or the left lung; no two of an image agree in all of
that. A label value stands for one such combination, so a sentence that leaves something open means several values.
As in reports, right and left are the patient's: the right lung is on the left of the image.
"""

from dataclasses import dataclass, fields
from functools import cached_property
from itertools import product
from typing import ClassVar, NamedTuple
from zlib import crc32

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from medcook import evaluation
from medcook.data import Case
from medcook.language import Question, one_of
from medcook.preparation import Preparation
from medcook.recipes.synthesis import _regions
from medcook.sam import prompts
from medcook.sampling import trained
from medcook.synthesis import small
from medcook.tasks import Task

KINDS = ("nodule", "cavity", "patch")
MANY = {"nodule": "nodules", "cavity": "cavities", "patch": "patches", "finding": "findings"}
SIZES = ("small", "large")
SIDES = ("right", "left")
FIELDS = ("upper", "middle", "lower")
RADII = {"small": (2.0, 2.6), "large": (3.6, 4.8)}
"""Pixels of a 64 x 64 image, drawn anew for each finding."""
MOST = 4
"""Findings in an image: two to so many."""


class Finding(NamedTuple):
    """What is said of a finding; the words are those of `KINDS`, `SIZES`, `SIDES` and `FIELDS`."""

    kind: str
    size: str
    side: str
    field: str


FINDINGS = tuple(Finding(*words) for words in product(KINDS, SIZES, SIDES, FIELDS))
"""Every combination; `FINDINGS[value - 1]` is what a label value stands for."""


def value_of(finding: Finding) -> int:
    """The label value of a combination."""
    return 1 + FINDINGS.index(finding)


def matching(**words: str) -> tuple[int, ...]:
    """The label values of all findings of which these words hold, e.g. `matching(kind="cavity", side="left")`."""
    return tuple(
        value
        for value, finding in enumerate(FINDINGS, 1)
        if all(getattr(finding, name) == word for name, word in words.items())
    )


def fields_of(lungs: np.ndarray) -> dict[tuple[str, str], np.ndarray]:
    """{(side, field): (H, W) bool} of lungs (H, W) bool: halves left and right of their middle, cut into thirds."""
    rows, columns = np.indices(lungs.shape)
    middle = np.median(columns[lungs]) if lungs.any() else 0
    found = {}
    for side, half in zip(SIDES, (lungs & (columns < middle), lungs & (columns >= middle)), strict=True):
        low, high = (rows[half].min(), rows[half].max() + 1) if half.any() else (0, 1)
        third = np.clip((rows - low) * 3 // max(high - low, 1), 0, 2)
        found |= {(side, name): half & (third == number) for number, name in enumerate(FIELDS)}
    return found


def shape_of(finding: Finding, centre: tuple[float, float], size: tuple[int, int], rng: np.random.Generator):
    """Brightness (H, W), 0 to 1, and mask (H, W) bool of a finding around a place; sizes scale with the image.

    nodule  a disc with a soft edge;  cavity  a ring around dark air, of which the mask is the whole
    patch   an uneven cloud without a clear edge
    """
    rows, columns = np.indices(size)
    radius = rng.uniform(*RADII[finding.size]) * size[0] / 64
    stretch, angle = rng.uniform(0.8, 1.25), rng.uniform(0, np.pi)
    down, across = rows - centre[0], columns - centre[1]
    first = (down * np.cos(angle) + across * np.sin(angle)) * stretch
    second = (across * np.cos(angle) - down * np.sin(angle)) / stretch
    distance = np.hypot(first, second) / radius
    inside = distance <= 1
    disc = np.clip((1.15 - distance) / 0.3, 0, 1)
    if finding.kind == "cavity":
        return disc * np.clip((distance - 0.35) / 0.3, -0.4, 1), inside
    if finding.kind == "patch":
        cloud = ndimage.gaussian_filter(rng.standard_normal(size), 0.35 * radius)
        cloud = np.clip(0.65 + 0.5 * cloud / cloud.std(), 0, 1.2)
        return 1.3 * cloud * np.exp(-((distance / 0.85) ** 2)), inside
    return disc, inside


def drawn(image: np.ndarray, lungs: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An image (H, W) of unit variance with two to `MOST` findings in its lungs (H, W), and their label map (H, W).

    Often they are of one kind, so that size or place must tell them apart. No two overlap.
    """
    image, label, places = image.copy(), np.zeros(image.shape, np.uint8), fields_of(lungs)
    favourite = KINDS[rng.integers(len(KINDS))]
    for _ in range(rng.integers(2, MOST + 1)):
        for _attempt in range(20):
            kind = favourite if rng.random() < 0.6 else KINDS[rng.integers(len(KINDS))]
            names = (SIZES[rng.integers(2)], SIDES[rng.integers(2)], FIELDS[rng.integers(3)])
            finding = Finding(kind, *names)
            cells = np.argwhere(places[finding.side, finding.field])
            if not len(cells) or (label == value_of(finding)).any():
                continue
            bright, mask = shape_of(finding, tuple(cells[rng.integers(len(cells))]), image.shape, rng)
            if not (label[ndimage.binary_dilation(mask)] > 0).any():
                image += rng.uniform(0.8, 1.3) * bright
                label[mask] = value_of(finding)
                break
    return image, label


@dataclass(frozen=True)
class Painted(Preparation):
    """A preparation after which findings are drawn into every image, in several ways, which the case's name decides.

    versions  how many of each image there are
    """

    versions: int = 1

    what: ClassVar[str] = "findings"

    def paint(self, image: np.ndarray, lungs: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """An image (H, W) with something in its lungs (H, W), and its label map (H, W)."""
        return drawn(image, lungs, rng)

    def both(self, case: Case) -> tuple[Tensor, Tensor]:
        """Images (N * versions, C, H, W) and label maps (N * versions, H, W), the versions of an image in a row."""
        images, organs = super().images(case), super().labels(case)
        rng = np.random.default_rng(crc32(f"{self.what} of {case.case_id}".encode()))
        pairs = [
            self.paint(image[0].numpy(), organ.numpy() > 0, rng)
            for image, organ in zip(images, organs, strict=True)
            for _ in range(self.versions)
        ]
        painted, labels = (torch.from_numpy(np.stack(part)) for part in zip(*pairs, strict=True))
        return painted[:, None].float(), labels

    def images(self, case: Case) -> Tensor:
        return self.both(case)[0]

    def labels(self, case: Case, values: np.ndarray | None = None) -> Tensor:
        return self.both(case)[1]


@dataclass(frozen=True)
class FindingsTask(Task):
    """X-rays of `side` x `side` pixels with findings; the labels are the findings'.

    Images and labels are on the task's own grid: `FindingsTask.preparation` cannot restore them to the case's.
    """

    side: int = 64
    versions: int = 3

    painter: ClassVar[type[Painted]] = Painted

    @cached_property
    def preparation(self) -> Painted:
        plain = small(super().preparation, self.side)
        kept = {part.name: getattr(plain, part.name) for part in fields(Preparation)}
        return self.painter(**kept, versions=self.versions)

    @property
    def classes(self) -> int:
        return 1 + len(FINDINGS)

    @property
    def structures(self) -> dict[int, str]:
        return {value: Spoken().name(value) for value in range(1, self.classes)}

    @property
    def data_kind(self) -> str:
        """What evidence on it counts as."""
        return "simulated" if self.data.manifest.simulated else "real-anatomy-simulated"


FORMS = (
    "{size} {kind} in the {field} field of the {side} lung",
    "{side} lung, {field} field: {kind}, {size}",
    "there is a {size} {kind} in the {side} {field} lung",
)
"""How a finding is told apart from all others."""
PARTS = (("kind",), ("size", "kind"), ("kind", "side"), ("side",), ("kind", "field"))
"""What sentences tell that may mean several findings."""


@dataclass(frozen=True)
class Spoken:
    """Findings are asked for by full descriptions, or by some of their words, which may mean several at once.

    forms  of full descriptions; scores use the first.   several  the share of questions that leave something open
    """

    forms: tuple[str, ...] = FORMS
    several: float = 0.3

    def name(self, value: int) -> str:
        return self.full(FINDINGS[value - 1], 0)

    def full(self, finding: Finding, form: int) -> str:
        """A description that tells everything."""
        return self.forms[form].format(**finding._asdict())

    def some(self, **words: str) -> str:
        """A sentence for all findings of which these words hold."""
        size, kind, place = words.get("size", ""), MANY[words.get("kind", "finding")], ""
        if "field" in words or "side" in words:
            field = f"{words['field']} field" if "field" in words else ""
            lung = f"{words['side']} lung" if "side" in words else ""
            place = "in the " + " of the ".join(filter(None, (field, lung)))
        return " ".join(filter(None, ("all", size, kind, place)))

    def ask(self, there: tuple[int, ...], group: int | None, absent: bool) -> Question:
        others = tuple(value for value in range(1, len(FINDINGS) + 1) if value not in there)
        value = one_of(others if others and (absent or not there) else there)
        finding = FINDINGS[value - 1]
        if float(torch.rand(())) < self.several:
            words = {name: getattr(finding, name) for name in PARTS[one_of(tuple(range(len(PARTS))))]}
            return Question(self.some(**words), matching(**words))
        return Question(self.full(finding, one_of(tuple(range(len(self.forms))))), (value,))


def box_of(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """(top, left, bottom, right) of a mask (H, W), the last two exclusive; None where it is empty."""
    if not mask.any():
        return None
    left, top, right, bottom = map(int, prompts.box_of(mask))
    return top, left, bottom, right


def box_iou(one: tuple[int, int, int, int] | None, other: tuple[int, int, int, int] | None) -> float:
    """Intersection over union of two boxes; 0 where one is missing."""
    if one is None or other is None:
        return 0.0
    return float(_regions.box_iou(torch.tensor(one).double(), torch.tensor(other).double()))


def asked_of(label: Tensor, language: Spoken, rng: np.random.Generator) -> dict[str, list[Question]]:
    """What a score asks about a label map (H, W): each finding by its full description, its kinds and sides in the
    plural, and as many full descriptions of what is not there."""
    there = sorted({*label.unique().tolist()} - {0})
    found = [FINDINGS[value - 1] for value in there]
    groups = {("kind", each.kind) for each in found} | {("side", each.side) for each in found}
    others = [value for value in range(1, len(FINDINGS) + 1) if value not in there]
    return {
        "one": [Question(language.name(value), (value,)) for value in there],
        "several": [Question(language.some(**{k: v}), matching(**{k: v})) for k, v in sorted(groups)],
        "absent": [Question(language.name(value), ()) for value in rng.choice(others, len(there), replace=False)],
    }


def grounding_rows(fitted, case: Case) -> list[dict]:
    """A row for each sort of question: `one` finding, `several`, and what is `absent`; means over a case's questions.

    dice, iou   of the answer, above a probability of 0.5, with what the sentence means (one and several)
    hit         whether the boxes around both overlap by half of their union
    pointed     whether the most probable pixel is in what is meant
    rejected    whether nothing was found: right where the finding is absent, wrong where it is there
    highest     the highest probability of the answer
    """
    nets, method = trained(fitted), fitted.method
    images, labels = fitted.task.preparation.both(case)
    rng = np.random.default_rng(crc32(f"questions about {case.case_id}".encode()))
    measured: dict[str, list[dict]] = {}
    for image, label in zip(images, labels, strict=True):
        sorts = asked_of(label, method.language, rng)
        questions = [(sort, question) for sort, each in sorts.items() for question in each]
        with torch.no_grad():
            answers = method.answer(nets, image[None], tuple(question.sentence for _, question in questions))[0]
        for (sort, question), answer in zip(questions, answers, strict=True):
            truth = torch.isin(label, torch.tensor(question.values, dtype=label.dtype)).numpy()
            measured.setdefault(sort, []).append(measures(answer.float().numpy(), truth))
    return [
        evaluation.row(case, sort, **{name: float(np.mean([each[name] for each in found])) for name in found[0]})
        for sort, found in measured.items()
    ]


def measures(answer: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """What `grounding_rows` tells of one answer: probabilities (H, W), and truth (H, W) bool."""
    mask = answer > 0.5
    shared, total = (mask & truth).sum(), mask.sum() + truth.sum()
    values = {"rejected": float(not mask.any()), "highest": float(answer.max())}
    if not truth.any():
        return values | dict.fromkeys(("dice", "iou", "hit", "pointed"), float("nan"))
    return values | {
        "dice": float(2 * shared / total),
        "iou": float(shared / (total - shared)),
        "hit": float(box_iou(box_of(mask), box_of(truth)) >= 0.5),
        "pointed": float(truth.flat[answer.argmax()]),
    }
