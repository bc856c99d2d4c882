"""ReXGroundingCT: chest CT with a mask for every sentence about a finding, and the authors' split, made safe."""

import json
import re
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from medcook.data import fetch
from medcook.data.case import IGNORE, Case
from medcook.data.datasets import Dataset, as_labels, present_values
from medcook.data.readers.damage import readable
from medcook.data.readers.nifti import read_ct, read_nifti
from medcook.data.splits import Split
from medcook.errors import MedcookError

TABLE = "dataset.json"
PARTS = ("train", "val", "test")
NAME = re.compile(r"((?:(train|valid)_[0-9]+)_[a-z]+)_[0-9]+\.nii\.gz")
CODES = ("1a", "1b", "1c", "1d", "1e", "1f", "2a", "2b", "2c", "2d", "2e", "2f", "2g", "2h")
"""Of the categories; the label value of each is its place, from 1. 1: typically non-focal, 2: typically focal."""


class Entry(NamedTuple):
    """One scan of dataset.json. categories: the code of each sentence, None where none is given (in test)."""

    name: str
    part: str
    sentences: tuple[str, ...]
    categories: tuple[str | None, ...]

    @property
    def scan(self) -> str:
        """`train_1741_b`, of which there may be several reconstructions."""
        return NAME.fullmatch(self.name)[1]

    @property
    def patient(self) -> str:
        return self.scan.rsplit("_", 1)[0]

    @property
    def image(self) -> str:
        """Where CT-RATE keeps the CT."""
        return f"dataset/{self.patient.split('_')[0]}_fixed/{self.patient}/{self.scan}/{self.name}"

    @property
    def masks(self) -> str:
        return f"segmentations/{self.name}"


class ReXGroundingCT(Dataset):
    """A case is one CT: image (1, H, W, D) in HU, as stored; label (H, W, D), the category of the findings, where
    these overlap the highest number. A finding whose category is not told is unlabelled there.

    attributes: part, sentences, categories (a code a sentence), exhaustive (whether all that a sentence means was
    drawn), orientation; entities, how many instances were drawn for each sentence
    extras: masks (findings, H, W, D) bool, in the order of the sentences
    """

    def index(self) -> dict[str, str]:
        """Of all scans, also of those that are left out; see `patients`."""
        return {case_id: entry.patient for case_id, entry in self._entries.items()}

    @cached_property
    def _entries(self) -> dict[str, Entry]:
        """{case_id: Entry} of dataset.json: first those of train, then val, then test."""
        path = self.file(TABLE)
        with readable(path, "JSON file", "Get it again.", quoting=False):
            content = json.loads(path.read_text(encoding="utf-8"))
        try:
            return entries_of(content)
        except ValueError as error:
            raise MedcookError(f"{path}: {error}.", "Take dataset.json of ReXGroundingCT as it is.") from error

    @cached_property
    def sides(self) -> dict[str, str]:
        """{patient: part of the split}: of two parts the later one, which judges."""
        return {entry.patient: entry.part for entry in self._entries.values()}

    @cached_property
    def patients(self) -> dict[str, list[str]]:
        """{patient: case_ids} without what is left out: a patient's scans in an earlier part than the patient's."""
        found: dict[str, list[str]] = {patient: [] for patient in self.sides}
        for case_id, entry in self._entries.items():
            if entry.part == self.sides[entry.patient]:
                found[entry.patient].append(case_id)
        return found

    @cached_property
    def split(self) -> Split:
        """The authors' split by patients; who is in two parts of theirs is in the later one."""
        parts = {part: tuple(patient for patient, side in self.sides.items() if side == part) for part in PARTS}
        return Split(**parts, source=f"the lists of {TABLE}; patients of two parts stay in the later one")

    def attributes(self, case_id: str) -> dict:
        entry = self._entries[case_id]
        told = {"part": entry.part, "sentences": entry.sentences, "categories": entry.categories}
        return told | {"exhaustive": entry.part != "train"}

    def read(self, case_id: str) -> Case:
        entry = self._entries[case_id]
        if entry.part == "test" and not fetch.local(self.manifest.name, entry.masks):
            raise MedcookError(
                f"{self.manifest.name}: the authors hold back the masks of test, {entry.masks} is not there.",
                "Develop on train and val; rexrank.ai judges answers on test.",
            )
        drawn = self.stored(entry.masks)
        image = read_ct(self.stored(entry.image, "CT-RATE"))
        stored = read_masks(drawn, (len(entry.sentences), *image.array.shape))
        masks = stored > 0
        label = np.zeros(image.array.shape, np.uint8)
        values = [0 if code is None else 1 + CODES.index(code) for code in entry.categories]
        for value, number in sorted(zip(values, range(len(values)), strict=True)):
            label[masks[number]] = value or IGNORE
        known = {"orientation": image.orientation, "entities": tuple(len(present_values(one)) - 1 for one in stored)}
        return Case(
            image=image.array[None],
            label=label,
            case_id=case_id,
            patient_id=entry.patient,
            spacing=image.spacing,
            attributes=self.attributes(case_id) | known,
            extras={"masks": masks},
        )


def entries_of(content: object) -> dict[str, Entry]:
    """{case_id: Entry} of what dataset.json holds; ValueError says what is wrong with it."""
    entries: dict[str, Entry] = {}
    for part in PARTS:
        listed = content.get(part) if isinstance(content, dict) else None
        if not isinstance(listed, list):
            raise ValueError(f"no list {part!r}")
        for one in listed:
            entry = entry_of(one, part)
            case_id = entry.name.removesuffix(".nii.gz")
            if case_id in entries:
                raise ValueError(f"{case_id} is listed twice")
            entries[case_id] = entry
    return entries


def entry_of(one: object, part: str) -> Entry:
    """What dataset.json says of one scan; its name tells where its files are, so it must be a name of CT-RATE."""
    one = one if isinstance(one, dict) else {}
    name = one.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(f"an entry of {part!r} is not named as train_1741_b_2.nii.gz is: {name!r:.60}")
    sentences = numbered(one.get("findings"))
    if not sentences or not all(isinstance(text, str) and text.strip() for text in sentences):
        raise ValueError(f"the findings of {name} are not sentences numbered from 0")
    given = one.get("categories")
    categories = (None,) * len(sentences) if part == "test" and not given else numbered(given)
    if len(categories) != len(sentences):
        raise ValueError(f"{name} has {len(sentences)} findings, and not a category for each")
    if strange := [code for code in categories if code is not None and code not in CODES]:
        raise ValueError(f"{name} has a finding of category {strange[0]!r:.20}; there are {', '.join(CODES)}")
    return Entry(name, part, sentences, categories)


def numbered(values: object) -> tuple:
    """The values of {"0": ..., "1": ...} in the order of the numbers; none where a number is missing."""
    if not isinstance(values, dict) or set(values) != {str(number) for number in range(len(values))}:
        return ()
    return tuple(values[str(number)] for number in range(len(values)))


def read_masks(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The masks (findings, H, W, D) uint8: 0, or an instance's number. None of them is empty."""
    stored = read_nifti(path).array
    if stored.shape != shape:
        problem = f"masks of {stored.shape}, not of {shape}, one a sentence on the voxels of the CT"
        raise MedcookError(f"{path}: {problem}.", "Get CT, masks and dataset.json of the same version.")
    with readable(path, "NIfTI file of masks", "Get it again."):
        masks = as_labels(stored, path)
    if empty := [number for number, mask in enumerate(masks) if not mask.any()]:
        raise MedcookError(f"{path}: nothing is drawn for finding {empty[0]}.", "Get it again.")
    return masks
