"""The child process of `medcook.data.safe`: `python safe_child.py FILE OUT.npz MEGABYTES SECONDS KEY...`.

It imports only what it needs, so that it starts fast. The last line on stderr says why it failed.
"""

import contextlib
import sys

import h5py
import numpy as np


def limit(megabytes: int, seconds: int) -> None:
    """Bound this process's memory and processor time, where the system can."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))


def main(path: str, out: str, megabytes: str, seconds: str, *keys: str) -> int:
    limit(int(megabytes), int(seconds))
    try:
        with h5py.File(path, "r") as stored:
            arrays = {key: stored[key][()] for key in keys}
        if not all(isinstance(array, np.ndarray) and array.dtype.kind in "biuf" for array in arrays.values()):
            raise ValueError("it holds something else than arrays of numbers")
        np.savez(out, **arrays)
    except (OSError, RuntimeError, KeyError, MemoryError, ValueError, TypeError) as error:
        print(" ".join(str(error).split()) or type(error).__name__, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
