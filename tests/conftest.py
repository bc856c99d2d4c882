"""Fixtures for every test: a cache of their own, one thread, and the mirror where there is one."""

import hashlib
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


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What a test draws without a seed of its own is the same every time."""
    import numpy as np
    import torch

    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture
def mirror() -> Path:
    """The local mirror of the open data; tests that need it are skipped where MEDCOOK_MIRROR is not set."""
    if not os.environ.get("MEDCOOK_MIRROR"):
        pytest.skip("needs MEDCOOK_MIRROR")
    return Path(os.environ["MEDCOOK_MIRROR"])


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A machine without mirror, with an empty cache and registries of its own: the registries' folder."""
    from medcook.data import fetch, registry

    monkeypatch.setenv("MEDCOOK_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MEDCOOK_MIRROR", raising=False)
    monkeypatch.setattr(registry, "MANIFESTS", tmp_path / "manifests")
    monkeypatch.setattr(fetch, "ATTEMPTS", 1)
    folder = tmp_path / "manifests" / "registries"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def register(place):
    """register(name, {path: (content, urls)}): write a registry."""
    from medcook.data.registry import load_registry

    def write(name: str, files: dict[str, tuple[bytes, str]]) -> None:
        lines = ["path,sha256,bytes,url"]
        for path, (content, urls) in files.items():
            lines.append(f"{path},{hashlib.sha256(content).hexdigest()},{len(content)},{urls}")
        (place / f"{name}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        load_registry.cache_clear()

    return write
