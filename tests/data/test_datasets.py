"""Loading checks a case against its manifest, and the test set stays shut."""

from dataclasses import replace

import numpy as np
import pytest

from medcook.data.case import IGNORE
from medcook.data.datasets import Dataset, as_labels, check_case, open_dataset
from medcook.data.manifests import manifest_names
from medcook.data.splits import Split, open_test
from medcook.errors import MedcookError


def test_a_good_case_passes_with_and_without_ignored_voxels(case, manifest):
    check_case(case, manifest)
    label = case.label.copy()
    label[0] = IGNORE
    check_case(replace(case, label=label), manifest)


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda c: {"image": c.image.astype(np.float64)}, "image is float64"),
        (lambda c: {"label": c.label.astype(np.int64)}, "label is int64"),
        (lambda c: {"label": c.label[:2]}, "differ in shape"),
        (lambda c: {"image": np.where(c.label == 1, np.nan, c.image).astype(np.float32)}, "NaN or infinity"),
        (lambda c: {"image": c.image * np.float32(np.inf)}, "NaN or infinity"),
        (lambda c: {"label": c.label * 7}, "label value 7 is not in the manifest"),
        (lambda c: {"raters": c.label[None] * 3}, "raters value 3 is not in the manifest"),
        (lambda c: {"label": c.label * 0}, "label is empty"),
    ],
)
def test_a_bad_case_is_refused_by_name(case, manifest, spoil, complaint):
    with pytest.raises(MedcookError, match=f"tiny, case one: .*{complaint}"):
        check_case(replace(case, **spoil(case)), manifest)


@pytest.mark.parametrize("stored", [np.array([0.5]), np.array([-1]), np.array([256]), np.array([np.nan])])
def test_labels_that_are_not_small_whole_numbers(stored, tmp_path):
    with pytest.raises(MedcookError, match="some.nii: the label holds values"):
        as_labels(stored, tmp_path / "some.nii")


class Tiny(Dataset):
    """Three patients, one in each part of the split."""

    def __init__(self, manifest, case):
        super().__init__(manifest)
        self.case = case
        self.split = Split(("p1",), ("p2",), ("p3",))

    def index(self):
        return {"one": "p1", "two": "p2", "three": "p3", "three again": "p3"}

    def read(self, case_id):
        return replace(self.case, case_id=case_id, patient_id=self.index()[case_id])


def test_test_cases_are_refused_outside_the_door_and_logged_inside(case, manifest):
    dataset = Tiny(manifest, case)
    assert dataset.load("one").case_id == "one"
    for test_case in ("three", "three again"):
        with pytest.raises(MedcookError, match=f"{test_case} of tiny is a test case"):
            dataset.load(test_case)
    with open_test("unit test") as reads:
        assert dataset.load("three").patient_id == "p3"
        assert reads[-1] == {"dataset": "tiny", "case": "three", "reason": "unit test"}
    with pytest.raises(MedcookError):
        list(dataset.cases(dataset.split.test))


def test_load_checks_what_it_read(case, manifest):
    with pytest.raises(MedcookError, match="label is empty"):
        Tiny(manifest, replace(case, label=case.label * 0)).load("one")


def test_unknown_case_and_data_set(case, manifest):
    with pytest.raises(MedcookError, match="tiny has no case 'four'"):
        Tiny(manifest, case).load("four")
    with pytest.raises(MedcookError, match="no data set called 'nothing'"):
        open_dataset("nothing")
    with pytest.raises(MedcookError) as caught:
        open_dataset("msd")
    assert "msd/Task09_Spleen" in caught.value.hint and "acdc" not in caught.value.hint


def test_hash_follows_files_and_reader_version(monkeypatch):
    dataset, again = open_dataset("hippocampus"), open_dataset("hippocampus")
    assert dataset.hash == again.hash and len(dataset.hash) == 12
    fewer = open_dataset("hippocampus")
    fewer.registry = dict(list(fewer.registry.items())[1:])
    newer = open_dataset("hippocampus")
    monkeypatch.setattr(newer, "version", "2", raising=False)
    hashes = {open_dataset(name).hash for name in manifest_names()}
    assert len({dataset.hash, fewer.hash, newer.hash}) == 3
    assert len(hashes) == len(manifest_names())


def test_registered_set_says_where_to_apply_and_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDCOOK_CACHE", str(tmp_path))
    monkeypatch.delenv("MEDCOOK_MIRROR", raising=False)
    with pytest.raises(MedcookError, match="kits21 is not on this machine") as caught:
        open_dataset("kits21").load(open_dataset("kits21").split.train[0])
    assert "github.com/neheller/kits21" in caught.value.hint and str(tmp_path) in caught.value.hint
