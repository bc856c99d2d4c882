"""The reader of ChestX-ray8, on tiny files in the published layout; boxes found and true."""

import numpy as np
import pytest
from PIL import Image

from medcook.data.case import IGNORE
from medcook.data.datasets import open_dataset
from medcook.data.manifests import load_manifest
from medcook.data.sets.chestxray8 import BOXED, Box, boxes_of, localisation, overlaps, painted
from medcook.data.splits import open_test
from medcook.errors import MedcookError

SHAPE = (30, 40)
HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],"
)
ROWS = [
    "00000001_000.png,Cardiomegaly|Effusion,0,1,057Y,M,PA,2682,2749,0.143,0.143,",
    "00000001_001.png,No Finding,1,1,058Y,M,AP,2894,2729,0.143,0.143,",
    "00000002_000.png,Infiltration|Hernia,0,2,414,F,PA,2500,2048,0.171,0.171,",
]
ROWS += [f"0000001{n}_000.png,No Finding,0,1{n},60,F,PA,2500,2048,0.171,0.171," for n in range(8)]
BOXES = [
    "00000001_000.png,Cardiomegaly,5.25,10.5,20.5,10.25",
    "00000001_000.png,Effusion,20.0,15.0,4.0,4.0",
    "00000002_000.png,Infiltrate,1.0,2.0,3.0,4.0",
]
TEST = ["00000002_000.png"]


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(rows, boxes, train, test): the tables, the lists and the X-rays; the folder."""
    monkeypatch.setenv("MEDCOOK_MIRROR", str(tmp_path))
    monkeypatch.setenv("MEDCOOK_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "chestxray8"

    def save(rows=ROWS, boxes=BOXES, train=None, test=TEST, header=HEADER):
        folder.mkdir(exist_ok=True)
        names = [row.split(",")[0] for row in ROWS]
        train = [name for name in names if name not in TEST] if train is None else train
        (folder / "Data_Entry_2017.csv").write_text("\n".join([header, *rows]) + "\n")
        (folder / "BBox_List_2017.csv").write_text("\n".join(["Image Index,Finding Label,Bbox [x,y,w,h],,,", *boxes]))
        (folder / "train_val_list.txt").write_text("\n".join(train))
        (folder / "test_list.txt").write_text("\n".join(test))
        for number, name in enumerate(names):
            path = folder / ("images" if number else "images_007/images") / name
            path.parent.mkdir(parents=True, exist_ok=True)
            mode = (*SHAPE, 4) if number == 1 else SHAPE  # a few of the set are RGBA
            Image.fromarray(np.full(mode, 10 + number, np.uint8)).save(path)
        return folder

    return save


def test_chestxray8_in_the_published_layout(write):
    write()
    dataset = open_dataset("chestxray8")
    assert dataset.patients["00000001"] == ["00000001_000", "00000001_001"] and len(dataset.patients) == 10
    case = dataset.load("00000001_000")
    assert case.image.shape == (1, *SHAPE) and case.image.max() == 10 and case.spacing is None
    assert case.attributes == dataset.attributes("00000001_000") | {
        "boxes": [Box("Cardiomegaly", 5.25, 10.5, 20.5, 10.25), Box("Effusion", 20, 15, 4, 4)],
        "annotated": [BOXED["Cardiomegaly"], BOXED["Effusion"]],
    }
    known = {"findings": ("Cardiomegaly", "Effusion"), "sex": "M", "age": 57, "follow_up": 0, "view": "PA"}
    assert dataset.attributes("00000001_000") == known
    assert dataset.attributes("00000001_001")["findings"] == () and dataset.attributes("00000002_000")["age"] is None


def test_chestxray8_label_has_the_smaller_box_on_top(write):
    write()
    dataset = open_dataset("chestxray8")
    label, names = dataset.load("00000001_000").label, dataset.manifest.classes
    assert names[label[12, 10]] == "Cardiomegaly" and names[label[16, 21]] == "Effusion"
    assert names[label[19, 21]] == "Cardiomegaly" and names[label[0, 0]] == "background"
    assert np.bincount(label.ravel()).tolist() == [1200 - 231, 0, 231 - 16, 16]


def test_chestxray8_without_a_box_nothing_is_known_of_any_pixel(write):
    write()
    case = open_dataset("chestxray8").load("00000001_001")
    assert (case.label == IGNORE).all() and case.attributes["annotated"] == [] and case.image.max() == 11
    assert painted([Box("Mass", 3.4, 0, 0.1, 0.1)], (2, 6)).tolist() == [[0, 0, 0, 5, 0, 0], [0] * 6], (
        "a pixel at least"
    )


def test_chestxray8_split_is_the_published_one_and_test_boxes_stay_closed(write):
    write()
    dataset = open_dataset("chestxray8")
    split = dataset.split
    assert split.test == ("00000002",) and len(split.val) == 1 and len(split.train) == 8
    assert open_dataset("chestxray8").split.hash == split.hash
    for look in (dataset.load, dataset.boxes):
        with pytest.raises(MedcookError, match="is a test case"):
            look("00000002_000")
    with open_test("a test of the reader"):
        assert dataset.boxes("00000002_000") == [Box("Infiltration", 1, 2, 3, 4)]
    assert dataset.boxes("00000001_001") == []


def test_chestxray8_the_corrected_table_is_preferred(write):
    folder = write()
    row = ROWS[0].replace("Cardiomegaly|Effusion", "Hernia")
    (folder / "Data_Entry_2017_v2020.csv").write_text("\n".join([HEADER[:-1], row[:-1], *ROWS[1:]]))
    assert open_dataset("chestxray8").attributes("00000001_000")["findings"] == ("Hernia",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"header": HEADER.replace("Patient Age", "Age")}, "Data_Entry_2017.csv: no column 'Patient Age'"),
        ({"rows": [*ROWS, ROWS[0]]}, "Data_Entry_2017.csv: 00000001_000 stands there twice"),
        ({"rows": [ROWS[0].replace("Effusion", "Flu")]}, "Data_Entry_2017.csv: 00000001_000.png has the finding 'Flu'"),
        ({"rows": [ROWS[1].replace("No Finding", "No Finding|Mass")]}, "has the finding 'No Finding'"),
        ({"rows": [ROWS[0].replace(",1,", ",3,")]}, "is no X-ray of its patient"),
        ({"rows": [ROWS[0].replace("057Y", "old")]}, "or has no age"),
        ({"rows": ["../" + ROWS[0]]}, "'../00000001_000.png' is no X-ray"),
        ({"rows": [ROWS[0][:30]]}, "Data_Entry_2017.csv: not a readable table"),
        ({"rows": ["\0"]}, "Data_Entry_2017.csv: "),
        ({"boxes": [BOXES[0].replace("Cardiomegaly", "Hernia")]}, "BBox_List_2017.csv: .*a box of 'Hernia' on"),
        ({"boxes": [BOXES[0].replace("00000001", "00000009")]}, "on '00000009_000.png', which it does not know"),
        ({"boxes": [BOXES[0].replace("20.5", "0")]}, "is empty or begins outside"),
        ({"boxes": [BOXES[0].replace("5.25", "-1")]}, "is empty or begins outside"),
        ({"boxes": [BOXES[0].replace("20.5", "nan")]}, "is empty or begins outside"),
        ({"boxes": [BOXES[0][:40]]}, "BBox_List_2017.csv: not a readable table"),
        ({"boxes": [BOXES[0].replace("20.5", "35.5")]}, "00000001_000.png: a box of BBox_List_2017.csv reaches over"),
        ({"boxes": [BOXES[0].replace("10.25", "25")]}, "00000001_000.png: a box of BBox_List_2017.csv reaches over"),
        ({"test": [*TEST, "00000001_001.png"]}, "test_list.txt: 00000001_001 is in no table, is listed twice"),
        ({"test": [*TEST, *TEST]}, "test_list.txt: 00000002_000 is in no table, is listed twice"),
        ({"test": [*TEST, "00000009_000.png"]}, "test_list.txt: 00000009_000 is in no table"),
        ({"test": ["00000001_000.png"], "train": ["00000001_001.png"]}, "or its patient is on both sides"),
        ({"test": []}, "00000002_000 and 0 more are in no list"),
    ],
)
def test_chestxray8_tables_that_are_not_as_published_are_refused(write, changes, message):
    write(**changes)
    with pytest.raises(MedcookError, match=message):
        open_dataset("chestxray8").load("00000001_000")


def test_chestxray8_damaged_or_missing_files_are_named(write):
    folder = write()
    (folder / "images" / "00000001_001.png").write_bytes(b"no image")
    with pytest.raises(MedcookError, match=r"00000001_001.png: not a readable PNG"):
        open_dataset("chestxray8").load("00000001_001")
    (folder / "images" / "00000001_001.png").unlink()
    with pytest.raises(MedcookError, match=r"the file images/00000001_001.png is missing"):
        open_dataset("chestxray8").load("00000001_001")
    (folder / "BBox_List_2017.csv").write_text("Image Index,Finding Label,x,y,w,h\n")
    with pytest.raises(MedcookError, match=r"its columns are not Image Index, Finding Label"):
        open_dataset("chestxray8").load("00000001_000")
    (folder / "Data_Entry_2017.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(MedcookError, match=r"Data_Entry_2017.csv: not a readable table"):
        open_dataset("chestxray8").index()


def test_chestxray8_that_is_not_here_says_where_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDCOOK_MIRROR", str(tmp_path))
    monkeypatch.setenv("MEDCOOK_CACHE", str(tmp_path / "cache"))
    with pytest.raises(MedcookError, match="nihcc.app.box.com"):
        open_dataset("chestxray8").index()


def test_chestxray8_overlap_over_the_found_box_forgives_a_small_one():
    small, large, far = Box("Mass", 2, 2, 2, 2), Box("Mass", 0, 0, 8, 8), Box("Mass", 20, 20, 1, 1)
    assert overlaps([small, large, far], [large]).ravel().tolist() == [1, 1, 0]
    assert overlaps([small, large], [small]).ravel().tolist() == [1, 4 / 64]
    assert overlaps([small], [large], "union").tolist() == [[4 / 64]] == overlaps([large], [small], "union").tolist()
    assert overlaps([Box("Mass", 4, 0, 8, 8)], [large], "union").item() == pytest.approx(1 / 3)
    assert overlaps([], [large]).shape == (0, 1)


def test_chestxray8_boxes_surround_the_regions_above_each_threshold():
    heat = np.zeros((10, 12))
    heat[1:4, 2:5], heat[2, 3], heat[7:9, 8:12] = 0.5, 1, 0.3
    low = [Box("Mass", 2, 1, 3, 3), Box("Mass", 8, 7, 4, 2)]
    assert boxes_of(heat, "Mass") == [*low, Box("Mass", 3, 2, 1, 1)] == boxes_of(heat * 7 - 3, "Mass")
    assert boxes_of(heat, "Mass", (60,)) == low and boxes_of(np.ones((3, 3)), "Mass") == []


def test_chestxray8_localisation_counts_true_boxes_that_are_hit_and_found_ones_that_hit_none():
    mass, other, nodule = Box("Mass", 0, 0, 10, 10), Box("Mass", 50, 50, 10, 10), Box("Nodule", 0, 0, 10, 10)
    true = {"a": [mass, other], "b": [mass], "c": [nodule]}
    found = {"a": [Box("Mass", 0, 0, 5, 5), Box("Mass", 30, 30, 5, 5), nodule], "c": [mass], "d": [mass]}
    table = localisation(found, true, 0.5).set_index("finding")
    assert table.loc["Mass"].tolist() == [2, 3, 1 / 3, 1 / 2], "a nodule on a mass and case c are none of its business"
    assert table.loc["Nodule"].tolist() == [1, 1, 0, 0] and len(table) == 2
    assert localisation(found, true, 0.5, "union").accuracy.tolist() == [0, 0]
    assert localisation(true, true, 1, "union").accuracy.tolist() == [1, 1]


def test_chestxray8_facts_are_those_published():
    manifest = load_manifest("chestxray8")
    assert manifest.facts.cases == 86_524 + 25_596 and manifest.facts.patients == 30_805
    assert manifest.structures == {value: name for name, value in BOXED.items()}
