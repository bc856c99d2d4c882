"""The reader of MedShapeNet, on tiny meshes under names as published."""

import numpy as np
import pytest
from stl_files import binary, box, in_words

from medcook.data.datasets import open_dataset
from medcook.data.manifests import load_manifest
from medcook.data.sets.medshapenet import key_of
from medcook.errors import MedcookError
from medcook.recipes.anatomy._shapes import load_shape

LINK = "download?path=%2F&files="


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(name, size, form): the file of a box of this size, in the mirror."""
    monkeypatch.setenv("MEDCOOK_MIRROR", str(tmp_path / "mirror"))
    monkeypatch.setenv("MEDCOOK_CACHE", str(tmp_path / "cache"))

    def save(name: str, size=(6, 5, 4), form=binary, under="mirror/medshapenet"):
        path = tmp_path / under / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(form(box(high=size)))
        return path

    return save


def opened():
    """The data set, with every patient in train."""
    dataset = open_dataset("medshapenet")
    dataset.split = dataset.split.__class__(train=tuple(dataset.patients), val=(), test=())
    return dataset


@pytest.mark.parametrize("form", [binary, in_words])
def test_medshapenet_shape_becomes_a_volume(write, form):
    write("s0485_rib_left_2.nii.g_1.stl", form=form)
    case = opened().load("s0485_rib_left_2")
    assert case.image.shape == (1, 8, 7, 6) and case.image.dtype == np.float32 and case.label.dtype == np.uint8
    assert case.image.sum() == 6 * 5 * 4 and np.array_equal(np.unique(case.image), [0, 1])
    number = load_manifest("totalsegmentator").classes
    assert number[int(case.label.max())] == "rib_left_2" and np.array_equal(case.label > 0, case.image[0] > 0)
    assert case.patient_id == "s0485" and case.spacing == (1, 1, 1)
    assert case.attributes["structure"] == "rib_left_2" and case.attributes["annotated"] == [case.label.max()]
    assert case.attributes["origin"] == (-0.5, -0.5, -0.5)


def test_medshapenet_case_is_a_shape_of_the_recipe(write):
    write("006412_liver.stl", (300, 200, 100))
    case = opened().load("006412_liver")
    shape = load_shape(case, 5, "liver")
    assert max(case.label.shape) == 128 and case.spacing == pytest.approx((300 / 126,) * 3)
    assert shape.volume == pytest.approx(300 * 200 * 100, rel=0.03) and shape.facts["unit"] == "mm"


def test_medshapenet_structures_of_a_patient_stay_together(write):
    names = ("s0001_liver.nii.g_1.stl", "s0001_kidney_left.nii.g_1.stl", "000001_kidneyleft.stl", "000442_liver.stl")
    for name in (*names, "face_1.stl", "face_12.stl", "ct_skull_00.stl"):
        write(name)
    dataset = open_dataset("medshapenet")
    assert {patient: sorted(cases) for patient, cases in dataset.patients.items()} == {
        "s0001": ["s0001_kidney_left", "s0001_liver"],
        "000001": ["000001_kidneyleft"],
        "000442": ["000442_liver"],
        "face": ["face_1", "face_12"],
        "ct_skull": ["ct_skull_00"],
    }
    split = dataset.split
    assert sorted(split.train + split.val + split.test) == sorted(dataset.patients)


@pytest.mark.parametrize(
    ("name", "structure"),
    [
        ("000442_kidneyleft.stl", "kidney_left"),
        ("001313_clavicleright.stl", "clavicula_right"),
        ("s0677_vertebrae_L3.nii.g_1.stl", "vertebrae_L3"),
        ("s0677_vertebrae_L1.nii.g_1.STL", "vertebrae_L1"),
        ("005001_vertebraeT12.stl", "vertebrae_T12"),
        ("000442_costa9right.stl", "costa9right"),
        ("000442_costa12left.stl", "costa12left"),
        ("000059_tumoredbrain.stl", "tumoredbrain"),
        ("100206_skull.stl", "skull"),
        ("ct_skull_07.stl", "ct_skull"),
        ("face_12.stl", "face"),
        (f"{LINK}s0485_hip_left.nii.g_1.stl", "hip_left"),
        ("kidney_stl/000442_adrenalglandright.stl", "adrenal_gland_right"),
    ],
)
def test_medshapenet_names_as_published(write, name, structure):
    write(name)
    dataset = opened()
    (case_id,) = dataset.index()
    case = dataset.load(case_id)
    assert dataset.manifest.classes[int(case.label.max())] == structure == case.attributes["structure"]
    assert "/" not in case_id and "=" not in case_id and "." not in case_id


def test_medshapenet_files_of_mirror_and_cache_count_once(write):
    write("s0001_liver.nii.g_1.stl", (5, 5, 5)), write("copy/s0001_liver.nii.g_1.stl", (9, 9, 9))
    write("s0001_liver.nii.g_1.stl", (9, 9, 9), under="cache/data/medshapenet")
    write("s0002_liver.nii.g_1.stl", under="cache/data/medshapenet")
    write("._s0003_liver.nii.g_1.stl"), write("readme.txt")
    assert sorted(open_dataset("medshapenet").index()) == ["s0001_liver", "s0002_liver"]


@pytest.mark.parametrize(
    "name",
    ["001_instrument3DCOSI_BoneForceps.stl", "liver_00012.stl", "s0001_liver.nii.g_1_1.stl", "s0001.stl", "liver.stl"],
)
def test_medshapenet_unknown_names_are_named(write, name):
    write("s0001_liver.nii.g_1.stl")
    path = write(name)
    with pytest.raises(MedcookError, match="the name tells no patient, or no structure") as caught:
        open_dataset("medshapenet").index()
    assert caught.value.problem.startswith(f"{path}: ") and "move other files" in caught.value.hint
    write("z_1.stl")
    with pytest.raises(MedcookError, match=r"\(and 1 more\)"):
        open_dataset("medshapenet").index()


def test_medshapenet_damaged_or_open_files_are_named(write):
    path = write("s0001_liver.nii.g_1.stl")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(MedcookError, match=r"s0001_liver.nii.g_1.stl: neither an ASCII"):
        opened().load("s0001_liver")
    path.write_bytes(binary(box(high=(6, 5, 4))[2:]))
    with pytest.raises(MedcookError, match=r"s0001_liver.nii.g_1.stl: an open surface"):
        opened().load("s0001_liver")


def test_medshapenet_that_is_not_here_says_where_to_get_it(write):
    with pytest.raises(MedcookError, match="medshapenet.ikim.nrw"):
        open_dataset("medshapenet").index()


def test_medshapenet_numbers_begin_with_those_of_totalsegmentator():
    classes = load_manifest("medshapenet").classes
    assert dict(list(classes.items())[:105]) == load_manifest("totalsegmentator").classes
    assert list(classes) == list(range(157)) and len({key_of(name) for name in classes.values()}) == 157
