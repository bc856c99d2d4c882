"""The reader of Chest ImaGenome, on tiny files in the published layout."""

import csv
import json
import zipfile

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from medcook.data.datasets import open_dataset
from medcook.data.manifests import load_manifest
from medcook.data.sets.chest_imagenome import ENDING, combinations, painted, with_boxes
from medcook.data.splits import open_test
from medcook.errors import MedcookError

SHAPE = (30, 40)
XRAYS = {  # dicom: (patient, study, list)
    "0a-1b-2c-3d-4e": ("10000032", "50414267", "train"),
    "0a-1b-2c-3d-4f": ("10000032", "53189527", "train"),
    "1a-1b-2c-3d-4e": ("10000764", "57375967", "valid"),
    "2a-1b-2c-3d-4e": ("11000935", "50578979", "test"),
}
FIRST, SECOND, _, LAST = XRAYS
BOXES = {"right lung": (2, 1, 12, 25), "right apical zone": (2, 1, 12, 6), "cardiac silhouette": (10, 10, 47, 22)}
LOOKS = {"spine": (15, 0, 15, 30), "left cardiac silhouette": (20, 10, 30, 22)}  # empty; not among the 29


def box(image: str, location: str, corners: tuple) -> dict:
    names = dict(zip(("x1", "y1", "x2", "y2"), corners, strict=True))
    on_224 = {name: value // 2 for name, value in names.items()}
    original = {f"original_{name}": value for name, value in names.items()}
    return on_224 | original | {"object_id": f"{image}_{location}", "bbox_name": location, "name": location.title()}


def said(image: str, location: str, *phrases: tuple[str, list[str]], **cues: list[list[str]]) -> dict:
    empty = {f"{cue}_cues": [[] for _ in phrases] for cue in ("comparison", "severity", "temporal", "texture")}
    listed = {"phrases": [text for text, _ in phrases], "attributes": [texts for _, texts in phrases]}
    return {location: True, "bbox_name": location, "object_id": f"{image}_{location}"} | listed | empty | cues


def told(image: str, before: str, location: str, *changes: str) -> dict:
    names = [f"comparison|yes|{change}" for change in changes]
    ids = {"subject_id": f"{image}_{location}", "object_id": f"{before}_{location}"}
    return ids | {"bbox_name": location, "relationship_names": names, "phrase": "As before."}


def graph(image: str = FIRST, **changes) -> dict:
    patient, study, _ = XRAYS[image]
    clear = ("Clear lungs.", ["anatomicalfinding|no|lung opacity", "nlp|yes|normal"])
    large = ("The heart is mildly enlarged.", ["anatomicalfinding|yes|enlarged cardiac silhouette"])
    content = {
        "image_id": image,
        "patient_id": int(patient),
        "study_id": int(study),
        "gender": "F",
        "age_decile": "50-60",
        "objects": [box(image, *one) for one in (BOXES | LOOKS).items()],
        "attributes": [
            said(image, "right lung", clear, ("No effusion.", ["anatomicalfinding|no|pleural effusion"])),
            said(image, "cardiac silhouette", large, severity_cues=[["severity|yes|mild"]]),
            said(image, "neck", ("Drain.", ["tubesandlines|yes|drain"])),
        ],
        "relationships": [told(image, FIRST, "right lung", "improved", "no change")] if image == SECOND else [],
    }
    return content | changes


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write({image: its graph}, {list: its rows}): the set, with some graphs and lists changed; the folder."""
    monkeypatch.setenv("MEDCOOK_MIRROR", str(tmp_path))
    monkeypatch.setenv("MEDCOOK_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "chest_imagenome"

    def save(graphs: dict | None = None, lists: dict | None = None, packed: bool = True):
        silver = folder / "silver_dataset"
        (silver / "splits").mkdir(parents=True, exist_ok=True)
        graphs = {image: graph(image) for image in XRAYS} | (graphs or {})
        texts = {f"scene_graph/{image}{ENDING}": json.dumps(content) for image, content in graphs.items() if content}
        if packed:
            with zipfile.ZipFile(silver / "scene_graph.zip", "w") as archive:
                for name, text in texts.items():
                    archive.writestr(name, text)
        for name, text in texts.items() if not packed else []:
            (silver / "scene_graph").mkdir(exist_ok=True)
            (silver / name).write_text(text)
        for stem in ("train", "valid", "test"):
            rows = (lists or {}).get(stem) or [row(image) for image in XRAYS if XRAYS[image][2] == stem]
            table(silver / "splits" / f"{stem}.csv", [{"": number} | one for number, one in enumerate(rows)])
        for number, image in enumerate(XRAYS):
            path = folder / row(image)["path"].replace(".dcm", ".jpg")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full(SHAPE, 40 + number, np.uint8)).save(path)
        return folder

    return save


def row(image: str, **changes) -> dict:
    patient, study, _ = XRAYS[image]
    path = f"files/p{patient[:2]}/p{patient}/s{study}/{image}.dcm"
    return {"subject_id": patient, "study_id": study, "dicom_id": image, "path": path, "ViewPosition": "PA"} | changes


def table(path, rows: list[dict], separator: str = ",") -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0], delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize("packed", [True, False])
def test_chest_imagenome_in_the_published_layout(write, packed):
    write(packed=packed)
    dataset = open_dataset("chest_imagenome")
    assert dataset.patients["10000032"] == [FIRST, SECOND] and len(dataset.index()) == 4
    case = dataset.load(FIRST)
    assert case.image.shape == (1, *SHAPE) and abs(case.image.mean() - 40) < 2 and case.spacing is None
    known = {name: case.attributes[name] for name in ("study", "view", "sex", "age_decile")}
    assert known == {"study": "50414267", "view": "PA", "sex": "F", "age_decile": "50-60"}
    assert dataset.attributes(FIRST) == {"study": "50414267", "view": "PA"}
    assert case.attributes["graph"].attributes.equals(dataset.graph(FIRST).attributes)


def test_chest_imagenome_label_has_the_smaller_box_on_top_and_ends_at_the_edge(write):
    write()
    dataset = open_dataset("chest_imagenome")
    label, names = dataset.load(FIRST).label, dataset.manifest.classes
    assert names[label[3, 5]] == "right apical zone" and names[label[7, 5]] == "right lung"
    assert names[label[12, 11]] == "right lung", "240 pixels are less than the heart's 360"
    assert names[label[12, 39]] == "cardiac silhouette" and names[label[26, 5]] == "background"
    assert {names[value] for value in np.unique(label)} == {"background", *BOXES}, "no empty box, none of other names"


def test_chest_imagenome_painting_keeps_every_box_that_is_not_hidden():
    boxes = pd.DataFrame({"location": ["a", "b"], "x1": [0, 1], "y1": [0, 1], "x2": [4, 2], "y2": [4, 2]})
    for order in ([0, 1], [1, 0]):
        label = painted(boxes.iloc[order].reset_index(drop=True), (4, 4), {1: "a", 2: "b"})
        assert np.bincount(label.ravel()).tolist() == [0, 15, 1]


def test_chest_imagenome_split_is_the_authors_and_test_graphs_stay_closed(write):
    write()
    dataset = open_dataset("chest_imagenome")
    assert (dataset.split.train, dataset.split.val, dataset.split.test) == (("10000032",), ("10000764",), ("11000935",))
    for look in (dataset.load, dataset.graph):
        with pytest.raises(MedcookError, match="is a test case"):
            look(LAST)
    with open_test("a test of the reader"):
        assert len(dataset.graph(LAST).objects) == 5


def test_chest_imagenome_attributes_are_a_row_each_and_linked_to_their_boxes(write):
    write()
    found = open_dataset("chest_imagenome").graph(FIRST)
    rows = with_boxes(found.attributes, found.objects)
    assert rows[["location", "phrase", "context", "name"]].to_numpy().tolist() == [
        ["right lung", 0, "no", "lung opacity"],
        ["right lung", 0, "yes", "normal"],
        ["right lung", 1, "no", "pleural effusion"],
        ["cardiac silhouette", 0, "yes", "enlarged cardiac silhouette"],
        ["neck", 0, "yes", "drain"],
    ]
    assert rows.sentence.iloc[2] == "No effusion." and rows.category.iloc[4] == "tubesandlines"
    assert rows.severity.tolist() == [(), (), (), ("mild",), ()]
    corners = rows[["x1", "y1", "x2", "y2"]].to_numpy()
    assert corners[0].tolist() == list(BOXES["right lung"]) and corners[3].tolist() == list(BOXES["cardiac silhouette"])
    assert np.isnan(corners[4]).all(), "the neck has no box"


def test_chest_imagenome_comparisons_lead_to_the_box_on_the_earlier_xray(write):
    moved = [box(FIRST, "right lung", (3, 3, 9, 9))]
    write({FIRST: graph(FIRST, objects=moved)})
    dataset = open_dataset("chest_imagenome")
    rows = dataset.graph(SECOND).comparisons
    assert rows.change.tolist() == ["improved", "no change"] and rows.previous.tolist() == [FIRST, FIRST]
    assert with_boxes(rows, dataset.graph(SECOND).objects).x1.tolist() == [2, 2]
    assert with_boxes(rows, dataset.graph(FIRST).objects, "previous_id").x1.tolist() == [3, 3]


def test_chest_imagenome_combinations_are_counted_over_graphs(write):
    write()
    dataset = open_dataset("chest_imagenome")
    counts = combinations(dataset.graph(image).attributes for image in (FIRST, SECOND))
    assert len(counts) == 5 and set(counts["count"]) == {2}
    assert counts[counts.location == "neck"].to_numpy().tolist() == [["neck", "tubesandlines", "yes", "drain", 2]]


def write_gold(folder, **changes) -> None:
    name = "gold_dataset/gold_"
    boxes = [box(f"{FIRST}.dcm", *one) | {"image_id": f"{FIRST}.dcm"} for one in BOXES.items()]
    table(folder / f"{name}bbox_coordinate_annotations_1000images.csv", boxes)
    attribute = {"row_id": f"{FIRST}|1", "sentence": "Clear.", "categoryID": "nlp", "context": "yes"}
    attribute |= {"image_id": f"{FIRST}.dcm", "bbox": "right lung", "label_name": "normal"}
    table(folder / f"{name}object_attribute_with_coordinates.txt", [attribute], "\t")
    pair = {"subject_id": f"{SECOND}_right lung", "object_id": f"{FIRST}.dcm_right lung", "bbox": "right lung"}
    pair |= {"comparison": "no change;;worsened", "sentence": "Much the same."} | changes
    table(folder / f"{name}object_comparison_with_coordinates.txt", [pair], "\t")


def test_chest_imagenome_gold_has_the_same_tables_and_is_a_test_set(write):
    write_gold(write())
    dataset = open_dataset("chest_imagenome")
    with pytest.raises(MedcookError, match="is a test case"):
        dataset.gold()
    with open_test("a test of the reader"):
        gold, silver = dataset.gold(), dataset.graph(FIRST)
    assert all(list(one) == list(other) for one, other in zip(gold, silver, strict=True))
    assert with_boxes(gold.attributes, gold.objects)[["name", "x2"]].to_numpy().tolist() == [["normal", 12]]
    assert gold.comparisons.change.tolist() == ["no change", "worsened"]
    assert with_boxes(gold.comparisons, gold.objects, "previous_id").y2.tolist() == [25, 25]
    write_gold(write(), comparison="better")
    with open_test("a test of the reader"), pytest.raises(MedcookError, match="a comparison says 'better'"):
        dataset.gold()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_id": SECOND}, "another X-ray, patient or study"),
        ({"patient_id": 10000033}, "another X-ray, patient or study"),
        ({"objects": None}, "scene_graph/0a-1b-2c-3d-4e"),
        ({"objects": [{"object_id": f"{FIRST}_spine"}]}, "no 'bbox_name'"),
        ({"objects": [box(FIRST, "spine", (1, 2, 3, 4))] * 2}, "two boxes of one location"),
        ({"objects": [box(FIRST, "spine", (1, 2, 3, float("nan")))]}, "or a box without its corners"),
        ({"objects": [box(SECOND, "spine", (1, 2, 3, 4))]}, "_spine' is not of this X-ray"),
        ({"attributes": [said(FIRST, "spine", ("Bent.", ["scoliosis"]))]}, "'scoliosis' is not of the form"),
        (
            {"attributes": [said(FIRST, "spine", ("Bent.", ["nlp|maybe|abnormal"]))]},
            "not of the form category.yes.name",
        ),
        ({"attributes": [said(FIRST, "spine", ("Bent.", []), phrases=[])]}, "of 'spine' differ in number"),
        ({"attributes": [said(FIRST, "spine", ("Bent.", []), texture_cues=[[], []])]}, "of 'spine' differ in number"),
        ({"relationships": [told(FIRST, SECOND, "spine", "better")]}, "a comparison says 'better'; there are improved"),
        (
            {"relationships": [told(FIRST, SECOND, "spine") | {"relationship_names": ["nlp|yes|improved"]}]},
            "comparison",
        ),
        ({"relationships": [told(FIRST, SECOND, "a", "improved") | {"object_id": f"{SECOND}_b"}]}, "is compared with"),
    ],
)
def test_chest_imagenome_graphs_that_are_not_as_published_are_refused(write, changes, message):
    write({FIRST: graph(**changes)})
    with pytest.raises(MedcookError, match=message) as caught:
        open_dataset("chest_imagenome").load(FIRST)
    assert caught.value.problem.startswith(f"scene_graph/{FIRST}{ENDING}: ")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(FIRST), row(FIRST)], "is listed twice, or"),
        ([row(FIRST), row(LAST)], "is listed twice, or"),
        ([row(FIRST, subject_id="10000033")], "is not its path"),
        ([row(FIRST, path=f"files/p10/p10000032/s50414267/../{FIRST}.dcm")], "is not its path"),
        ([row(FIRST, path=f"/files/p10/p10000032/s50414267/{FIRST}.dcm")], "is not its path"),
        ([{"subject_id": "10000032"}], "no column 'study_id'"),
    ],
)
def test_chest_imagenome_lists_that_are_not_as_published_are_refused(write, rows, message):
    path = write(lists={"train": rows}) / "silver_dataset" / "splits"
    with pytest.raises(MedcookError, match=message) as caught:
        open_dataset("chest_imagenome").index()
    assert caught.value.problem.startswith(str(path))


def test_chest_imagenome_patients_in_two_lists_are_refused(write):
    both = row(SECOND)
    write(lists={"train": [row(FIRST)], "valid": [both]})
    with pytest.raises(MedcookError, match="A patient stands in two parts"):
        open_dataset("chest_imagenome").load(FIRST)


def test_chest_imagenome_few_xrays_lack_a_graph_many_mean_a_broken_set(write):
    def without(count: int) -> list[dict]:
        ids = [f"ff-{number}" for number in range(count)]
        return [row(FIRST)] + [row(FIRST, dicom_id=one, path=row(FIRST)["path"].replace(FIRST, one)) for one in ids]

    write(lists={"train": without(23)})
    assert open_dataset("chest_imagenome").patients["10000032"] == [FIRST]
    write(lists={"train": without(24)})
    with pytest.raises(MedcookError, match="24 listed X-rays have no scene graph"):
        open_dataset("chest_imagenome").index()


def test_chest_imagenome_damaged_or_missing_files_are_named(write):
    folder = write(packed=False)
    path = folder / "silver_dataset" / "scene_graph" / f"{FIRST}{ENDING}"
    for damage in (b"", b"{", b"\xff\xfe", b"[" * 100_000):
        path.write_bytes(damage)
        with pytest.raises(MedcookError, match="not a readable JSON file") as caught:
            open_dataset("chest_imagenome").load(FIRST)
        assert caught.value.problem.startswith(f"{path}: ")
    xray = folder / row(SECOND)["path"].replace(".dcm", ".jpg")
    xray.write_bytes(xray.read_bytes()[:100])
    with pytest.raises(MedcookError, match=f"{SECOND}.jpg: not a readable"):
        open_dataset("chest_imagenome").load(SECOND)
    xray.unlink()
    with pytest.raises(MedcookError, match=f"the file files/p10/.*{SECOND}.jpg is missing"):
        open_dataset("chest_imagenome").load(SECOND)
    (folder / "silver_dataset" / "scene_graph.zip").write_bytes(b"PK")
    with pytest.raises(MedcookError, match=r"scene_graph.zip: not a readable zip file"):
        open_dataset("chest_imagenome").index()


def test_chest_imagenome_that_is_not_here_says_where_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDCOOK_MIRROR", str(tmp_path))
    monkeypatch.setenv("MEDCOOK_CACHE", str(tmp_path / "cache"))
    with pytest.raises(MedcookError, match="physionet.org/content/chest-imagenome"):
        open_dataset("chest_imagenome").index()


def test_chest_imagenome_facts_are_those_published():
    manifest = load_manifest("chest_imagenome")
    assert manifest.facts.cases == 166_521 + 23_953 + 47_393 - 23 and len(manifest.structures) == 29
