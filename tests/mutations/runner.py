"""A copy of the package with its tests, and tests run on that copy in processes of their own."""

import compileall
import multiprocessing
import os
import py_compile
import resource
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

SECONDS = 600
"""Of a processor, however busy it is: tests that take more hang, and are stopped."""

PRELOADED = ["numpy", "pandas", "scipy.ndimage", "scipy.stats", "torch", "torch.nn.functional", "pytest"]
PRELOADED += ["monai", "lightning_fabric", "pydantic", "nibabel", "h5py", "yaml", "matplotlib.pyplot"]
"""What every process starts with; nothing of the package, which each finds in the copy."""

COPIED = ("medcook", "tests")
ELSEWHERE = 99


def copy(folder: Path) -> None:
    """The package and its tests as a copy; everything else of the checkout as links."""
    for path in ROOT.iterdir():
        if path.name in COPIED:
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif not path.name.startswith("."):
            (folder / path.name).symlink_to(path)
    checked = py_compile.PycInvalidationMode.CHECKED_HASH  # by content: an error and its repair have the same second
    compileall.compile_dir(folder / "medcook", quiet=1, invalidation_mode=checked)


def run_tests(folder: Path, tests: str, log: Path) -> None:
    """In a process of its own: the tests of a copy, on that copy. Ends the process with pytest's status."""
    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    sys.path.insert(0, str(folder))
    with open(log, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        import pytest

        import medcook

        if not Path(medcook.__file__).is_relative_to(folder):
            os._exit(ELSEWHERE)
        os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", f"tests/{tests}"]))


def status(folder: Path, tests: str, log: Path) -> int:
    """pytest's exit status; below zero where the tests had to be stopped."""
    process = multiprocessing.get_context("forkserver").Process(target=run_tests, args=(folder, tests, log))
    process.start()
    process.join()
    return process.exitcode
