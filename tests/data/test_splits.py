"""Splits: disjoint, complete, the published order kept, and made again letter by letter."""

import json

import pytest

from medcook.data.datasets import open_dataset
from medcook.data.manifests import load_manifest, manifest_names
from medcook.data.split_plans import PLANS, make_split, split_text, stratified
from medcook.data.splits import Split, load_split, split_by_hash
from medcook.errors import MedcookError
from medcook.paths import MANIFESTS

WITH_SPLIT = [name for name in manifest_names() if load_manifest(name).splits and not name.startswith("msd/")]


@pytest.mark.parametrize("name", WITH_SPLIT)
def test_committed_split_is_patient_disjoint_and_covers_everybody(name):
    dataset = open_dataset(name)
    parts = [*dataset.split.train, *dataset.split.val, *dataset.split.test]
    assert len(parts) == len(set(parts))
    assert set(parts) == set(dataset.patients)


@pytest.mark.parametrize("name", [name for name in PLANS if name != "chest_xray"])
def test_split_is_made_again_letter_by_letter(name):
    assert split_text(make_split(name)) == (MANIFESTS / "splits" / f"{name}.json").read_text()


def test_chest_split_is_made_again_and_stratified(mirror):
    split = make_split("chest_xray")
    assert split_text(split) == (MANIFESTS / "splits" / "chest_xray.json").read_text()
    dataset = open_dataset("chest_xray")
    for key, value in [("site", "Montgomery"), ("tuberculosis", True), ("sex", "F")]:
        shares = [share(dataset, part, key, value) for part in (split.train, split.val, split.test)]
        assert max(shares) - min(shares) < 0.03


def share(dataset, patients, key, value) -> float:
    return sum(dataset.attributes(patient)[key] == value for patient in patients) / len(patients)


def test_acdc_is_the_published_split(mirror):
    published = json.loads((mirror / "acdc" / "splits.json").read_text())
    split = open_dataset("acdc").split
    assert list(split.train) == published["train"], "the published order of train is draw 0"
    assert (list(split.val), list(split.test)) == (published["val"], published["test"])
    assert split.labelled(7) == tuple(published["train"][:7])


def test_every_scanner_and_group_of_the_embedded_cohort_is_in_train_and_test():
    dataset = open_dataset("embedded")
    for part in (dataset.split.train, dataset.split.test):
        known = [dataset.attributes(patient) for patient in part]
        assert {person["site"] for person in known} == {"north", "south", "island"}
        assert {person["group"] for person in known} == {"control", "atrophy"}


def test_a_patient_in_two_parts_is_refused():
    with pytest.raises(MedcookError, match="two parts"):
        Split(("a", "b"), ("b",), ())


def test_labelled_draws_are_fixed_and_differ():
    split = Split(tuple("abcdefgh"), (), ())
    assert split.labelled(3) == ("a", "b", "c")
    assert split.labelled(3, draw=1) == split.labelled(3, draw=1) != split.labelled(3, draw=2)
    with pytest.raises(MedcookError, match="out of range"):
        split.labelled(9)


def test_folds_hold_out_everybody_once_and_never_test():
    split = Split(tuple("abcdefg"), tuple("hij"), tuple("xyz"))
    folds = split.folds(5)
    assert sorted(p for _, held in folds for p in held) == sorted("abcdefghij")
    assert all(not set(train) & set(held) for train, held in folds)


@pytest.mark.parametrize("count", [1, 2, 3, 10, 41])
def test_split_by_hash_is_complete_and_blind_to_order(count):
    names = [f"p{n}" for n in range(count)]
    split = split_by_hash(names)
    assert split == split_by_hash(reversed(names))
    assert sorted(split.train + split.val + split.test) == sorted(names)
    assert split.train and (count < 2 or split.val) and (count < 3 or split.test)


def test_stratified_deals_each_stratum_evenly():
    strata = {f"p{n}": n % 4 for n in range(80)}
    split = stratified(strata, (40, 20, 20), seed="s", source="")
    assert (len(split.train), len(split.val), len(split.test)) == (40, 20, 20)
    for part in (split.train, split.val, split.test):
        counts = [sum(strata[p] == k for p in part) for k in range(4)]
        assert max(counts) - min(counts) <= 1


def test_unreadable_split_file_is_named(tmp_path):
    (tmp_path / "s.json").write_text('{"train": []}')
    with pytest.raises(MedcookError, match="s.json: not a readable split file"):
        load_split(tmp_path / "s.json")
