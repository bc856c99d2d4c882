"""The reader of CheXmask-U, on a tiny table in the published layout."""

import csv

import numpy as np
import pytest
from PIL import Image
from skimage.draw import polygon2mask

from medcook.data.datasets import open_dataset
from medcook.data.sets.chexmask_u import NODES, decoded
from medcook.errors import MedcookError

SHAPE = (40, 50)
PARTS = {
    "Right Lung": (44, (20, 12)),
    "Left Lung": (50, (20, 38)),
    "Heart": (26, (28, 34)),
}  # nodes, centre (row, column)


def circle(nodes: int, centre: tuple[float, float]) -> np.ndarray:
    angle = np.arange(nodes) * 2 * np.pi / nodes
    return np.round(np.stack([centre[1] + 8 * np.cos(angle), centre[0] + 8 * np.sin(angle)], axis=1))


def encoded(mask: np.ndarray) -> str:
    """Run lengths as the data dictionary of CheXmask has them: 1-based starts and lengths, row by row."""
    flat, words, k = mask.ravel(), [], 0
    while k < len(flat):
        length = 0
        while k + length < len(flat) and flat[k + length]:
            length += 1
        if length:
            words += [k + 1, length]
        k += length + 1
    return " ".join(map(str, words))


LANDMARKS = np.concatenate([circle(*part) for part in PARTS.values()])
SPREAD = np.linspace(0.5, 3, 2 * NODES).reshape(NODES, 2).round(2)
MASKS = {name: polygon2mask(SHAPE, circle(*part)[:, ::-1]) for name, part in PARTS.items()}


def row(first: str, name: str) -> dict:
    return {
        first: name,
        "Dice RCA (Mean)": 0.83,
        "Dice RCA (Max)": 0.9,
        "Landmarks (Mean)": ",".join(str(int(value)) for value in LANDMARKS.ravel()),
        "Landmarks (Std)": ",".join(f"{value:.2f}" for value in SPREAD.ravel()),
        **{structure: encoded(mask) for structure, mask in MASKS.items()},
        "Height": SHAPE[0],
        "Width": SHAPE[1],
    }


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDCOOK_MIRROR", str(tmp_path))
    return tmp_path / "chexmask_u"


@pytest.fixture
def write(folder):
    """write(source, first column, names, **changes): a source's table and its images."""

    def save(source: str, first: str, names: list[str], **changes) -> None:
        path = folder / "OriginalResolution" / f"{source}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [row(first, name) | changes for name in names]
        rows = [{column: value for column, value in each.items() if value is not None} for each in rows]
        with path.open("w", newline="") as stream:
            table = csv.DictWriter(stream, rows[0])
            table.writeheader()
            table.writerows(rows)
        for number, name in enumerate(names):
            image = folder / "images" / source / (name if "." in name else f"{name}.png")
            image.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full(SHAPE, 10 + number, np.uint8)).save(image)

    return save


def test_chexmask_u_in_the_published_layout(write):
    write("ChestX-Ray8", "Image Index", ["00000001_000.png", "00000001_001.png", "00000002_000.png"])
    dataset = open_dataset("chexmask_u")
    assert dataset.patients == {
        "ChestX-Ray8/00000001": ["ChestX-Ray8/00000001_000.png", "ChestX-Ray8/00000001_001.png"],
        "ChestX-Ray8/00000002": ["ChestX-Ray8/00000002_000.png"],
    }
    case = dataset.load(dataset.patients[dataset.split.train[0]][0])
    assert case.image.shape == (1, *SHAPE) and case.image.min() >= 10
    assert np.array_equal(case.attributes["landmarks"], LANDMARKS)
    assert np.allclose(case.attributes["spread"], SPREAD)
    assert case.attributes["quality"] == 0.83 and case.attributes["source"] == "ChestX-Ray8"


def test_chexmask_u_label_is_the_inside_of_the_landmarks_and_the_heart_is_on_top(write):
    write("CheXpert", "Path", ["train/patient00001/study1/view1_frontal.jpg"])
    dataset = open_dataset("chexmask_u")
    assert list(dataset.patients) == ["CheXpert/patient00001"]
    label = dataset.load("CheXpert/train/patient00001/study1/view1_frontal.jpg").label
    assert np.array_equal(label == 3, MASKS["Heart"])
    assert (
        np.array_equal(label == 2, MASKS["Left Lung"] & ~MASKS["Heart"]) and (MASKS["Left Lung"] & MASKS["Heart"]).any()
    )
    assert np.array_equal(label == 1, MASKS["Right Lung"])


def test_chexmask_u_keeps_a_source_whole_where_names_tell_no_patient(write):
    write("MIMIC-CXR-JPG", "dicom_id", ["0a-1b", "2c-3d"])
    write("VinDr-CXR", "image_id", ["f00d"])
    dataset = open_dataset("chexmask_u")
    assert {patient: len(cases) for patient, cases in dataset.patients.items()} == {"MIMIC-CXR-JPG": 2, "VinDr-CXR": 1}
    assert dataset.load(dataset.patients[dataset.split.train[0]][0]).label.max() == 3, "names without ending"


def test_chexmask_u_run_lengths():
    assert decoded("1 2 6 1", (2, 3)).astype(int).tolist() == [[1, 1, 0], [0, 0, 1]]
    assert not decoded("", (2, 3)).any()
    with pytest.raises(MedcookError, match="do not fit"):
        decoded("5 3", (2, 3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"Landmarks (Mean)": "1,2,3"}, "120 landmarks"),
        ({"Landmarks (Std)": ",".join(["-1"] * 240)}, "120 landmarks"),
        ({"Height": 99}, r"the image is \(40, 50\)"),
        ({"Landmarks (Std)": None}, "no column 'Landmarks \\(Std\\)'"),
    ],
)
def test_chexmask_u_says_what_is_wrong(write, changes, message):
    write("VinDr-CXR", "image_id", ["f00d"], **changes)
    with pytest.raises(MedcookError, match=message):
        open_dataset("chexmask_u").load("VinDr-CXR/f00d")


def test_chexmask_u_says_where_to_get_it(folder, tmp_path, monkeypatch, write):
    monkeypatch.setenv("MEDCOOK_CACHE", str(tmp_path / "cache"))
    with pytest.raises(MedcookError, match="not on this machine") as caught:
        open_dataset("chexmask_u").index()
    assert "huggingface.co/datasets/mcosarinsky/CheXmask-U" in caught.value.hint
    write("VinDr-CXR", "image_id", ["f00d"])
    (folder / "images" / "VinDr-CXR" / "f00d.png").unlink()
    with pytest.raises(MedcookError, match="not on this machine"):
        open_dataset("chexmask_u").load("VinDr-CXR/f00d")


def test_chexmask_u_facts_are_those_published():
    facts = open_dataset("chexmask_u").manifest.facts
    assert facts.cases == 657_566 and facts.label_values == [0, 1, 2, 3]
