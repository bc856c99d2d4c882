"""The choice of precision is timed once and remembered."""

import pytest
import torch

from medcook import precision
from medcook.errors import MedcookError


@pytest.mark.parametrize(("bfloat16", "chosen"), [(0.10, "bfloat16"), (0.19, "float32"), (0.40, "float32")])
def test_bfloat16_only_where_it_is_clearly_faster(monkeypatch, tmp_path, bfloat16, chosen):
    monkeypatch.setenv("MEDCOOK_CACHE", str(tmp_path))
    calls = []
    monkeypatch.setattr(
        precision, "time_step", lambda dtype: calls.append(dtype) or (0.2 if dtype == torch.float32 else bfloat16)
    )
    assert precision.resolve_precision("auto") == chosen
    assert precision.resolve_precision("auto") == chosen
    assert len(calls) == 2, "the second answer comes from the first timing"


def test_a_wish_is_not_timed(monkeypatch):
    monkeypatch.setattr(precision, "time_step", None)
    assert precision.resolve_precision("float32") == "float32"


def test_an_unknown_precision_is_refused():
    with pytest.raises(MedcookError, match="'float16'.*auto, float32 or bfloat16"):
        precision.resolve_precision("float16")


def test_a_training_step_can_be_timed():
    assert precision.time_step(torch.float32, repeats=1) > 0


def test_a_trained_network_predicts_in_the_precision_of_its_training():
    for name, wanted in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        with precision.autocast({"precision": name}):
            assert torch.nn.Linear(2, 2)(torch.zeros(1, 2)).dtype == wanted
