"""RefPath, the data set of PathVG: tiles of lung pathology, on each the boxes of what expressions describe."""

import json
import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import pandas as pd
from PIL import Image

from medcook.data import fetch
from medcook.data.case import Case
from medcook.data.datasets import Dataset
from medcook.data.readers.damage import readable
from medcook.data.splits import guard_test
from medcook.errors import MedcookError

PARTS = ("train", "testA", "testB")
MAGNIFICATION = {"testA": 40, "testB": 20}
FOLDERS = ("refpath_image", "refpath_images", "images")  # the archive's, and those that the authors' page speaks of
NAME = re.compile(r"(\d+)\.jpg")
CORNERS = ("x1", "y1", "x2", "y2")
OR = " or "
WHERE = "Take the lists and images of RefPath as they are."
SLIDES = (
    *((21, 764), (865, 1227), (1303, 1425), (1507, 1690), (1747, 2183), (2208, 2330), (2340, 3037), (3054, 4125)),
    *((4136, 4940), (4955, 6016), (6019, 6743), (6748, 7054), (7076, 7262), (7269, 7540), (7576, 7900), (7920, 8233)),
    *((8243, 8476), (8506, 9574), (9633, 9944), (9991, 10097), (10167, 11013), (11043, 11892), (11901, 12832)),
    *((12854, 13292), (13301, 13602), (13608, 13714), (13725, 14022), (14100, 14653), (14665, 15705), (15735, 15906)),
    *((15925, 16720), (16727, 16849), (16879, 17622), (17647, 18621), (18629, 19041), (19070, 20115), (20148, 20297)),
    *((20329, 21304), (21310, 22019), (22058, 22617), (22629, 23776), (23806, 24870), (24887, 25040), (25060, 25957)),
    *((25977, 26181), (26184, 26833)),
)
"""First and last number of a slide's images in testA and testB, as measured; what lies between two may be of either."""


class Region(NamedTuple):
    """What expressions describe: its number in the image, and its box in pixels, x to the right and y downwards."""

    number: int
    x1: float
    y1: float
    x2: float
    y2: float
    expressions: tuple[str, ...]


class Tile(NamedTuple):
    """One image: the list it is in, its size in pixels, and its regions."""

    part: str
    width: int
    height: int
    regions: tuple[Region, ...]


class PathVG(Dataset):
    """A case is one image: image (3, H, W) in 0 to 255; label (H, W), 1 in the boxes of its regions.

    attributes: part (train, testA or testB, as the authors deal them), magnification (None in train, where it is not
    told); of a case also: regions
    """

    def index(self) -> dict[str, str]:
        """{case_id: slide} of all images, also of those that may be of either of two slides; see `patients`."""
        return self._slides

    @cached_property
    def _slides(self) -> dict[str, str]:
        return {case_id: slide_of(case_id) for case_id in sorted(self._tiles, key=int)}

    @cached_property
    def patients(self) -> dict[str, list[str]]:
        """{slide: case_ids}, without the images that may be of either of two slides."""
        found: dict[str, list[str]] = {}
        for case_id, slide in self._slides.items():
            if OR not in slide:
                found.setdefault(slide, []).append(case_id)
        return found

    def guard(self, case_id: str) -> None:
        """Refuse a test case, also an image that may be of a test slide."""
        slides = self.index().get(case_id, "").split(OR)
        if len(slides) > 1 and not {*slides}.isdisjoint(self.split.test):
            guard_test(self.manifest.name, case_id)
        super().guard(case_id)

    @cached_property
    def _tiles(self) -> dict[str, Tile]:
        """{case_id: Tile} of all lists."""
        tiles: dict[str, Tile] = {}
        for part in PARTS:
            path = self.file(f"{part}.jsonl")
            for number, (case_id, tile) in enumerate(tiles_of(path, part)):
                before = tiles.setdefault(case_id, tile)
                problem = None
                if before.part != part:
                    problem = f"{case_id}.jpg is in {before.part}.jsonl, too"
                elif (before.width, before.height) != (tile.width, tile.height):
                    problem = f"{case_id}.jpg has two sizes"
                elif before is not tile and tile.regions[0].number in [one.number for one in before.regions]:
                    problem = f"region {tile.regions[0].number} of {case_id}.jpg is listed twice"
                elif part != "train" and OR in slide_of(case_id):
                    problem = f"{case_id}.jpg has a number that none of {part} had: slides cannot be told by them"
                if problem:
                    raise MedcookError(f"{path}, entry {number + 1}: {problem}.", WHERE)
                if before is not tile:
                    tiles[case_id] = before._replace(regions=before.regions + tile.regions)
        return tiles

    def attributes(self, case_id: str) -> dict:
        part = self._tiles[case_id].part
        return {"part": part, "magnification": MAGNIFICATION.get(part)}

    def read(self, case_id: str) -> Case:
        tile = self._tiles[case_id]
        places = [fetch.local(self.manifest.name, f"{folder}/{case_id}.jpg") for folder in FOLDERS]
        path = next(filter(None, places), None) or self.stored(f"{FOLDERS[0]}/{case_id}.jpg")
        with readable(path, "image", "Unpack it again."), Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
        if pixels.shape[:2] != (tile.height, tile.width):
            problem = f"{pixels.shape[1]} x {pixels.shape[0]} pixels, not {tile.width} x {tile.height} as listed"
            raise MedcookError(f"{path}: {problem}.", WHERE)
        if any(one.x2 > tile.width or one.y2 > tile.height for one in tile.regions):
            raise MedcookError(f"{path}: a box of {tile.part}.jsonl reaches over its edge.", WHERE)
        label = np.zeros(pixels.shape[:2], np.uint8)
        for one in tile.regions:
            label[pixels_of(one)] = 1
        return Case(
            image=np.ascontiguousarray(pixels.transpose(2, 0, 1)),
            label=label,
            case_id=case_id,
            patient_id=self._slides[case_id],
            attributes=self.attributes(case_id) | {"regions": tile.regions},
        )


