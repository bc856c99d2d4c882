"""The reader of RadGenome-Chest CT, on tiny files in the published layout."""

import nibabel
import numpy as np
import pandas as pd
import pytest

from medcook.data.datasets import open_dataset
from medcook.data.manifests import load_manifest
from medcook.data.sets.radgenome_ct import REGIONS, TABLES, Link
from medcook.data.splits import open_test
from medcook.errors import MedcookError

SHAPE = (6, 5, 4)
CASE, OTHER, LAST = "train_17_b_1", "train_17_a_2", "valid_3_a_1"
LEFT = "lung/lung/left lung"
SENTENCES = [(LEFT, "A nodule."), ("lung", "Else clear."), ("others/thoracic cavity", "Noise."), ("", "Supine.")]
SENTENCES += [("bone/bone/rib/left rib/left rib 2", "Old fracture."), ("thyroid", "Normal.")]
QUESTIONS = {
    "vqa_abnormality": [(LEFT, {"Abnormality": "nodule"})],
    "vqa_location": [(LEFT, {"Abnormality": "nodule"})],
    "vqa_presence": [
        (LEFT, {"Finding": "nodule", "Presence": "Yes."}),
        ("thyroid", {"Finding": "x", "Presence": "No."}),
    ],
    "vqa_size": [(LEFT, {"Abnormality": "nodule", "Size": "6x4 mm"})],
}


