"""A data set, opened: its manifest, its split, and its cases one at a time."""

import hashlib
import importlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from medcook.data import fetch
from medcook.data.case import IGNORE, Case
from medcook.data.manifests import Manifest, load_manifest
from medcook.data.registry import Entry, content_hash, registry_of
from medcook.data.splits import Split, guard_test, load_split, split_by_hash
from medcook.errors import MedcookError
from medcook.paths import MANIFESTS

READERS = {
    "acdc": "medcook.data.sets.acdc:Acdc",
    "aeropath": "medcook.data.sets.aeropath:AeroPath",
    "bubil": "medcook.data.sets.bubil:Bubil",
    "cactus": "medcook.data.sets.cactus:Cactus",
    "cads": "medcook.data.sets.cads:Cads",
    "chest_imagenome": "medcook.data.sets.chest_imagenome:ChestImaGenome",
    "chest_xray": "medcook.data.sets.chest_xray:ChestXray",
    "chestxray8": "medcook.data.sets.chestxray8:ChestXray8",
    "chexmask_u": "medcook.data.sets.chexmask_u:CheXmaskU",
    "decathlon": "medcook.data.sets.decathlon:Decathlon",
    "embedded": "medcook.data.embedded:Embedded",
    "fairseg": "medcook.data.sets.fairseg:FairSeg",
    "kits21": "medcook.data.sets.kits21:Kits21",
    "med_glip": "medcook.data.sets.med_glip:MedGLIP5M",
    "medshapenet": "medcook.data.sets.medshapenet:MedShapeNet",
    "medtrinity": "medcook.data.sets.medtrinity:MedTrinity",
    "ncl_sm": "medcook.data.sets.ncl_sm:NclSm",
    "openkbp": "medcook.data.sets.openkbp:OpenKbp",
    "pathvg": "medcook.data.sets.pathvg:PathVG",
    "paxray": "medcook.data.sets.paxray:PaxRay",
    "radgenome_ct": "medcook.data.sets.radgenome_ct:RadGenomeCT",
    "rexgroundingct": "medcook.data.sets.rexgroundingct:ReXGroundingCT",
    "totalsegmentator": "medcook.data.sets.totalsegmentator:TotalSegmentator",
}
"""The reader named in a manifest, and the class behind it (imported when first needed)."""


class Dataset:
    """Base class of the data sets: a subclass says which cases there are and how to read one.

    `index()` gives {case_id: patient_id}; `read(case_id)` gives the Case; `attributes(case_id)` what is known of a
    case without reading its image. All may assume that the files they need can be had through `self.file(path)`,
    which fetches and verifies on first use.
    """

    version = "1"
    """Raised when the reader gives other arrays for the same files, so that old results are not taken for new."""

    def __init__(self, manifest: Manifest):
        self.manifest = manifest

    def index(self) -> dict[str, str]:
        raise NotImplementedError

    def read(self, case_id: str) -> Case:
        raise NotImplementedError

    def attributes(self, case_id: str) -> dict:
        """What is known of a case without reading its image, also for test cases."""
        return {}

    @cached_property
    def registry(self) -> dict[str, Entry]:
        """{path: Entry} of the files, empty where the set has no registry."""
        return registry_of(Path(self.manifest.registry).stem) if self.manifest.registry else {}

    def fetch(self, progress: bool = True) -> None:
        """Bring all files onto this machine; MedcookError with the way to them where that needs a person."""
        manifest = self.manifest
        if self.registry:
            fetch.fetch(manifest.name, progress=progress)
        elif manifest.archive:
            fetch.fetch_archive(manifest.name, manifest.archive, progress)
        elif manifest.access == "registered":
            hint = f"Get it from {manifest.apply_at or manifest.source}; put it into {fetch.data_dir(manifest.name)}."
            raise MedcookError(f"{manifest.name} is not on this machine and cannot be fetched for you.", hint)

    def file(self, path: str) -> Path:
        """One file of the set; where it is missing the whole set is fetched, in parallel and with a progress bar."""
        name = self.manifest.name
        if fetch.local(name, path) is None:
            self.fetch()
        if found := fetch.local(name, path):
            return found
        raise MedcookError(f"{name}: the file {path} is missing.", f"Put it into {fetch.data_dir(name)}.")

    def stored(self, path: str, source: str = "") -> Path:
        """A file that the set's own tables name and nobody can fetch; source: where it is, if not where the set is."""
        name = self.manifest.name
        if found := fetch.local(name, path):
            return found
        hint = f"Get it from {source or self.manifest.source}; put it into {fetch.data_dir(name)}."
        raise MedcookError(f"{name}: the file {path} is missing.", hint)

    @cached_property
    def patients(self) -> dict[str, list[str]]:
        """{patient_id: case_ids}, in the order of the index."""
        found: dict[str, list[str]] = {}
        for case_id, patient_id in self.index().items():
            found.setdefault(patient_id, []).append(case_id)
        return found

    @cached_property
    def split(self) -> Split:
        """The committed split of this data set, or a fixed one by the hash of the patient where it has none."""
        if self.manifest.splits:
            return load_split(MANIFESTS / self.manifest.splits)
        return split_by_hash(self.patients)

    @cached_property
    def hash(self) -> str:
        """12 hex digits over what the cases are made from: files, reader and its version, classes and facts."""
        manifest = self.manifest
        parts = [manifest.reader, self.version, repr(manifest.classes), manifest.facts.model_dump_json()]
        parts += [repr(sorted(manifest.options.items())), self.content_hash()]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]

    def content_hash(self) -> str:
        """What stands for the files' contents: the archive's checksum, else SHA-256 over the registry's checksums.

        A set that each user gets from its source (kits21) has neither; its hash says nothing of the files.
        """
        archive = self.manifest.archive
        return archive.checksum if archive else content_hash(self.registry)

    def load(self, case_id: str) -> Case:
        """Read, check against the manifest and return one case; test cases only inside `open_test`."""
        self.guard(case_id)
        case = self.read(case_id)
        check_case(case, self.manifest)
        return case

    def guard(self, case_id: str) -> None:
        """Refuse a case that the set does not have, and a test case outside of `open_test`."""
        patient = self.index().get(case_id)
        if patient is None:
            raise MedcookError(f"{self.manifest.name} has no case {case_id!r:.60}.", "See `medcook data show`.")
        if patient in self.split.test:
            guard_test(self.manifest.name, case_id)

    def cases(self, patients) -> Iterator[Case]:
        """All cases of the given patients, in order."""
        for patient in patients:
            for case_id in self.patients[patient]:
                yield self.load(case_id)


