"""Samples on a case's own grid: the right number, the same again, and their mean where that is the prediction."""

import pytest
import torch
from tiny import BEHAVIOUR, TASK, train

from medcook import training
from medcook.methods import Supervised
from medcook.methods.uncertainty import DeepEnsemble, MCDropout
from medcook.sampling import case_samples, once


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Runs are made anew and need no fingerprint."""
    monkeypatch.setenv("MEDCOOK_CACHE", str(tmp_path))
    monkeypatch.setattr(training, "behaviour", lambda method: BEHAVIOUR)


@pytest.fixture(scope="module")
def case():
    return next(iter(TASK.cases("val")))


def test_samples_of_dropout_depend_on_the_seed_alone(case):
    fitted = train(MCDropout(channels=(4, 8)))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = case_samples(fitted, case, 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert one.shape == (3, fitted.task.classes, *case.spatial) and one.dtype == torch.float32
    assert not torch.equal(one[0], one[1])
    torch.manual_seed(2)
    assert torch.equal(case_samples(fitted, case, 3), one)
    assert not torch.equal(case_samples(fitted, case, 3, seed=1), one)
    assert torch.allclose(one.sum(1), torch.ones(case.spatial), atol=1e-5)


def test_the_mean_of_an_ensembles_samples_is_its_prediction(case):
    fitted = train(DeepEnsemble(channels=(4, 8), members=2))
    assert torch.allclose(case_samples(fitted, case, 2).mean(0), fitted.probabilities(case), atol=1e-5)


def test_a_method_without_samples_gives_its_prediction(case):
    fitted = train(Supervised(channels=(4, 8)))
    assert torch.equal(case_samples(fitted, case, 5), fitted.probabilities(case)[None])


def test_what_is_worked_out_once_is_kept_with_the_run():
    fitted, calls = train(Supervised(channels=(4, 8))), []
    assert [once(fitted, "sum", lambda: calls.append(1) or 7) for _ in range(3)] == [7, 7, 7] and len(calls) == 1
