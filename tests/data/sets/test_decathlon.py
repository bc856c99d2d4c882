"""All ten tasks of the Medical Segmentation Decathlon (MSD), on tiny files in the published layout."""

import json
import re

import nibabel
import numpy as np
import pytest

from medcook.data.datasets import open_dataset
from medcook.data.fetch import data_dir
from medcook.data.manifests import load_manifest, manifest_names
from medcook.data.splits import open_test
from medcook.errors import MedcookError

TASKS = [name for name in manifest_names() if name.startswith("msd/")]
MODALITIES = {"Task01_BrainTumour": ("FLAIR", "T1w", "t1gd", "T2w"), "Task05_Prostate": ("T2", "ADC")}
"""Tasks with several channels, which are the last axis of an image; all others have one, and three axes."""
SPLEEN = "msd/Task09_Spleen"
SHAPE, SPACING = (6, 5, 4), (0.75, 0.75, 5.0)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([*SPACING, 1])), path)


def image(task: str, number: int) -> np.ndarray:
    channels = len(MODALITIES.get(task.removeprefix("msd/"), ("one",)))
    array = np.full((*SHAPE, channels), number, np.float32) + 100 * np.arange(channels, dtype=np.float32)
    return array[..., 0] if channels == 1 else array


def label(task: str) -> np.ndarray:
    """Each value of the task in a row of its own."""
    values = sorted(load_manifest(task).classes)
    array = np.zeros(SHAPE, np.uint8)
    array[: len(values)] = np.array(values, np.uint8)[:, None, None]
    return array


@pytest.fixture
def unpacked(tmp_path, monkeypatch):
    """unpacked(task): an unpacked archive of five cases and one without label; its folder."""
    monkeypatch.delenv("MEDCOOK_MIRROR", raising=False)
    monkeypatch.setenv("MEDCOOK_CACHE", str(tmp_path))

    def write(task: str):
        folder, stem = data_dir(task), task.split("_")[1].lower()
        names = [f"{stem}_{number:03d}.nii.gz" for number in (12, 3, 20, 4, 7)]
        for number, name in enumerate(names):
            save(folder / "imagesTr" / name, image(task, number))
            save(folder / "labelsTr" / name, label(task))
            (folder / "imagesTr" / f"._{name}").write_bytes(b"what the archives hold of the computer they come from")
        save(folder / "imagesTs" / f"{stem}_001.nii.gz", image(task, 9))
        content = {
            "name": task.split("_")[1],
            "description": load_manifest(task).title,
            "reference": "none",
            "licence": "CC-BY-SA 4.0",
            "release": "1.0 04/05/2018",
            "tensorImageSize": "4D" if image(task, 0).ndim == 4 else "3D",
            "modality": dict(enumerate(MODALITIES.get(task.removeprefix("msd/"), ("CT",)))),
            "labels": load_manifest(task).classes,
            "numTraining": len(names),
            "numTest": 1,
            "training": [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names],
            "test": [f"./imagesTs/{stem}_001.nii.gz"],
        }
        (folder / "dataset.json").write_text(json.dumps(content))
        return folder

    return write


@pytest.mark.parametrize("task", TASKS)
def test_msd_reads_every_task_in_the_published_layout(unpacked, task):
    unpacked(task)
    data = open_dataset(task)
    stem = task.split("_")[1].lower()
    assert list(data.index()) == [f"{stem}_{number:03d}" for number in (3, 4, 7, 12, 20)], "no image without a label"
    assert data.index() == {case_id: case_id for case_id in data.index()}, "a case is a patient"
    with open_test("unit test"):
        cases = [data.load(case_id) for case_id in data.index()]
    for case, number in zip(cases, (1, 3, 4, 0, 2), strict=True):
        stored = image(task, number).reshape(*SHAPE, -1)
        assert np.array_equal(case.image, np.moveaxis(stored, -1, 0)) and case.image.flags.c_contiguous
        assert np.array_equal(case.label, label(task))
        assert sorted(np.unique(case.label)) == sorted(data.manifest.classes)
        assert case.spacing == SPACING and case.attributes["orientation"] == "RAS"
        assert np.array_equal(case.attributes["affine"], np.diag([*SPACING, 1]))