def box(*bounds: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(SHAPE, np.uint8)
    mask[tuple(slice(*bound) for bound in bounds)] = 1
    return mask


LUNG, BONE, LEFT_LUNG = box((0, 4), (0, 5), (0, 4)), box((3, 6), (0, 5), (0, 1)), box((0, 2), (0, 5), (0, 4))


def save(path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([-3.0, -3.0, 1.5, 1.0])), path)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(reports, questions): the tables, CTs and masks; the folder. Both arguments replace a table's rows."""
    monkeypatch.setenv("MEDCOOK_MIRROR", str(tmp_path))
    monkeypatch.setenv("MEDCOOK_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "radgenome_ct" / "dataset"

    def make(reports: dict | None = None, **questions):
        files = folder / "radgenome_files"
        files.mkdir(parents=True, exist_ok=True)
        for part, cases in {"train": (CASE, OTHER), "validation": (LAST,)}.items():
            names = [f"{case}.nii.gz" for case in cases]
            rows = [{"Volumename": n, "Anatomy": place, "Sentence": text} for n in names for place, text in SENTENCES]
            pd.DataFrame((reports or {}).get(part, rows)).to_csv(files / f"{part}_region_report.csv", index=False)
            for table, found in (QUESTIONS | questions).items():
                rows = [{"Volumename": name, "Anatomy": place} | told for name in names for place, told in found]
                pd.DataFrame(rows).to_csv(files / f"{part}_{table}.csv", index=False)
            rows = [{"Volumename": name, "Disorders": "emphysema, hernia"} for name in names]
            pd.DataFrame(rows).to_csv(files / f"{part}_case_disorders.csv", index=False)
        for case, scan in ((CASE, "train_17b"), (OTHER, "train_17a"), (LAST, "valid_3a")):
            part, patient = case.split("_")[0], scan[:-1]
            image = np.arange(np.prod(SHAPE)).reshape(SHAPE).astype(np.int16) - 900
            save(folder / f"{part}_preprocessed" / patient / scan / f"{case}.nii.gz", image)
            for kind, name, mask in (
                ("region", "lung", LUNG),
                ("region", "bone", BONE),
                ("anatomy", "left lung", LEFT_LUNG),
            ):
                save(folder / f"{part}_{kind}_mask" / f"seg_{case}" / f"{name}.nii.gz", mask)
        return folder

    return make


def test_radgenome_ct_in_the_published_layout(write):
    write()
    dataset = open_dataset("radgenome_ct")
    assert dataset.patients == {"train_17": [CASE, OTHER], "valid_3": [LAST]}
    case = dataset.load(CASE)
    assert case.image.shape == (1, *SHAPE) and case.image.dtype == np.float32 and case.image.min() == -900
    assert case.spacing == (3, 3, 1.5) and case.attributes["orientation"] == "LPS"
    assert case.attributes["sentences"].equals(dataset.sentences(CASE)) and case.patient_id == "train_17"
    names = {name: value for value, name in dataset.manifest.classes.items()}
    assert case.attributes["annotated"] == [names["lung"], names["bone"]]
    assert (case.label[4:, :, 0] == names["bone"]).all() and (case.label[:3] == names["lung"]).all()
    assert (case.label[3, :, 0] == names["bone"]).all(), "bone is later than lung"
    assert (case.label[4:, :, 1:] == 0).all()


def test_radgenome_ct_every_sentence_leads_to_the_mask_of_its_place(write):
    write()
    dataset = open_dataset("radgenome_ct")
    rows = dataset.sentences(CASE)
    assert rows.sentence.tolist() == [text for _, text in SENTENCES]
    assert rows.about.tolist() == ["structure", "region", "whole", "whole", "region", "missing"]
    assert rows["mask"].iloc[0] == f"dataset/train_anatomy_mask/seg_{CASE}/left lung.nii.gz"
    assert rows["mask"].iloc[4] == f"dataset/train_region_mask/seg_{CASE}/bone.nii.gz"
    masks = [dataset.mask(CASE, anatomy) for anatomy in rows.anatomy[:5]]
    assert masks[2] is None and masks[3] is None and masks[0].dtype == bool
    for found, drawn in zip((masks[0], masks[1], masks[4]), (LEFT_LUNG, LUNG, BONE), strict=True):
        assert np.array_equal(found, drawn > 0)
    with pytest.raises(MedcookError, match=f"dataset/train_region_mask/seg_{CASE}/thyroid.nii.gz is missing"):
        dataset.mask(CASE, "thyroid")


def test_radgenome_ct_names_of_regions_may_be_capitals_and_spaced(write):
    write()
    assert open_dataset("radgenome_ct").link(CASE, " Bone / humerus").mask.endswith("/bone.nii.gz")
    assert open_dataset("radgenome_ct").link(CASE, "Whole scan") == Link("whole", None)


def test_radgenome_ct_questions_and_answers_lead_to_the_same_masks(write):
    write()
    rows = open_dataset("radgenome_ct").questions(CASE)
    assert rows[["task", "asked", "answer", "about"]].to_numpy().tolist() == [
        ["abnormality", "", "nodule", "structure"],
        ["location", "nodule", LEFT, "structure"],
        ["presence", "nodule", "Yes.", "structure"],
        ["presence", "x", "No.", "missing"],
        ["size", "nodule", "6x4 mm", "structure"],
        ["disorders", "", "emphysema, hernia", "whole"],
    ]
    assert rows.anatomy.tolist() == [LEFT, LEFT, LEFT, "thyroid", LEFT, ""]


def test_radgenome_ct_a_ct_without_questions_has_none(write):
    folder = write()
    for table in TABLES:
        if table != "region_report":
            path = folder / "radgenome_files" / f"train_{table}.csv"
            rows = pd.read_csv(path, dtype=str, keep_default_na=False)
            rows[rows.Volumename != f"{OTHER}.nii.gz"].to_csv(path, index=False)
    dataset = open_dataset("radgenome_ct")
    assert len(dataset.questions(OTHER)) == 0 and len(dataset.questions(CASE)) == 6


def test_radgenome_ct_split_keeps_patients_whole_and_the_authors_validation_closed(write):
    names = [f"train_{patient}_{scan}_1.nii.gz" for patient in range(20) for scan in "ab"]
    write({"train": [{"Volumename": name, "Anatomy": "lung", "Sentence": "Clear."} for name in names]})
    dataset = open_dataset("radgenome_ct")
    split = dataset.split
    assert split.test == ("valid_3",) and (len(split.train), len(split.val)) == (18, 2)
    assert split.hash == open_dataset("radgenome_ct").split.hash
    for look in (dataset.load, dataset.sentences, dataset.questions, lambda case: dataset.mask(case, "lung")):
        with pytest.raises(MedcookError, match="is a test case"):
            look(LAST)
    with open_test("a test of the reader"):
        assert len(dataset.sentences(LAST)) == 6 and dataset.load(LAST).label.any()
    with pytest.raises(MedcookError, match="has no case 'train_99_a_1'"):
        dataset.sentences("train_99_a_1")


def report(name: str = f"{CASE}.nii.gz", place: str | None = "lung") -> dict:
    return {"train": [{"Volumename": name, "Anatomy": place, "Sentence": "Clear."}]}


@pytest.mark.parametrize(
    ("reports", "message"),
    [
        (report(f"{LAST}.nii.gz"), "not named as train_17_b_1.nii.gz is"),
        (report("scan1.nii.gz"), "'scan1.nii.gz' of the reports is not named"),
        (report(f"../{CASE}.nii.gz"), "not named as train_17_b_1.nii.gz is"),
        (report(place="brain/brain"), "'brain/brain' is no place in mediastinum, pleura"),
        (report(place="lung/.."), "'lung/..' is no place"),
        (report(place="lung/..\\seg"), "is no place"),
        (report(place="../lung"), "'../lung' is no place"),
        ({"train": [{"Volumename": f"{CASE}.nii.gz", "Sentence": "Clear."}]}, "report.csv: no column 'Anatomy'"),
    ],
)
def test_radgenome_ct_reports_that_are_not_as_published_are_refused(write, reports, message):
    write(reports)
    with pytest.raises(MedcookError, match=message):
        open_dataset("radgenome_ct").load(CASE)


def test_radgenome_ct_answers_that_are_neither_yes_nor_no_are_refused(write):
    write(vqa_presence=[("lung", {"Finding": "nodule", "Presence": "Maybe."})])
    with pytest.raises(MedcookError, match=r"train_vqa_presence.csv: the answer 'Maybe.' is neither"):
        open_dataset("radgenome_ct").questions(CASE)


@pytest.mark.parametrize("text", ["", "\xff\xfe", 'Volumename,Anatomy,Sentence\n"', "a,b\n1,2,3\n4,5,6,7"])
def test_radgenome_ct_broken_tables_are_named(write, text):
    path = write() / "radgenome_files" / "train_region_report.csv"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(MedcookError, match=r"train_region_report.csv: "):
        open_dataset("radgenome_ct").index()


def test_radgenome_ct_a_table_that_is_cut_off_is_named(write):
    path = write() / "radgenome_files" / "train_region_report.csv"
    path.write_text(path.read_text() + f"{CASE}.nii.gz,lung")
    with pytest.raises(MedcookError, match=r"train_region_report.csv: row 13, its last, is cut off"):
        open_dataset("radgenome_ct").index()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (LUNG[:-1], r"a mask of \(5, 5, 4\), the CT has \(6, 5, 4\)"),
        (LUNG * 2, "the value 2; a mask has 0 and 1"),
        (LUNG * np.float32(0.5), "not whole numbers"),
        (np.repeat(LUNG[..., None], 2, -1), "a mask of"),
    ],
)
def test_radgenome_ct_masks_that_do_not_fit_are_named(write, mask, message):
    path = write() / "train_region_mask" / f"seg_{CASE}" / "lung.nii.gz"
    save(path, mask)
    with pytest.raises(MedcookError, match=message) as caught:
        open_dataset("radgenome_ct").load(CASE)
    assert caught.value.problem.startswith(f"{path}: ")


