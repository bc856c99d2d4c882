"""The strict runner: what it refuses, what it measures, what a failure leaves, and when it does not run at all."""

import json
import sys
from pathlib import Path

import nbformat
import pytest

from medcook.errors import MedcookError
from medcook.notebooks import runner
from medcook.notebooks.parameters import accept, declared, parse

PLOT = "import matplotlib.pyplot as plt\nplt.plot([0, 1]);"


@pytest.fixture
def hostile_user(tmp_path, monkeypatch):
    """A user-wide `python3` kernel that cannot start, and a start-up file that breaks every kernel."""
    kernel = tmp_path / "share" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    spec = {"argv": ["no-such-program", "{connection_file}"], "display_name": "Python 3", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    startup = tmp_path / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "00.py").write_text("SEED = 'from the start-up file'\nraise SystemExit\n")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "share"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))


def test_a_chapter_runs_in_this_interpreter_whatever_the_user_installed(write_chapter, hostile_user):
    chapter = write_chapter(
        "import sys, os, medcook\nload = bytearray(300 * 2**20)\nimport time; time.sleep(0.6)",
        "print(PROFILE, SEED, sys.executable, len(os.listdir()))",
        PLOT,
    )
    cooked = runner.cook(chapter, "quick", {"SEED": 3}, progress=False)
    assert cooked.error is None and not cooked.cached
    printed = nbformat.read(cooked.notebook, as_version=4).cells[4].outputs[0].text.split()
    assert printed[:3] == ["quick", "3", sys.executable]
    assert 300 < cooked.peak_mb < 900, "the kernel's memory, and not more than the kernel's"
    assert [Path(path).name for path in cooked.figures] == ["cell05_1.png"]
    assert Path(cooked.figures[0]).read_bytes().startswith(b"\x89PNG")


def test_a_failed_notebook_names_the_cell_and_leaves_its_executed_copy(write_chapter):
    chapter = write_chapter("print('before')", "1 / 0", "print('after')")
    cooked = runner.cook(chapter, "quick", progress=False)
    assert "01_tiny: cell 4 failed with ZeroDivisionError: division by zero." in cooked.error
    assert str(cooked.notebook) in cooked.error
    text = cooked.notebook.read_text()
    assert "before" in text and "Traceback" in text
    assert not list(cooked.notebook.parent.glob("*.partial*"))


def test_a_dead_kernel_names_the_cell(write_chapter):
    chapter = write_chapter("import os", "os._exit(9)", "print('after')")
    cooked = runner.cook(chapter, "quick", progress=False)
    assert "the kernel died in cell 4" in cooked.error


@pytest.fixture
def runs(monkeypatch) -> list[dict]:
    """Parameters of every execution; instead of a kernel, the source is copied."""
    seen = []

    def pretend(source, target, profile, parameters, name, *, progress):
        seen.append(parameters)
        nbformat.write(source, target)

    monkeypatch.setattr(runner, "run_notebook", pretend)
    return seen


def test_an_unchanged_chapter_is_not_executed_again(write_chapter, runs):
    chapter = write_chapter("x = 1")
    assert [runner.cook(chapter, "quick").cached for _ in range(2)] == [False, True]
    assert len(runs) == 1
    assert not runner.cook(chapter, "quick", force=True).cached


@pytest.mark.parametrize("change", ["source", "profile", "parameter", "evidence", "manifest", "package", "version"])
def test_a_changed_input_executes_again(write_chapter, runs, tmp_path, monkeypatch, change):
    root = tmp_path / "root"
    files = {"package": root / "medcook" / "a.py", "manifest": root / "m" / "a.yaml", "evidence": root / "p" / "s.json"}
    for path in files.values():
        path.parent.mkdir(parents=True)
        path.write_text("before")
    for name, folder in {"ROOT": root, "MANIFESTS": root / "m", "PAPERS": root / "p"}.items():
        monkeypatch.setattr(runner.paths, name, folder)
    chapter, profile, parameters = write_chapter("x = 1"), "quick", {}
    runner.cook(chapter, profile, parameters)
    assert runner.cook(chapter, profile, parameters).cached
    if change in files:
        files[change].write_text("after")
    elif change == "source":
        chapter = write_chapter("x = 2")
    elif change == "profile":
        profile = "full"
    elif change == "parameter":
        parameters = {"SEED": 5}
    else:
        monkeypatch.setattr(runner, "distributions", list)
    assert not runner.cook(chapter, profile, parameters).cached
    assert len(runs) == 2


def test_a_changed_file_of_the_users_own_data_executes_again(write_chapter, runs, tmp_path):
    chapter, folder = write_chapter("x = 1"), tmp_path / "own"
    folder.mkdir()
    (folder / "image.png").write_bytes(b"1")
    given = {"SEED": str(folder)}
    runner.cook(chapter, "quick", given)
    assert runner.cook(chapter, "quick", given).cached
    (folder / "image.png").write_bytes(b"22")
    assert not runner.cook(chapter, "quick", given).cached


def test_a_missing_figure_executes_again(write_chapter, runs):
    chapter = write_chapter("x = 1")
    runner.cook(chapter, "quick").notebook.unlink()
    assert not runner.cook(chapter, "quick").cached


def test_own_parameters_leave_the_plain_run_alone(write_chapter, runs):
    chapter = write_chapter("x = 1")
    plain = runner.cook(chapter, "quick")
    assert runner.cook(chapter, "quick", {"SEED": 5}).notebook != plain.notebook
    assert runner.cook(chapter, "quick").cached


def test_a_failure_leaves_the_earlier_good_run(write_chapter, runs, monkeypatch):
    good = runner.cook(write_chapter("x = 1"), "quick").notebook
    kept = good.read_bytes()

    def fail(source, target, *_, **__):
        nbformat.write(source, target)
        return "it failed."

    monkeypatch.setattr(runner, "run_notebook", fail)
    failed = runner.cook(write_chapter("x = 2"), "quick")
    assert failed.notebook.name == "01_tiny.failed.ipynb" and failed.notebook.exists()
    assert good.read_bytes() == kept


def test_an_unknown_parameter_is_refused_before_anything_runs(write_chapter, runs):
    with pytest.raises(MedcookError, match="01_tiny.py has no parameter 'SED'. It has PROFILE, SEED."):
        runner.cook(write_chapter("x = 1"), "quick", {"SED": 1})
    assert runs == []


@pytest.mark.parametrize("line", ["SEED = max(1, 2)", "import os", "SEED += 1", "A = B = 1", "print(1)", "SEED ="])
def test_a_parameters_cell_with_more_than_literals_is_refused(write_chapter, header, line):
    chapter = write_chapter(header=header.replace("SEED = 0", line))
    with pytest.raises(MedcookError, match="NAME = literal"):
        declared(chapter.read(), "01_tiny.py")


def test_a_notebook_without_parameters_cell_is_refused(write_chapter, header):
    chapter = write_chapter("x = 1", header=header.replace('"parameters"', '"other"'))
    with pytest.raises(MedcookError, match="has 0 cells tagged"):
        accept(chapter.read(), "01_tiny.py", {})


def test_parameters_from_the_command_line():
    assert parse(["SEED=1", "NAME=abc", "TEXT=a=b", "LIST=[1, 2]"]) == {
        "SEED": 1,
        "NAME": "abc",
        "TEXT": "a=b",
        "LIST": [1, 2],
    }
    with pytest.raises(MedcookError, match="'SEED' is not a parameter"):
        parse(["SEED"])