def test_msd_has_the_ten_tasks_and_their_published_numbers_of_cases():
    facts = [load_manifest(task).facts for task in TASKS]
    assert [one.cases for one in facts] == [484, 20, 131, 260, 32, 63, 281, 303, 41, 126]
    assert [one.patients for one in facts] == [one.cases for one in facts]


def test_msd_split_is_by_patients_and_hides_the_test_cases(unpacked):
    unpacked(SPLEEN)
    data = open_dataset(SPLEEN)
    assert {*data.split.train, *data.split.val, *data.split.test} == {*data.index()}
    with pytest.raises(MedcookError, match=f"{data.split.test[0]} of {SPLEEN} is a test case"):
        data.load(data.split.test[0])
    with pytest.raises(MedcookError, match="has no case 'spleen_001'"):
        data.load("spleen_001")  # it is in imagesTs, and has no label


def strange(value: float) -> np.ndarray:
    array = label(SPLEEN).astype(np.float32)
    array[0, 0, 0] = value
    return array


@pytest.mark.parametrize(
    ("part", "array", "message"),
    [
        ("labelsTr", strange(2), r"label value 2 is not in the manifest \(\[0, 1\]\)"),
        ("labelsTr", strange(0.5), "values that are not whole numbers"),
        ("labelsTr", strange(-1), "values that are not whole numbers"),
        ("labelsTr", label(SPLEEN)[:-1], r"image \(6, 5, 4\) and label \(5, 5, 4\) differ in shape"),
        ("labelsTr", label(SPLEEN)[..., None, None], "differ in shape"),
        ("imagesTr", image(SPLEEN, 0)[:, :-1], r"image \(6, 4, 4\) and label \(6, 5, 4\) differ in shape"),
        ("imagesTr", image(SPLEEN, 0) * np.float32(np.nan), "the image holds NaN or infinity"),
    ],
)
def test_msd_case_that_does_not_fit_is_named(unpacked, part, array, message):
    folder = unpacked(SPLEEN)
    data = open_dataset(SPLEEN)
    name = data.split.train[0]
    save(folder / part / f"{name}.nii.gz", array)
    with pytest.raises(MedcookError, match=f"{name}.*{message}"):
        data.load(name)


@pytest.mark.parametrize("part", ["imagesTr", "labelsTr"])
def test_msd_damaged_and_missing_files_are_named(unpacked, part):
    folder = unpacked(SPLEEN)
    data = open_dataset(SPLEEN)
    name = data.split.train[0]
    path = folder / part / f"{name}.nii.gz"
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"no volume", b""):
        path.write_bytes(damaged)
        with pytest.raises(MedcookError, match=f"{re.escape(str(path))}: not a readable NIfTI file"):
            data.load(name)
    path.unlink()
    with pytest.raises(MedcookError, match=f"{SPLEEN}: the file {part}/{name}.nii.gz is missing"):
        data.load(name)


def test_msd_without_its_table_says_that_it_is_missing(unpacked):
    (unpacked(SPLEEN) / "dataset.json").unlink()
    with pytest.raises(MedcookError, match=f"{SPLEEN}: the file dataset.json is missing"):
        open_dataset(SPLEEN).index()


@pytest.mark.parametrize(
    "damage", ["", "[]", '{"training": 3}', '{"training": [{"label": "a"}]}', '{"training": [{"ima']
)
def test_msd_with_a_damaged_table_names_it(unpacked, damage):
    path = unpacked(SPLEEN) / "dataset.json"
    path.write_text(damage)
    with pytest.raises(MedcookError, match="dataset.json: not a readable list of training images"):
        open_dataset(SPLEEN).index()


def test_msd_table_cannot_lead_out_of_its_folder(unpacked, tmp_path):
    folder = unpacked(SPLEEN)
    save(tmp_path / "outside.nii.gz", image(SPLEEN, 0))
    pair = {key: "../../../../outside.nii.gz" for key in ("image", "label")}
    content = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(content | {"training": [pair, *content["training"]]}))
    with open_test("unit test"), pytest.raises(MedcookError, match="the file imagesTr/outside.nii.gz is missing"):
        open_dataset(SPLEEN).load("outside")