def slide_of(case_id: str) -> str:
    """The slide of an image by its number: `slide 8`, or `slide 8 or slide 9` where it may be of either."""
    number = int(case_id)
    place = bisect_right(SLIDES, (number, math.inf))  # how many slides begin up to there
    known = place > 0 and number <= SLIDES[place - 1][1]
    return f"slide {place}" if known else f"slide {place}{OR}slide {place + 1}"


def tiles_of(path: Path, part: str) -> Iterator[tuple[str, Tile]]:
    """(case_id, a Tile with one region) for each line of a list."""
    with readable(path, "list", "Get it again."):
        lines = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    if not lines:
        raise MedcookError(f"{path}: nothing is listed.", "Get it again.")
    for number, line in enumerate(lines, start=1):
        try:
            yield tile_of(json.loads(line), part)
        except (ValueError, RecursionError) as error:
            raise MedcookError(f"{path}, entry {number}: {error}.", WHERE) from error


def tile_of(one: object, part: str) -> tuple[str, Tile]:
    """(case_id, Tile) of one line; ValueError says what is wrong with it."""
    one = one if isinstance(one, dict) else {}
    name = one.get("image_id")
    match = NAME.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        raise ValueError(f"the image is not named as 8006.jpg is: {name!r:.60}")
    if "image" in one and PurePosixPath(str(one["image"])).name != name:
        raise ValueError(f"{name} is at {one['image']!r:.60}, another image")
    size = [one.get("width"), one.get("height")]
    if not all(type(side) is int and side > 0 for side in size):
        raise ValueError(f"the size of {name} is not told in pixels: {size!r:.60}")
    box, number, said = one.get("bbox"), one.get("bbox_id"), one.get("expression")
    if not isinstance(box, list) or len(box) != 4 or not all(type(side) in (int, float) for side in box):
        raise ValueError(f"a box of {name} is not four numbers: {box!r:.60}")
    x1, y1, x2, y2 = map(float, box)
    if not np.isfinite([x1, y1, x2, y2]).all() or not (0 <= x1 < x2 and 0 <= y1 < y2):
        raise ValueError(f"a box of {name} is empty or begins outside: {box!r:.80}")
    if type(number) is not int:
        raise ValueError(f"a box of {name} has no number: {number!r:.60}")
    expressions = tuple(map(spoken, said)) if isinstance(said, list) and all(isinstance(t, str) for t in said) else ()
    if not expressions or not all(expressions):
        raise ValueError(f"box {number} of {name} has no expressions: {said!r:.60}")
    return match[1], Tile(part, *size, (Region(number, x1, y1, x2, y2, expressions),))


def spoken(text: str) -> str:
    """An expression without the blanks, brackets and quotation marks that some are wrapped in."""
    text = text.strip()
    for opening, closing in ("[]", '""'):
        if len(text) > 1 and text[0] == opening and text[-1] == closing:
            text = text[1:-1].strip()
    return text


def pixels_of(region: Region) -> tuple[slice, slice]:
    """(rows, columns) of a region's box, at least one of each."""
    rows, columns = ((region.y1, region.y2), (region.x1, region.x2))
    return tuple(slice(round(low), max(round(low) + 1, round(high))) for low, high in (rows, columns))


def expression_table(cases: Iterable[Case]) -> pd.DataFrame:
    """One row an expression: case_id, part, number, x1, y1, x2, y2, expression, share and several.

    share    of the image that the box takes
    several  whether the same words mean another box of the image, too, so that no answer can be right about both
    """
    rows = []
    for case in cases:
        height, width = case.spatial
        for one in case.attributes["regions"]:
            share = (one.x2 - one.x1) * (one.y2 - one.y1) / (height * width)
            told = (case.case_id, case.attributes["part"], one.number, *one[1:5])
            rows += [(*told, text, share) for text in one.expressions]
    table = pd.DataFrame(rows, columns=["case_id", "part", "number", *CORNERS, "expression", "share"])
    boxes = table.groupby(["case_id", "expression"])["number"].transform("nunique")
    return table.assign(several=(boxes > 1).to_numpy())


def grounding(table: pd.DataFrame, answers: np.ndarray, least: float = 0.5) -> pd.DataFrame:
    """One row a part: how many expressions there are, the `accuracy` of answers to them, and their mean `iou`.

    answers  (N, 4), a box x1, y1, x2, y2 for each row of `expression_table`; NaN where none was found, which is wrong
    least    an answer is right where its intersection over union is above it, as the authors count
    """
    found, true = np.asarray(answers, dtype=float), table[[*CORNERS]].to_numpy(float)
    if found.shape != true.shape:
        raise MedcookError(f"answers of {found.shape}, not of {true.shape}.", "Give a box for each expression.")
    low, high = np.maximum(found[:, :2], true[:, :2]), np.minimum(found[:, 2:], true[:, 2:])
    shared = np.clip(high - low, 0, None).prod(1)
    areas = sum(np.clip(box[:, 2:] - box[:, :2], 0, None).prod(1) for box in (found, true))
    iou = np.nan_to_num(shared / (areas - shared))
    rows = table[["part"]].assign(iou=iou, accuracy=(iou > least).astype(float))
    return rows.groupby("part", sort=False).agg(
        expressions=("iou", "size"), accuracy=("accuracy", "mean"), iou=("iou", "mean")
    )
