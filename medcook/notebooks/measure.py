"""Peak memory of a process tree."""

import threading
from contextlib import suppress

import psutil

MIB = 2**20


class PeakMemory:
    """Sample the memory of all new child processes while a block runs; `.peak_mb` afterwards, in MiB.

    Shared pages are counted once (proportional set size) where the system tells, as Linux does; elsewhere the
    resident sizes are added up.
    """

    def __init__(self, interval_s: float = 0.2):
        self.peak_mb = 0.0
        self._interval = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._parent = psutil.Process()
        self._before = {child.pid for child in self._parent.children(recursive=True)}
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self._interval):
            children = [c for c in self._parent.children(recursive=True) if c.pid not in self._before]
            self.peak_mb = max(self.peak_mb, sum(_bytes(child) for child in children) / MIB)


def _bytes(process: psutil.Process) -> int:
    with suppress(psutil.Error):
        memory = process.memory_full_info()
        return getattr(memory, "pss", memory.rss)
    with suppress(psutil.Error):
        return process.memory_info().rss
    return 0
