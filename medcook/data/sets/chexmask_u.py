"""CheXmask-U: predicted landmarks of lungs and heart in five public chest X-ray sets, and the spread of each."""

import csv
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from medcook.data import fetch
from medcook.data.case import Case
from medcook.data.datasets import Dataset
from medcook.data.readers.png import read_gray
from medcook.errors import MedcookError

FOLDER = "OriginalResolution"
SOURCES = ("ChestX-Ray8", "CheXpert", "MIMIC-CXR-JPG", "Padchest", "VinDr-CXR")
NODES = 120  # 44 of the right lung, 50 of the left lung, 26 of the heart
PAINTED = {"Right Lung": 1, "Left Lung": 2, "Heart": 3}  # in this order, the later wins
PATIENT = {"ChestX-Ray8": re.compile(r"(\d+)_\d+\.png"), "CheXpert": re.compile(r".*(patient\d+)/.*")}
COLUMNS = ("Landmarks (Mean)", "Landmarks (Std)", *PAINTED, "Height", "Width")

csv.field_size_limit(1 << 24)  # run lengths of a large mask


class CheXmaskU(Dataset):
    """A case is one X-ray: image (1, H, W) as stored, label 1 right lung, 2 left lung, 3 heart.

    attributes: source, landmarks (120, 2) in pixels as (x, y), spread (120, 2) their standard deviations,
    quality (Dice of reverse classification accuracy, None where it is not given)
    """

    def index(self) -> dict[str, str]:
        return {case_id: patient for case_id, (patient, _, _) in self._rows.items()}

    @cached_property
    def _rows(self) -> dict[str, tuple[str, Path, int]]:
        """{case_id: (patient_id, its CSV, where its line begins)}, of the sources that are on this machine."""
        tables = {source: fetch.local(self.manifest.name, f"{FOLDER}/{source}.csv") for source in SOURCES}
        found = {
            f"{source}/{name}": (patient_of(source, name), path, start)
            for source, path in tables.items()
            if path
            for name, start in lines_of(path)
        }
        if not found:
            self.fetch()
        return found

    def attributes(self, case_id: str) -> dict:
        return {"source": case_id.split("/")[0]}

    def read(self, case_id: str) -> Case:
        patient, path, start = self._rows[case_id]
        row = read_row(path, start)
        shape = int(float(row["Height"])), int(float(row["Width"]))
        image = read_gray(self.image_path(case_id))
        if image.shape != shape:
            problem = f"{case_id}: the image is {image.shape}, its annotation {shape}"
            raise MedcookError(f"{problem}.", "Take the source's own image, not a resized copy.")
        quality = row.get("Dice RCA (Mean)")
        known = {
            "landmarks": pairs(row["Landmarks (Mean)"], case_id),
            "spread": pairs(row["Landmarks (Std)"], case_id),
            "quality": float(quality) if quality else None,
        }
        return Case(
            image=image[None],
            label=painted(row, shape),
            case_id=case_id,
            patient_id=patient,
            attributes=self.attributes(case_id) | known,
        )

    def image_path(self, case_id: str) -> Path:
        """The image of a case, whose stored name may lack the ending."""
        endings = ("", ".png", ".jpg")
        there = (fetch.local(self.manifest.name, f"images/{case_id}{ending}") for ending in endings)
        return next((path for path in there if path), None) or self.file(f"images/{case_id}")


def lines_of(path: Path) -> Iterator[tuple[str, int]]:
    """(name of the image, where its line begins) of every row of a table; the tables are too large to keep."""
    with path.open("rb") as lines:
        header = lines.readline()
        missing = set(COLUMNS) - set(next(csv.reader([header.decode("utf-8-sig")])))
        if missing:
            raise MedcookError(
                f"{path}: no column {sorted(missing)[0]!r}.", "Get the CSV of CheXmask-U, not CheXmask's."
            )
        start = len(header)
        for line in lines:
            if name := line.split(b",", 1)[0].strip().strip(b'"').decode():
                yield name, start
            start += len(line)


def read_row(path: Path, start: int) -> dict[str, str]:
    """The row that begins at a place of a table, by the names of its columns."""
    with path.open("rb") as lines:
        header = lines.readline().decode("utf-8-sig")
        lines.seek(start)
        return next(csv.DictReader([header, lines.readline().decode()]))


def patient_of(source: str, name: str) -> str:
    """The patient, where the image's name tells; else the source: so no patient is ever on two sides of a split."""
    match = PATIENT[source].fullmatch(name) if source in PATIENT else None
    return f"{source}/{match[1]}" if match else source


def pairs(text: str, case_id: str) -> np.ndarray:
    """x1,y1,x2,y2,... as (120, 2) float32."""
    try:
        values = np.array(text.split(","), dtype=np.float32)
    except ValueError:
        values = np.empty(0)
    if values.size != 2 * NODES or not np.isfinite(values).all() or values.min() < 0:
        raise MedcookError(f"{case_id}: not the coordinates of {NODES} landmarks.", "Get its CSV again.")
    return values.reshape(NODES, 2)


def painted(row: dict[str, str], shape: tuple[int, int]) -> np.ndarray:
    """The label map (H, W) of the run-length masks of a row."""
    label = np.zeros(shape, np.uint8)
    for structure, value in PAINTED.items():
        label[decoded(row[structure], shape)] = value
    return label


def decoded(runs: str, shape: tuple[int, int]) -> np.ndarray:
    """A mask (H, W) bool of run lengths `start length start length ...`, row by row, the first pixel being 1."""
    numbers = np.array(runs.split(), dtype=np.int64)
    starts, lengths = numbers[::2] - 1, numbers[1::2]
    if len(starts) != len(lengths) or (len(starts) and (starts.min() < 0 or (starts + lengths).max() > np.prod(shape))):
        raise MedcookError(f"Run lengths do not fit an image of {shape}.", "Get its CSV again.")
    change = np.zeros(np.prod(shape) + 1, dtype=np.int8)
    np.add.at(change, starts, 1)
    np.add.at(change, starts + lengths, -1)
    return change[:-1].cumsum().astype(bool).reshape(shape)
