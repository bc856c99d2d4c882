"""Finished and half-finished training runs on disk, addressed by the content that made them."""

import json
import os
import shutil
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from filelock import FileLock

from medcook.memory import give_back
from medcook.paths import cache_dir


def content_key(**parts) -> str:
    """16 hex digits over everything that determines a run; any change of a part gives another key."""
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run: `run.json`, `weights.pt`, and `checkpoint.pt` while it is under way."""

    key: str

    @property
    def path(self) -> Path:
        return cache_dir() / "runs" / self.key

    def lock(self) -> FileLock:
        """Held while training, so that a second process waits and then reads the result."""
        self.path.mkdir(parents=True, exist_ok=True)
        return FileLock(self.path / "lock")

    def finished(self) -> tuple[dict, dict] | None:
        """(record, weights) of a finished run, or None; a damaged one counts as not finished."""
        try:
            record = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
            return record, load_tensors(self.path / "weights.pt")
        except (OSError, ValueError):
            return None

    def finish(self, record: dict, weights: dict) -> None:
        """Write the weights, then the record that declares the run finished, then drop the checkpoint."""
        save_tensors(weights, self.path / "weights.pt")
        write_atomically(self.path / "run.json", json.dumps(record))
        (self.path / "checkpoint.pt").unlink(missing_ok=True)
        give_back()

    def checkpoint(self) -> dict | None:
        """The state of an interrupted run, or None."""
        try:
            return load_tensors(self.path / "checkpoint.pt")
        except (OSError, ValueError):
            return None

    def save_checkpoint(self, state: dict) -> None:
        save_tensors(state, self.path / "checkpoint.pt")

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def save_tensors(content: dict, path: Path) -> None:
    """Save so that a reader sees the old file or the new one, never half of one."""
    partial = path.with_suffix(f".{os.getpid()}.part")
    torch.save(content, partial)
    partial.replace(path)


def load_tensors(path: Path) -> dict:
    """Tensors and plain values only: nothing in the file is executed. ValueError where the file is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # on damaged bytes the unpickler fails in many ways, IndexError among them
        raise ValueError(f"{path}: not a readable file of tensors") from error


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file in one move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
