"""Chest ImaGenome: a scene graph for every chest X-ray of MIMIC-CXR, as tables that are linked to boxes."""

import json
import re
import zipfile
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from medcook.data import fetch
from medcook.data.case import Case
from medcook.data.datasets import Dataset
from medcook.data.readers.damage import readable
from medcook.data.readers.png import read_gray
from medcook.data.readers.tables import read_table
from medcook.data.splits import Split, guard_test
from medcook.errors import MedcookError

LISTS = {"train": "train", "val": "valid", "test": "test"}
LISTED = {name: name for name in ("subject_id", "study_id", "dicom_id", "path", "ViewPosition")}
ENDING = "_SceneGraph.json"
PATH = re.compile(r"files/p(\d\d)/p(\1\d{6})/s(\d+)/([0-9a-f]+(?:-[0-9a-f]+)*)\.dcm")
WITHOUT = 23  # listed images that have no scene graph in the published set
CHANGES = ("improved", "no change", "worsened")
CORNERS = ("x1", "y1", "x2", "y2")
CUES = ("comparison", "severity", "temporal", "texture")
COLUMNS = {
    "objects": ["object_id", "location", *CORNERS],
    "attributes": ["object_id", "location", "phrase", "sentence", "category", "context", "name", *CUES],
    "comparisons": ["object_id", "location", "previous_id", "previous", "change", "sentence"],
}
SAID = {"bbox": "location", "sentence": "sentence"}
GOLD = {
    "bbox_coordinate_annotations_1000images.csv": {f"original_{corner}": corner for corner in CORNERS}
    | {"image_id": "image", "bbox_name": "location"},
    "object_attribute_with_coordinates.txt": SAID
    | {"image_id": "image", "row_id": "phrase", "categoryID": "category", "context": "context", "label_name": "name"},
    "object_comparison_with_coordinates.txt": SAID
    | {"subject_id": "object_id", "object_id": "previous_id", "comparison": "change"},
}
"""Tables of the gold set; {a column there: what it is called here}."""
WHERE = "Take the files of Chest ImaGenome 1.0.0 as they are."


class SceneGraph(NamedTuple):
    """One X-ray's graph as three tables; `object_id`, image and location, links them.

    objects      a box a row, in pixels of the X-ray, also those that are empty or reach over its edge
    attributes   what a phrase says of a location: category, yes or no (context), name, and the phrase's cues
    comparisons  what a phrase says of a location against an earlier X-ray (previous): improved, worsened, no change
    """

    objects: pd.DataFrame
    attributes: pd.DataFrame
    comparisons: pd.DataFrame


