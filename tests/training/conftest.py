"""What every test of the loop starts from."""

import pytest
from tiny import BEHAVIOUR, BUDGET, METHOD, TASK

from medcook import training
from medcook.training import Fitted, fit


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Each test has a run cache of its own; fingerprints have their own tests."""
    monkeypatch.setenv("MEDCOOK_CACHE", str(tmp_path))
    monkeypatch.setattr(training, "behaviour", lambda method: BEHAVIOUR)
    monkeypatch.setattr(training, "SHORT_RUN", 0)


@pytest.fixture(scope="module")
def reference() -> Fitted:
    """The run that nobody disturbed."""
    return fit(METHOD, TASK, BUDGET, cache=False, progress=False)
