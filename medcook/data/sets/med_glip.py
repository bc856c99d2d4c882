"""Med-GLIP-5M: images of seven modalities with regions, each of which is a phrase, a box and perhaps a mask.

The files could not be opened, and no page that could be read says how they are laid out: the layout is our reading. The
authors send who trains with the set to MMDetection, so an annotation file is COCO's, with images, categories and
annotations; one of these is a region, with a box in pixels. A category's name is the phrase, its supercategory the
class that it was put into.
"""

import difflib
import json
import math
import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import pandas as pd
from PIL import Image
from skimage.draw import polygon2mask

from medcook.data import fetch
from medcook.data.case import Case
from medcook.data.datasets import Dataset
from medcook.data.readers.damage import readable
from medcook.errors import MedcookError

PARTS = ("images", "categories", "annotations")
LISTS = (".json", ".jsonl")
"""Endings of annotation files; JSON Lines, MMDetection's other form, are refused rather than passed over."""
MODALITIES = {"ct": "CT", "mri": "MRI", "xray": "X-ray", "ultrasound": "ultrasound", "endoscopy": "endoscopy"}
"""{word: modality} of the five that a summary of the paper names."""
PUBLISHED = {"regions": 5_300_000, "modalities": 7, "phrases": 198, "groups": 38}
"""By the paper (over 5.3 million regions, seven modalities) and the authors' page (198 labels, 38 classes)."""
EDGE, AROUND = 0.01, 1
"""Pixels by which a box may be over the edge of its image, and a mask over that of its box."""
LAYOUT = f"An annotation file is COCO's, with {', '.join(PARTS)}; take it as it is published, and other JSON away."


class Picture(NamedTuple):
    """One image: its path as listed, its size in pixels, and its modality, None where that is not told."""

    name: str
    width: int
    height: int
    modality: str | None


class Term(NamedTuple):
    """What a region is called, and the class that this name was put into, None where there is none."""

    phrase: str
    group: str | None


class Box(NamedTuple):
    """A rectangle in pixels."""

    left: float
    top: float
    width: float
    height: float


class Region(NamedTuple):
    """One region of one image; `listed`: the annotation file; `outline`: its mask as COCO stores it, if it has one."""

    listed: str
    picture: Picture
    term: Term
    box: Box
    outline: object


