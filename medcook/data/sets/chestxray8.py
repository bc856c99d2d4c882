"""ChestX-ray8 (NIH): diseases read out of reports for each X-ray, and boxes of some to judge where they are found."""

import csv
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import ndimage

from medcook.data import fetch
from medcook.data.case import IGNORE, Case
from medcook.data.datasets import Dataset
from medcook.data.readers.damage import readable
from medcook.data.readers.png import read_gray
from medcook.data.splits import Split, held_out
from medcook.errors import MedcookError

TABLES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")  # the first that is there
BOXES = "BBox_List_2017.csv"
LISTS = {"train": "train_val_list.txt", "test": "test_list.txt"}
FOLDERS = ("images", *(f"images_{number:03d}/images" for number in range(1, 13)))
NAME = re.compile(r"(\d{8})_\d{3}\.png")
AGE = re.compile(r"0*(\d+)Y?")
OLDEST = 120  # the first version of the table tells of people of 400 years
NONE = "No Finding"
FINDINGS = (
    *("Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax"),
    *("Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia"),
)
"""The first eight have boxes; the place of each, from 1, is its label value."""
BOXED = {name: value for value, name in enumerate(FINDINGS[:8], start=1)}
NAMED = {"Infiltrate": "Infiltration"}  # in the list of boxes
COLUMNS = ("Image Index", "Finding Labels", "Follow-up #", "Patient ID", "Patient Age", "Patient Gender")
WHERE = "Take the tables and lists of ChestX-ray8 as they are."


class Box(NamedTuple):
    """Where a disease is, in pixels; x to the right and y downwards from the upper left corner."""

    finding: str
    x: float
    y: float
    width: float
    height: float


class ChestXray8(Dataset):
    """A case is one X-ray: image (1, H, W) as stored; label (H, W), the boxes of the diseases, where these overlap the
    smaller one. Without a box nobody drew anything, and all of the label is unlabelled.

    attributes: findings (read out of the report), sex, age (None where impossible), follow_up, view
    of a case also: boxes, and annotated (the label values of the diseases whose boxes were drawn)
    """

    def index(self) -> dict[str, str]:
        return self._owners

    @cached_property
    def _owners(self) -> dict[str, str]:
        return {case_id: case_id.split("_")[0] for case_id in self._rows}

    @cached_property
    def _rows(self) -> dict[str, dict]:
        """{case_id: what the table says of it}."""
        path = next((found for name in TABLES if (found := fetch.local(self.manifest.name, name))), None)
        path = path or self.file(TABLES[-1])
        with readable(path, "table", WHERE, quoting=False), path.open(encoding="utf-8-sig", newline="") as lines:
            rows = csv.DictReader(lines)
            if missing := [column for column in COLUMNS if column not in (rows.fieldnames or ())]:
                raise MedcookError(f"{path}: no column {missing[0]!r}.", WHERE)
            found: dict[str, dict] = {}
            for row in rows:
                name, known = known_of(row, path)
                if name in found:
                    raise MedcookError(f"{path}: {name} stands there twice.", WHERE)
                found[name] = known
        return found

    @cached_property
    def _boxes(self) -> dict[str, list[Box]]:
        """{case_id: its boxes}."""
        path, found = self.file(BOXES), {}
        with readable(path, "table", WHERE), path.open(encoding="utf-8-sig", newline="") as lines:
            rows = csv.reader(lines)
            if next(rows, [])[:3] != ["Image Index", "Finding Label", "Bbox [x"]:
                raise ValueError("its columns are not Image Index, Finding Label, Bbox [x,y,w,h]")
            for row in filter(any, rows):
                box = Box(NAMED.get(row[1], row[1]), *map(float, row[2:6]))
                case_id = row[0].removesuffix(".png")
                if box.finding not in BOXED or case_id not in self._rows:
                    raise ValueError(f"a box of {row[1]!r:.40} on {row[0]!r:.40}, which it does not know")
                if not np.isfinite(box[1:]).all() or min(box.x, box.y) < 0 or min(box.width, box.height) <= 0:
                    raise ValueError(f"a box of {row[0]} is empty or begins outside")
                found.setdefault(case_id, []).append(box)
        return found

    @cached_property
    def split(self) -> Split:
        """The published split; of its patients for training and validation one in eight, by hash, is for validation."""
        sides: dict[str, str] = {}
        listed: set[str] = set()
        for side, name in LISTS.items():
            path = self.file(name)
            with readable(path, "list", WHERE):
                cases = [line.removesuffix(".png") for line in path.read_text(encoding="utf-8-sig").split()]
            for case_id in cases:
                patient = self._owners.get(case_id)
                if patient is None or case_id in listed or sides.setdefault(patient, side) != side:
                    problem = f"{case_id:.40} is in no table, is listed twice, or its patient is on both sides"
                    raise MedcookError(f"{path}: {problem}.", WHERE)
                listed.add(case_id)
        if rest := [case_id for case_id in self._owners if case_id not in listed]:
            raise MedcookError(f"{self.manifest.name}: {rest[0]} and {len(rest) - 1} more are in no list.", WHERE)
        learning, test = ([one for one in sides if sides[one] == side] for side in LISTS)
        return Split(
            *held_out(learning, 8),
            tuple(test),
            source=f"{', '.join(LISTS.values())}; an eighth of the first is val, by hash",
        )

    def attributes(self, case_id: str) -> dict:
        return dict(self._rows[case_id])

    def boxes(self, case_id: str) -> list[Box]:
        """A case's boxes without its X-ray; those of a test case only inside `open_test`."""
        self.guard(case_id)
        return self._boxes.get(case_id, [])

    def read(self, case_id: str) -> Case:
        places = [fetch.local(self.manifest.name, f"{folder}/{case_id}.png") for folder in FOLDERS]
        path = next(filter(None, places), None) or self.stored(f"{FOLDERS[0]}/{case_id}.png")
        image, boxes = read_gray(path), self._boxes.get(case_id, [])
        height, width = image.shape
        if any(box.x + box.width > width or box.y + box.height > height for box in boxes):
            raise MedcookError(f"{path}: a box of {BOXES} reaches over its edge.", "Take the X-rays of 1024 x 1024.")
        annotated = sorted({BOXED[box.finding] for box in boxes})
        return Case(
            image=image[None],
            label=painted(boxes, image.shape),
            case_id=case_id,
            patient_id=self._owners[case_id],
            attributes=self.attributes(case_id) | {"boxes": boxes, "annotated": annotated},
        )


