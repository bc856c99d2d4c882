"""The reader of CACTUS, on tiny images in the published folders."""

import csv

import numpy as np
import pytest
from PIL import Image

from medcook.data.datasets import open_dataset
from medcook.data.sets.cactus import COLUMNS, VIEWS, grade_table, grading_error, regraded
from medcook.data.splits import Split
from medcook.errors import MedcookError

SHAPE = (6, 9)
ROWS = {
    "A4C": [("1_D15_frame_600_v2.jpg", 1), ("1_D15_frame_601_v2.jpg", 1), ("9_dr60_frame_3_v2.jpg", 9)],
    "SC": [("4_D15_frame_2_v2.jpg", 4), ("still.jpg", 5)],
    "PL": [("10_V2.jpg", 10), ("7_Folder3_frame_1.png", 8)],
    "PSAV": [("3_V2_frame_7_v2.jpg", 3), ("scan 12.jpg", 2.5)],
    "PSMV": [("6_D7_frame_2_v2.jpg", 6)],
    "Random": [("0_frame_2.jpg", 0), ("12.jpg", 0)],
}


def save_table(path, rows, header=COLUMNS):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8-sig") as lines:
        csv.writer(lines).writerows([header, *rows])


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(top, **changes): the six views, with some of the tables' rows changed; the folder."""
    monkeypatch.setenv("MEDCOOK_MIRROR", str(tmp_path))
    monkeypatch.setenv("MEDCOOK_CACHE", str(tmp_path / "cache"))

    def make(top="Cactus Dataset", **changes):
        folder = tmp_path / "cactus" / top
        for view, rows in ROWS.items():
            listed = changes.get(view, [(name, view, grade) for name, grade in rows])
            save_table(folder / "Grades" / f"{view}_grades.csv", listed)
            for number, (name, _) in enumerate(rows):
                path = folder / "Images Dataset" / view / name
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((*SHAPE, 3), 20 * VIEWS.index(view) + number, np.uint8)).save(path)
        return folder

    return make


def opened():
    """The data set, with every recording in train."""
    dataset = open_dataset("cactus")
    dataset.split = Split(train=tuple(dataset.patients), val=(), test=())
    return dataset


@pytest.mark.parametrize("top", ["", "Cactus Dataset"])
def test_cactus_reads_the_published_folders(write, top):
    write(top)
    dataset = opened()
    assert len(dataset.index()) == 12
    case = dataset.load("A4C/1_D15_frame_600_v2")
    assert case.image.shape == (1, *SHAPE) and case.image.dtype == np.float32 and case.spacing is None
    assert case.image.mean() == pytest.approx(20, abs=2), "the image that the table names"
    told = {"view": "A4C", "grade": 1.0, "grade_in_name": 1, "recording": "D15"}
    assert case.attributes == told == dataset.attributes("A4C/1_D15_frame_600_v2") and case.patient_id == "D15"


def test_cactus_label_is_the_number_of_the_view(write):
    write()
    dataset = opened()
    for view in VIEWS:
        case_id = next(one for one in dataset.index() if one.startswith(f"{view}/"))
        assert (dataset.load(case_id).label == VIEWS.index(view)).all()
    assert dataset.manifest.classes[VIEWS.index("PSMV")].endswith("mitral valve")
    assert dataset.manifest.classes[VIEWS.index("SC")].startswith("subcostal")


def test_cactus_grade_is_the_tables(write):
    write()
    dataset = opened()
    assert dataset.attributes("PSAV/scan 12") == {
        "view": "PSAV",
        "grade": 2.5,
        "grade_in_name": None,
        "recording": "PSAV",
    }
    assert dataset.attributes("PL/7_Folder3_frame_1")["grade"] == 8


def test_cactus_frames_of_a_recording_stay_together(write):
    """Whatever their grade, their view and the capitals of their names are."""
    write()
    dataset = open_dataset("cactus")
    assert dataset.patients["D15"] == ["A4C/1_D15_frame_600_v2", "A4C/1_D15_frame_601_v2", "SC/4_D15_frame_2_v2"]
    assert dataset.patients["V2"] == ["PL/10_V2", "PSAV/3_V2_frame_7_v2"]
    assert dataset.patients["Random"] == ["Random/0_frame_2", "Random/12"]
    assert set(dataset.patients) == {"D15", "DR60", "V2", "FOLDER3", "D7", "SC", "PSAV", "Random"}
    split = dataset.split
    assert sorted(split.train + split.val + split.test) == sorted(dataset.patients)


def test_cactus_test_recordings_are_refused(write):
    write()
    dataset = open_dataset("cactus")
    with pytest.raises(MedcookError, match="is a test case"):
        dataset.load(dataset.patients[dataset.split.test[0]][0])