class MedGLIP5M(Dataset):
    """A case is one region: image (3, H, W) in 0 to 255; label (H, W), 1 in its mask, or in its box without a mask.

    attributes: image, phrase, group and modality (both None where they are not told); of a case that was read also
    box, and region_from: `mask` or `box`
    """

    def index(self) -> dict[str, str]:
        return {case_id: patient_of(region) for case_id, region in self._regions.items()}

    @cached_property
    def _lists(self) -> dict[str, Path]:
        """{path below the set's folder: file} of all annotation files on this machine."""
        roots = [root for root in fetch.folders(self.manifest.name) if root.is_dir()]
        found: dict[str, Path] = {}
        for root in roots:
            paths = (path for path in sorted(root.rglob("*")) if path.suffix in LISTS and path.name[:2] != "._")
            found = {path.relative_to(root).as_posix(): path for path in paths} | found
        if roots and not found:
            raise MedcookError(f"{roots[0]}: there is no annotation file.", LAYOUT)
        if not found:
            self.fetch()  # this says where to get them
        return dict(sorted(found.items()))

    @cached_property
    def _regions(self) -> dict[str, Region]:
        """{annotation file/number: Region} of all annotation files."""
        regions: dict[str, Region] = {}
        seen: dict[tuple, str] = {}
        for listed, path in self._lists.items():
            for number, region in regions_of(path, listed).items():
                key = (PurePosixPath(listed).parent / region.picture.name, region.term.phrase, region.box)
                if (other := seen.setdefault(key, listed)) != listed:
                    raise MedcookError(f"{path}: region {number} is in {other}, too.", "Keep one of the two files.")
                regions[f"{listed.rpartition('.')[0]}/{number}"] = region
        return regions

    def meant(self, phrase: str) -> list[str]:
        """Ids of the cases that a phrase means; MedcookError for one that the annotation files do not have."""
        found = [case_id for case_id, region in self._regions.items() if region.term.phrase == spoken(phrase)]
        if not found:
            known = sorted({region.term.phrase for region in self._regions.values()})
            near = difflib.get_close_matches(spoken(phrase), known, cutoff=0.4) or known[:5]
            raise MedcookError(f"{self.manifest.name} has no phrase {phrase!r:.60}.", f"It has {', '.join(near)}, ...")
        return found

    def attributes(self, case_id: str) -> dict:
        picture, term = self._regions[case_id].picture, self._regions[case_id].term
        return {"image": picture.name, **term._asdict(), "modality": picture.modality}

    def read(self, case_id: str) -> Case:
        region = self._regions[case_id]
        pixels, mask = self._pixels(region), self._mask(case_id)
        return Case(
            image=pixels,
            label=(boxed(region) if mask is None else mask).astype(np.uint8),
            case_id=case_id,
            patient_id=patient_of(region),
            attributes=self.attributes(case_id) | {"box": region.box, "region_from": "box" if mask is None else "mask"},
        )

    def _pixels(self, region: Region) -> np.ndarray:
        """The image of a region, (3, H, W) float32, of the size that is listed."""
        folder, name = PurePosixPath(region.listed).parent, region.picture.name
        places = [str(base / inner / name) for base in (folder, folder.parent) for inner in ("", "images")]
        found = (fetch.local(self.manifest.name, place) for place in places)
        path = next(filter(None, found), None) or self.stored(places[-1])
        with readable(path, "image", "Get it again."), Image.open(path) as image:
            if image.mode[0] in "IF":  # converting these would cut all values off at 255
                raise MedcookError(f"{path}: an image of an unknown format ({image.mode}).", "Save it with 8 bits.")
            pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
        width, height = region.picture.width, region.picture.height
        if pixels.shape[:2] != (height, width):
            problem = f"{pixels.shape[1]} x {pixels.shape[0]} pixels, not {width} x {height} as in {region.listed}"
            raise MedcookError(f"{path}: {problem}.", "Get both again; do not resize it.")
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def _mask(self, case_id: str) -> np.ndarray | None:
        """(H, W) bool of a region that has a mask; MedcookError where it is empty or reaches out of the box."""
        region, path = self._regions[case_id], self._lists[self._regions[case_id].listed]
        with readable(path, f"mask of {case_id}", LAYOUT):
            mask = mask_of(region.outline, (region.picture.height, region.picture.width))
        if mask is not None and (not mask.any() or (mask & ~boxed(region, AROUND)).any()):
            raise MedcookError(f"{path}: the mask of {case_id} is empty or reaches out of its box.", "Get it again.")
        return mask


def regions_of(path: Path, listed: str) -> dict[int | str, Region]:
    """{number: Region} of one annotation file; MedcookError says what is not COCO's in it."""
    with readable(path, "annotation file", LAYOUT):
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    parts = [content.get(part) if isinstance(content, dict) else None for part in PARTS]
    if not all(isinstance(part, list) and all(isinstance(one, dict) for one in part) for part in parts):
        raise MedcookError(f"{path}: a file of an unknown format.", LAYOUT)
    images, categories, annotations = parts
    try:
        pictures = numbered(images, "image", lambda entry: picture_of(entry, listed))
        terms = numbered(categories, "category", term_of)
        return numbered(annotations, "region", lambda entry: region_of(entry, listed, pictures, terms))
    except (ValueError, OverflowError) as error:
        raise MedcookError(f"{path}: {error}.", LAYOUT) from error


def numbered(entries: list[dict], what: str, make: Callable[[dict], NamedTuple]) -> dict[int | str, NamedTuple]:
    """{id: make(entry)}; ValueError for an entry without an id of its own."""
    made: dict[int | str, NamedTuple] = {}
    for entry in entries:
        number = entry.get("id")
        if not isinstance(number, int | str) or number in made:
            raise ValueError(f"{what} {number!r:.40} has no id, or that of another")
        made[number] = make(entry)
    return made


def picture_of(entry: dict, listed: str) -> Picture:
    """The Picture of an entry of `images`; ValueError says what is wrong with it."""
    name, size, told = entry.get("file_name"), [entry.get("width"), entry.get("height")], entry.get("modality")
    path = PurePosixPath(name if isinstance(name, str) else "")
    if not path.name or path.is_absolute() or ".." in path.parts or re.search(r"\\|^\w:", str(path)):
        raise ValueError(f"the file_name {name!r:.80} is not the path of an image below its folder")
    if not all(type(side) is int and side > 0 for side in size):
        raise ValueError(f"the size of {name:.80} is not told in pixels: {size!r:.60}")
    if told is not None and not (isinstance(told, str) and told.strip()):
        raise ValueError(f"the modality of {name:.80} is no text: {told!r:.60}")
    return Picture(str(path), *size, modality_in(listed) if told is None else modality_in(told) or told.strip())


