"""Detection against scikit-learn, with and without ties."""

import math

import numpy as np
import pytest
from sklearn import metrics

from medcook.measures.detection import auroc, average_precision, fpr_at_95


@pytest.fixture(params=[8, 1], ids=["distinct", "ties"])
def scored(request):
    rng = np.random.default_rng(0)
    outcome = rng.random(500) < 0.2
    return np.round(outcome + rng.standard_normal(500), request.param), outcome


def test_they_agree_with_scikit_learn(scored):
    score, outcome = scored
    assert auroc(score, outcome) == pytest.approx(metrics.roc_auc_score(outcome, score))
    assert average_precision(score, outcome) == pytest.approx(metrics.average_precision_score(outcome, score))
    false, true, _ = metrics.roc_curve(outcome, score, drop_intermediate=False)
    assert fpr_at_95(score, outcome) == pytest.approx(false[true >= 0.95].min())


def test_images_are_flattened(scored):
    score, outcome = (each.reshape(10, 50) for each in scored)
    for measure in (auroc, average_precision, fpr_at_95):
        assert measure(score, outcome) == measure(*scored)


@pytest.mark.parametrize("outcome", [np.zeros(4), np.ones(4)])
@pytest.mark.parametrize("measure", [auroc, average_precision, fpr_at_95])
def test_one_outcome_alone_determines_nothing(measure, outcome):
    assert math.isnan(measure(np.arange(4.0), outcome))
    assert math.isnan(measure(np.zeros(0), np.zeros(0)))