def test_radgenome_ct_damaged_or_missing_files_are_named(write):
    folder = write()
    path = folder / "train_preprocessed" / "train_17" / "train_17b" / f"{CASE}.nii.gz"
    for damage in (path.read_bytes()[:60], b"no NIfTI"):
        path.write_bytes(damage)
        with pytest.raises(MedcookError, match=f"{CASE}.nii.gz: not a readable NIfTI"):
            open_dataset("radgenome_ct").load(CASE)
    save(path, LUNG[0])
    with pytest.raises(MedcookError, match="not of three axes"):
        open_dataset("radgenome_ct").load(CASE)
    path.unlink()
    with pytest.raises(MedcookError, match=f"the file dataset/train_preprocessed/.*{CASE}.nii.gz is missing"):
        open_dataset("radgenome_ct").load(CASE)
    for region in ("lung", "bone"):
        (folder / "train_region_mask" / f"seg_{OTHER}" / f"{region}.nii.gz").unlink()
    with pytest.raises(MedcookError, match=f"the file dataset/train_region_mask/seg_{OTHER}/lung.nii.gz is missing"):
        open_dataset("radgenome_ct").load(OTHER)


def test_radgenome_ct_that_is_not_here_says_where_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDCOOK_MIRROR", str(tmp_path))
    monkeypatch.setenv("MEDCOOK_CACHE", str(tmp_path / "cache"))
    with pytest.raises(MedcookError, match="huggingface.co/datasets/RadGenome/RadGenome-ChestCT"):
        open_dataset("radgenome_ct").index()


def test_radgenome_ct_facts_are_those_published():
    manifest = load_manifest("radgenome_ct")
    assert manifest.facts.cases == 24_128 + 1_564 and tuple(manifest.structures.values()) == REGIONS
