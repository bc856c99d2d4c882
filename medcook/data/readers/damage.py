"""A damaged file becomes one sentence that names it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medcook.errors import MedcookError

LONGEST = 200


@contextmanager
def readable(path: Path, kind: str, hint: str, quoting: bool = True) -> Iterator[None]:
    """MedcookError(`path`: not a readable `kind`) for whatever a library raises inside: on damage that may be anything.

    quoting  say what it raised; not where it could quote what a file says of a patient
    """
    try:
        yield
    except MedcookError:
        raise
    except Exception as error:
        why = f" ({first(error)})" if quoting else ""
        raise MedcookError(f"{path}: not a readable {kind}{why}.", hint) from error


def first(error: Exception) -> str:
    """An error's text on one line, or its name where it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST else text[:LONGEST] + "..."
