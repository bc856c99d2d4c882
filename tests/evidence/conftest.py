"""Evidence in a temporary folder."""

import time
from types import SimpleNamespace

import pytest
from toy import ToyFitted

from medcook import fingerprints, paths, training
from medcook.errors import Paused


@pytest.fixture(autouse=True)
def world(tmp_path, monkeypatch):
    """Evidence in a temporary folder, training counted and faked, behaviour by settings."""
    fitted = []

    def fit(method, task, budget, seed, progress=True, deadline=None, devices=1):
        if deadline is not None and deadline <= time.monotonic():
            raise Paused(2, budget.steps)
        fitted.append((method, seed))
        extra = {"selected": {}} if task.evaluation == "test" else {}
        return ToyFitted(method, seed, weights={"last": {}} | extra)

    monkeypatch.setattr(paths, "EVIDENCE", tmp_path)
    monkeypatch.setattr(training, "fit", fit)
    monkeypatch.setattr(fingerprints, "behaviour", lambda method: {"loss": float(method.loses)})
    return SimpleNamespace(fitted=fitted, folder=tmp_path / "toy-paper", monkeypatch=monkeypatch)
