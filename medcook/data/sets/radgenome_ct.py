"""RadGenome-Chest CT: reports, questions and answers, each sentence with the mask of the place that it is about."""

import re
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from medcook.data import fetch
from medcook.data.case import Case
from medcook.data.datasets import Dataset, as_labels, present_values
from medcook.data.readers.nifti import read_ct, read_nifti
from medcook.data.readers.tables import read_table
from medcook.data.splits import Split, held_out
from medcook.errors import MedcookError

PARTS = {"train": "train", "valid": "validation"}
"""{a part, as its CTs and masks are named: as its tables are named}."""
NAME = re.compile(r"((train|valid)_\d+)_([a-z]+)_\d+\.nii\.gz")
PLACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ()'-]*")
REGIONS = (
    *("mediastinum", "pleura", "abdomen", "breast", "lung", "bone", "heart", "trachea and bronchie", "esophagus"),
    "thyroid",
)
"""The place of each, from 1, is its label value; where regions overlap the later wins."""
WHOLE = frozenset({"others", "whole scan", ""})
REPORT = "region_report"
TABLES = {
    REPORT: {"Anatomy": "anatomy", "Sentence": "sentence"},
    "vqa_abnormality": {"Anatomy": "anatomy", "Abnormality": "answer"},
    "vqa_location": {"Anatomy": "anatomy", "Abnormality": "asked"},
    "vqa_presence": {"Anatomy": "anatomy", "Finding": "asked", "Presence": "answer"},
    "vqa_size": {"Anatomy": "anatomy", "Abnormality": "asked", "Size": "answer"},
    "case_disorders": {"Disorders": "answer"},
}
"""{table: {its column: what it is called here}}, besides Volumename."""
ANSWERS = {"vqa_presence": frozenset({"Yes.", "No."})}
WHERE = "Take the files of RadGenome-ChestCT as they are."


class Link(NamedTuple):
    """Where the mask of a place is (mask: its path), and what that is a mask of.

    about  `structure`: the place itself; `region`: the one that it lies in, since it has none of its own;
           `whole`: it is about the CT as a whole, without a mask; `missing`: there is no mask, though there should be
    """

    about: str
    mask: str | None


