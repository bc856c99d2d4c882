"""MedTrinity-25M: triplets of an image, a region of interest and a description, from many public sources."""

import json
import math
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from PIL import Image
from scipy import ndimage

from medcook.data.case import IGNORE, Case
from medcook.data.datasets import Dataset
from medcook.data.fetch import folders
from medcook.data.readers.damage import readable
from medcook.errors import MedcookError

ENDINGS = (".jpg", ".jpeg", ".png")
COLUMNS = ("file_name", "caption", "source")
NUMBER = r"(\d+(?:\.\d+)?)"
NAMED_BOX = re.compile(rf".*(?:bhx|DeepLesion).*__(?:\d+_)?{NUMBER}_{NUMBER}_{NUMBER}_{NUMBER}\.\w+", re.IGNORECASE)
"""..._CT000015__0_135_228_61_55.jpg: left, top, width and height stand at the end."""
PATIENTS = (
    r"(BraTS-[A-Za-z]+-\d+)",
    r"(ISPY\d_\d+)_",
    r".*(CQ500)-?CT-?(\d+)",
    r".*DeepLesion.*Images_png_(\d{6})_",
    r"(?:seg_)?((?:train|valid)_\d+)_[a-z]_\d",
)
"""What begins the names of files that tell the patient."""
TOLD = re.compile(rf"{NUMBER}\s?% of the (?:image|picture)")
GREEN, LEAST, LINE = 50, 8, 4
"""How much greener than red and blue a drawn line is; pixels of the smallest box; of the thickest line."""


class Box(NamedTuple):
    """A rectangle in pixels."""

    left: float
    top: float
    width: float
    height: float


class Row(NamedTuple):
    """What the tables say of one image."""

    caption: str
    source: str


class Triplet(NamedTuple):
    """An image (3, H, W), its region of interest (H, W) bool, None where the files do not tell it, and its text."""

    image: np.ndarray
    region: np.ndarray | None
    description: str


class MedTrinity(Dataset):
    """A case is one image: image (3, H, W) in 0 to 255, label (H, W), 1 in the region of interest. Where the files do
    not tell the region all of the label is unlabelled.

    attributes: caption, source; of a case that was read also boxes, and boxes_from: `name` (the file's name has the
    box), `drawn` (it is drawn on the image) or None
    """

    def index(self) -> dict[str, str]:
        return {name: patient_of(name, row.source) for name, row in self._rows.items()}

    @cached_property
    def _images(self) -> dict[str, Path]:
        """{name: file} of the images on this machine, in whatever folders."""
        found: dict[str, Path] = {}
        for root in folders(self.manifest.name):
            there: dict[str, Path] = {}
            for path in sorted(root.rglob("*")):
                if path.suffix.lower() not in ENDINGS or path.name.startswith("._"):
                    continue
                if there.setdefault(path.name, path) != path:
                    problem = f"{path}: {there[path.name]} has the same name, and the captions go by names"
                    raise MedcookError(f"{problem}.", "Keep the one that belongs to the tables.")
            found = there | found
        return found

    @cached_property
    def _rows(self) -> dict[str, Row]:
        """{name of the image: Row} of the rows that have a caption, and an image on this machine, by name."""
        tables = [path for root in folders(self.manifest.name) for path in tables_of(root)]
        if not tables:
            self.fetch()  # this says where to get them
        rows: dict[str, Row] = {}
        for path in tables:
            for where, name, row in rows_of(path):
                if name in self._images and row.caption and rows.setdefault(name, row) != row:
                    raise MedcookError(f"{where}: {name} has another caption or source elsewhere.", "Keep one table.")
        if not rows:
            problem = f"{tables[0]}: none of its images is here ({len(self._images)} images are)"
            raise MedcookError(f"{problem}.", f"Unpack files of 25M_accessible into {folders(self.manifest.name)[-1]}.")
        return dict(sorted(rows.items()))

    def attributes(self, case_id: str) -> dict:
        return self._rows[case_id]._asdict()

    def read(self, case_id: str) -> Case:
        path = self._images[case_id]
        with readable(path, "image", "Unpack it again."), Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        named, drawn = named_box(case_id), drawn_boxes(pixels)
        boxes = (named,) if named else drawn
        try:
            label = painted(boxes, pixels.shape[:2])
        except ValueError as error:
            raise MedcookError(f"{path}: {error}.", "Unpack it again; do not resize it.") from error
        known = {"boxes": boxes, "boxes_from": "name" if named else "drawn" if drawn else None}
        return Case(
            image=np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32),
            label=label,
            case_id=case_id,
            patient_id=patient_of(case_id, self._rows[case_id].source),
            attributes=self.attributes(case_id) | known,
        )


def tables_of(root: Path) -> list[Path]:
    """The tables in a folder: every metadata.jsonl, else the Parquet files of 25M_full."""
    return sorted(root.rglob("metadata.jsonl")) or sorted((root / "25M_full").glob("*.parquet"))


