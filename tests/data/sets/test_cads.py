"""The reader of CADS, on a tiny case in the published layout."""

import nibabel
import numpy as np
import pytest

from medcook.data.datasets import open_dataset
from medcook.data.sets.cads import GROUPS, PAINTED, SOURCES, patient_of
from medcook.errors import MedcookError

SHAPE, SPACING = (6, 5, 4), (0.75, 0.75, 1.5)
HEADER = "Image ID,Spacing X,Spacing Y,Spacing Z,Size X,Size Y,Size Z\n"


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([*SPACING, 1])), path)


def box(value: int, stop: int) -> np.ndarray:
    array = np.zeros(SHAPE, np.uint8)
    array[:stop] = value
    return array


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(source, names, groups): the CSV of a source, and of each name an image and {group: label map}."""
    monkeypatch.setenv("MEDCOOK_MIRROR", str(tmp_path))

    def source(folder: str, names: list[str], groups: dict[int, np.ndarray]) -> None:
        root = tmp_path / "cads" / folder
        root.mkdir(parents=True, exist_ok=True)
        rows = "".join(f"{name},0.75,0.75,1.5,6,5,4\n" for name in [*names, "Average"])
        (root / f"{folder}.csv").write_text(HEADER + rows)
        for name in names:
            stem = name.removesuffix(".nii.gz").removesuffix("_0000")
            save(root / "images" / name, np.full(SHAPE, -50, np.int16))
            for group, array in groups.items():
                save(root / "segmentations" / stem / f"{stem}_part_{group}.nii.gz", array)

    return source


def test_cads_in_the_published_layout(write):
    """A liver (551) upon muscle (559): the special is painted over the general, and both stay in the extras."""
    write("0016_lidc", ["LIDC-1_0000.nii.gz"], {551: box(5, 2), 559: box(2, 4)})
    write("0043_new_ct_tri", ["a_0000.nii.gz"], {}), write("0007_chaos", ["b_0000.nii.gz"], {})
    dataset = open_dataset("cads")
    dataset.split = dataset.split.__class__(train=tuple(dataset.patients), val=(), test=())
    case = dataset.load("0016_lidc/LIDC-1")
    assert case.image.shape == (1, *SHAPE) and case.image.dtype == np.float32 and case.image.max() == -50
    names = dataset.manifest.classes
    assert [names[int(case.label[x, 0, 0])] for x in (0, 3, 5)] == ["liver", "muscle", "background"]
    assert {name: int(array.max()) for name, array in case.extras.items()} == {"group 551": 5, "group 559": 2}
    assert np.array_equal(case.extras["group 559"], box(2, 4)), "as published, although the label shows less of it"
    assert case.attributes["annotated"] == [*range(1, 18), *range(158, 168)]
    assert case.attributes["source"] == "0016_lidc" and case.attributes["orientation"] == "RAS"
    assert case.spacing == SPACING


@pytest.mark.parametrize(
    ("group", "value", "name"),
    [
        (551, 17, "lung_lower_lobe_right"),
        (552, 1, "vertebrae_L5"),
        (553, 18, "face"),
        (554, 21, "iliopsoas_right"),
        (555, 13, "rib_right_1"),
        (556, 1, "spinal_canal"),
        (557, 9, "head muscles"),
        (558, 29, "OAR_Pituitary"),
        (559, 10, "spinal_cord"),
    ],
)
def test_cads_numbers_of_a_group_follow_those_of_the_groups_before(write, group, value, name):
    write("0041_ctrate", ["train_10030_a_2.nii.gz"], {group: box(value, 3)})
    dataset = open_dataset("cads")
    dataset.split = dataset.split.__class__(train=tuple(dataset.patients), val=(), test=())
    label = dataset.load("0041_ctrate/train_10030_a_2").label
    assert dataset.manifest.classes[int(label.max())] == name


def test_cads_has_forty_sources_and_a_hundred_and_sixty_seven_structures():
    manifest = open_dataset("cads").manifest
    assert len(SOURCES) == len(set(SOURCES)) == 40 and sorted(PAINTED) == list(GROUPS)
    assert sum(GROUPS.values()) == len(manifest.structures) == 167 and manifest.facts.cases == 22022


def test_cads_patients_that_cannot_be_told_apart_stay_together(write):
    """Two scans of a CT-RATE patient, KiTS and the sets made from it, and any source whose names say nothing."""
    write("0041_ctrate", ["train_1_a_1.nii.gz", "train_1_b_1.nii.gz", "train_12_a_1.nii.gz"], {})
    assert list(map(len, open_dataset("cads").patients.values())) == [2, 1]
    assert patient_of("0003_kits21", "a") == patient_of("0009_abdomenct1k", "b") == patient_of("0040_saros", "c")
    assert patient_of("0038_amos", "a") == patient_of("0038_amos", "b") != patient_of("0039_han_seg", "a")


def test_cads_label_maps_that_do_not_fit_are_named(write, tmp_path):
    write("0038_amos", ["x_0000.nii.gz"], {557: box(10, 2)})
    dataset = open_dataset("cads")
    with pytest.raises(MedcookError, match=r"x_part_557.nii.gz: label value 10 of 9"):
        dataset.read("0038_amos/x")
    save(tmp_path / "cads" / "0038_amos" / "segmentations" / "x" / "x_part_557.nii.gz", np.zeros((2, 2, 2), np.uint8))
    with pytest.raises(MedcookError, match=r"case 0038_amos/x: group 557 has shape"):
        dataset.read("0038_amos/x")


def test_cads_that_is_not_here_says_where_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDCOOK_MIRROR", str(tmp_path))
    with pytest.raises(MedcookError, match="huggingface.co/datasets/mrmrx/CADS-dataset"):
        open_dataset("cads").index()
