"""HDF5 that a user brings, read in a child process with limits: a malformed file cannot take the program down.

`python -m medcook.data.safe FILE OUT.npz MEGABYTES SECONDS KEY...` is that child.
"""

import contextlib
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from medcook.errors import MedcookError
from medcook.paths import ROOT

MEGABYTES = 4096
SECONDS = 60


def read_hdf5_safely(
    path: Path, keys: tuple[str, ...], megabytes: int = MEGABYTES, seconds: int = SECONDS
) -> dict[str, np.ndarray]:
    """The named arrays of an untrusted HDF5 file; MedcookError when reading fails, crashes or takes too much."""
    with tempfile.TemporaryDirectory(prefix="medcook-") as folder:
        out = Path(folder) / "arrays.npz"
        command = [
            sys.executable,
            "-m",
            "medcook.data.safe",
            str(path.absolute()),
            str(out),
            str(megabytes),
            str(seconds),
        ]
        try:
            child = subprocess.run([*command, *keys], cwd=ROOT, capture_output=True, text=True, timeout=2 * seconds)
        except subprocess.TimeoutExpired as error:
            raise unreadable(path, f"reading it took over {2 * seconds} seconds") from error
        if child.returncode != 0 or not out.exists():
            raise unreadable(path, reason_of(child))
        with np.load(out, allow_pickle=False) as stored:
            return {key: stored[key] for key in keys}


def unreadable(path: Path, reason: str) -> MedcookError:
    return MedcookError(f"{path}: not a readable HDF5 file ({reason}).", "Write it again, or convert it to NIfTI.")


def reason_of(child: subprocess.CompletedProcess) -> str:
    """Why the child failed: its last word, or the signal that ended it."""
    if child.returncode < 0:
        return f"reading it ended with signal {-child.returncode}: damaged, or too large for {MEGABYTES} MB"
    lines = child.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit status {child.returncode}"


def limit(megabytes: int, seconds: int) -> None:
    """Bound this process's memory and processor time, where the system can."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))


def child_main(path: str, out: str, megabytes: str, seconds: str, *keys: str) -> int:
    """Read the arrays and write them to `out`; the reason of a failure is the last line on stderr."""
    from medcook.data.readers.hdf5 import read_hdf5

    limit(int(megabytes), int(seconds))
    try:
        arrays = read_hdf5(Path(path), keys)
        if any(array.dtype.hasobject for array in arrays.values()):
            raise ValueError("it holds objects, not numbers")
        np.savez(out, **arrays)
    except MedcookError as error:
        print(error.__cause__ or error, file=sys.stderr)
        return 1
    except (MemoryError, ValueError, OSError, TypeError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(child_main(*sys.argv[1:]))
