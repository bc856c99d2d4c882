"""Tensors that are kept in a file instead of in memory, which stays flat however many there are."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryFile
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from medcook.errors import MedcookError
from medcook.paths import cache_dir


class Place(NamedTuple):
    """Where a tensor starts, in bytes, and its shape."""

    start: int
    shape: tuple[int, ...]


class Spool:
    """Tensors of one type, one after the other in a file of the cache that has no name and goes with the process.

    Each can be read again. All of them can be mapped as one tensor, of which the operating system holds in memory what
    is used, and forgets it where memory is short.
    """

    def __init__(self):
        with _disk():
            cache_dir().mkdir(parents=True, exist_ok=True)
            self.file = TemporaryFile(dir=cache_dir())  # noqa: SIM115
        self.end, self.rows, self.kind, self.writing = 0, 0, torch.empty(0), Lock()

    def append(self, rows: Tensor) -> Place:
        """Write a tensor (N, ...) at the end; all have the same shape but for N."""
        if self.rows and (rows.shape[1:], rows.dtype) != (self.kind.shape[1:], self.kind.dtype):
            raise ValueError(f"{tuple(rows.shape)} {rows.dtype} after {tuple(self.kind.shape)} {self.kind.dtype}")
        with self.writing, _disk():
            self.file.seek(self.end)
            self.file.write(rows.contiguous().numpy().tobytes())
            self.file.flush()
            place = Place(self.end, tuple(rows.shape))
            self.end, self.rows, self.kind = self.file.tell(), self.rows + len(rows), rows[:0].clone()
        return place

    def read(self, place: Place) -> Tensor:
        """A copy of what was written there."""
        return torch.from_numpy(np.array(np.memmap(self.file, self.kind.numpy().dtype, "r", *place)))

    def mapped(self) -> Tensor:
        """All rows (sum of N, ...); what is changed in them is changed in memory alone."""
        shape = (self.rows, *self.kind.shape[1:])
        return torch.from_numpy(np.memmap(self.file, self.kind.numpy().dtype, "c", shape=shape))


@contextmanager
def _disk() -> Iterator[None]:
    """A disk that is full or cannot be written becomes one clear sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            problem, hint = "The disk is full", "Free some space, and run the same command again."
        else:
            problem, hint = error.strerror or str(error), "Set MEDCOOK_CACHE to a folder you can write."
        raise MedcookError(f"{cache_dir()}: cannot keep prepared images: {problem}.", hint) from error
