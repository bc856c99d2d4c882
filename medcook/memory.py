"""What Linux's C library does with memory that is free again: give it back to the system, or keep it at hand."""

import contextlib
import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Parameters of `mallopt`, in its own numbers."""
AT_HAND = 32 << 20
"""Bytes: tensors up to this size come out of memory that the process keeps, twice as much of it at most."""


def give_back() -> None:
    """Return freed memory to the system. Linux's C library keeps it: a notebook that trains twice grew by 300 MB."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def keep_at_hand() -> None:
    """Give back what is free now, then keep what short computations free for the next one.

    By default the C library hands tensors of some MB back at once: a click of the small SAM then waits for 3500 pages
    to be mapped again. It comes to these limits by itself once a tensor of 32 MB was freed.
    """
    give_back()
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(MMAP_THRESHOLD, AT_HAND)
        library.mallopt(TRIM_THRESHOLD, 2 * AT_HAND)
