"""The reader of ReXGroundingCT, on tiny files in the published layout."""

import gzip
import json

import nibabel
import numpy as np
import pytest

from medcook.data import IGNORE
from medcook.data.datasets import open_dataset
from medcook.data.manifests import load_manifest
from medcook.data.sets.rexgroundingct import CODES
from medcook.data.splits import open_test
from medcook.errors import MedcookError

SHAPE = (6, 7, 5)
AFFINE = np.diag([-0.7, -0.6, 1.5, 1.0])
"""As CT-RATE stores CTs: left, posterior, superior."""
LISTED = {
    "train": ("train_1741_b_2", "train_1741_b_1", "train_39_a_1", "valid_39_a_1", "train_302_a_1"),
    "val": ("train_2936_a_1", "train_302_b_1"),
    "test": ("train_302_c_2", "train_39_b_1"),
}


def entry(scan: str, /, **changes) -> dict:
    """As the card shows one, with ten findings and their numbers in no order."""
    count = 10 if scan == "train_2936_a_1" else 2
    numbers = [str(number) for number in range(count)][::-1]
    return {
        "name": f"{scan}.nii.gz",
        "findings": {number: f"Nodule number {number} in the left lung" for number in numbers},
        "entity_counts": dict.fromkeys(numbers, 1),
        "shape": list(SHAPE),
        "categories": {number: "1c" if int(number) % 2 else "2d" for number in numbers},
        "protocol": "protocol1",
    } | changes


def masks(count: int = 2) -> np.ndarray:
    """Finding 0 has instances 1 and 4, finding 1 covers all of the first and more; the others are a voxel each."""
    found = np.zeros((count, *SHAPE), np.uint8)
    found[0, 1, 2, 3], found[0, 4, 2:4, 3] = 1, 4
    found[1, :3, 2:4, 2:] = 1
    for number in range(2, count):
        found[number, 5, number % 7, number % 5] = 1
    return found


def scan() -> np.ndarray:
    return np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE) - 1000


def paths(folder, name: str) -> tuple:
    """Of a CT and of its masks."""
    patient, letter = "_".join(name.split("_")[:2]), "_".join(name.split("_")[:3])
    ct = folder / "dataset" / f"{name.split('_')[0]}_fixed" / patient / letter / f"{name}.nii.gz"
    return ct, folder / "segmentations" / f"{name}.nii.gz"


