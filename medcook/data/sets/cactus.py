"""CACTUS: ultrasound images of a heart phantom, each with its view and with a grade from 0 to 10."""

import csv
import math
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from PIL import Image

from medcook.data import fetch
from medcook.data.case import Case
from medcook.data.datasets import Dataset
from medcook.data.readers.damage import readable
from medcook.errors import MedcookError

TOPS = ("", "Cactus Dataset/")
IMAGES, GRADES = "Images Dataset", "Grades"
VIEWS = ("Random", "A4C", "SC", "PL", "PSAV", "PSMV")
"""The label value of each is its place: 0 is no view of the heart."""
COLUMNS = ("Image Name", "Subfolder Name", "Grade")
NAME = re.compile(r"(\d+)_((?:DR|D|V|Folder)\d+)(?:_.*)?\.(?:jpe?g|png)", re.IGNORECASE)
"""1_D15_frame_600_v2.jpg: its grade, the recording."""
BEST = 10


class Entry(NamedTuple):
    """One image of a table of grades. named: the grade that its name begins with, None where it does not."""

    view: str
    name: str
    grade: float
    recording: str
    named: int | None


class Cactus(Dataset):
    """A case is one image: image (1, H, W) in 0 to 255; label (H, W), the number of the view on every pixel.

    attributes: view, grade, grade_in_name (it should be the same, see `regraded`), recording

    The heart is one phantom, so there are no patients. A recording takes their place: what is in one, from whatever
    view, stays on one side of a split. All images of a view whose names tell no recording count as one.
    """

    def index(self) -> dict[str, str]:
        return {case_id: entry.recording for case_id, entry in self._entries.items()}

    @cached_property
    def _entries(self) -> dict[str, Entry]:
        """{case_id: Entry} of all tables of grades; the one of Random may be missing."""
        tables = {view: self.found(f"{GRADES}/{view}_grades.csv") for view in VIEWS}
        if not any(tables.values()):
            self.fetch()  # this says where to get them
        if missing := [view for view, path in tables.items() if path is None and view != "Random"]:
            raise MedcookError(f"{self.manifest.name}: {missing[0]}_grades.csv is missing.", self._where(GRADES))
        return {
            f"{view}/{Path(entry.name).stem}": entry
            for view, path in tables.items()
            if path
            for entry in entries_of(path, view)
        }

    def found(self, path: str) -> Path | None:
        """A file of the set, in its top folder or without one."""
        there = (fetch.local(self.manifest.name, top + path) for top in TOPS)
        return next((file for file in there if file), None)

    def _where(self, folder: str) -> str:
        return f"Put the folder {folder} as it is into {fetch.data_dir(self.manifest.name)}."

    def attributes(self, case_id: str) -> dict:
        entry = self._entries[case_id]
        known = {"view": entry.view, "grade": entry.grade, "grade_in_name": entry.named}
        return known | {"recording": entry.recording}

    def read(self, case_id: str) -> Case:
        entry = self._entries[case_id]
        listed = f"{IMAGES}/{entry.view}/{entry.name}"
        path = self.found(listed)
        if path is None:
            problem = f"{self.manifest.name}: the image {listed} of {entry.view}_grades.csv is missing"
            raise MedcookError(f"{problem}.", self._where(IMAGES))
        with readable(path, "image", "Unpack it again."), Image.open(path) as image:
            pixels = np.asarray(image.convert("L"), dtype=np.float32)
        return Case(
            image=pixels[None],
            label=np.full(pixels.shape, VIEWS.index(entry.view), np.uint8),
            case_id=case_id,
            patient_id=entry.recording,
            attributes=self.attributes(case_id),
        )


def entries_of(path: Path, view: str) -> Iterator[Entry]:
    """The images in the table of a view, each once."""
    with readable(path, "CSV file", "Unpack it again."), path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, skipinitialspace=True, strict=True)
        header = [name.strip() for name in reader.fieldnames or ()]
        reader.fieldnames = header
        rows = list(reader)
    if missing := [name for name in COLUMNS if name not in header]:
        raise MedcookError(f"{path}: no column {missing[0]!r}, but {header}.", f"It needs {', '.join(COLUMNS)}.")
    seen: set[str] = set()
    for number, row in enumerate(rows, start=2):
        try:
            entry = entry_of(row, view)
            if Path(entry.name).stem in seen:
                raise ValueError(f"{entry.name} is listed twice")
        except ValueError as error:
            raise MedcookError(f"{path}, line {number}: {error}.", "Take the table as it is published.") from error
        seen.add(Path(entry.name).stem)
        yield entry
    if not seen:
        raise MedcookError(f"{path}: no image is listed.", "Unpack it again.")


def entry_of(row: dict, view: str) -> Entry:
    """One line of a table; ValueError says what is wrong with it."""
    name, folder, grade = ((row[column] or "").strip() for column in COLUMNS)
    if not name or name[0] == "." or re.search(r"[/\\]", name):
        raise ValueError(f"{name!r:.60} is not the name of an image in the folder {view}")
    if folder != view:
        raise ValueError(f"the image is in {folder!r:.20}, not in {view}; the views are {', '.join(VIEWS)}")
    try:
        value = float(grade)
    except ValueError:
        value = math.nan
    if not 0 <= value <= BEST:
        raise ValueError(f"the grade of {name} is {grade!r:.20}, not a number from 0 to {BEST}")
    match = NAME.fullmatch(name)
    leading = re.match(r"\d+", name)
    return Entry(view, name, value, match[2].upper() if match else view, int(leading[0]) if leading else None)


def grade_table(dataset: Cactus, patients: Iterable[str]) -> pd.DataFrame:
    """One row an image of these recordings: case, view, grade, grade_in_name, recording; nothing is opened."""
    cases = [case_id for patient in patients for case_id in dataset.patients[patient]]
    return pd.DataFrame([{"case": case_id} | dataset.attributes(case_id) for case_id in cases])


def regraded(table: pd.DataFrame) -> pd.DataFrame:
    """The rows whose grade is another one than their name tells: none, if the authors' description holds."""
    named = table["grade_in_name"].astype(float)
    return table[named.notna() & (named != table["grade"])]


def grading_error(table: pd.DataFrame, found: Iterable[float]) -> float:
    """The mean squared difference from the grades, the paper's measure, over the images that show a view."""
    difference = np.asarray(list(found), dtype=float) - table["grade"].to_numpy(dtype=float)
    shown = table["view"].to_numpy() != VIEWS[0]
    if not shown.any():
        raise MedcookError("No image here shows a view of the heart.", "Take recordings other than Random.")
    return float(np.mean(difference[shown] ** 2))
