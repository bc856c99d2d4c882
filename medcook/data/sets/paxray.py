"""PAXRay: X-rays projected from CT, on each the masks of 166 structures, which overlap, and the authors' split."""

import json
import re
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from medcook.data.case import Case
from medcook.data.datasets import Dataset
from medcook.data.readers.damage import readable
from medcook.data.readers.png import read_gray
from medcook.data.splits import Split
from medcook.errors import MedcookError

TABLE = "paxray.json"
PARTS = ("train", "val", "test")
NAME = re.compile(r"(RibFrac\d+)(frontal|lateral)\.png")
TWICE = " (again)"
"""What the manifest adds to a name that the authors gave to two structures."""


class Entry(NamedTuple):
    """One X-ray: its patient, its view, the part of the split, and the paths of the image and of its masks."""

    patient: str
    view: str
    part: str
    image: str
    target: str


class PaxRay(Dataset):
    """A case is one X-ray: image (1, H, W) as stored; label (H, W), where structures overlap, the highest number.

    attributes: view (frontal or lateral)
    extras: masks (166, H, W) bool, at each structure's number less 1
    """

    def index(self) -> dict[str, str]:
        return {case_id: entry.patient for case_id, entry in self._entries.items()}

    @cached_property
    def _entries(self) -> dict[str, Entry]:
        """{case_id: Entry} of paxray.json."""
        path = self.file(TABLE)
        with readable(path, "JSON file", "Unpack it again."):
            content = json.loads(path.read_text(encoding="utf-8"))
        try:
            return entries_of(content, tuple(self.manifest.structures.values()))
        except ValueError as error:
            raise MedcookError(f"{path}: {error}.", "Take paxray.json of paxray_dataset.zip as it is.") from error

    @cached_property
    def split(self) -> Split:
        """The authors' split, by patients."""
        known = self._entries.values()
        parts = {part: tuple(dict.fromkeys(one.patient for one in known if one.part == part)) for part in PARTS}
        return Split(**parts, source=f"the lists of {TABLE}")

    def attributes(self, case_id: str) -> dict:
        return {"view": self._entries[case_id].view}

    def read(self, case_id: str) -> Case:
        entry = self._entries[case_id]
        image = read_gray(self.stored(entry.image))
        masks = read_masks(self.stored(entry.target), (len(self.manifest.structures), *image.shape))
        label = np.zeros(image.shape, np.uint8)
        for value, mask in enumerate(masks, start=1):
            label[mask] = value
        return Case(
            image=image[None],
            label=label,
            case_id=case_id,
            patient_id=entry.patient,
            attributes=self.attributes(case_id),
            extras={"masks": masks},
        )


def entries_of(content: object, names: tuple[str, ...]) -> dict[str, Entry]:
    """{case_id: Entry} of what paxray.json holds; ValueError says what is wrong with it, also where its structures are
    not those of `names`, in their order."""
    if not isinstance(content, dict) or not isinstance(content.get("label_dict"), dict):
        raise ValueError("no label_dict, which names the structures")
    expected = {str(number): name.removesuffix(TWICE) for number, name in enumerate(names)}
    labels = content["label_dict"]
    for number in {**expected, **labels}:
        if labels.get(number) != expected.get(number):
            found = f"structure {number:.20} is {labels.get(number)!r:.40}"
            raise ValueError(f"{found}, not {expected.get(number)!r} as in the manifest")
    entries: dict[str, Entry] = {}
    for part in PARTS:
        listed = content.get(part)
        if not isinstance(listed, list):
            raise ValueError(f"no list {part!r}")
        for one in listed:
            entry = entry_of(one, part)
            case_id = PurePosixPath(entry.image).stem
            if case_id in entries:
                raise ValueError(f"{case_id} is listed twice")
            entries[case_id] = entry
    sides: dict[str, str] = {}
    for entry in entries.values():
        if sides.setdefault(entry.patient, entry.part) != entry.part:
            raise ValueError(f"{entry.patient} is in two parts of the split")
    return entries


def entry_of(one: object, part: str) -> Entry:
    """What paxray.json says of one X-ray; no path may lead out of its folder."""
    image, target = (one.get("image"), one.get("target")) if isinstance(one, dict) else (None, None)
    for path in (image, target):
        if not isinstance(path, str) or not path or path[0] in "/\\" or ".." in re.split(r"[/\\]", path):
            raise ValueError(f"an entry of {part!r} without paths of image and target in this folder: {one!r:.80}")
    match = NAME.fullmatch(PurePosixPath(image).name)
    if match is None:
        raise ValueError(f"{image:.80} is not named as RibFrac9frontal.png is")
    return Entry(match[1], match[2], part, image, target)


def read_masks(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The masks (structures, H, W) bool of a .npy file: what is above zero. Stored Python objects are refused."""
    with readable(path, ".npy file", "Unpack it again."):
        stored = np.load(path, mmap_mode="r", allow_pickle=False)
        kind, found = stored.dtype.kind, stored.shape
    if kind not in "biuf" or found != shape:
        problem = f"masks of {found} {stored.dtype}, not of {shape}, one a structure on the image's pixels"
        raise MedcookError(f"{path}: {problem}.", "Unpack image and masks again.")
    return np.asarray(stored > 0)