class ChestImaGenome(Dataset):
    """A case is one X-ray: image (1, H, W) as stored in MIMIC-CXR-JPG; label (H, W), the boxes of the 29 locations,
    where these overlap the smaller one.

    attributes: study, view; sex and age_decile as the graph says, graph (the SceneGraph)
    """

    def index(self) -> dict[str, str]:
        return {case_id: row.subject_id for case_id, (_, row) in self._rows.items()}

    @cached_property
    def _rows(self) -> dict[str, tuple]:
        """{case_id: (part, row of its list)} of the listed images that have a scene graph."""
        listed: dict[str, tuple] = {}
        for part, stem in LISTS.items():
            path = self.file(f"silver_dataset/splits/{stem}.csv")
            for row in read_table(path, LISTED, WHERE).itertuples():
                match, own = PATH.fullmatch(row.path), (row.subject_id, row.study_id, row.dicom_id)
                if match is None or match.groups()[1:] != own or row.dicom_id in listed:
                    problem = f"{row.dicom_id!r:.50} is listed twice, or {row.path!r:.90} is not its path"
                    raise MedcookError(f"{path}: {problem}.", WHERE)
                listed[row.dicom_id] = part, row
        if without := [case_id for case_id in listed if case_id not in self._graphs][WITHOUT:]:
            problem = f"{len(without) + WITHOUT} listed X-rays have no scene graph, {without[0]} for one"
            raise MedcookError(f"{self.manifest.name}: {problem}.", "Unpack scene_graph.zip again, or leave it packed.")
        return {case_id: row for case_id, row in listed.items() if case_id in self._graphs}

    @cached_property
    def _graphs(self) -> dict[str, Path | str]:
        """{case_id: its file, or its name in scene_graph.zip}."""
        folder = self.file("silver_dataset/splits/train.csv").parents[1] / "scene_graph"
        names = self._packed.namelist() if self._packed else folder.rglob(f"*{ENDING}")
        return {Path(name).name.removesuffix(ENDING): name for name in names if str(name).endswith(ENDING)}

    @cached_property
    def _packed(self) -> zipfile.ZipFile | None:
        path = fetch.local(self.manifest.name, "silver_dataset/scene_graph.zip")
        with readable(path or Path(), "zip file", WHERE):
            return zipfile.ZipFile(path) if path else None

    @cached_property
    def split(self) -> Split:
        """The authors' split, by patients."""
        sides = [dict.fromkeys(row.subject_id for part, row in self._rows.values() if part == side) for side in LISTS]
        return Split(*map(tuple, sides), source="the lists in silver_dataset/splits")

    def attributes(self, case_id: str) -> dict:
        row = self._rows[case_id][1]
        return {"study": row.study_id, "view": row.ViewPosition or None}

    def graph(self, case_id: str) -> SceneGraph:
        """A case's scene graph without its X-ray; that of a test case only inside `open_test`."""
        self.guard(case_id)
        return self._graph(case_id)[1]

    def _graph(self, case_id: str) -> tuple[dict, SceneGraph]:
        """What the file holds, and its tables."""
        found, row = self._graphs[case_id], self._rows[case_id][1]
        with readable(Path(found), "JSON file", WHERE, quoting=False):
            content = json.loads(found.read_bytes() if isinstance(found, Path) else self._packed.read(found))
        try:
            whose = [str(content[key]) for key in ("image_id", "patient_id", "study_id")]
            if whose != [case_id, row.subject_id, row.study_id]:
                raise ValueError("it is the graph of another X-ray, patient or study")
            return content, tables_of(content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            why = f"no {error}" if isinstance(error, KeyError) else error
            raise MedcookError(f"{found}: {why}.", WHERE) from error

    def read(self, case_id: str) -> Case:
        path = self._rows[case_id][1].path.removesuffix(".dcm") + ".jpg"
        image = read_gray(self.stored(path, "MIMIC-CXR-JPG"))
        content, graph = self._graph(case_id)
        known = {"sex": content.get("gender") or None, "age_decile": content.get("age_decile") or None, "graph": graph}
        return Case(
            image=image[None],
            label=painted(graph.objects, image.shape, self.manifest.structures),
            case_id=case_id,
            patient_id=self.index()[case_id],
            attributes=self.attributes(case_id) | known,
        )

    def gold(self) -> SceneGraph:
        """The tables that experts corrected, of patients who are in no part of the split; only inside `open_test`."""
        guard_test(self.manifest.name, "the gold set")
        paths = [self.file(f"gold_dataset/gold_{name}") for name in GOLD]
        found = [read_table(*one, WHERE) for one in zip(paths, GOLD.values(), strict=True)]
        for table in found[:2]:
            table["object_id"] = table.image.str.removesuffix(".dcm") + "_" + table.location
        with readable(paths[0], "table of boxes", WHERE):
            found[0] = found[0].astype(dict.fromkeys(CORNERS, float))
        with readable(paths[2], "table of comparisons", WHERE):
            told = found[2].replace(r"\.dcm_", "_", regex=True).assign(change=found[2].change.str.split(";;"))
            rows = told.explode("change")[["object_id", "previous_id", "location", "change", "sentence"]]
            found[2] = pd.DataFrame([compared(*row) for row in rows.to_numpy()], columns=COLUMNS["comparisons"])
        return SceneGraph(*(one.reindex(columns=COLUMNS[name]) for name, one in zip(COLUMNS, found, strict=True)))


def tables_of(content: dict) -> SceneGraph:
    """The tables of what a scene graph's file holds; ValueError or KeyError say what is wrong with it."""
    image = content["image_id"]
    objects = [
        (one["object_id"], one["bbox_name"], *(float(one[f"original_{corner}"]) for corner in CORNERS))
        for one in content["objects"]
    ]
    if len({one[0] for one in objects}) < len(objects) or not all(np.isfinite(one[2:]).all() for one in objects):
        raise ValueError("two boxes of one location, or a box without its corners")
    said = [row for one in content["attributes"] for row in attributes_of(one)]
    told = [
        compared(one["subject_id"], one["object_id"], one["bbox_name"], parts(name, "comparison")[2], one["phrase"])
        for one in content["relationships"]
        for name in one["relationship_names"]
    ]
    if strange := [one[0] for one in [*objects, *said, *told] if not one[0].startswith(f"{image}_")]:
        raise ValueError(f"{strange[0]!r:.90} is not of this X-ray")
    found = zip(COLUMNS.values(), (objects, said, told), strict=True)
    return SceneGraph(*(pd.DataFrame(rows, columns=columns) for columns, rows in found))


def attributes_of(one: dict) -> list[tuple]:
    """The rows of one location's attributes, which are listed phrase by phrase, as are the cues."""
    phrases, said = one["phrases"], one["attributes"]
    cues = [one.get(f"{cue}_cues") or [[] for _ in phrases] for cue in CUES]
    if any(len(listed) != len(phrases) for listed in (said, *cues)):
        raise ValueError(f"phrases, attributes and cues of {one['bbox_name']!r:.40} differ in number")
    return [
        (one["object_id"], one["bbox_name"], number, phrases[number], *parts(text), *named)
        for number, texts in enumerate(said)
        for named in [[tuple(parts(cue)[2] for cue in listed[number]) for listed in cues]]
        for text in texts
    ]


def parts(text: str, category: str | None = None) -> list[str]:
    """`anatomicalfinding|no|pneumothorax` in its three parts."""
    found = text.split("|", 2)
    if len(found) != 3 or found[1] not in ("yes", "no") or not found[2] or category not in (None, found[0]):
        raise ValueError(f"{text!r:.60} is not of the form {category or 'category'}|yes|name")
    return found


def compared(here: str, before: str, location: str, change: str, sentence: str) -> tuple:
    """A row of the comparisons: a location here, the same one on the earlier X-ray, what became of it."""
    if change not in CHANGES:
        raise ValueError(f"a comparison says {change!r:.40}; there are {', '.join(CHANGES)}")
    previous, _, same = before.partition("_")
    if same != here.partition("_")[2]:
        raise ValueError(f"{here!r:.90} is compared with {before!r:.90}")
    return here, location, before, previous, change, sentence


def with_boxes(table: pd.DataFrame, objects: pd.DataFrame, key: str = "object_id") -> pd.DataFrame:
    """The rows of `attributes` or `comparisons` with x1, y1, x2, y2 of their boxes, NaN where a location has none.

    key  "previous_id" takes the box on the earlier X-ray, from the objects of that one's graph
    """
    boxes = objects[["object_id", *CORNERS]].rename(columns={"object_id": key})
    return table.merge(boxes, on=key, how="left", validate="many_to_one")


def combinations(tables: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """How often each location is said to have, or not to have, each attribute, over many `attributes` tables."""
    keys = ["location", "category", "context", "name"]
    return pd.concat(list(tables)).groupby(keys, as_index=False).size().rename(columns={"size": "count"})


def painted(objects: pd.DataFrame, shape: tuple[int, int], structures: dict[int, str]) -> np.ndarray:
    """The label map (H, W) of the boxes, cut at the edge of the X-ray; the smaller are painted over the larger."""
    label, numbers = np.zeros(shape, np.uint8), {name: value for value, name in structures.items()}
    corners = objects[list(CORNERS)].to_numpy(float).round().clip(0, np.array([*shape[::-1]] * 2)).astype(int)
    for number in np.argsort(-np.prod(corners[:, 2:] - corners[:, :2], axis=1), kind="stable"):
        (x1, y1, x2, y2), name = corners[number], objects.location[number]
        if name in numbers and x1 < x2 and y1 < y2:
            label[y1:y2, x1:x2] = numbers[name]
    return label
