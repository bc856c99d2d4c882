"""The reader of MedTrinity-25M, on tiny images and tables as published."""

import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageDraw

from medcook.data import IGNORE
from medcook.data.datasets import open_dataset
from medcook.data.sets.medtrinity import drawn_boxes, patient_of, share_gap, told_share, triplet
from medcook.data.splits import Split
from medcook.errors import MedcookError

SIZE = (60, 40)
BHX = "_data2_mm_bhx-brain-bounding-box_CQ500-CT-22_CQ500CT22_Unknown Study_CT PLAIN THIN_CT000015__0_5_8_20_10.jpg"
LESION = "_data5_od_dataset_DeepLesion_Images_png_17_Images_png_001087_10_01_184__8.5_6.25_17.25_6.83699999999999.jpg"
DRAWN, PLAIN = "TCGA-02-0003_12.jpg", "BraTS-GoAT-01507_0000_y_output-slice119.png"
TEXT = (
    "A CT scan of the brain. The region of interest, located centrally, occupies approximately 4.1% of the image area."
)
ROWS = [
    {"file_name": BHX, "caption": TEXT, "source": "bhx"},
    {"file_name": LESION, "caption": "A CT scan of the chest.", "source": "deeplesion"},
    {"file_name": DRAWN, "caption": "A slide. It covers 12 % of the image.", "source": "TCGA", "id": "9"},
    {"file_name": PLAIN, "caption": "An MRI scan.", "source": "brats24"},
    {"file_name": "not_released.png", "caption": "An X-ray.", "source": "padchest"},
]


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(rows, table): images in the folders that unpacking makes, and a table of captions; the folder."""
    monkeypatch.setenv("MEDCOOK_MIRROR", str(tmp_path))
    monkeypatch.setenv("MEDCOOK_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "medtrinity"

    def save(rows=ROWS, table="metadata.jsonl"):
        for number, name in enumerate((BHX, LESION, DRAWN, PLAIN)):
            path = folder / "25M_accessible" / f"part_{number % 2}" / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.new("L" if name == PLAIN else "RGB", SIZE, "gray")
            if name == DRAWN:
                ImageDraw.Draw(image).rectangle([10, 12, 39, 31], outline="green", width=2)
            image.save(path)
        path = folder / table
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows) + "\n")
        return folder

    return save


def opened():
    """The data set, with every patient in train."""
    dataset = open_dataset("medtrinity")
    dataset.split = Split(train=tuple(dataset.patients), val=(), test=())
    return dataset


def test_medtrinity_reads_the_rows_whose_images_are_here(write):
    write()
    dataset = opened()
    assert list(dataset.index()) == sorted([BHX, LESION, DRAWN, PLAIN])
    case = dataset.load(PLAIN)
    assert case.image.shape == (3, 40, 60) and case.image.dtype == np.float32 and (case.image == 128).all()
    assert case.attributes == {"caption": "An MRI scan.", "source": "brats24", "boxes": (), "boxes_from": None}
    assert dataset.attributes(PLAIN) == {"caption": "An MRI scan.", "source": "brats24"}


def test_medtrinity_box_in_the_name_is_the_region(write):
    write()
    case = opened().load(BHX)
    region = np.zeros((40, 60), np.uint8)
    region[8:18, 5:25] = 1
    assert np.array_equal(case.label, region)
    assert case.attributes["boxes"] == ((5, 8, 20, 10),) and case.attributes["boxes_from"] == "name"
    region = np.zeros((40, 60), np.uint8)
    region[6:14, 8:26] = 1
    assert np.array_equal(opened().load(LESION).label, region), "all pixels that the box touches"


def test_medtrinity_drawn_box_is_the_region(write):
    write()
    case = opened().load(DRAWN)
    assert case.attributes["boxes_from"] == "drawn" and len(case.attributes["boxes"]) == 1
    region = np.zeros((40, 60), bool)
    region[12:32, 10:40] = True
    assert ((case.label == 1) != region).mean() < 0.03, "JPEG blurs the line"


def test_medtrinity_drawn_boxes_are_outlines():
    image = Image.new("RGB", SIZE, "black")
    drawing = ImageDraw.Draw(image)
    drawing.rectangle([2, 3, 20, 30], outline="green", width=2)
    drawing.rectangle([30, 5, 55, 20], outline="lime", width=3)
    assert drawn_boxes(np.asarray(image)) == ((2, 3, 19, 28), (30, 5, 26, 16))
    for other in ({"fill": "green"}, {"outline": "red", "width": 2}, {"outline": "white", "width": 2}):
        image = Image.new("RGB", SIZE, "black")
        ImageDraw.Draw(image).rectangle([5, 5, 50, 35], **other)
        assert drawn_boxes(np.asarray(image)) == ()
    image = Image.new("RGB", SIZE, "black")
    ImageDraw.Draw(image).line([5, 35, 5, 5, 50, 5], fill="green", width=2)
    assert drawn_boxes(np.asarray(image)) == (), "two sides are no box"


def test_medtrinity_region_that_is_not_told_is_unlabelled(write):
    write()
    case = opened().load(PLAIN)
    assert (case.label == IGNORE).all() and triplet(case).region is None


def test_medtrinity_triplet_of_image_region_and_description(write):
    write()
    case = opened().load(BHX)
    image, region, text = triplet(case)
    assert image is case.image and text == TEXT and region.dtype == bool and region.sum() == 200
    assert told_share(TEXT) == pytest.approx(0.041) and told_share("12 % of the image") == 0.12
    assert told_share("in 5% of the patients") is None
    assert share_gap(triplet(case)) == pytest.approx(200 / 2400 - 0.041)
    assert share_gap(triplet(opened().load(LESION))) is None and share_gap(triplet(opened().load(PLAIN))) is None


@pytest.mark.parametrize(
    ("name", "source", "patient"),
    [
        (BHX, "bhx", "CQ50022"),
        ("CQ500CT22_x.jpg", "other", "CQ50022"),
        (LESION, "deeplesion", "001087"),
        (PLAIN, "brats24", "BraTS-GoAT-01507"),
        ("BraTS-GLI-02358-101_t1c_slice_100_y.png", "brats", "BraTS-GLI-02358"),
        ("BraTS-GLI-02358-100_t1c_slice_90_y.png", "brats_24", "BraTS-GLI-02358"),
        ("ISPY1_1001_0001.nii_45.png", "MAMA-MIA", "ISPY1_1001"),
        ("seg_train_558_a_2-right lung.nii-105.jpg", "ct_rate", "train_558"),
        ("seg_train_558_b_1-heart.nii-7.jpg", "cr_rate", "train_558"),
        ("59983169626606300641130732593187736_dcqfmb.png", "padchest", "padchest"),
    ],
)
def test_medtrinity_patient_of_a_name(name, source, patient):
    assert patient_of(name, source) == patient


def test_medtrinity_split_keeps_patients_together(write):
    write()
    dataset = open_dataset("medtrinity")
    assert dataset.patients == {"BraTS-GoAT-01507": [PLAIN], "TCGA": [DRAWN], "CQ50022": [BHX], "001087": [LESION]}
    split = dataset.split
    assert sorted(split.train + split.val + split.test) == sorted(dataset.patients)


def test_medtrinity_rows_without_a_caption_are_passed_over(write):
    write([ROWS[0], ROWS[1] | {"caption": None}, ROWS[2] | {"caption": " "}])
    assert list(open_dataset("medtrinity").index()) == [BHX]


def test_medtrinity_reads_parquet_where_pyarrow_is(write, monkeypatch):
    """Which pandas does; here without it, from the same rows."""
    path = write(table="25M_full/train-00000-of-00001.parquet") / "25M_full" / "train-00000-of-00001.parquet"

    def stands_for(found, columns):
        assert found == path and columns == ["file_name", "caption", "source"]
        return pd.DataFrame(ROWS + [{"file_name": PLAIN.replace("119", "120"), "source": "brats24"}])[columns]

    monkeypatch.setattr(pd, "read_parquet", stands_for)
    assert opened().load(BHX).attributes["caption"] == TEXT and len(opened().index()) == 4


def test_medtrinity_parquet_without_pyarrow_is_told(write, monkeypatch):
    write(table="25M_full/train-00000-of-00001.parquet")

    def lacking(*args, **options):
        raise ImportError("Unable to find a usable engine")

    monkeypatch.setattr(pd, "read_parquet", lacking)
    with pytest.raises(MedcookError, match="parquet: Parquet files need pyarrow") as caught:
        open_dataset("medtrinity").index()
    assert "metadata.jsonl" in caught.value.hint


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"file_name": "../x.png"}, "file_name '../x.png' is not the name of an image"),
        ({"file_name": "/etc/x.png"}, "is not the name of an image"),
        ({"file_name": "..\\x.png"}, "is not the name of an image"),
        ({"file_name": None}, "file_name None is not the name"),
        ({"caption": ["An X-ray."]}, "has a caption that is no text, or no source"),
        ({"source": None}, "has a caption that is no text, or no source"),
        ({"source": " "}, "has a caption that is no text, or no source"),
    ],
)
def test_medtrinity_rows_that_are_not_as_published_are_named(write, row, message):
    path = write([*ROWS, ROWS[0] | row]) / "metadata.jsonl"
    with pytest.raises(MedcookError, match=message) as caught:
        open_dataset("medtrinity").index()
    assert caught.value.problem.startswith(f"{path}, row 6: ")


def test_medtrinity_other_caption_of_the_same_image_is_named(write):
    write([*ROWS, ROWS[0]])
    assert len(open_dataset("medtrinity").index()) == 4
    write([*ROWS, ROWS[0] | {"caption": "Another."}])
    with pytest.raises(MedcookError, match="row 6: .*has another caption or source elsewhere"):
        open_dataset("medtrinity").index()


def test_medtrinity_other_image_of_the_same_name_is_named(write):
    folder = write()
    (folder / "copy").mkdir()
    (folder / "copy" / PLAIN).write_bytes(b"another")
    with pytest.raises(MedcookError, match="has the same name, and the captions go by names"):
        open_dataset("medtrinity").index()


@pytest.mark.parametrize("text", ["{", '{"file_name": "a.png"', "[1]", "\xff\xfe", "[" * 100_000])
def test_medtrinity_broken_tables_are_named(write, text):
    path = write() / "metadata.jsonl"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(MedcookError, match="metadata.jsonl"):
        open_dataset("medtrinity").index()


def test_medtrinity_table_without_its_images_is_told(write):
    write(ROWS[-1:])
    with pytest.raises(MedcookError, match=r"metadata.jsonl: none of its images is here \(4 images are\)"):
        open_dataset("medtrinity").index()


def test_medtrinity_damaged_images_and_boxes_outside_are_named(write):
    folder = write() / "25M_accessible"
    path = next(folder.rglob(BHX))
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"no image", b""):
        path.write_bytes(damaged)
        with pytest.raises(MedcookError, match="not a readable image"):
            opened().load(BHX)
    Image.new("RGB", (24, 40)).save(path)
    with pytest.raises(MedcookError, match="region of interest .* is not in the image"):
        opened().load(BHX)


def test_medtrinity_that_is_not_here_says_where_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDCOOK_MIRROR", str(tmp_path))
    monkeypatch.setenv("MEDCOOK_CACHE", str(tmp_path / "cache"))
    with pytest.raises(MedcookError, match="UCSC-VLAA/MedTrinity-25M"):
        open_dataset("medtrinity").index()
