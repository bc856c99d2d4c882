"""`python -m tests.mutations [WORD ...]`: does some test notice each deliberate error of the catalogue?

Every error is made in a copy of the package, never in the checkout, and the tests named for it run on that copy. What
they do not notice is a survivor; any makes the exit status 1. Words choose the mutations whose file holds one of them.
"""

import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

from tests.mutations.catalogue import MUTATIONS, Mutation
from tests.mutations.runner import PRELOADED, copy, status


def survives(mutation: Mutation, folder: Path) -> bool:
    """Make the error in the copy, run its tests, take the error back."""
    path = folder / "medcook" / mutation.file
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    found = status(folder, mutation.tests, folder / "log.txt")
    path.write_text(text, encoding="utf-8")
    if found > 1:  # 1: tests failed; above that nothing was tested, which says nothing
        sys.exit(f"{mutation.file}: pytest ended with {found}:\n{(folder / 'log.txt').read_text()[-3000:]}")
    return found == 0


def expect_to_pass(tests: str, folder: Path) -> None:
    """What fails without any error would notice none."""
    if status(folder, tests, folder / "log.txt") != 0:
        sys.exit(f"{tests} must pass without any error:\n{(folder / 'log.txt').read_text()[-3000:]}")


def main(words: list[str]) -> int:
    """Print one line a mutation and the survivors; returns their number."""
    chosen = [one for one in MUTATIONS if not words or any(word in one.file for word in words)]
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    multiprocessing.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        copy(folder)
        passing, survivors = set(), []
        for number, mutation in enumerate(chosen, 1):
            if mutation.tests not in passing:
                expect_to_pass(mutation.tests, folder)
                passing.add(mutation.tests)
            start, alive = time.monotonic(), survives(mutation, folder)
            survivors += [mutation] if alive else []
            word = "SURVIVED" if alive else "noticed"
            print(
                f"{number}/{len(chosen)} {word} {mutation.file}: {mutation.new} ({time.monotonic() - start:.0f} s)",
                flush=True,
            )
    for one in survivors:
        print(f"{one.file}: no test of {one.tests} notices {one.new!r} in place of {one.old!r}")
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} errors were noticed.")
    return len(survivors)


if __name__ == "__main__":
    sys.exit(min(1, main(sys.argv[1:])))
