"""Reports of chest X-rays and the facts in them, see medcook/recipes/language/_reports.py and _reading.py."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F

from medcook.errors import MedcookError
from medcook.recipes.language import _reading, _reports
from medcook.recipes.language._reading import BRAINS, ReportPretrained, Unread, pairs
from medcook.recipes.language._reports import facts_of
from medcook.tasks import Budget
from medcook.training import fit


@pytest.mark.parametrize(
    ("report", "sides", "fields", "signs"),
    [
        ("normal", "", "", ""),
        ("PTB in the right upper field", "right", "upper", "tuberculosis"),
        ("bilateral PTB, with left pleural effusion", "left right", "", "effusion pleura tuberculosis"),
        ("RUL infiltrate; cavitary", "right", "upper", "cavity infiltrate"),
        ("inactive TB scars LUL", "left", "upper", "scars tuberculosis"),
        ("secondary PTB in the bilateral upper and middle field", "left right", "middle upper", "tuberculosis"),
        ("calcified granuloma in the rt lung", "right", "", "calcified nodules"),
        ("STB", "", "", "tuberculosis"),
    ],
)
def test_facts_are_what_the_words_say(report, sides, fields, signs):
    found = facts_of(report)
    assert (found.sides, found.fields, found.signs) == tuple(map(frozenset, map(str.split, (sides, fields, signs))))


def test_a_report_comes_with_every_image():
    samples = BRAINS.samples("unlabelled")
    cases = [case for patient in BRAINS.unlabelled_patients for case in BRAINS.data.patients[patient]]
    told = _reports.said(samples.groups)
    for sentence, number in zip(told, samples.case_of.tolist(), strict=True):
        attributes = BRAINS.data.attributes(cases[number])
        assert ("atrophy" in sentence) == (attributes["group"] == "atrophy")
    assert (samples.labels == 255).all(), "the outcome is hidden"


def test_few_labels_are_half_of_either_outcome_and_the_draw_picks_them():
    few = replace(BRAINS, labelled=6)

    def positive(patient: str) -> bool:
        return BRAINS.is_positive(BRAINS.data.attributes(patient))

    assert sum(map(positive, few.labelled_patients)) == 3 and len(few.labelled_patients) == 6
    assert few.labelled_patients != replace(few, draw=1).labelled_patients
    assert few.unlabelled_patients == BRAINS.unlabelled_patients, "reports are read of everybody"
    many, sick = replace(BRAINS, labelled=60).labelled_patients, sum(map(positive, BRAINS.unlabelled_patients))
    assert sum(map(positive, many)) == sick and len(many) <= 30 + sick, "no more than there are"
    with pytest.raises(MedcookError, match="the same outcome"):
        _ = replace(BRAINS, labelled=4, positive="nobody").labelled_patients


def test_data_without_reports_are_refused():
    with pytest.raises(MedcookError, match="no reports"):
        _reports.sentences_of("acdc")


def test_pairs_are_the_weighted_cross_entropies_of_both_directions():
    torch.manual_seed(0)
    images, texts = torch.randn(5, 8), torch.randn(5, 8)
    similarity = F.cosine_similarity(images[:, None], texts[None], dim=2) / 0.1
    target = torch.arange(5)
    there, back = F.cross_entropy(similarity, target), F.cross_entropy(similarity.T, target)
    reports = tuple("abcde")
    assert torch.allclose(pairs(images, texts, reports), (there + back) / 2, atol=1e-5)
    assert torch.allclose(pairs(images, texts, reports, image_weight=0.75), 0.75 * there + 0.25 * back, atol=1e-5)


def test_equal_reports_are_nobodys_negative():
    images = torch.eye(3)
    exchanged = images[[1, 0, 2]]
    for reports, same in ((("a", "b", "c"), False), (("a", "a", "c"), True)):
        matched, mixed = (pairs(images, texts, reports) for texts in (images, exchanged))
        assert torch.isclose(matched, mixed) == same


@dataclass
class Pairing(ReportPretrained):
    start: str = "random"

    def reading(self, nets, images, reports, now):
        parts = nets["pretext"]
        return pairs(parts["see"](nets["model"].features(images)), parts["hear"](parts["text"](reports)), reports)


def test_reports_are_read_first_and_then_the_outcome_is_learnt():
    method = Pairing(channels=(8, 16, 16), rate=2e-3, pretext_rate=2e-3)
    fitted = fit(method, BRAINS, Budget(60, 8, "float32", 0), cache=False, progress=False)
    losses = fitted.history["loss"]
    assert sum(losses[25:30]) < sum(losses[:5]) and sum(losses[55:]) < sum(losses[30:35])
    case = next(fitted.task.cases("val"))
    rows = _reading.outcome_rows(fitted, case)
    assert rows[0]["outcome"] in (0.0, 1.0) and 0 <= rows[0]["score"] <= 1


def test_who_reads_nothing_waits():
    fitted = fit(Unread(start="random", channels=(8, 16)), BRAINS, Budget(6, 4, "float32", 0), cache=False)
    assert fitted.history["loss"][:3] == [0, 0, 0] and "pretext" not in fitted.nets


def test_volumes_are_refused():
    with pytest.raises(MedcookError, match="not volumes"):
        Pairing().build(1, 2, 3)