def save(path, array: np.ndarray, affine=AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(**changes): dataset.json with some lists changed, the CTs, and all masks but those of test; the folder."""
    monkeypatch.setenv("MEDCOOK_MIRROR", str(tmp_path))
    monkeypatch.setenv("MEDCOOK_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "rexgroundingct"

    def make(**changes):
        content = {part: [entry(name) for name in names] for part, names in LISTED.items()}
        for part, names in LISTED.items():
            for name in names:
                ct, drawn = paths(folder, name)
                save(ct, scan())
                if part != "test":
                    save(drawn, masks(len(entry(name)["findings"])), np.eye(4))
        (folder / "dataset.json").write_text(json.dumps(content | changes))
        return folder

    return make


def test_rexgroundingct_in_the_published_layout(write):
    write()
    dataset = open_dataset("rexgroundingct")
    assert len(dataset.index()) == 9
    case = dataset.load("train_1741_b_2")
    assert case.patient_id == "train_1741" and case.image.shape == (1, *SHAPE) and case.image.dtype == np.float32
    assert np.array_equal(case.image[0], scan()), "as stored: neither turned nor flipped"
    assert np.array_equal(case.extras["masks"], masks() > 0) and case.extras["masks"].dtype == bool
    assert case.spacing == pytest.approx((0.7, 0.6, 1.5)), "the CT's, for the masks' header has none"
    told = {"sentences": ("Nodule number 0 in the left lung", "Nodule number 1 in the left lung")}
    told |= {"categories": ("2d", "1c"), "part": "train", "exhaustive": False}
    assert dataset.attributes("train_1741_b_2") == told
    assert case.attributes == told | {"orientation": "LPS", "entities": (2, 1)}


def test_rexgroundingct_sentences_are_in_the_order_of_the_masks(write):
    write()
    case = open_dataset("rexgroundingct").load("train_2936_a_1")
    assert [text.split()[2] for text in case.attributes["sentences"]] == [str(number) for number in range(10)]
    assert np.array_equal(case.extras["masks"], masks(10) > 0)
    assert case.attributes["categories"] == ("2d", "1c") * 5
    assert case.attributes["exhaustive"] and case.attributes["part"] == "val"


def test_rexgroundingct_label_is_the_highest_category_of_those_that_overlap(write):
    write()
    dataset = open_dataset("rexgroundingct")
    label, names = dataset.load("train_1741_b_2").label, dataset.manifest.classes
    assert names[label[1, 2, 3]] == names[label[4, 3, 3]] == "2d pulmonary nodule or mass"
    assert names[label[0, 2, 2]] == names[label[1, 3, 3]] == "1c emphysema" and label[5, 5, 0] == 0
    assert tuple(name[:2] for name in dataset.manifest.structures.values()) == CODES


def test_rexgroundingct_patients_of_two_parts_stay_in_the_later_one(write):
    """train_39 is in train and test, train_302 in all three; valid_39 is another patient."""
    write()
    dataset = open_dataset("rexgroundingct")
    split = dataset.split
    assert (split.train, split.val) == (("train_1741", "valid_39"), ("train_2936",))
    assert set(split.test) == {"train_302", "train_39"}
    assert dataset.patients["train_1741"] == ["train_1741_b_2", "train_1741_b_1"]
    assert dataset.patients["train_39"] == ["train_39_b_1"] and dataset.patients["train_302"] == ["train_302_c_2"]
    read = {case.case_id for case in dataset.cases((*split.train, *split.val))}
    assert read == {"train_1741_b_2", "train_1741_b_1", "valid_39_a_1", "train_2936_a_1"}
    for case_id in ("train_39_a_1", "train_302_a_1", "train_302_b_1", "train_39_b_1"):
        with pytest.raises(MedcookError, match="is a test case"):
            dataset.load(case_id)


def test_rexgroundingct_masks_of_test_are_held_back(write):
    folder = write()
    dataset = open_dataset("rexgroundingct")
    with open_test("a test of the reader"), pytest.raises(MedcookError, match="hold back the masks of test"):
        dataset.load("train_39_b_1")
    assert len(dataset.attributes("train_39_b_1")["sentences"]) == 2
    save(paths(folder, "train_39_b_1")[1], masks(), np.eye(4))
    with open_test("a test of the reader"):
        assert dataset.load("train_39_b_1").extras["masks"].any()


def test_rexgroundingct_test_may_have_no_categories(write):
    folder = write(test=[{"name": "train_39_b_1.nii.gz", "findings": {"0": "a", "1": "b"}}])
    save(paths(folder, "train_39_b_1")[1], masks(), np.eye(4))
    with open_test("a test of the reader"):
        case = open_dataset("rexgroundingct").load("train_39_b_1")
    assert case.attributes["categories"] == (None, None)
    assert np.array_equal(case.label == IGNORE, (masks() > 0).any(0)) and set(np.unique(case.label)) == {0, IGNORE}


def test_rexgroundingct_findings_without_category_give_way_to_those_with_one(write):
    folder = write(test=[entry("train_39_b_1", categories={"0": "2d", "1": None})])
    save(paths(folder, "train_39_b_1")[1], masks(), np.eye(4))
    with open_test("a test of the reader"):
        label = open_dataset("rexgroundingct").load("train_39_b_1").label
    assert label[1, 2, 3] == label[4, 3, 3] == 1 + CODES.index("2d") and label[0, 2, 2] == IGNORE


GOOD = "train_1_a_1"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val": {}}, "no list 'val'"),
        ({"val": ["train_1_a_1.nii.gz"]}, "an entry of 'val' is not named as"),
        ({"val": [entry(GOOD, name="../train_1_a_1.nii.gz")]}, "an entry of 'val' is not named as"),
        ({"val": [entry(GOOD, name="/etc/train_1_a_1.nii.gz")]}, "an entry of 'val' is not named as"),
        ({"val": [entry("train_../.._a_1")]}, "an entry of 'val' is not named as"),
        ({"val": [entry("scan_1_a_1")]}, "an entry of 'val' is not named as"),
        ({"val": [entry(GOOD, name=7)]}, "an entry of 'val' is not named as"),
        ({"val": [entry(GOOD), entry(GOOD)]}, "train_1_a_1 is listed twice"),
        ({"val": [entry("train_1741_b_2")]}, "train_1741_b_2 is listed twice"),
        ({"val": [entry(GOOD, findings={})]}, "findings of train_1_a_1.nii.gz are not sentences"),
        ({"val": [entry(GOOD, findings=["a", "b"])]}, "are not sentences numbered from 0"),
        ({"val": [entry(GOOD, findings={"0": "a", "2": "b"})]}, "are not sentences numbered from 0"),
        ({"val": [entry(GOOD, findings={"0": "a", "1": " "})]}, "are not sentences numbered from 0"),
        ({"val": [entry(GOOD, findings={"0": "a", "1": 3})]}, "are not sentences numbered from 0"),
        ({"val": [entry(GOOD, categories=None)]}, "2 findings, and not a category for each"),
        ({"val": [entry(GOOD, categories={"0": "2d"})]}, "2 findings, and not a category for each"),
        ({"test": [entry(GOOD, categories={"0": "2d"})]}, "2 findings, and not a category for each"),
        ({"val": [entry(GOOD, categories={"0": "2d", "1": "3a"})]}, "a finding of category '3a'"),
        ({"val": [entry(GOOD, categories={"0": "2d", "1": ["2d"]})]}, "a finding of category"),
    ],
)
def test_rexgroundingct_tables_that_are_not_as_published_are_refused(write, changes, message):
    path = write(**changes) / "dataset.json"
    with pytest.raises(MedcookError, match=message) as caught:
        open_dataset("rexgroundingct").index()
    assert caught.value.problem.startswith(f"{path}: ")


@pytest.mark.parametrize("text", ["", "{", '{"train": [{"name": "train_1', "[1]", "\xff\xfe", "[" * 100_000])
def test_rexgroundingct_broken_tables_are_named(write, text):
    path = write() / "dataset.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(MedcookError, match="dataset.json: "):
        open_dataset("rexgroundingct").index()


def test_rexgroundingct_broken_tables_are_not_quoted(write):
    """They hold what reports say of patients."""
    path = write() / "dataset.json"
    path.write_bytes(b'{"train": "a nodule \xff"}')
    with pytest.raises(MedcookError) as caught:
        open_dataset("rexgroundingct").index()
    assert "nodule" not in str(caught.value)


EMPTY = masks()
EMPTY[1] = 0
NOT_WHOLE = masks().astype(np.float32)
NOT_WHOLE[0, 0, 0, 0] = 0.5


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (masks(3), "not of"),
        (masks()[0], "not of"),
        (masks()[:, :-1], "not of"),
        (np.moveaxis(masks(), 0, -1), "not of"),
        (EMPTY, "nothing is drawn for finding 1"),
        (NOT_WHOLE, "not whole numbers"),
        (np.where(masks(), np.nan, 0).astype(np.float32), "not whole numbers"),
    ],
)
def test_rexgroundingct_masks_that_do_not_fit_are_named(write, stored, message):
    path = paths(write(), "train_1741_b_2")[1]
    save(path, stored, np.eye(4))
    with pytest.raises(MedcookError, match=message) as caught:
        open_dataset("rexgroundingct").load("train_1741_b_2")
    assert caught.value.problem.startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (scan()[None], "not of three axes"),
        (scan()[:-1], "masks of"),
        (np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")]), "not a readable CT"),
    ],
)
def test_rexgroundingct_cts_that_do_not_fit_are_named(write, stored, message):
    save(paths(write(), "train_1741_b_2")[0], stored)
    with pytest.raises(MedcookError, match=message):
        open_dataset("rexgroundingct").load("train_1741_b_2")


@pytest.mark.parametrize("number", [0.0, np.nan])
def test_rexgroundingct_a_ct_without_spacing_is_named(write, number):
    path = paths(write(), "train_1741_b_2")[0]
    header = bytearray(gzip.decompress(path.read_bytes()))
    header[280:328] = np.full(12, number, "<f4").tobytes()  # srow_x, srow_y and srow_z
    path.write_bytes(gzip.compress(header))
    with pytest.raises(MedcookError, match="not a readable CT"):
        open_dataset("rexgroundingct").load("train_1741_b_2")


@pytest.mark.parametrize("which", [0, 1])
def test_rexgroundingct_damaged_or_missing_files_are_named(write, which):
    path = paths(write(), "train_1741_b_2")[which]
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"no volume", b""):
        path.write_bytes(damaged)
        with pytest.raises(MedcookError, match="train_1741_b_2.nii.gz: not a readable"):
            open_dataset("rexgroundingct").load("train_1741_b_2")
    path.unlink()
    source = ("CT-RATE", "ReXGroundingCT")[which]
    with pytest.raises(MedcookError, match=r"train_1741_b_2.nii.gz is missing") as caught:
        open_dataset("rexgroundingct").load("train_1741_b_2")
    assert source in caught.value.hint


def test_rexgroundingct_that_is_not_here_says_where_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDCOOK_MIRROR", str(tmp_path))
    monkeypatch.setenv("MEDCOOK_CACHE", str(tmp_path / "cache"))
    with pytest.raises(MedcookError, match="rajpurkarlab/ReXGroundingCT"):
        open_dataset("rexgroundingct").index()


def test_rexgroundingct_facts_are_those_published():
    manifest = load_manifest("rexgroundingct")
    assert manifest.facts.cases == 2992 + 50 + 100 and len(manifest.structures) == 14
    assert sum(name.startswith("1") for name in manifest.structures.values()) == 6
