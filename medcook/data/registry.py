"""Registries: the files of a data set, each with its checksum, size and addresses."""

import csv
import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from medcook.errors import MedcookError
from medcook.paths import MANIFESTS


@dataclass(frozen=True)
class Entry:
    """One file: `path` below the data set's folder, to be had from any of `urls`; `bytes` is None where unknown."""

    path: str
    checksum: str
    bytes: int | None
    urls: tuple[str, ...]
    algorithm: str = "sha256"


@lru_cache
def load_registry(path: Path) -> dict[str, Entry]:
    """{path: Entry} of one registry file: CSV with path, sha256, bytes and url (several urls with spaces or |)."""
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            rows = list(csv.DictReader(lines))
        entries = [
            Entry(r["path"], r["sha256"], int(r["bytes"]), tuple(r["url"].replace("|", " ").split())) for r in rows
        ]
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise MedcookError(
            f"{path}: not a readable registry ({error}).", "It needs path, sha256, bytes, url."
        ) from error
    return {entry.path: entry for entry in entries}


def registry_of(name: str) -> dict[str, Entry]:
    """The registry called `name`, which is also the name of the set's folder in a mirror; empty where there is none."""
    path = MANIFESTS / "registries" / f"{name}.csv"
    return load_registry(path) if path.exists() else {}


def content_hash(entries: dict[str, Entry]) -> str:
    """SHA-256 over all paths and checksums: the same for the same files, whatever their order and address."""
    lines = sorted(f"{entry.path} {entry.checksum}" for entry in entries.values())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
