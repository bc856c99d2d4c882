"""Bring your own: image/label pairs in a folder, inspected, and opened as a data set that can be trained on.

Two layouts are understood: a folder of images beside one of labels (`images` + `labels`, `imagesTr` + `labelsTr`), and
one folder in which labels carry a suffix (`_seg`, `_mask`, `_label`). Files are NIfTI or PNG, or HDF5 with the arrays
`image` and `label`.
"""

import hashlib
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from medcook.data.case import IGNORE, Case
from medcook.data.datasets import Dataset, as_labels
from medcook.data.fetch import checksum_of
from medcook.data.manifests import Facts, Manifest
from medcook.data.readers.nifti import read_nifti
from medcook.data.readers.png import read_gray, read_labels
from medcook.data.safe import read_hdf5_safely
from medcook.errors import MedcookError

EXTENSION = re.compile(r"\.(nii\.gz|nii|png|h5|hdf5)$", re.IGNORECASE)
LABEL_SUFFIX = re.compile(r"[_-](seg|segmentation|mask|label|labels|gt)$", re.IGNORECASE)
IMAGE_SUFFIX = re.compile(r"[_-](image|img|0000)$", re.IGNORECASE)
LABEL_FOLDER = re.compile(r"(labels?|masks?|segs?|segmentations?|gt)(tr)?", re.IGNORECASE)
IMAGE_FOLDER = re.compile(r"(images?|imgs?)(tr)?", re.IGNORECASE)
AFFINE_TOLERANCE = 1e-3  # mm


@dataclass(frozen=True)
class Pair:
    """The files of one case; for HDF5 both are the same file."""

    image: Path
    label: Path


@dataclass(frozen=True)
class CaseReport:
    """What inspection found in one case; `fatal` problems keep the folder from being trained on."""

    case_id: str
    shape: tuple[int, ...] = ()
    spacing: tuple[float, ...] | None = None
    counts: dict[int, int] = field(default_factory=dict)  # voxels per label value, as stored
    fatal: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Inspection:
    """All cases of a folder, and the problems that no single case shows."""

    folder: Path
    cases: tuple[CaseReport, ...]
    unpaired: tuple[Path, ...] = ()

    @property
    def label_values(self) -> list[int]:
        """Every label value found, as stored."""
        return sorted({value for case in self.cases for value in case.counts})

    @property
    def balance(self) -> dict[int, float]:
        """Share of all voxels per label value."""
        total = sum(sum(case.counts.values()) for case in self.cases)
        return {value: sum(case.counts.get(value, 0) for case in self.cases) / total for value in self.label_values}

    @property
    def fatal(self) -> list[str]:
        """Problems that must be put right before training."""
        return [f"{case.case_id}: {problem}" for case in self.cases for problem in case.fatal]

    @property
    def warnings(self) -> list[str]:
        """Problems that training survives, but that you should know of."""
        found = [f"{path.name}: it has no partner" for path in self.unpaired]
        found += [f"{case.case_id}: {problem}" for case in self.cases for problem in case.warnings]
        if len({case.spacing and tuple(np.round(case.spacing, 3)) for case in self.cases}) > 1:
            found.append("mixed spacing: the cases do not share one voxel size")
        if len({len(case.shape) for case in self.cases if case.shape}) > 1:
            found.append("mixed dimensions: some images are 2D, some 3D")
        return found


def find_pairs(folder: Path) -> tuple[dict[str, Pair], list[Path]]:
    """{case_id: Pair} and the files without partner; MedcookError when there is no such folder or nothing to pair."""
    if not folder.is_dir():
        raise MedcookError(f"{folder}: there is no such folder.", "Give a folder with images and labels.")
    parts = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    image_folder = next((path for path in parts if IMAGE_FOLDER.fullmatch(path.name)), None)
    label_folder = next((path for path in parts if LABEL_FOLDER.fullmatch(path.name)), None)
    if image_folder and label_folder:
        images, labels = by_case(data_files(image_folder)), by_case(data_files(label_folder))
    else:
        files = data_files(folder)
        labels = by_case([path for path in files if LABEL_SUFFIX.search(stem(path)) or is_hdf5(path)])
        images = by_case([path for path in files if not LABEL_SUFFIX.search(stem(path))])
    pairs = {case: Pair(images[case], labels[case]) for case in sorted(images.keys() & labels.keys())}
    if not pairs:
        hint = "Put images and labels of the same names into `images` and `labels`, or add _seg to the labels' names."
        raise MedcookError(f"{folder}: no image/label pairs.", hint)
    return pairs, [(images.get(case) or labels[case]) for case in sorted(images.keys() ^ labels.keys())]


def data_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if EXTENSION.search(path.name) and not path.name.startswith("."))


def is_hdf5(path: Path) -> bool:
    return path.suffix.lower() in (".h5", ".hdf5")


def stem(path: Path) -> str:
    return EXTENSION.sub("", path.name)


def by_case(paths: list[Path]) -> dict[str, Path]:
    """{case_id: path}: the name without extension and without what only says image or label."""
    return {IMAGE_SUFFIX.sub("", LABEL_SUFFIX.sub("", stem(path))): path for path in paths}


@dataclass(frozen=True)
class Loaded:
    """The arrays of a pair as stored: image (C, *spatial), label (*spatial)."""

    image: np.ndarray
    label: np.ndarray
    spacing: tuple[float, ...] | None = None
    affines: tuple[np.ndarray, np.ndarray] | None = None


