"""The reader of Med-GLIP-5M, on tiny images and annotation files in the layout that is our reading of it."""

import json

import numpy as np
import pytest
from PIL import Image

from medcook.data.datasets import open_dataset
from medcook.data.manifests import load_manifest
from medcook.data.sets.med_glip import PUBLISHED, figures, mask_of, modality_in, spoken, unpacked
from medcook.data.splits import Split
from medcook.errors import MedcookError

WIDTH, HEIGHT = 40, 30
CT, XRAY = "btcv/1/slice_7.png", "jsrt/JPCLN001.png"
CATEGORIES = [
    {"id": 1, "name": "gluteus_maximus_left", "supercategory": "muscle"},
    {"id": 2, "name": "hepatic_tumor", "supercategory": "liver"},
    {"id": 3, "name": "right_lung"},
]


def picture(number, name, **changes) -> dict:
    return {"id": number, "file_name": name, "width": WIDTH, "height": HEIGHT} | changes


def region(number, image=1, category=1, box=(4, 2, 12, 8), **changes) -> dict:
    return {"id": number, "image_id": image, "category_id": category, "bbox": list(box)} | changes


LISTS = {
    "annotations/ct_train.json": {
        "images": [picture(1, CT)],
        "categories": CATEGORIES,
        "annotations": [
            region(10, box=(10.5, 4, 9.5, 12)),
            region(11, category=2, segmentation=[[4, 2, 16, 2, 16, 10, 4, 10]]),
            region(12, category=2, box=(0, 0, 40, 30), segmentation=[]),
        ],
    },
    "annotations/other.json": {
        "images": [picture(1, XRAY, modality="X-ray"), picture(2, "us/2.png", modality=" Ultrasound, B mode ")],
        "categories": CATEGORIES[2:],
        "annotations": [region(10, category=3), region("b", 2, 3)],
    },
}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(folder of the images, {annotation file: content}): all images, and the annotation files; the top folder."""
    monkeypatch.setenv("MEDCOOK_MIRROR", str(tmp_path))
    monkeypatch.setenv("MEDCOOK_CACHE", str(tmp_path / "cache"))
    top = tmp_path / "med_glip"

    def save(images="images", lists=LISTS):
        for name in (CT, XRAY):
            (top / images / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("L" if name == XRAY else "RGB", (WIDTH, HEIGHT), 128).save(top / images / name)
        for listed, content in lists.items():
            (top / listed).parent.mkdir(parents=True, exist_ok=True)
            (top / listed).write_text(json.dumps(content))
        return top

    return save


def opened():
    """The data set, with every patient in train."""
    dataset = open_dataset("med_glip")
    dataset.split = Split(train=tuple(dataset.patients), val=(), test=())
    return dataset


@pytest.mark.parametrize("folder", [".", "images", "annotations", "annotations/images"])
def test_med_glip_reads_a_region_of_an_image(write, folder):
    write(folder)
    assert [*opened().index()] == [f"annotations/{name}" for name in ("ct_train/10", "ct_train/11", "ct_train/12")] + [
        "annotations/other/10",
        "annotations/other/b",
    ]
    case = opened().load("annotations/ct_train/10")
    assert case.image.shape == (3, HEIGHT, WIDTH) and case.image.dtype == np.float32 and case.spacing is None
    assert case.image.max((1, 2)).tolist() == [128, 0, 0], "red, green and blue, in this order"
    assert case.label.sum() == 12 * 10 and case.label[4:16, 10:20].all(), "all pixels that the box touches"
    known = {"image": CT, "phrase": "gluteus maximus left", "group": "muscle", "modality": "CT"}
    assert case.attributes == known | {"box": (10.5, 4, 9.5, 12), "region_from": "box"}
    assert opened().attributes("annotations/ct_train/10") == known, "nothing of where it is"
    case = opened().load("annotations/other/10")
    assert (case.image == 128).all() and case.attributes["group"] is None and case.attributes["modality"] == "X-ray"


def test_med_glip_mask_is_the_region_where_there_is_one(write):
    write()
    case = opened().load("annotations/ct_train/11")
    assert case.label.sum() == 12 * 8 and case.label[2:10, 4:16].all() and case.attributes["region_from"] == "mask"
    case = opened().load("annotations/ct_train/12")
    assert case.label.all() and case.attributes["region_from"] == "box", "an empty segmentation is none"


def packed(runs) -> str:
    """Run lengths as COCO packs them, from its definition: 5 bits a character, the rest of them all sign at the end."""
    text = ""
    for place, run in enumerate(runs):
        value, more = run - (runs[place - 2] if place > 2 else 0), True
        while more:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            text += chr(48 + bits + 32 * more)
    return text


def test_med_glip_masks_are_read_in_each_of_cocos_forms():
    mask = np.random.default_rng(0).random((70, 50)) < 0.2
    mask[:, 20:40] = False  # a long run
    down = mask.T.ravel()
    edges = np.flatnonzero(np.diff(down)) + 1
    runs = np.diff(np.concatenate([[0] * (1 + down[0]), edges, [down.size]])).tolist()
    for counts in (runs, packed(runs)):
        assert np.array_equal(mask_of({"size": [70, 50], "counts": counts}, (70, 50)), mask)
    assert unpacked("231N") == [2, 3, 1, 1], "1 after 3 is -2: 30 in five bits, and no more"
    assert unpacked(packed([40_000, 3, 17, 900, 17])) == [40_000, 3, 17, 900, 17]
    two = mask_of([[0, 0, 2, 0, 2, 3, 0, 3], [3.0, 1, 5, 1, 5, 2, 3, 2]], (4, 6))
    assert np.argwhere(two).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [1, 3], [1, 4], [2, 0], [2, 1]]
    assert mask_of(None, (4, 6)) is None and mask_of([], (4, 6)) is None


@pytest.mark.parametrize(
    ("outline", "message"),
    [
        ({"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}, "is empty or reaches out of its box"),
        ({"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH]}, "is empty or reaches out of its box"),
        ([[4, 2, 18, 2, 18, 10, 4, 10]], "is empty or reaches out of its box"),
        ({"size": [WIDTH, HEIGHT], "counts": [0, HEIGHT * WIDTH]}, "not a readable mask of .*its size is not"),
        ({"size": [HEIGHT, WIDTH], "counts": [0, 7]}, "not a readable mask of .*its size is not"),
        ({"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH + 1, -1]}, "not a readable mask of"),
        ({"counts": "231N"}, "not a readable mask of"),
        ([[4, 2, 16]], "not a readable mask of"),
        ("masks/11.png", "not a readable mask of"),
        (7, "not a readable mask of"),
    ],
)
def test_med_glip_masks_that_are_not_those_of_the_box_are_refused(write, outline, message):
    content = LISTS["annotations/ct_train.json"] | {"annotations": [region(11, segmentation=outline)]}
    path = write(lists={"annotations/ct.json": content}) / "annotations/ct.json"
    with pytest.raises(MedcookError, match=message) as caught:
        opened().load("annotations/ct/11")
    assert caught.value.problem.startswith(f"{path}: ") and "annotations/ct/11" in caught.value.problem


@pytest.mark.parametrize(
    ("text", "modality"),
    [
        ("annotations/ct_train", "CT"),
        ("MRI/annotations/train", "MRI"),
        ("X-Ray/train", "X-ray"),
        ("chest_x_ray", "X-ray"),
        ("endoscopy-2", "endoscopy"),
        ("annotations/direction", None),
        ("", None),
    ],
)
def test_med_glip_modality_in_the_name_of_a_file(text, modality):
    assert modality_in(text) == modality


def test_med_glip_modality_that_is_told_wins(write):
    content = LISTS["annotations/ct_train.json"]
    told = [picture(1, CT, modality="dermoscopy"), picture(2, "a.png", modality="mri"), picture(3, "b.png")]
    regions = [region(number, number) for number in (1, 2, 3)]
    write(lists={"ct/a.json": content | {"images": told, "annotations": regions}})
    dataset = opened()
    assert [dataset.attributes(case_id)["modality"] for case_id in dataset.index()] == ["dermoscopy", "MRI", "CT"]


def test_med_glip_phrases_find_their_regions_and_unknown_ones_are_named(write):
    write()
    dataset = opened()
    assert dataset.meant("hepatic_tumor") == ["annotations/ct_train/11", "annotations/ct_train/12"]
    assert dataset.meant("right lung") == ["annotations/other/10", "annotations/other/b"]
    with pytest.raises(MedcookError, match="has no phrase 'left lung'") as caught:
        dataset.meant("left lung")
    assert "right lung" in caught.value.hint
    with pytest.raises(MedcookError, match="It has gluteus maximus left, hepatic tumor"):
        dataset.meant("?")
    assert spoken(" hepatic__tumor ") == "hepatic tumor"


def test_med_glip_split_keeps_the_images_of_a_folder_together(write):
    write()
    dataset = open_dataset("med_glip")
    assert {patient: len(cases) for patient, cases in dataset.patients.items()} == {
        "annotations/btcv/1": 3,
        "annotations/jsrt": 1,
        "annotations/us": 1,
    }
    split = dataset.split
    assert sorted(split.train + split.val + split.test) == sorted(dataset.patients)
    dataset.split = Split(train=(), val=(), test=("annotations/btcv/1",))
    with pytest.raises(MedcookError, match="is a test case"):
        dataset.load("annotations/ct_train/10")


def test_med_glip_figures_stand_beside_those_published(write):
    write()
    table = figures(opened())
    assert table["here"].to_dict() == {"regions": 5, "modalities": 3, "phrases": 3, "groups": 2}
    assert table["published"].to_dict() == {"regions": 5_300_000, "modalities": 7, "phrases": 198, "groups": 38}
    manifest = load_manifest("med_glip")
    assert manifest.facts.cases == PUBLISHED["regions"] and "CC BY 4.0" in manifest.licence


def one(**changes) -> dict:
    """An annotation file with another part."""
    return LISTS["annotations/ct_train.json"] | changes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "a file of an unknown format"),
        ({"0": "liver"}, "a file of an unknown format"),
        (one(annotations={}), "a file of an unknown format"),
        (one(images=[CT]), "a file of an unknown format"),
        (one(images=[picture(None, CT)]), "image None has no id, or that of another"),
        (one(images=[picture(1, CT), picture(1, XRAY)]), "image 1 has no id, or that of another"),
        (one(images=[picture(1, "../slice.png")]), "'../slice.png' is not the path of an image below its folder"),
        (one(images=[picture(1, "/etc/slice.png")]), "is not the path of an image below its folder"),
        (one(images=[picture(1, "C:/slice.png")]), "is not the path of an image below its folder"),
        (one(images=[picture(1, "a\\slice.png")]), "is not the path of an image below its folder"),
        (one(images=[picture(1, None)]), "is not the path of an image below its folder"),
        (one(images=[picture(1, CT, width=0)]), "the size of btcv/1/slice_7.png is not told"),
        (one(images=[picture(1, CT, height="30")]), "the size of btcv/1/slice_7.png is not told"),
        (one(images=[picture(1, CT, modality=3)]), "the modality of btcv/1/slice_7.png is no text"),
        (one(categories=[{"id": 1, "name": " _ "}]), "category 1 has no name"),
        (one(categories=[{"id": 1}]), "category 1 has no name"),
        (one(annotations=[region(1), region(1)]), "region 1 has no id, or that of another"),
        (one(annotations=[region(1, image=2)]), "region 1 is of image 2, which is not listed"),
        (one(annotations=[region(1, image=[1])]), r"region 1 is of image \[1\], which is not listed"),
        (one(annotations=[region(1, category=9)]), "region 1 has category 9, which has no phrase"),
        (one(annotations=[region(1, category={})]), "region 1 has category {}, which has no phrase"),
        (one(annotations=[region(1, bbox=None)]), "the box of region 1 is not four numbers"),
        (one(annotations=[region(1, box=(1, 2, 3))]), "the box of region 1 is not four numbers"),
        (one(annotations=[region(1, box=(1, 2, 3, "4"))]), "the box of region 1 is not four numbers"),
        (
            one(annotations=[region(1, box=(1, 2, 0, 4))]),
            "the box of region 1 is empty or outside of btcv/1/slice",
        ),
        (one(annotations=[region(1, box=(1, 2, 3, float("nan")))]), "the box of region 1 is empty or outside"),
        (one(annotations=[region(1, box=(-0.1, 2, 3, 4))]), "the box of region 1 is empty or outside"),
        (one(annotations=[region(1, box=(1, -1, 3, 4))]), "the box of region 1 is empty or outside"),
        (one(annotations=[region(1, box=(30, 2, 10.1, 4))]), "the box of region 1 is empty or outside"),
        (one(annotations=[region(1, box=(1, 28, 3, 3))]), "the box of region 1 is empty or outside"),
        (one(annotations=[region(1, box=(1, 2, 3, 10**400))]), "int too large"),
    ],
)
def test_med_glip_annotation_files_that_are_not_cocos_are_refused(write, content, message):
    path = write(lists=LISTS | {"annotations/other.json": content}) / "annotations/other.json"
    with pytest.raises(MedcookError, match=message) as caught:
        open_dataset("med_glip").index()
    assert caught.value.problem.startswith(f"{path}: ")


@pytest.mark.parametrize("name", ["b.json", "b.jsonl"])
@pytest.mark.parametrize("text", ["{", '{"filename": "a.png"}\n{"filename": "b.png"}', "\xff\xfe", "[" * 100_000, ""])
def test_med_glip_broken_annotation_files_are_named(write, name, text):
    (write() / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(MedcookError, match=f"{name}: not a readable annotation file"):
        open_dataset("med_glip").index()


def test_med_glip_region_in_two_files_is_named(write):
    write(lists=LISTS | {"annotations/all.json": one(annotations=[region(3, box=(10.5, 4, 9.5, 12))])})
    with pytest.raises(MedcookError, match=r"ct_train.json: region 10 is in annotations/all.json, too"):
        open_dataset("med_glip").index()
    write(lists={"annotations/all.json": one(annotations=[region(3, category=2, box=(10.5, 4, 9.5, 12))])})
    assert len(open_dataset("med_glip").index()) == 6, "the same box, with another phrase"


def test_med_glip_mirror_comes_before_the_cache(write, tmp_path):
    top = write(lists={"a.json": one(annotations=[region(1)]), "ct.json": one(annotations=[region(1, category=2)])})
    other = tmp_path / "cache/data/med_glip"
    other.mkdir(parents=True)
    (other / "a.json").write_text("{")
    (top / "ct.json").rename(other / "ct.json")
    (top / "._a.json").write_text("{")
    assert [*open_dataset("med_glip").index()] == ["a/1", "ct/1"]


def test_med_glip_damaged_missing_or_other_images_are_named(write):
    path = write() / "images" / CT
    whole = path.read_bytes()
    Image.new("RGB", (HEIGHT, WIDTH)).save(path)
    with pytest.raises(MedcookError, match=r"slice_7.png: 30 x 40 pixels, not 40 x 30 as in annotations/ct_train.json"):
        opened().load("annotations/ct_train/10")
    Image.fromarray(np.full((HEIGHT, WIDTH), 1000, np.uint16)).save(path)
    with pytest.raises(MedcookError, match="slice_7.png: an image of an unknown format"):
        opened().load("annotations/ct_train/10")
    for damaged in (whole[: len(whole) // 2], b"no image", b""):
        path.write_bytes(damaged)
        with pytest.raises(MedcookError, match="slice_7.png: not a readable image"):
            opened().load("annotations/ct_train/10")
    path.unlink()
    with pytest.raises(
        MedcookError, match="file images/btcv/1/slice_7.png is missing. Get it from https://huggingface"
    ):
        opened().load("annotations/ct_train/10")


def test_med_glip_that_is_not_here_says_where_to_get_it(write, tmp_path, monkeypatch):
    write(lists={})
    with pytest.raises(MedcookError, match=r"med_glip: there is no annotation file. An annotation file is COCO's"):
        open_dataset("med_glip").index()
    monkeypatch.setenv("MEDCOOK_MIRROR", str(tmp_path / "elsewhere"))
    with pytest.raises(MedcookError, match="huggingface.co/datasets/Med-GLIP/Med-GLIP-5M"):
        open_dataset("med_glip").index()
