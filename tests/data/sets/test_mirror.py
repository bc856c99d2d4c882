"""The real data, where a mirror is at hand: counts and facts, and what each reader promises."""

from collections import Counter

import numpy as np
import pytest

from medcook.data.case import IGNORE
from medcook.data.datasets import open_dataset


def some(dataset, count: int):
    """A few cases from train."""
    return list(dataset.cases(dataset.split.train[:count]))


@pytest.mark.parametrize("name", ["acdc", "bubil", "chest_xray", "hippocampus", "openkbp"])
def test_counts_agree_with_the_manifest(mirror, name):
    dataset = open_dataset(name)
    facts = dataset.manifest.facts
    assert (len(dataset.patients), len(dataset.index())) == (facts.patients, facts.cases)
    assert all((mirror / name / path).is_file() for path in dataset.registry)


def test_acdc_frames_groups_scribbles_and_centre(mirror):
    dataset = open_dataset("acdc")
    groups = Counter(dataset.attributes(cases[0])["group"] for cases in dataset.patients.values())
    assert groups == dict.fromkeys(("DCM", "HCM", "MINF", "NOR", "RV"), 20)
    assert dataset.attributes("patient090_frame04")["phase"] == "ED"
    assert dataset.attributes("patient090_frame11")["phase"] == "ES"
    first, second = some(dataset, 1)
    assert first.image.shape[1:] == first.label.shape and first.spacing is None
    assert first.attributes["roi_centre"] == second.attributes["roi_centre"]
    drawn = first.extras["scribble"] != IGNORE
    assert 0.001 < drawn.mean() < 0.05
    assert (first.extras["scribble"] == first.label)[drawn].mean() > 0.95
    assert (first.label == 3).sum() > (second.label == 3).sum(), "the left ventricle is larger at end-diastole"


def test_chest_attributes_and_masks(mirror):
    dataset = open_dataset("chest_xray")
    known = [dataset.attributes(case_id) for case_id in dataset.index()]
    assert Counter((person["site"], person["sex"]) for person in known) == {
        ("Montgomery", "F"): 74,
        ("Montgomery", "M"): 64,
        ("Shenzhen", "F"): 134,
        ("Shenzhen", "M"): 250,
        ("Shenzhen", None): 166,
    }
    assert sum(person["tuberculosis"] for person in known if person["site"] == "Montgomery") == 58
    ages = [person["age"] for person in known if person["site"] == "Montgomery"]
    assert (min(ages), max(ages)) == (4, 89)
    assert set(dataset.clinical) <= set(dataset.index()), "rows of other cohorts are dropped"
    for case in some(dataset, 5):
        assert 0.05 < case.label.mean() < 0.6 and case.image.shape == (1, 256, 256)


def test_hippocampus_volumes(mirror):
    for case in some(open_dataset("hippocampus"), 8):
        assert case.spacing == (1.0, 1.0, 1.0) and case.image.shape[1:] == case.label.shape
        assert set(np.unique(case.label)) == {0, 1, 2}


def test_bubil_raters_agree_with_the_gold_standard(mirror):
    case = some(open_dataset("bubil"), 1)[0]
    assert len(case.raters) == len(case.attributes["raters"]) == 10
    assert case.label.mean() < 0.3, "the cell is the small part: masks are turned round"
    for rater in case.raters:
        assert 2 * (rater & case.label).sum() / (rater.sum() + case.label.sum()) > 0.5


def test_openkbp_in_hounsfield_units_with_unlabelled_organs_said(mirror):
    dataset = open_dataset("openkbp")
    for case in some(dataset, 2):
        assert case.image.min() == -1024 and case.image.max() > 1000
        assert sorted(set(np.unique(case.label)) - {0}) == case.attributes["annotated"]
        assert 2 <= case.spacing[2] <= 3.5 < case.spacing[0]
        bone = case.image[0][case.label == 7]
        assert bone.size == 0 or np.median(bone) > 200, "the mandible is bone"
    assert 6 not in dataset.attributes("pt_2")["annotated"]
