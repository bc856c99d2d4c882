"""The reader of PAXRay, on tiny files in the published layout."""

import json

import numpy as np
import pytest
from PIL import Image

from medcook.data.datasets import open_dataset
from medcook.data.manifests import load_manifest
from medcook.errors import MedcookError

SHAPE = (6, 8)
NAMES = [name.removesuffix(" (again)") for name in load_manifest("paxray").structures.values()]
PATIENTS = {"train": ("RibFrac9", "RibFrac360"), "val": ("RibFrac4",), "test": ("RibFrac171",)}


def masks() -> np.ndarray:
    """Both lungs, the right one with its lower lobe; a rib across; all of the lungs is lung_overall."""
    found = np.zeros((166, *SHAPE))
    number = NAMES.index
    found[number("lung_right"), 1:5, 1:4] = found[number("lung_left"), 1:5, 5:7] = 1
    found[number("lung_overall")] = found[number("lung_right")] + found[number("lung_left")]
    found[number("lung_right_lobelower"), 3:5, 1:4] = 1
    found[number("bones"), 2] = found[number("rib_left_anterior_3"), 2, 4:] = 0.5
    return found


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(**changes): paxray.json with some keys changed, and the files that it names; the folder."""
    monkeypatch.setenv("MEDCOOK_MIRROR", str(tmp_path))
    monkeypatch.setenv("MEDCOOK_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "paxray"
    content = {"label_dict": {str(number): name for number, name in enumerate(NAMES)}}

    def save(**changes):
        for part, patients in PATIENTS.items():
            names = [f"{patient}{view}" for patient in patients for view in ("frontal", "lateral")]
            content[part] = [{"image": f"images/{name}.png", "target": f"labels/{name}.npy"} for name in names]
            for number, name in enumerate(names):
                (folder / "images").mkdir(parents=True, exist_ok=True), (folder / "labels").mkdir(exist_ok=True)
                Image.fromarray(np.full(SHAPE, 10 + number, np.uint8)).save(folder / "images" / f"{name}.png")
                np.save(folder / "labels" / f"{name}.npy", masks().astype(bool) if number else masks())
        (folder / "paxray.json").write_text(json.dumps(content | changes))
        return folder

    return save


def test_paxray_in_the_published_layout(write):
    write()
    dataset = open_dataset("paxray")
    assert dataset.patients["RibFrac360"] == ["RibFrac360frontal", "RibFrac360lateral"] and len(dataset.patients) == 4
    for case_id, view in (("RibFrac9frontal", "frontal"), ("RibFrac9lateral", "lateral")):
        case = dataset.load(case_id)
        assert case.image.shape == (1, *SHAPE) and case.image.dtype == np.float32 and case.image.min() >= 10
        assert case.attributes == {"view": view} == dataset.attributes(case_id) and case.patient_id == "RibFrac9"
        assert np.array_equal(case.extras["masks"], masks() > 0) and case.extras["masks"].dtype == bool
        assert case.spacing is None


def test_paxray_label_is_the_highest_number_of_those_that_overlap(write):
    write()
    dataset = open_dataset("paxray")
    label, names = dataset.load("RibFrac9frontal").label, dataset.manifest.classes
    row = [[names[value] for value in line] for line in label]
    assert row[1] == ["background"] + ["lung_right"] * 3 + ["background"] + ["lung_left"] * 2 + ["background"]
    assert row[2] == ["bones"] * 4 + ["rib_left_anterior_3"] * 4
    assert row[3][1:4] == ["lung_right_lobelower"] * 3 and set(row[0]) == {"background"}


def test_paxray_split_is_the_authors_and_both_views_stay_together(write):
    write()
    split = open_dataset("paxray").split
    assert (split.train, split.val, split.test) == tuple(PATIENTS.values())
    with pytest.raises(MedcookError, match="is a test case"):
        open_dataset("paxray").load("RibFrac171lateral")


def entry(name: str, folder: str = "images") -> dict:
    return {"image": f"{folder}/{name}.png", "target": f"labels/{name}.npy"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_dict": None}, "no label_dict"),
        ({"label_dict": {str(n): name for n, name in enumerate(NAMES[:-1])}}, "structure 165 is None"),
        (
            {"label_dict": {str(n): name for n, name in enumerate(NAMES)} | {"3": "liver"}},
            "structure 3 is 'liver', not",
        ),
        ({"label_dict": {str(n): name for n, name in enumerate([*NAMES, "liver"])}}, "structure 166 is 'liver', not"),
        ({"val": {}}, "no list 'val'"),
        ({"val": ["RibFrac1frontal.png"]}, "an entry of 'val' without paths"),
        ({"val": [{"image": "images/RibFrac1frontal.png", "target": None}]}, "an entry of 'val' without paths"),
        ({"val": [entry("RibFrac1frontal", "../images")]}, "in this folder"),
        ({"val": [entry("RibFrac1frontal", "/images")]}, "in this folder"),
        ({"val": [entry("scan1")]}, "not named as RibFrac9frontal.png"),
        ({"val": [entry("RibFrac1frontal"), entry("RibFrac1frontal", "other")]}, "RibFrac1frontal is listed twice"),
        ({"train": [entry("RibFrac1frontal")], "val": [entry("RibFrac1lateral")]}, "RibFrac1 is in two parts"),
    ],
)
def test_paxray_tables_that_are_not_as_published_are_refused(write, changes, message):
    path = write(**changes) / "paxray.json"
    with pytest.raises(MedcookError, match=message) as caught:
        open_dataset("paxray").index()
    assert caught.value.problem.startswith(f"{path}: ")


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff\xfe", "[" * 100_000])
def test_paxray_broken_tables_are_named(write, text):
    path = write() / "paxray.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(MedcookError, match="paxray.json: "):
        open_dataset("paxray").index()


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (masks()[:, :-1], "not of"),
        (masks()[:-1], "not of"),
        (masks().astype(str), "not of"),
        (np.array([print], dtype=object), "not a readable .npy"),
    ],
)
def test_paxray_masks_that_do_not_fit_are_named(write, stored, message):
    path = write() / "labels" / "RibFrac9frontal.npy"
    np.save(path, stored, allow_pickle=True)
    with pytest.raises(MedcookError, match=message) as caught:
        open_dataset("paxray").load("RibFrac9frontal")
    assert caught.value.problem.startswith(f"{path}: ")


def test_paxray_damaged_or_missing_files_are_named(write):
    folder = write()
    (folder / "labels" / "RibFrac9frontal.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(MedcookError, match=r"RibFrac9frontal.npy: not a readable"):
        open_dataset("paxray").load("RibFrac9frontal")
    np.savez(folder / "labels" / "RibFrac9frontal.npy", masks())
    (folder / "labels" / "RibFrac9frontal.npy.npz").rename(folder / "labels" / "RibFrac9frontal.npy")
    with pytest.raises(MedcookError, match=r"RibFrac9frontal.npy: not a readable"):
        open_dataset("paxray").load("RibFrac9frontal")
    (folder / "labels" / "RibFrac9frontal.npy").unlink()
    with pytest.raises(MedcookError, match=r"the file labels/RibFrac9frontal.npy is missing"):
        open_dataset("paxray").load("RibFrac9frontal")
    (folder / "images" / "RibFrac9lateral.png").write_bytes(b"no image")
    with pytest.raises(MedcookError, match=r"RibFrac9lateral.png: not a readable PNG"):
        open_dataset("paxray").load("RibFrac9lateral")


def test_paxray_that_is_not_here_says_where_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDCOOK_MIRROR", str(tmp_path))
    monkeypatch.setenv("MEDCOOK_CACHE", str(tmp_path / "cache"))
    with pytest.raises(MedcookError, match="constantinseibold.github.io/paxray"):
        open_dataset("paxray").index()


def test_paxray_facts_are_those_published():
    manifest = load_manifest("paxray")
    assert (manifest.facts.patients, manifest.facts.cases, len(manifest.structures)) == (426, 852, 166)
    places = {0: "lung_overall", 10: "mediastinum_overall", 24: "bones", 163: "diaphragm"}  # in the authors' code
    assert {number: NAMES[number] for number in places} == places
    assert len(set(manifest.classes.values())) == 167 and len(set(NAMES)) == 165
