"""The reader of NCL-SM, on tiny sections in folders as published."""

import numpy as np
import pytest
from PIL import Image

from medcook.data import IGNORE
from medcook.data.datasets import open_dataset
from medcook.data.sets import ncl_sm
from medcook.data.sets.ncl_sm import Fibre, section_table
from medcook.data.splits import Split
from medcook.errors import MedcookError

SHAPE = (40, 60)
FOLDERS = {
    "image": "Images",
    "fibres": "Mask_All_Myofibres",
    "analysable": "Mask_All_AM",
    "non_transverse": "Mask_Non_Transverse_Myofibres",
    "frozen": "Mask_Freezing_Artefact_Myofibres",
    "folded": "Mask_Folded_Regions",
    "classes": "Mask_AM_vs_NAM",
    "again": "Mask_QA",
}


def square(number: int, size: int = 8) -> tuple[slice, slice]:
    """Where myofibre `number` lies; the first touches the border."""
    row, column = divmod(number - 1, 5)
    return slice(12 * row, 12 * row + size), slice(12 * column, 12 * column + size)


def section() -> dict[str, np.ndarray]:
    """Myofibres 1 and 2 are fit, 3 is frozen, 4 lies askew, 5 in a fold, 7 is both askew and frozen, of 6 nobody says
    why it is rejected; 8 has 25 pixels."""
    found = {role: np.zeros(SHAPE, np.uint16) for role in FOLDERS}
    for number in range(1, 8):
        found["fibres"][square(number)] = number
    found["fibres"][square(2)] = 0
    found["fibres"][square(2, 6)] = 2
    found["fibres"][square(8, 5)] = 8
    found["analysable"][square(1)], found["analysable"][square(2, 6)] = 1, 2
    found["non_transverse"][square(4)], found["non_transverse"][square(7)] = 1, 2
    found["frozen"][square(3)], found["frozen"][square(7)], found["frozen"][square(1, 2)] = 1, 2, 3
    found["folded"][7:9, 48:60] = 1
    found["image"] = np.zeros((*SHAPE, 3), np.uint8)
    found["image"][..., 0], found["image"][..., 1] = 200, np.arange(SHAPE[1])
    return found


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(**changes): sections of both techniques, with some arrays changed (None: no file); the folder."""
    monkeypatch.setenv("MEDCOOK_MIRROR", str(tmp_path))
    monkeypatch.setenv("MEDCOOK_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "ncl_sm"

    def save(**changes):
        for name in ("IMC/C03", "IMC/C03-2", "IMC/P01", "IF/S60", "IF/C03", "IF/S9"):
            technique, stem = name.split("/")
            for role, array in (section() | changes).items():
                path = folder / technique / FOLDERS[role] / f"{stem}.{'png' if role == 'image' else 'tiff'}"
                path.parent.mkdir(parents=True, exist_ok=True)
                if array is not None:
                    Image.fromarray(array).save(path)
        return folder

    return save


def opened():
    """The data set, with every patient in train."""
    dataset = open_dataset("ncl_sm")
    dataset.split = Split(train=tuple(dataset.patients), val=(), test=())
    return dataset


def test_ncl_sm_reads_the_published_folders(write):
    write()
    case = opened().load("IF/S60")
    assert case.image.shape == (2, *SHAPE) and case.image.dtype == np.float32 and case.spacing is None
    assert (case.image[0] == 200).all() and (case.image[1] == np.arange(SHAPE[1])).all()
    assert case.extras["instances"].dtype == np.int32 and case.extras["instances"].max() == 8
    assert case.attributes["technique"] == "IF" and opened().attributes("IF/S60") == {"technique": "IF"}
    assert [fibre.number for fibre in case.attributes["fibres"]] == [1, 2, 3, 4, 5, 6, 7], "8 has 25 pixels"


def test_ncl_sm_flags_and_areas_are_those_of_the_masks(write):
    write()
    fibres = opened().load("IF/S60").attributes["fibres"]
    nothing = dict(analysable=False, non_transverse=False, frozen=False, folded=False, on_border=False)
    assert fibres[0] == Fibre(**nothing | dict(number=1, area=64, analysable=True, on_border=True))
    assert fibres[2] == Fibre(**nothing | dict(number=3, area=64, frozen=True, on_border=True))
    assert fibres[6] == Fibre(**nothing | dict(number=7, area=64, frozen=True, non_transverse=True))
    assert fibres[4].folded and fibres[1].area == 36
    kinds = ["analysable", "analysable", "frozen", "non_transverse", "folded", "not_told", "frozen"]
    assert [fibre.kind for fibre in fibres] == kinds


def test_ncl_sm_label_is_the_kind_of_each_myofibre(write):
    write()
    dataset = opened()
    label, names = dataset.load("IF/S60").label, dataset.manifest.classes
    assert all(names[label[square(n)][0, 0]] == "analysable myofibre" for n in (1, 2))
    assert names[label[square(4)][0, 0]] == "non-transverse myofibre" and label[11, 11] == 0
    assert names[label[square(3)][0, 0]] == names[label[square(7)][0, 0]] == "myofibre with freezing artefact"
    assert names[label[square(5)][0, 0]] == "myofibre in folded tissue"
    assert names[label[square(6)][0, 0]] == "rejected myofibre, reason not told"
    assert (label[square(8, 5)] == IGNORE).all()


def test_ncl_sm_statistics_of_a_section(write):
    write()
    table = section_table(opened().cases(("S60", "P01")))
    assert list(table.section) == ["IF/S60", "IMC/P01"] and list(table.technique) == ["IF", "IMC"]
    row = table.iloc[0]
    assert (row.fibres, row.analysable, row.frozen, row.non_transverse, row.folded, row.not_told) == (7, 2, 2, 1, 1, 1)
    assert (row.area_mean, row.area_median, row.area_iqr) == (50, 50, 14) and row.area_sd == pytest.approx(
        19.799, abs=1e-3
    )
    assert table.on_border[0] == 6, "1 to 5 at the top, 6 at the left"


def test_ncl_sm_statistics_without_a_fit_myofibre(write):
    write(analysable=np.zeros(SHAPE, np.uint16))
    row = section_table(opened().cases(("S60",))).iloc[0]
    assert row.analysable == 0 and row.fibres == 7 and np.isnan([row.area_mean, row.area_median, row.area_sd]).all()


def test_ncl_sm_kinds_add_up_to_the_myofibres(write):
    write()
    row = section_table(opened().cases(("S60",))).iloc[0]
    assert sum(row[list(ncl_sm.VALUES)]) == row.fibres


def test_ncl_sm_sections_of_a_patient_stay_together(write):
    write()
    dataset = open_dataset("ncl_sm")
    assert dataset.patients["C03"] == ["IMC/C03", "IMC/C03-2", "IF/C03"]
    assert set(dataset.patients) == {"C03", "P01", "S60", "S9"}
    split = dataset.split
    assert sorted(split.train + split.val + split.test) == sorted(dataset.patients)


def test_ncl_sm_one_technique_is_enough(write):
    folder = write()
    (folder / "IMC").rename(folder.parent / "elsewhere")
    assert set(open_dataset("ncl_sm").index()) == {"IF/C03", "IF/S60", "IF/S9"}


def test_ncl_sm_reason_without_a_file_marks_nothing(write):
    write(folded=None, frozen=None)
    fibres = opened().load("IF/S60").attributes["fibres"]
    assert [fibre.kind for fibre in fibres][2:5] == ["not_told", "non_transverse", "not_told"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Images", "Pictures", "0 folders could be Images, of .*'Pictures'"),
        ("Mask_All_AM", "Mask_AM", "0 folders could be Mask_All_AM"),
        ("Mask_QA", "Mask_Folded", "2 folders could be Mask_FR"),
        ("Mask_QA", "Images_RGB", "2 folders could be"),
    ],
)
def test_ncl_sm_folders_that_cannot_be_told_are_named(write, old, new, message):
    folder = write() / "IF"
    (folder / old).rename(folder / new)
    if new == "Images_RGB":
        (folder / "Images").rename(folder / "Images_Raw")
    with pytest.raises(MedcookError, match=message) as caught:
        open_dataset("ncl_sm").index()
    assert "Rename the right one to" in caught.value.hint


def test_ncl_sm_folder_under_the_named_name_wins(write):
    folder = write() / "IF"
    (folder / "Images_Raw").mkdir()
    assert "IF/S60" in open_dataset("ncl_sm").index()


@pytest.mark.parametrize("role", ["image", "analysable"])
def test_ncl_sm_missing_files_are_named(write, role):
    folder = write() / "IF" / FOLDERS[role]
    next(folder.glob("S60.*")).unlink()
    with pytest.raises(MedcookError, match=r"IF/S60: no .* of this section"):
        opened().load("IF/S60")


@pytest.mark.parametrize("role", ["image", "fibres", "analysable", "frozen"])
def test_ncl_sm_damaged_files_are_named(write, role):
    path = next((write() / "IF" / FOLDERS[role]).glob("S60.*"))
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"no image", b""):
        path.write_bytes(damaged)
        with pytest.raises(MedcookError, match=rf"{path.name}: not a readable image"):
            opened().load("IF/S60")


FRACTION = section()["fibres"].astype(np.float32)
FRACTION[1, 1] = 0.5
OTHER = np.zeros(SHAPE, np.uint16)
OTHER[36:] = 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": section()["image"][:-1]}, "S60.png: an image of"),
        ({"image": section()["image"][..., 0]}, "not an image of red, green and blue"),
        ({"analysable": section()["analysable"][:-1]}, "S60.tiff: a mask of"),
        ({"folded": section()["folded"][:, :-1]}, "S60.tiff: a mask of"),
        ({"fibres": section()["image"]}, "not one whole number from 0"),
        ({"fibres": FRACTION}, "not one whole number from 0"),
        ({"fibres": -section()["fibres"].astype(np.int32)}, "not one whole number from 0"),
        ({"analysable": OTHER}, "most of it is not on the myofibres"),
    ],
)
def test_ncl_sm_files_that_do_not_fit_are_named(write, changes, message):
    write(**changes)
    with pytest.raises(MedcookError, match=message):
        opened().load("IF/S60")


def test_ncl_sm_section_with_two_files_is_named(write):
    folder = write() / "IF" / "Images"
    (folder / "S60.tif").write_bytes((folder / "S60.png").read_bytes())
    with pytest.raises(MedcookError, match=r"S60.tif: section S60 has S60.png, too"):
        open_dataset("ncl_sm").index()


def test_ncl_sm_large_sections_are_opened(write, monkeypatch):
    """Pillow refuses what has twice as many pixels as it thinks safe."""
    write()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert opened().load("IF/S60").image.shape == (2, *SHAPE)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_ncl_sm_that_is_not_here_says_where_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDCOOK_MIRROR", str(tmp_path))
    monkeypatch.setenv("MEDCOOK_CACHE", str(tmp_path / "cache"))
    with pytest.raises(MedcookError, match="10.25405/data.ncl.24125391"):
        open_dataset("ncl_sm").index()