def load_pair(pair: Pair) -> Loaded:
    """Read both files of a case; MedcookError naming the file when one cannot be read."""
    if is_hdf5(pair.image):
        stored = read_hdf5_safely(pair.image, ("image", "label"))
        return Loaded(stored["image"][None], stored["label"])
    if pair.image.suffix.lower() == ".png":
        return Loaded(read_gray(pair.image)[None], read_labels(pair.label))
    image, label = read_nifti(pair.image), read_nifti(pair.label)
    channels = np.moveaxis(image.array, -1, 0) if image.array.ndim == label.array.ndim + 1 else image.array[None]
    return Loaded(channels, label.array, image.spacing[: label.array.ndim], (image.affine, label.affine))


def slices_first(loaded: Loaded) -> Loaded:
    """A NIfTI volume with its coarsest axis (the last one where they are alike) in front, so that slices come first."""
    if loaded.spacing is None or len(loaded.spacing) != 3:
        return loaded
    axis = 2 - int(np.argmax(loaded.spacing[::-1]))
    order = (axis, *(other for other in range(3) if other != axis))
    image = loaded.image.transpose(0, *(1 + position for position in order))
    spacing = tuple(loaded.spacing[position] for position in order)
    return Loaded(image, loaded.label.transpose(order), spacing, loaded.affines)


def inspect_pair(case_id: str, pair: Pair) -> CaseReport:
    """Everything that can be told of one case."""
    try:
        loaded = load_pair(pair)
        labels = as_labels(loaded.label, pair.label)
    except MedcookError as error:
        return CaseReport(case_id, fatal=(error.problem,))
    values, counts = np.unique(labels, return_counts=True)
    fatal, warnings = [], []
    if loaded.image.shape[1:] != labels.shape:
        fatal.append(f"image {loaded.image.shape[1:]} and label {labels.shape} differ in shape")
    if not np.isfinite(loaded.image).all():
        fatal.append("the image holds NaN or infinity")
    elif loaded.image.min() == loaded.image.max():
        warnings.append("the image is constant")
    if loaded.affines and not np.allclose(*loaded.affines, atol=AFFINE_TOLERANCE):
        warnings.append("image and label have different affines: they may not lie on each other")
    if not labels.any():
        warnings.append("the label is empty")
    return CaseReport(
        case_id,
        shape=loaded.image.shape[1:],
        spacing=loaded.spacing,
        counts=dict(zip(values.tolist(), counts.tolist(), strict=True)),
        fatal=tuple(fatal),
        warnings=tuple(warnings),
    )


def inspect_folder(path: Path | str) -> Inspection:
    """Read every pair of a folder and say what is there and what is wrong with it."""
    pairs, unpaired = find_pairs(Path(path))
    cases = tuple(inspect_pair(case_id, pair) for case_id, pair in pairs.items())
    return Inspection(Path(path), cases, tuple(unpaired))


def class_values(stored: list[int]) -> list[int]:
    """Stored label values in the order of their class, background first; 255 is a class only in two-valued masks."""
    foreground = [value for value in stored if value not in (0, IGNORE)]
    return [0, *(foreground or [value for value in stored if value == IGNORE])]


class Folder(Dataset):
    """A folder of your own: each file stem is a patient; label values are numbered 0, 1, 2, ... in their order.

    The split follows from the hash of the names; attributes: none, as nothing is known. Volumes: see `slices_first`.
    """

    def __init__(self, manifest: Manifest, folder: Path, stored_values: list[int]):
        super().__init__(manifest)
        self.folder = folder
        lookup = np.full(256, IGNORE, np.uint8)
        lookup[stored_values] = np.arange(len(stored_values))
        self._class_of = lookup

    @cached_property
    def _pairs(self) -> dict[str, Pair]:
        return find_pairs(self.folder)[0]

    def index(self) -> dict[str, str]:
        return {case_id: case_id for case_id in self._pairs}

    def read(self, case_id: str) -> Case:
        pair = self._pairs[case_id]
        loaded = slices_first(load_pair(pair))
        return Case(
            image=np.ascontiguousarray(loaded.image, dtype=np.float32),
            label=self._class_of[as_labels(loaded.label, pair.label)],
            case_id=case_id,
            patient_id=case_id,
            spacing=loaded.spacing,
        )

    def content_hash(self) -> str:
        """SHA-256 over the names and contents of all files."""
        files = sorted({path for pair in self._pairs.values() for path in (pair.image, pair.label)})
        lines = [f"{path.relative_to(self.folder).as_posix()} {checksum_of(path)}" for path in files]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def open_folder(path: Path | str) -> Folder:
    """Open a folder as a data set; MedcookError, naming the first one, when it has problems that spoil training."""
    inspection = inspect_folder(path)
    if inspection.fatal:
        more = f" (and {len(inspection.fatal) - 1} more)" if len(inspection.fatal) > 1 else ""
        hint = f"`medcook data show {path}` lists every problem."
        raise MedcookError(f"{inspection.fatal[0]}{more}.", hint)
    values = class_values(inspection.label_values)
    manifest = Manifest(
        name=f"folder:{path}",
        title=f"Your folder {Path(path).name}",
        modality="unknown",
        dimensions=max(len(case.shape) for case in inspection.cases),
        classes={0: "background"} | {number: f"label {value}" for number, value in enumerate(values) if number},
        licence="yours",
        terms="yours",
        citation="",
        source=str(path),
        access="open",
        reader="folder",
        facts=Facts(cases=len(inspection.cases), label_values=list(range(len(values)))),
    )
    return Folder(manifest, Path(path), values)