def test_cactus_table_of_grades_and_names_that_disagree(write):
    write()
    dataset = open_dataset("cactus")
    table = grade_table(dataset, dataset.patients)
    assert len(table) == 12 and set(regraded(table).case) == {"PL/7_Folder3_frame_1", "Random/12"}
    assert list(grade_table(dataset, ("D15",)).grade) == [1, 1, 4]


def test_cactus_grading_error_is_squared_and_leaves_out_random(write):
    write()
    dataset = open_dataset("cactus")
    table = grade_table(dataset, ("D7", "DR60", "Random"))
    assert list(table.grade) == [9, 6, 0, 0] or list(table.grade) == [6, 9, 0, 0]
    assert grading_error(table, table.grade) == 0
    assert grading_error(table, [*(table.grade[:2] + [1, -3]), 10, 10]) == (1 + 9) / 2
    with pytest.raises(MedcookError, match="No image here shows a view"):
        grading_error(grade_table(dataset, ("Random",)), [0, 0])


def test_cactus_without_a_table_of_random_leaves_it_out(write):
    (write() / "Grades" / "Random_grades.csv").unlink()
    assert len(open_dataset("cactus").index()) == 10


def test_cactus_missing_table_of_a_view_is_told(write):
    (write() / "Grades" / "SC_grades.csv").unlink()
    with pytest.raises(MedcookError, match="SC_grades.csv is missing"):
        open_dataset("cactus").index()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("../../1_D15.jpg", "PL", 1), "is not the name of an image in the folder PL"),
        (("/etc/1_D15.jpg", "PL", 1), "is not the name of an image"),
        (("..\\1_D15.jpg", "PL", 1), "is not the name of an image"),
        (("", "PL", 1), "is not the name of an image"),
        (("1_D15.jpg", "PLAX", 1), "the image is in 'PLAX', not in PL; the views are"),
        (("1_D15.jpg", "A4C", 1), "the image is in 'A4C', not in PL"),
        (("1_D15.jpg", "PL", 11), "is '11', not a number from 0 to 10"),
        (("1_D15.jpg", "PL", -1), "is '-1', not a number from 0 to 10"),
        (("1_D15.jpg", "PL", "nan"), "is 'nan', not a number from 0 to 10"),
        (("1_D15.jpg", "PL", "good"), "is 'good', not a number from 0 to 10"),
        (("1_D15.jpg", "PL"), "is '', not a number from 0 to 10"),
        (("2_V1.jpg", "PL", 2), "2_V1.jpg is listed twice"),
        (("2_V1.png", "PL", 2), "2_V1.png is listed twice"),
    ],
)
def test_cactus_lines_that_are_not_as_published_are_named(write, row, message):
    path = write(PL=[("2_V1.jpg", "PL", 2), row]) / "Grades" / "PL_grades.csv"
    with pytest.raises(MedcookError, match=message) as caught:
        open_dataset("cactus").index()
    assert caught.value.problem.startswith(f"{path}, line 3: ")


def test_cactus_tables_without_columns_or_rows_are_named(write):
    path = write() / "Grades" / "PL_grades.csv"
    save_table(path, [("1_D15.jpg", "PL")], COLUMNS[:2])
    with pytest.raises(MedcookError, match="PL_grades.csv: no column 'Grade'"):
        open_dataset("cactus").index()
    save_table(path, [])
    with pytest.raises(MedcookError, match="PL_grades.csv: no image is listed"):
        open_dataset("cactus").index()
    path.write_bytes(b"")
    with pytest.raises(MedcookError, match="PL_grades.csv: no column 'Image Name'"):
        open_dataset("cactus").index()
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(MedcookError, match="PL_grades.csv: not a readable CSV"):
        open_dataset("cactus").index()


def test_cactus_damaged_or_missing_images_are_named(write):
    path = write() / "Images Dataset" / "A4C" / "1_D15_frame_600_v2.jpg"
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"no image", b""):
        path.write_bytes(damaged)
        with pytest.raises(MedcookError, match="1_D15_frame_600_v2.jpg: not a readable image"):
            opened().load("A4C/1_D15_frame_600_v2")
    path.unlink()
    with pytest.raises(MedcookError, match="A4C/1_D15_frame_600_v2.jpg of A4C_grades.csv is missing"):
        opened().load("A4C/1_D15_frame_600_v2")


def test_cactus_that_is_not_here_says_where_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDCOOK_MIRROR", str(tmp_path))
    monkeypatch.setenv("MEDCOOK_CACHE", str(tmp_path / "cache"))
    with pytest.raises(MedcookError, match="10.20383/103.01484"):
        open_dataset("cactus").index()