def rows_of(path: Path) -> Iterator[tuple[str, str, Row]]:
    """(where it stands, name of the image, Row) of each row of a table."""
    for number, content in enumerate(parquet_of(path) if path.suffix == ".parquet" else lines_of(path), start=1):
        where = f"{path}, row {number}"
        try:
            yield where, *row_of(content)
        except ValueError as error:
            raise MedcookError(f"{where}: {error}.", f"A row needs {', '.join(COLUMNS)}.") from error


def lines_of(path: Path) -> Iterator[object]:
    """The objects of a file with one JSON object a line."""
    with readable(path, "JSON Lines file", "Get it again."), path.open(encoding="utf-8") as lines:
        yield from (json.loads(line) for line in lines if line.strip())


def parquet_of(path: Path) -> list[dict]:
    """The rows of a Parquet file, which pandas reads where pyarrow is installed."""
    with readable(path, "Parquet file", "Get it again."):
        try:
            return pd.read_parquet(path, columns=list(COLUMNS)).to_dict("records")
        except ImportError as error:
            hint = "pip install pyarrow, or save the rows as metadata.jsonl, one JSON object a line."
            raise MedcookError(f"{path}: Parquet files need pyarrow, which is not installed.", hint) from error


def row_of(content: object) -> tuple[str, Row]:
    """(name of the image, Row), with an empty caption where there is none; ValueError says what is wrong with it."""
    name, caption, source = (content.get(column) if isinstance(content, dict) else None for column in COLUMNS)
    if not isinstance(name, str) or not name or re.search(r"[/\\]", name):
        raise ValueError(f"file_name {name!r:.80} is not the name of an image")
    if caption is None or caption != caption:  # NaN: so pandas says that there is none
        caption = ""
    if not isinstance(caption, str) or not isinstance(source, str) or not source.strip():
        raise ValueError(f"{name:.80} has a caption that is no text, or no source")
    return name, Row(caption.strip(), source)


def patient_of(name: str, source: str) -> str:
    """The patient where the image's name tells, the same in all sources; else the source, which then stays together."""
    match = next(filter(None, (re.match(pattern, name) for pattern in PATIENTS)), None)
    return "".join(match.groups()) if match else source


def named_box(name: str) -> Box | None:
    """The box in the name of a file of BHX or DeepLesion."""
    match = NAMED_BOX.fullmatch(name)
    return Box(*map(float, match.groups())) if match else None


def drawn_boxes(pixels: np.ndarray) -> tuple[Box, ...]:
    """The green rectangles that are drawn on an image (H, W, 3) uint8: outlines, whose inside is not green."""
    red, green, blue = pixels.astype(np.int16).transpose(2, 0, 1)
    line = green - np.maximum(red, blue) > GREEN
    boxes = []
    for rows, columns in ndimage.find_objects(ndimage.label(line, np.ones((3, 3)))[0]):
        part = line[rows, columns]
        if min(part.shape) >= LEAST:
            sides = (part[:LINE].any(0), part[-LINE:].any(0), part[:, :LINE].any(1), part[:, -LINE:].any(1))
            inside = part[LINE:-LINE, LINE:-LINE]
            if min(side.mean() for side in sides) > 0.9 and (not inside.size or inside.mean() < 0.1):
                boxes.append(Box(columns.start, rows.start, part.shape[1], part.shape[0]))
    return tuple(boxes)


def painted(boxes: Iterable[Box], shape: tuple[int, ...]) -> np.ndarray:
    """The label (H, W) uint8: 1 inside the boxes; unlabelled where there is none. ValueError for a box outside."""
    boxes = list(boxes)
    label = np.full(shape, 0 if boxes else IGNORE, np.uint8)
    for box in boxes:
        bottom, right = math.ceil(box.top + box.height), math.ceil(box.left + box.width)
        if bottom > shape[0] or right > shape[1] or not box.width or not box.height:
            raise ValueError(f"its region of interest {tuple(box)} is not in the image of {shape} pixels")
        label[int(box.top) : bottom, int(box.left) : right] = 1
    return label


def triplet(case: Case) -> Triplet:
    """Image, region of interest and description of a case."""
    told = case.attributes["boxes_from"] is not None
    return Triplet(case.image, case.label == 1 if told else None, case.attributes["caption"])


def told_share(caption: str) -> float | None:
    """The part of the image that the text says the region has ("approximately 4.1% of the image area"), or None."""
    match = TOLD.search(caption)
    return float(match[1]) / 100 if match else None


def share_gap(found: Triplet) -> float | None:
    """How much larger the region is than the text says, in parts of the image; None where either does not tell."""
    told = told_share(found.description)
    return None if told is None or found.region is None else float(found.region.mean()) - told
