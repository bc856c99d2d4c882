"""A few hundred damaged files, the same every time; `make fuzz` reads ten thousand in processes with bounds."""

import subprocess
import sys
import time

import pytest
from fuzz import damaged_files as files

from medcook.errors import MedcookError


@pytest.mark.parametrize("kind", files.KINDS)
def test_damaged_files_are_read_or_refused_in_one_clear_sentence(kind, tmp_path):
    found = [files.read(kind, number, tmp_path) for number in range(4 if kind == "hdf5" else 60)]
    assert set(found) <= {"read", "refused"}, found
    assert "refused" in found


def test_a_file_is_the_same_every_time(tmp_path):
    (tmp_path / "one").mkdir()
    again = files.file("nifti", 3, tmp_path / "one").read_bytes()
    assert files.file("nifti", 3, tmp_path).read_bytes() == again
    assert files.file("nifti", 4, tmp_path).read_bytes() != again


@pytest.mark.parametrize(
    ("reader", "said"),
    [
        (lambda path: {}["x"], "KeyError"),
        (lambda path: time.sleep(3), "TimeoutError"),
        (lambda path: (_ for _ in ()).throw(MedcookError("Something is wrong.")), "unclear"),
    ],
)
def test_other_endings_are_findings(reader, said, tmp_path, monkeypatch):
    monkeypatch.setitem(files.KINDS, "png", (*files.KINDS["png"][:2], reader))
    monkeypatch.setattr(files, "SECONDS", 1)
    assert files.read("png", 0, tmp_path).startswith(said)


def test_a_child_that_crashes_is_named_and_the_next_one_goes_on(monkeypatch):
    def run(command, **options):
        first, last = map(int, command[-2:])
        if first == 0:
            return subprocess.CompletedProcess(command, -11, '[0, "read"]\n', "Segmentation fault")
        lines = "".join(f'[{number}, "refused"]\n' for number in range(first, last))
        return subprocess.CompletedProcess(command, 0, lines, "")

    monkeypatch.setattr(subprocess, "run", run)
    tally, failures = files.fuzz({"png": 5})
    assert tally == {("png", "read"): 1, ("png", "failed"): 1, ("png", "refused"): 3}
    assert failures == ["png 1: the process ended with -11: Segmentation fault"]


def test_the_command_ends_with_an_error_where_something_fails(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["damaged_files.py", "--files", "80"])
    monkeypatch.setattr(files, "outcomes", lambda kind, count: iter([(0, "read"), (1, "IndexError: x")]))
    assert files.main() == 1
    assert "png 1: IndexError: x" in capsys.readouterr().out
    assert sum(files.shares(10_000).values()) == 10_000
