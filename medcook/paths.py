"""Where things are: the checkout, the cache and an optional local mirror."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MANIFESTS = ROOT / "data_manifests"
NOTEBOOKS = ROOT / "notebooks"
PAPERS = ROOT / "papers"
EVIDENCE = PAPERS / "evidence"


def cache_dir() -> Path:
    """Folder for downloads and finished runs: `MEDCOOK_CACHE`, else `XDG_CACHE_HOME`/medcook, else ~/.cache/medcook."""
    if chosen := os.environ.get("MEDCOOK_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).expanduser() / "medcook"


def mirror_dir() -> Path | None:
    """Local copy of the open data sets (`MEDCOOK_MIRROR`), read before any download; None when not set."""
    chosen = os.environ.get("MEDCOOK_MIRROR")
    return Path(chosen).expanduser() if chosen else None
