"""HDF5 that a user brings, read in a child process with limits: a malformed file cannot take the program down."""

import math
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from medcook.data import safe_child
from medcook.errors import MedcookError

MEGABYTES = 4096
SECONDS = 60  # of processor time; twice as long by the clock


def read_hdf5_safely(
    path: Path, keys: tuple[str, ...], megabytes: int = MEGABYTES, seconds: float = SECONDS
) -> dict[str, np.ndarray]:
    """The named arrays of an untrusted HDF5 file; MedcookError when reading fails, crashes or takes too much."""
    with tempfile.TemporaryDirectory(prefix="medcook-") as folder:
        out = Path(folder) / "arrays.npz"
        command = [
            sys.executable,
            "-P",
            safe_child.__file__,
            str(path),
            str(out),
            str(megabytes),
            str(math.ceil(seconds)),
            *keys,
        ]
        try:
            child = subprocess.run(command, capture_output=True, text=True, timeout=2 * seconds)
        except subprocess.TimeoutExpired as error:
            raise unreadable(path, f"reading it took over {2 * seconds} seconds") from error
        if child.returncode != 0:
            raise unreadable(path, reason_of(child, megabytes))
        with np.load(out, allow_pickle=False) as stored:
            return {key: stored[key] for key in keys}


def unreadable(path: Path, reason: str) -> MedcookError:
    return MedcookError(f"{path}: not a readable HDF5 file ({reason}).", "Write it again, or convert it to NIfTI.")


def reason_of(child: subprocess.CompletedProcess, megabytes: int) -> str:
    """Why the child failed: its last word, or the signal that ended it."""
    if child.returncode < 0:
        return f"reading it ended with signal {-child.returncode}: damaged, or too large for {megabytes} MB"
    lines = child.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit status {child.returncode}"