def known_of(row: dict[str, str], path: Path) -> tuple[str, dict]:
    """(case_id, attributes) of a row of the table."""
    name, findings = row["Image Index"], tuple(row["Finding Labels"].split("|"))
    match, age = NAME.fullmatch(name), AGE.fullmatch(row["Patient Age"])
    if match is None or match[1] != row["Patient ID"].zfill(8) or age is None:
        raise MedcookError(f"{path}: {name!r:.40} is no X-ray of its patient, or has no age.", WHERE)
    if strange := [one for one in findings if one not in FINDINGS and findings != (NONE,)]:
        raise MedcookError(f"{path}: {name} has the finding {strange[0]!r:.40}; none is called so.", WHERE)
    known = {
        "findings": () if findings == (NONE,) else findings,
        "sex": row["Patient Gender"] if row["Patient Gender"] in ("M", "F") else None,
        "age": int(age[1]) if int(age[1]) <= OLDEST else None,
        "follow_up": int(row["Follow-up #"]),
        "view": row.get("View Position") or None,
    }
    return name.removesuffix(".png"), known


def painted(boxes: list[Box], shape: tuple[int, int]) -> np.ndarray:
    """The label map (H, W) of the boxes, the smaller over the larger; unlabelled where there is none at all."""
    label = np.full(shape, 0 if boxes else IGNORE, np.uint8)
    for box in sorted(boxes, key=lambda one: -one.width * one.height):
        rows, columns = (
            slice(round(a), max(round(a) + 1, round(a + b))) for a, b in ((box.y, box.height), (box.x, box.width))
        )
        label[rows, columns] = BOXED[box.finding]
    return label


def boxes_of(heat: np.ndarray, finding: str, thresholds: tuple[float, ...] = (60, 180)) -> list[Box]:
    """Boxes around the connected regions of a heat map (H, W) that, scaled to 0..255, is above each threshold."""
    span = np.ptp(heat)
    scaled = (heat - heat.min()) / span * 255 if span > 0 else np.zeros_like(heat)
    found = [region for least in thresholds for region in ndimage.find_objects(ndimage.label(scaled > least)[0])]
    return [Box(finding, x.start, y.start, x.stop - x.start, y.stop - y.start) for y, x in found]


def overlaps(found: list[Box], true: list[Box], over: str = "found") -> np.ndarray:
    """(found, true): the area they share, over that of the found box (`found`: IoBB) or of both together (`union`)."""
    a, b = (np.array([box[1:] for box in boxes], float).reshape(-1, 4) for boxes in (found, true))
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, :2] + a[:, None, 2:], b[None, :, :2] + b[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(-1)
    own = np.broadcast_to(a[:, None, 2:].prod(-1), shared.shape)
    return shared / (own if over == "found" else own + b[None, :, 2:].prod(-1) - shared)


def localisation(
    found: Mapping[str, list[Box]], true: Mapping[str, list[Box]], least: float, over: str = "found"
) -> pd.DataFrame:
    """One row a disease, over the cases that have a true box of it.

    accuracy         share of the true boxes that a found box of this disease overlaps by at least `least`
    false_positives  found boxes of this disease that overlap none so, per case
    """
    rows = []
    for finding in BOXED:
        cases = [case for case, boxes in true.items() if any(box.finding == finding for box in boxes)]
        pairs = [[[b for b in side.get(case, []) if b.finding == finding] for side in (found, true)] for case in cases]
        hits = [overlaps(*pair, over) >= least for pair in pairs]
        count = sum(hit.shape[1] for hit in hits)
        right, wrong = sum(hit.any(0).sum() for hit in hits), sum((~hit.any(1)).sum() for hit in hits)
        if count:
            rows.append((finding, len(cases), count, right / count, wrong / len(cases)))
    return pd.DataFrame(rows, columns=["finding", "cases", "boxes", "accuracy", "false_positives"])
