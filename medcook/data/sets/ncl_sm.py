"""NCL-SM: sections of human skeletal muscle, each myofibre an instance, and which of them are fit for analysis."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from PIL import Image

from medcook.data.case import IGNORE, Case
from medcook.data.datasets import Dataset
from medcook.data.fetch import folders
from medcook.data.readers.damage import readable
from medcook.errors import MedcookError

TECHNIQUES = ("IMC", "IF")
ENDINGS = (".png", ".tif", ".tiff")
LARGEST = 400_000_000
"""Pixels of an image. Pillow takes what has more than 179 million for an attack; S11 has 186 million."""
SMALLEST = 25
"""Pixels of a myofibre, as in the authors' code: what is smaller was marked by accident."""

ROLES = {
    "image": ("Images", r"(?!.*_masks?_).*_(images?|rgb)_"),
    "fibres": ("Mask_All_Myofibres", r".*_all_\w*fib(re|er)s?_"),
    "analysable": ("Mask_All_AM", r".*_all_am_"),
    "non_transverse": ("Mask_NTM", r".*_(ntm|non_?transverse)"),
    "frozen": ("Mask_FAM", r".*_(fam|freez|froz)"),
    "folded": ("Mask_FR", r".*_(frs?_|fold)"),
}
"""{what a folder holds: (its name where nothing else is published, what its name is recognised by)}."""
REASONS = ("frozen", "non_transverse", "folded")
"""To reject a myofibre; of several the first decides its class."""
VALUES = {"analysable": 1, "non_transverse": 2, "frozen": 3, "folded": 4, "not_told": 5}


class Fibre(NamedTuple):
    """One myofibre: its number in the mask, its area in pixels, and its quality flags.

    frozen, non_transverse  most of it was marked so
    folded, on_border       a part of it lies in folded tissue, at the edge of the image
    """

    number: int
    area: int
    analysable: bool
    non_transverse: bool
    frozen: bool
    folded: bool
    on_border: bool

    @property
    def kind(self) -> str:
        """analysable, or the reason against it."""
        return "analysable" if self.analysable else next((why for why in REASONS if getattr(self, why)), "not_told")


class NclSm(Dataset):
    """A case is one section: image (2, H, W) in 0 to 255, membrane and mitochondrial mass; label (H, W), the kind of
    the myofibre there.

    attributes: technique (IMC or IF); fibres, a Fibre for each that has more than 25 pixels
    extras: instances (H, W) int32, the number of each myofibre as stored
    """

    def index(self) -> dict[str, str]:
        return {case_id: patient_of(case_id) for case_id in self._sections}

    @cached_property
    def _sections(self) -> dict[str, dict[str, Path]]:
        """{case_id: {role: file}} of the sections whose myofibres are on this machine."""
        found: dict[str, dict[str, Path]] = {}
        for technique in TECHNIQUES:
            folder = self._folder(technique)
            files = {role: files_of(own) for role, own in (folders_of(folder) if folder else {}).items()}
            for name in sorted(files.get("fibres", {})):
                found[f"{technique}/{name}"] = {role: there[name] for role, there in files.items() if name in there}
        if not found:
            self.fetch()  # this says where to get them
        return found

    def _folder(self, technique: str) -> Path | None:
        """The folder of a technique, in the mirror or else in the cache."""
        there = (folder / technique for folder in folders(self.manifest.name))
        return next((folder for folder in there if folder.is_dir()), None)

    def attributes(self, case_id: str) -> dict:
        return {"technique": case_id.split("/")[0]}

    def read(self, case_id: str) -> Case:
        files = self._sections[case_id]
        for role in ("image", "analysable"):
            if role not in files:
                problem = f"{case_id}: no {ROLES[role][0]} of this section beside {files['fibres']}"
                raise MedcookError(f"{problem}.", "Unpack it again; all folders name a section alike.")
        instances = read_instances(files["fibres"])
        image = read_image(files["image"])
        marks = {role: read_mark(files.get(role), instances.shape) for role in ("analysable", *REASONS)}
        if image.shape[1:] != instances.shape:
            raise MedcookError(
                f"{files['image']}: an image of {image.shape[1:]}, its myofibres are of {instances.shape}.",
                "Unpack images and masks again.",
            )
        if (fit := marks["analysable"]).any() and (instances[fit] > 0).mean() < 0.5:
            problem = f"{files['analysable']}: most of it is not on the myofibres of {files['fibres']}"
            raise MedcookError(f"{problem}.", "Unpack both again: they are of different sections.")
        fibres = fibres_of(instances, marks)
        return Case(
            image=image,
            label=painted(instances, fibres),
            case_id=case_id,
            patient_id=patient_of(case_id),
            attributes=self.attributes(case_id) | {"fibres": fibres},
            extras={"instances": instances},
        )


def patient_of(case_id: str) -> str:
    """IMC/C03-2 is another section of C03, and so would be IF/C03."""
    return re.sub(r"-\d+$", "", case_id.split("/")[1])