def modality_in(text: str) -> str | None:
    """The first modality that a word of a text means, or None."""
    words = re.findall(r"[a-z]+", re.sub(r"x[-_ ]ray", "xray", text.lower()))
    return next((MODALITIES[word] for word in words if word in MODALITIES), None)


def term_of(entry: dict) -> Term:
    """The Term of an entry of `categories`; ValueError for one without a name."""
    name, group = entry.get("name"), entry.get("supercategory")
    if not isinstance(name, str) or not spoken(name):
        raise ValueError(f"category {entry.get('id')!r:.40} has no name: {name!r:.60}")
    return Term(spoken(name), spoken(group) or None if isinstance(group, str) else None)


def spoken(name: str) -> str:
    """A name as a phrase: gluteus_maximus_left is `gluteus maximus left`."""
    return " ".join(name.replace("_", " ").split())


def region_of(entry: dict, listed: str, pictures: dict[int | str, Picture], terms: dict[int | str, Term]) -> Region:
    """The Region of an entry of `annotations`; ValueError says what is wrong with it."""
    number, image, category, box = (entry.get(key) for key in ("id", "image_id", "category_id", "bbox"))
    if not isinstance(image, int | str) or image not in pictures:
        raise ValueError(f"region {number!r:.40} is of image {image!r:.40}, which is not listed")
    if not isinstance(category, int | str) or category not in terms:
        raise ValueError(f"region {number!r:.40} has category {category!r:.40}, which has no phrase")
    if not isinstance(box, list) or len(box) != 4 or not all(type(side) in (int, float) for side in box):
        raise ValueError(f"the box of region {number!r:.40} is not four numbers: {box!r:.60}")
    picture, box = pictures[image], Box(*map(float, box))
    over = max(box.left + box.width - picture.width, box.top + box.height - picture.height, -box.left, -box.top)
    if not np.isfinite(box).all() or min(box.width, box.height) <= 0 or over > EDGE:
        raise ValueError(f"the box of region {number!r:.40} is empty or outside of {picture.name:.60}: {[*box]!r:.60}")
    return Region(listed, picture, terms[category], box, entry.get("segmentation"))


def patient_of(region: Region) -> str:
    """The folder of a region's image. No name tells the patient, so that what lies together stays together."""
    return str(PurePosixPath(region.listed).parent / PurePosixPath(region.picture.name).parent)


def boxed(region: Region, around: int = 0) -> np.ndarray:
    """(H, W) bool: all pixels that a region's box touches, and some more around it."""
    (left, top, width, height), picture = region.box, region.picture
    mask = np.zeros((picture.height, picture.width), bool)
    rows = slice(max(int(top) - around, 0), math.ceil(top + height) + around)
    mask[rows, max(int(left) - around, 0) : math.ceil(left + width) + around] = True
    return mask


def mask_of(outline: object, shape: tuple[int, int]) -> np.ndarray | None:
    """(H, W) bool of a `segmentation`: polygons, or run lengths down the columns, as numbers or packed; None if empty.

    What is neither raises whatever it may.
    """
    if not outline:
        return None
    if isinstance(outline, list):
        corners = [np.asarray(polygon, float).reshape(-1, 2) for polygon in outline]
        masks = [polygon2mask(shape, points[:, ::-1] - 0.5) for points in corners]  # a pixel is where its middle is
        return np.any(masks, axis=0)
    runs = unpacked(outline["counts"]) if isinstance(outline["counts"], str) else outline["counts"]
    if tuple(outline["size"]) != shape or sum(runs) != shape[0] * shape[1]:
        raise ValueError(f"its size is not {shape}")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(shape[::-1]).T


def unpacked(text: str) -> list[int]:
    """Run lengths that COCO has packed: 5 bits a character, the lowest first, and from the fourth on differences to the
    length before the last."""
    runs: list[int] = []
    value = shift = 0
    for code in (ord(character) - 48 for character in text):
        value, shift = value | (code & 31) << shift, shift + 5
        if not code & 32:  # nothing follows; bit 16 is the sign
            value -= (code & 16) and 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs


def figures(dataset: MedGLIP5M) -> pd.DataFrame:
    """One row a figure of the set, `here` and as `published`; what is not told counts as nothing. No image is read."""
    known = pd.DataFrame([dataset.attributes(case_id) for case_id in dataset.index()])
    here = [len(known), *(known[column].nunique() for column in ("modality", "phrase", "group"))]
    return pd.DataFrame({"here": here, "published": PUBLISHED.values()}, index=pd.Index(PUBLISHED, name="figure"))
