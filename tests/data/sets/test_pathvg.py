"""The reader of RefPath, on tiny files in the published layout; the table of expressions, and answers to them."""

import json
import random

import numpy as np
import pytest
from PIL import Image

from medcook.data.datasets import open_dataset
from medcook.data.manifests import load_manifest
from medcook.data.sets.pathvg import SLIDES, expression_table, grounding, slide_of, spoken
from medcook.data.splits import open_test
from medcook.errors import MedcookError

WIDTH, HEIGHT = 40, 30
WORDS = "Detached tumor cells in the upper-left alveolar space."


def entry(number, box=(4, 2, 12, 8), said=(WORDS,), bbox_id=1, **changes) -> dict:
    """One line of a list, with the keys of the data card and the one that the authors' code reads besides."""
    name = f"{number}.jpg"
    told = {"bbox": list(box), "image_id": name, "height": HEIGHT, "width": WIDTH, "bbox_id": bbox_id}
    told |= {"expression": list(said), "image": f"refpath_image/{name}"} | changes
    return {key: value for key, value in told.items() if value is not ...}


TRAIN = [entry(first + 1) for first, _ in SLIDES] + [entry(800)]  # one of each slide, and one between two
LISTS = {
    "train": TRAIN,
    "testA": [entry(SLIDES[0][0], box=(0, 0, 40, 30)), entry(SLIDES[2][0])],
    "testB": [
        entry(4136, box=(10.5, 4, 20, 16), said=["[Dense cluster.]", ' "Dark nuclei." ']),
        entry(4136, box=(30, 20, 40, 30), said=["Dense cluster."], bbox_id=2, image=...),
    ],
}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(folder of the images, list=entries ...): the lists, some of them changed, and all images; the folder."""
    monkeypatch.setenv("MEDCOOK_MIRROR", str(tmp_path))
    monkeypatch.setenv("MEDCOOK_CACHE", str(tmp_path / "cache"))
    top = tmp_path / "pathvg"

    def save(images="refpath_image", **changes):
        (top / images).mkdir(parents=True)
        for part, entries in (LISTS | changes).items():
            (top / f"{part}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in entries))
        for name in {one["image_id"] for entries in LISTS.values() for one in entries}:
            pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8) + np.uint8([200, 100, 150])
            Image.fromarray(pixels).save(top / images / name)
        return top

    return save


def opened(case_id: str):
    """A case, whatever part it is in."""
    with open_test("unit test"):
        return open_dataset("pathvg").load(case_id)


@pytest.mark.parametrize("folder", ["refpath_image", "refpath_images", "images"])
def test_pathvg_reads_images_boxes_and_expressions(write, folder):
    write(folder)
    case = opened("4136")
    assert case.image.shape == (3, HEIGHT, WIDTH) and case.image.dtype == np.float32
    assert np.abs(case.image.mean((1, 2)) - [200, 100, 150]).max() < 3, "red, green and blue, in this order"
    assert case.label.sum() == 12 * 10 + 10 * 10 and case.label[4:16, 10:20].all() and case.label[20:, 30:].all()
    assert case.attributes["part"] == "testB" and case.attributes["magnification"] == 20
    first, second = case.attributes["regions"]
    assert first[:5] == (1, 10.5, 4, 20, 16) and first.expressions == ("Dense cluster.", "Dark nuclei.")
    assert second[:5] == (2, 30, 20, 40, 30) and case.spacing is None
    assert opened("21").attributes["magnification"] == 40 and opened("22").attributes["magnification"] is None


def test_pathvg_split_keeps_a_slide_together_whatever_list_its_images_are_in(write):
    write()
    data = open_dataset("pathvg")
    assert data.patients["slide 1"] == ["21", "22"] and data.patients["slide 9"] == ["4136", "4137"]
    assert len(data.patients) == 46 and len(data.index()) == 50
    split = data.split
    assert {*split.train, *split.val, *split.test} == {*data.patients} and len(split.test) == 7 == len(split.val)
    for slide in split.test:
        with pytest.raises(MedcookError, match="is a test case"):
            data.load(data.patients[slide][0])


def test_pathvg_image_between_two_slides_is_in_no_part_and_may_be_a_test_case(write):
    data = open_dataset("pathvg")
    ends = {f"{number}": number for first, last in SLIDES for number in (first, last)}
    assert all(slide_of(end) == f"slide {1 + place // 2}" for place, end in enumerate(ends))
    between = {last + 1: f"slide {place} or slide {place + 1}" for place, (_, last) in enumerate(SLIDES, start=1)}
    write(train=[*TRAIN[:-1], *map(entry, between), entry(20)])
    assert {number: data.index()[str(number)] for number in between} == between
    assert data.index()["20"] == "slide 0 or slide 1" and sum(map(len, data.patients.values())) == 49
    for number, slides in between.items():
        hidden = not {*slides.split(" or ")}.isdisjoint(data.split.test)
        with pytest.raises(MedcookError, match="is a test case" if hidden else "is missing"):
            data.load(str(number))


def line(**changes) -> list:
    return [*TRAIN, entry(100, **changes)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": [*TRAIN, ["8006.jpg"]]}, "entry 48: the image is not named as 8006.jpg is: None"),
        ({"train": line(image_id="../8006.jpg")}, "not named as 8006.jpg is"),
        ({"train": line(image_id="/etc/8006.jpg")}, "not named as 8006.jpg is"),
        ({"train": line(image_id=8006)}, "not named as 8006.jpg is"),
        ({"train": line(image="refpath_image/101.jpg")}, "100.jpg is at 'refpath_image/101.jpg', another image"),
        ({"train": line(height=0)}, "the size of 100.jpg is not told"),
        ({"train": line(width="40")}, "the size of 100.jpg is not told"),
        ({"train": line(box=(1, 2, 3))}, "a box of 100.jpg is not four numbers"),
        ({"train": line(bbox=None)}, "a box of 100.jpg is not four numbers"),
        ({"train": line(box=(1, 2, 3, "4"))}, "a box of 100.jpg is not four numbers"),
        ({"train": line(box=(4, 2, 4, 8))}, "a box of 100.jpg is empty or begins outside"),
        ({"train": line(box=(-1, 2, 4, 8))}, "a box of 100.jpg is empty or begins outside"),
        ({"train": line(box=(1, 2, float("nan"), 8))}, "a box of 100.jpg is empty or begins outside"),
        ({"train": line(bbox_id=None)}, "a box of 100.jpg has no number"),
        ({"train": line(said=[])}, "box 1 of 100.jpg has no expressions"),
        ({"train": line(said=["dense", ' "" '])}, "box 1 of 100.jpg has no expressions"),
        ({"train": line(said=["dense", 3])}, "box 1 of 100.jpg has no expressions"),
        ({"train": line(expression=WORDS)}, "box 1 of 100.jpg has no expressions"),
        ({"train": [*TRAIN, entry(22)]}, "region 1 of 22.jpg is listed twice"),
        ({"train": [*TRAIN, entry(22, bbox_id=2, height=31)]}, "22.jpg has two sizes"),
        ({"testA": [entry(22)]}, "22.jpg is in train.jsonl, too"),
        ({"testA": [entry(801)]}, "801.jpg has a number that none of testA had"),
        ({"testB": []}, "testB.jsonl: nothing is listed"),
    ],
)
def test_pathvg_lists_that_are_not_as_published_are_refused(write, changes, message):
    path = write(**changes) / f"{next(iter(changes))}.jsonl"
    with pytest.raises(MedcookError, match=message) as caught:
        open_dataset("pathvg").index()
    assert caught.value.problem.startswith(str(path))


@pytest.mark.parametrize(
    "spoil", [lambda text: text[:-20], lambda text: text + b"[" * 100_000, lambda text: b"\xff\xfe"]
)
def test_pathvg_broken_lists_are_named(write, spoil):
    path = write() / "testA.jsonl"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(MedcookError, match="testA.jsonl"):
        open_dataset("pathvg").index()


def test_pathvg_damaged_missing_or_other_images_are_named(write):
    folder = write(testB=[entry(4136, box=(30, 20, 41, 30))]) / "refpath_image"
    with pytest.raises(MedcookError, match=r"4136.jpg: a box of testB.jsonl reaches over its edge"):
        opened("4136")
    Image.fromarray(np.zeros((WIDTH, HEIGHT, 3), np.uint8)).save(folder / "21.jpg")
    with pytest.raises(MedcookError, match=r"21.jpg: 30 x 40 pixels, not 40 x 30 as listed"):
        opened("21")
    (folder / "22.jpg").write_bytes((folder / "22.jpg").read_bytes()[:200])
    with pytest.raises(MedcookError, match=r"22.jpg: not a readable image"):
        opened("22")
    (folder / "866.jpg").unlink()
    with pytest.raises(MedcookError, match=r"refpath_image/866.jpg is missing. Get it from https://huggingface.co"):
        opened("866")


def test_pathvg_that_is_not_here_says_where_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDCOOK_MIRROR", str(tmp_path))
    monkeypatch.setenv("MEDCOOK_CACHE", str(tmp_path / "cache"))
    with pytest.raises(MedcookError, match="huggingface.co/datasets/fengluo/RefPath"):
        open_dataset("pathvg").index()


@pytest.mark.parametrize("text", ["dense", " dense ", "[dense]", '"dense"', ' [ "dense" ] ', '"dense" '])
def test_pathvg_expressions_lose_what_they_are_wrapped_in(text):
    assert spoken(text) == "dense"
    assert spoken(f'a so-called "{text}"') == f'a so-called "{text}"' and spoken('"') == '"'


def test_pathvg_table_has_a_row_an_expression_and_tells_which_mean_several_boxes(write):
    write()
    table = expression_table([opened("4136"), opened("21")])
    assert table["expression"].tolist() == ["Dense cluster.", "Dark nuclei.", "Dense cluster.", WORDS]
    assert table["several"].tolist() == [True, False, True, False] and table["number"].tolist() == [1, 1, 2, 1]
    assert table["share"].to_numpy() == pytest.approx([9.5 * 12 / 1200] * 2 + [100 / 1200, 1])
    assert expression_table([]).columns.tolist() == table.columns.tolist()


def test_pathvg_answers_are_judged_by_their_overlap_and_a_missing_one_is_wrong(write):
    write()
    table = expression_table([opened("4136"), opened("21")])
    true = table[["x1", "y1", "x2", "y2"]].to_numpy()
    perfect = grounding(table, true)
    assert perfect.index.tolist() == ["testB", "testA"] and perfect["expressions"].tolist() == [3, 1]
    assert (perfect[["accuracy", "iou"]] == 1).all(None)
    doubled = true + [0, 0, 1, 0] * (true[:, 2] - true[:, 0])[:, None]
    judged = grounding(table, doubled)
    assert judged["iou"].to_numpy() == pytest.approx(0.5) and (judged["accuracy"] == 0).all(), (
        "above one half, not at it"
    )
    assert (grounding(table, doubled, least=0.49)["accuracy"] == 1).all()
    none = np.where(np.arange(4)[:, None] == 0, np.nan, true)
    assert grounding(table, none).loc["testB", ["accuracy", "iou"]].tolist() == pytest.approx([2 / 3, 2 / 3])
    assert grounding(table, true + 1000)["iou"].tolist() == [0, 0]
    with pytest.raises(MedcookError, match="a box for each expression"):
        grounding(table, true[:3])


def test_pathvg_overlap_is_that_of_masks():
    rng = random.Random(0)
    cases, answers, expected = [], [], []
    for _ in range(50):
        (x1, x2), (y1, y2), (a1, a2), (b1, b2) = (sorted(rng.sample(range(20), 2)) for _ in range(4))
        one, two = np.zeros((2, 20, 20), bool)
        one[y1:y2, x1:x2] = two[b1:b2, a1:a2] = True
        cases.append((x1, y1, x2, y2)), answers.append((a1, b1, a2, b2))
        expected.append((one & two).sum() / (one | two).sum())
    table = expression_table([]).reindex(range(50)).assign(part=range(50))
    table[["x1", "y1", "x2", "y2"]] = cases
    assert grounding(table, answers)["iou"].to_numpy() == pytest.approx(expected)


def test_pathvg_facts_are_those_published():
    manifest = load_manifest("pathvg")
    assert manifest.facts.cases == 27610 and len(SLIDES) == 46
    numbers = [number for stretch in SLIDES for number in stretch]
    assert numbers == sorted({*numbers}), "the stretches of two slides do not overlap"