def check_case(case: Case, manifest: Manifest) -> None:
    """Raise MedcookError, naming the case, where it is not what Case and the manifest promise."""
    problem = first_problem(case, manifest)
    if problem:
        hint = f"Run `medcook data verify {manifest.name}`; if the files are good, correct the manifest."
        raise MedcookError(f"{manifest.name}, case {case.case_id}: {problem}.", hint)


def first_problem(case: Case, manifest: Manifest) -> str | None:
    """What is wrong with a case, in words, or None."""
    image, label = case.image, case.label
    if image.dtype != np.float32:
        return f"the image is {image.dtype}, not float32"
    if label.dtype != np.uint8:
        return f"the label is {label.dtype}, not uint8"
    if label.shape != case.spatial:
        return f"image {case.spatial} and label {label.shape} differ in shape"
    if not np.isfinite(image).all():
        return "the image holds NaN or infinity"
    allowed = {*manifest.facts.label_values, IGNORE}
    for name, values in [("label", label)] + ([("raters", case.raters)] if case.raters is not None else []):
        if strange := sorted(set(present_values(values)) - allowed):
            return f"{name} value {strange[0]} is not in the manifest ({sorted(manifest.facts.label_values)})"
    if manifest.facts.foreground_in_every_case and not np.any((label != 0) & (label != IGNORE)):
        return "the label is empty, although every case should hold a structure"
    return None


def present_values(label: np.ndarray) -> list[int]:
    """The values that occur in a uint8 array (much faster than np.unique)."""
    return np.flatnonzero(np.bincount(label.ravel(), minlength=256)).tolist()


def as_labels(array: np.ndarray, path: Path) -> np.ndarray:
    """A stored label map as uint8; MedcookError naming the file when values are not whole numbers from 0 to 255."""
    with np.errstate(invalid="ignore"):
        labels = array.astype(np.uint8)
    if not np.array_equal(labels, array):
        raise MedcookError(
            f"{path}: the label holds values that are not whole numbers from 0 to 255.", "Export it again."
        )
    return labels


def open_dataset(name: str) -> Dataset:
    """Open the data set called `name`, or your own as `folder:PATH`; nothing is downloaded before a case is read."""
    if name.startswith("folder:"):
        from medcook.data.folder import open_folder

        return open_folder(Path(name.removeprefix("folder:")))
    manifest = load_manifest(name)
    if manifest.reader not in READERS:
        raise MedcookError(f"{name}: no reader called {manifest.reader!r}.", f"Known: {', '.join(READERS)}.")
    module, reader = READERS[manifest.reader].split(":")
    return getattr(importlib.import_module(module), reader)(manifest)