class RadGenomeCT(Dataset):
    """A case is one CT: image (1, X, Y, Z) as stored; label (X, Y, Z), the ten regions of the reports, where these
    overlap the later in REGIONS.

    attributes of a case: orientation, annotated (label values of the regions that have a mask), and sentences
    """

    def index(self) -> dict[str, str]:
        return self._owners

    @cached_property
    def _owners(self) -> dict[str, str]:
        """{case_id: patient} of all CTs that have a report."""
        found: dict[str, str] = {}
        for part in PARTS:
            for name in self._table(part, REPORT)[1]:
                match = NAME.fullmatch(name)
                if match is None or match[2] != part:
                    problem = f"{name!r:.60} of the reports is not named as {part}_17_b_1.nii.gz is"
                    raise MedcookError(f"{self.manifest.name}: {problem}.", WHERE)
                found[name.removesuffix(".nii.gz")] = match[1]
        return found

    @cached_property
    def _tables(self) -> dict[tuple[str, str], tuple[pd.DataFrame, dict[str, np.ndarray]]]:
        return {}

    def _table(self, part: str, table: str) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
        """A table of a part, and {name of a CT: the numbers of its rows}; read once."""
        if (part, table) not in self._tables:
            path = self.file(f"dataset/radgenome_files/{PARTS[part]}_{table}.csv")
            rows = read_table(path, TABLES[table] | {"Volumename": "volume"}, WHERE)
            if not rows.empty and not rows.drop(columns="anatomy", errors="ignore").iloc[-1].all():
                raise MedcookError(f"{path}: row {len(rows)}, its last, is cut off.", "Get it again.")
            if strange := set(rows.answer if table in ANSWERS else ()) - ANSWERS.get(table, frozenset()):
                raise MedcookError(f"{path}: the answer {min(strange)!r:.40} is neither 'Yes.' nor 'No.'.", WHERE)
            self._tables[part, table] = rows, rows.groupby("volume", sort=False).indices
        return self._tables[part, table]

    @cached_property
    def split(self) -> Split:
        """The authors' validation is test here; of the patients of their train one in ten, by hash, is validation."""
        train, test = ([one for one in dict.fromkeys(self._owners.values()) if one.startswith(part)] for part in PARTS)
        return Split(
            *held_out(train, 10),
            tuple(test),
            source="train and validation of the tables; a tenth of train is val, by hash",
        )

    def sentences(self, case_id: str) -> pd.DataFrame:
        """The report, a row a sentence: sentence, anatomy (the place that it is about), and about and mask of its Link.
        Of a test case only inside `open_test`, as everything below."""
        self.guard(case_id)
        return self._sentences(case_id)

    def _sentences(self, case_id: str) -> pd.DataFrame:
        return self._linked(case_id, self._rows(case_id, REPORT))[["sentence", "anatomy", *Link._fields]]

    def questions(self, case_id: str) -> pd.DataFrame:
        """A row a question: task, anatomy, asked (the finding that it names), answer, and about and mask as above.

        task  abnormality (what is in the place), location (where is the finding), presence (is it in the place), size,
              disorders (of the patient)
        """
        self.guard(case_id)
        found = [self._rows(case_id, table).assign(task=table.split("_")[1]) for table in TABLES if table != REPORT]
        rows = pd.concat(found, ignore_index=True).reindex(columns=["task", "anatomy", "asked", "answer"]).fillna("")
        return self._linked(case_id, rows.assign(answer=rows.answer.where(rows.task != "location", rows.anatomy)))

    def _rows(self, case_id: str, table: str) -> pd.DataFrame:
        rows, groups = self._table(self._owners[case_id].split("_")[0], table)
        return rows.iloc[groups.get(f"{case_id}.nii.gz", [])].reset_index(drop=True)

    def _linked(self, case_id: str, rows: pd.DataFrame) -> pd.DataFrame:
        links = {anatomy: self.link(case_id, anatomy) for anatomy in rows.anatomy.unique()}
        found = pd.DataFrame([links[anatomy] for anatomy in rows.anatomy], columns=Link._fields, index=rows.index)
        return pd.concat([rows, found], axis=1)

    def link(self, case_id: str, anatomy: str) -> Link:
        """Where the mask of a place is, such as lung/lung/left lung, of which the first is the region."""
        steps = [step.strip() for step in anatomy.split("/")]
        region, place = steps[0].lower(), steps[-1]
        if {region, place.lower()} & WHOLE:
            return Link("whole", None)
        if region not in REGIONS or not PLACE.fullmatch(place):
            raise MedcookError(f"{case_id}: {anatomy!r:.60} is no place in {', '.join(REGIONS)}.", WHERE)
        for about, kind, name in (("structure", "anatomy", place), ("region", "region", region)):
            path = mask_of(case_id, kind, name)
            if fetch.local(self.manifest.name, path):
                return Link(about, path)
        return Link("missing", None)

    def mask(self, case_id: str, anatomy: str) -> np.ndarray | None:
        """(X, Y, Z) bool, the mask that belongs to a place; None for the CT as a whole."""
        self.guard(case_id)
        link = self.link(case_id, anatomy)
        if link.about == "missing":
            self.stored(mask_of(case_id, "region", anatomy.split("/")[0].strip().lower()))
        return read_mask(self.stored(link.mask)) if link.mask else None

    def read(self, case_id: str) -> Case:
        patient, part = self._owners[case_id], case_id.split("_")[0]
        scan = f"{patient}{case_id.split('_')[2]}"
        image = read_ct(self.stored(f"dataset/{part}_preprocessed/{patient}/{scan}/{case_id}.nii.gz"))
        label, annotated = np.zeros(image.array.shape, np.uint8), []
        for value, region in enumerate(REGIONS, start=1):
            path = fetch.local(self.manifest.name, mask_of(case_id, "region", region))
            if path is None:
                continue
            label[read_mask(path, label.shape)] = value
            annotated.append(value)
        if not annotated:
            self.stored(mask_of(case_id, "region", "lung"))  # says where to get it
        return Case(
            image=image.array[None],
            label=label,
            case_id=case_id,
            patient_id=patient,
            spacing=image.spacing,
            attributes={
                "orientation": image.orientation,
                "annotated": annotated,
                "sentences": self._sentences(case_id),
            },
        )


def mask_of(case_id: str, kind: str, name: str) -> str:
    """Path of a mask; kind: anatomy or region."""
    return f"dataset/{case_id.split('_')[0]}_{kind}_mask/seg_{case_id}/{name}.nii.gz"


def read_mask(path: Path, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """A mask, of this shape, as bool."""
    stored = read_nifti(path).array
    if stored.ndim != 3 or shape not in (None, stored.shape):
        raise MedcookError(f"{path}: a mask of {stored.shape}, the CT has {shape}.", "Get CT and masks again.")
    mask = as_labels(stored, path)
    if strange := [value for value in present_values(mask) if value > 1]:
        raise MedcookError(f"{path}: the value {strange[0]}; a mask has 0 and 1.", "Get it again.")
    return mask > 0