def folders_of(technique: Path) -> dict[str, Path]:
    """{role: folder} in the folder of a technique; exactly one folder a role."""
    there = sorted(folder for folder in technique.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    found: dict[str, Path] = {}
    for role, (name, pattern) in ROLES.items():
        matching = [folder for folder in there if re.match(pattern, f"_{re.sub('[^a-z]+', '_', folder.name.lower())}_")]
        exact = [folder for folder in matching if folder.name == name]
        if len(exact or matching) != 1:
            problem = f"{technique}: {len(matching)} folders could be {name}, of {[folder.name for folder in there]}"
            raise MedcookError(f"{problem}.", f"Rename the right one to {name}.")
        found[role] = (exact or matching)[0]
    return found


def files_of(folder: Path) -> dict[str, Path]:
    """{section: its file}, S60 of S60.png and of S60.tiff."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in ENDINGS and not path.name.startswith("."):
            name = path.name.split(".")[0]
            if found.setdefault(name, path) != path:
                raise MedcookError(f"{path}: section {name} has {found[name].name}, too.", "Keep one of the two.")
    return found


@contextmanager
def large_images() -> Iterator[None]:
    """Let Pillow open what is as large as a section."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, LARGEST
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def read_stored(path: Path) -> np.ndarray:
    with readable(path, "image", "Unpack it again."), large_images(), Image.open(path) as image:
        return np.asarray(image)


def read_image(path: Path) -> np.ndarray:
    """(2, H, W) float32: red is the membrane, green is mitochondrial mass, and blue is empty."""
    stored = read_stored(path)
    if stored.ndim != 3 or stored.shape[-1] < 3:
        raise MedcookError(f"{path}: {stored.shape}, not an image of red, green and blue.", "Take the RGB images.")
    return np.ascontiguousarray(stored[..., :2].transpose(2, 0, 1), dtype=np.float32)


def read_instances(path: Path) -> np.ndarray:
    """(H, W) int32: 0, or the number of a myofibre."""
    stored = read_stored(path)
    with np.errstate(invalid="ignore"):
        instances = stored.astype(np.int32)
    if stored.ndim != 2 or not np.array_equal(instances, stored) or instances.min() < 0:
        problem = f"{path}: not one whole number from 0 for each pixel ({stored.shape}, {stored.dtype})"
        raise MedcookError(f"{problem}.", "Take the mask of instances, and unpack it again.")
    return instances


def read_mark(path: Path | None, shape: tuple[int, ...]) -> np.ndarray:
    """(H, W) bool: where something is marked, nowhere where there is no file."""
    if path is None:
        return np.zeros(shape, bool)
    mark = read_instances(path) > 0
    if mark.shape != shape:
        raise MedcookError(f"{path}: a mask of {mark.shape}, the myofibres are of {shape}.", "Unpack both again.")
    return mark


def fibres_of(instances: np.ndarray, marks: dict[str, np.ndarray]) -> tuple[Fibre, ...]:
    """The myofibres of a mask, in the order of their numbers, without those that were marked by accident."""
    area = np.bincount(instances.ravel())
    inside = {role: np.bincount(instances[mark], minlength=len(area)) for role, mark in marks.items()}
    border = {*instances[[0, -1]].ravel().tolist(), *instances[:, [0, -1]].ravel().tolist()}
    return tuple(
        Fibre(
            number=number,
            area=int(area[number]),
            **{role: bool(2 * inside[role][number] > area[number]) for role in marks if role != "folded"},
            folded=bool(inside["folded"][number]),
            on_border=number in border,
        )
        for number in np.flatnonzero(area > SMALLEST).tolist()
        if number
    )


def painted(instances: np.ndarray, fibres: Iterable[Fibre]) -> np.ndarray:
    """The label (H, W) uint8: the kind of each myofibre; what is too small for one is unlabelled."""
    values = np.full(instances.max() + 1, IGNORE, np.uint8)
    values[0] = 0
    for fibre in fibres:
        values[fibre.number] = VALUES[fibre.kind]
    return values[instances]


def section_table(cases: Iterable[Case]) -> pd.DataFrame:
    """One row a section: how many myofibres there are, of which kind, and the areas of those fit for analysis.

    Areas are in pixels, since no size of a pixel is published with the files; so IMC and IF cannot be compared.
    """
    rows = []
    for case in cases:
        fibres = case.attributes["fibres"]
        areas = np.array([fibre.area for fibre in fibres if fibre.analysable], dtype=float)
        low, middle, high = np.percentile(areas, [25, 50, 75]) if len(areas) else [np.nan] * 3
        row = {"section": case.case_id, "technique": case.attributes["technique"], "fibres": len(fibres)}
        row |= {kind: sum(fibre.kind == kind for fibre in fibres) for kind in VALUES}
        row |= {"on_border": sum(fibre.on_border for fibre in fibres)}
        row |= {"area_mean": areas.mean() if len(areas) else np.nan, "area_median": middle}
        rows.append(row | {"area_iqr": high - low, "area_sd": areas.std(ddof=1) if len(areas) > 1 else np.nan})
    return pd.DataFrame(rows)
