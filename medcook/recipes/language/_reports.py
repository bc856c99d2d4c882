"""What radiologists wrote about the chest X-rays of Montgomery and Shenzhen: reports, and the facts they state.

The clinical table of `chest_xray` has a radiologist's own words about every patient whom it lists: "normal",
"PTB in the right upper field", "RUL infiltrate, cavitary". Two hospitals wrote in two styles. What a report says is
found by its words (`facts_of`), not by a model. For the embedded cohort, whose patients nobody reported on, reports are
made from what is known of them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from medcook.cohorts import OutcomeTask
from medcook.data import Dataset
from medcook.errors import MedcookError
from medcook.tasks import Samples, shared_dataset

LOBES = {
    "rul": ("right", "upper"),
    "rml": ("right", "middle"),
    "rll": ("right", "lower"),
    "lul": ("left", "upper"),
    "lll": ("left", "lower"),
    "lingula": ("left", "middle"),
    "rl": ("right", ""),
    "ll": ("left", ""),
}
"""Abbreviations of lobes: side, and the field of the lung that it mostly fills."""
SIDES = {"right": ("right",), "rt": ("right",), "left": ("left",), "bilateral": ("right", "left")}
SIDES |= {"bilaterally": ("right", "left"), "both": ("right", "left"), "lt": ("left",)}
FIELDS = {"upper": "upper", "apex": "upper", "apical": "upper", "middle": "middle", "lower": "lower"}
SIGNS = {
    "cavity": "cavit",
    "effusion": "effusion|fluid|pleurisy",
    "pleura": "pleura|adhesion",
    "scars": "scar|fibro|inactive|old",
    "infiltrate": "infiltrat|pneumonia|infection",
    "nodules": "nodul|granuloma|miliary|disseminated|tuberculoma",
    "calcified": "calcif",
    "tuberculosis": r"\b[ps]?tb\b|tubercul",
}
"""What a report may state, and the beginnings of words that state it."""


class Facts(NamedTuple):
    """What a report states: sides and fields of the lungs, and signs; all empty for a normal one."""

    sides: frozenset[str]
    fields: frozenset[str]
    signs: frozenset[str]


def facts_of(report: str) -> Facts:
    """The facts that a report's words state. Negations are rare in these reports, and are not understood."""
    text = report.lower()
    words = re.findall("[a-z]+", text)
    lobes = [LOBES[word] for word in words if word in LOBES]
    sides = {side for word in words for side in SIDES.get(word, ())} | {side for side, _ in lobes}
    fields = {FIELDS[word] for word in words if word in FIELDS} | {field for _, field in lobes if field}
    signs = {name for name, pattern in SIGNS.items() if re.search(pattern, text)}
    return Facts(*map(frozenset, (sides, fields, signs)))


def reports_of(data: Dataset) -> dict[str, str]:
    """{case_id: report} of the cases that have one; a MedcookError for data sets without reports."""
    if data.manifest.simulated:
        return {case: made_up(data.attributes(case)) for case in data.index()}
    if not hasattr(data, "clinical"):
        raise MedcookError(f"{data.manifest.name} has no reports.", "Take chest_xray or embedded.")
    lines = {case: " ".join(row.get("Condition", "").split()) for case, row in data.clinical.items()}
    return {case: line for case, line in lines.items() if line and not line.lower().startswith("no report")}


def made_up(attributes: Mapping) -> str:
    """A report about a patient of the embedded cohort."""
    finding = {"atrophy": "atrophy with wide ventricles"}.get(attributes.get("group"), "normal")
    return f"{finding}, {'older' if attributes['age'] >= 55 else 'young'} patient"


CORPORA = ("embedded", "chest_xray")
"""Data sets with reports; `Samples.groups` say which report an image has: see `said`."""
MANY = 10_000


@lru_cache(maxsize=4)
def sentences_of(dataset: str) -> tuple[str, ...]:
    """Every report of a data set once, in the order of the alphabet."""
    if dataset not in CORPORA:
        raise MedcookError(f"{dataset} has no reports.", f"Take one of {', '.join(CORPORA)}.")
    return tuple(sorted(set(reports_of(shared_dataset(dataset)).values())))


def said(groups: Tensor) -> tuple[str, ...]:
    """The reports of images, by their groups (B,) int64 as a `ReportTask` hands them out."""
    return tuple(sentences_of(CORPORA[number // MANY])[number % MANY] for number in groups.tolist())


@dataclass(frozen=True)
class ReportTask(OutcomeTask):
    """An outcome of each image, and images with reports to learn from first; only patients with a report train.

    Unlabelled samples are those of all training patients, also of those whose outcome is known: it is hidden there,
    the report is not. Labelled ones are everybody's, or those of `labelled` patients at most, half of them with the
    outcome, which `draw` picks. Groups say which report an image has.
    """

    @cached_property
    def _reports(self) -> dict[str, str]:
        return reports_of(self.data)

    def _kept(self, patients: tuple[str, ...]) -> tuple[str, ...]:
        return super()._kept(tuple(p for p in patients if self.data.patients[p][0] in self._reports))

    @cached_property
    def unlabelled_patients(self) -> tuple[str, ...]:
        return self._kept(
            self.data.split.train if self.fold is None else self.data.split.folds(self.folds)[self.fold][0]
        )

    @cached_property
    def labelled_patients(self) -> tuple[str, ...]:
        everyone = self.unlabelled_patients
        if self.labelled is None:
            return everyone
        order = torch.randperm(len(everyone), generator=torch.Generator().manual_seed(self.draw)).tolist()
        positive = [self.is_positive(self.data.attributes(self.data.patients[p][0])) for p in everyone]
        halves = self.labelled // 2, self.labelled - self.labelled // 2
        chosen = [[n for n in order if positive[n] == (k == 0)][:many] for k, many in enumerate(halves)]
        if not all(chosen):
            raise MedcookError(f"{self.dataset}: all patients have the same outcome.", "Take another outcome.")
        return tuple(everyone[number] for number in sorted(sum(chosen, [])))

    def samples(self, role: str) -> Samples:
        found = super().samples(role)
        patients, known = getattr(self, f"{role}_patients"), sentences_of(self.dataset)
        reports = [self._reports[case] for patient in patients for case in self.data.patients[patient]]
        numbers = torch.tensor([known.index(report) for report in reports]) + MANY * CORPORA.index(self.dataset)
        return replace(found, groups=numbers[found.case_of])
