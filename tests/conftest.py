"""Fixtures for every test: a cache of their own, one thread, and the mirror where there is one."""

import os
from pathlib import Path

for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

import pytest  # noqa: E402  (threads are fixed before anything numeric is imported)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory) -> Path:
    """The cache folder of this test session: nothing is read from or left in the user's own."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["MEDCOOK_CACHE"] = str(folder)
    return folder


@pytest.fixture
def mirror() -> Path:
    """The local mirror of the open data; tests that need it are skipped where MEDCOOK_MIRROR is not set."""
    if not os.environ.get("MEDCOOK_MIRROR"):
        pytest.skip("needs MEDCOOK_MIRROR")
    return Path(os.environ["MEDCOOK_MIRROR"])
