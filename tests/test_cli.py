"""The command line: help, exit statuses, one sentence for what a user can put right."""

import re
import subprocess
import sys

import pytest
from PIL import Image
from typer.testing import CliRunner

from medcook import __version__, cli
from medcook.errors import MedcookError, Paused
from medcook.notebooks import chapters, runner
from medcook.paths import ROOT


def run(*arguments: str):
    return CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


def test_every_command_is_listed_and_has_help():
    text = run("--help").output
    for name in cli.COMMANDS:
        assert re.search(rf"\b{name}\b", text), name
        result = run(name, "--help")
        assert result.exit_code == 0 and len(result.output.splitlines()) > 4, name


def test_version():
    assert run("--version").output.strip() == __version__


@pytest.mark.parametrize("arguments", [["nonsense"], ["cook", "--nonsense"], ["work"]])
def test_wrong_usage_exits_with_2(arguments):
    assert run(*arguments).exit_code == 2


def fail_with(monkeypatch, error: BaseException) -> None:
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(chapters, "find_chapters", fail)


def test_a_problem_is_one_line_and_exits_with_1(monkeypatch):
    fail_with(monkeypatch, MedcookError("a.h5 is truncated.", "Fetch it again."))
    result = run("cook")
    assert result.exit_code == 1
    assert result.stderr == "medcook: a.h5 is truncated. Fetch it again.\n"


def test_a_pause_has_an_exit_status_of_its_own(monkeypatch):
    fail_with(monkeypatch, Paused(7, 12, "arm bcp, replicate 0"))
    result = run("cook")
    assert result.exit_code == 75
    assert result.stderr == "medcook: Paused at step 7 of 12 of arm bcp, replicate 0; the same command goes on.\n"


def test_an_interruption_exits_with_130_and_says_how_to_go_on(monkeypatch):
    fail_with(monkeypatch, KeyboardInterrupt())
    result = run("cook")
    assert result.exit_code == 130
    assert "run the same command to resume" in result.stderr


def test_a_bug_keeps_its_traceback(monkeypatch):
    fail_with(monkeypatch, ZeroDivisionError())
    assert isinstance(run("cook").exception, ZeroDivisionError)


def test_an_unknown_profile_is_refused():
    result = run("cook", "--profile", "huge")
    assert result.exit_code == 1
    assert "Unknown profile 'huge'. Choose one of quick, full, paper." in result.stderr


def test_the_command_starts_without_importing_torch():
    code = "import sys, medcook.cli, medcook.cli.cook; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.fixture
def cooked(monkeypatch, tmp_path):
    """Calls of the runner, which cooks nothing; chapter 02 fails where the seed is 13."""
    calls = []

    def pretend(chapter, profile, parameters, *, force=False):
        calls.append((chapter.name, profile, parameters))
        error = f"{chapter.name}: cell 3 failed with ValueError: no." if parameters.get("SEED") == 13 else None
        return runner.Cooked(chapter.name, tmp_path / f"{chapter.name}.ipynb", ["a.png"], 0.5, 321.0, "k", error=error)

    header = "# ---\n# jupyter:\n#   kernelspec:\n#     name: python3\n#     display_name: Python 3\n# ---\n"
    for name in ("01_first", "02_second"):
        (tmp_path / f"{name}.py").write_text(
            header + '\n# %% tags=["parameters"]\nPROFILE = None\nSEED = 0\nDATA = None\n'
        )
    monkeypatch.setattr(chapters.paths, "NOTEBOOKS", tmp_path)
    monkeypatch.setattr(runner, "cook", pretend)
    return calls


def test_cook_runs_every_chapter_and_prints_what_it_took(cooked):
    result = run("cook", "--profile", "full", "-p", "SEED=2")
    assert result.exit_code == 0
    assert cooked == [("01_first", "full", {"SEED": 2}), ("02_second", "full", {"SEED": 2})]
    assert re.search(r"02_second.*0\.5.*321.*now.*1 in ", result.output)


def test_cook_takes_the_profile_from_the_environment(cooked, monkeypatch):
    monkeypatch.setenv("PROFILE", "full")
    run("cook", "2")
    assert cooked == [("02_second", "full", {})]


def test_a_failed_chapter_is_named_after_the_table(cooked):
    result = run("cook", "-p", "SEED=13")
    assert result.exit_code == 1
    assert len(cooked) == 2, "the other chapters are still run"
    assert "failed" in result.stdout
    assert "01_first: cell 3 failed with ValueError: no. 02_second: cell 3" in result.stderr


def test_an_unknown_parameter_stops_before_anything_runs(cooked):
    result = run("cook", "-p", "SED=1")
    assert result.exit_code == 1 and cooked == []
    assert "01_first.py has no parameter 'SED'. It has PROFILE, SEED, DATA." in result.stderr


def test_own_data_is_inspected_and_handed_on_as_an_absolute_path(cooked, monkeypatch, tmp_path):
    (tmp_path / "own").mkdir()
    for kind in ("images", "labels"):
        (tmp_path / "own" / kind).mkdir()
        Image.new("L", (8, 8), 1).save(tmp_path / "own" / kind / "a.png")
    monkeypatch.chdir(tmp_path)
    assert run("cook", "2", "--data", "own").exit_code == 0
    assert cooked == [("02_second", "quick", {"DATA": str(tmp_path / "own")})]


def test_own_data_with_a_problem_stops_before_anything_runs(cooked, tmp_path):
    result = run("cook", "2", "--data", str(tmp_path / "nowhere"))
    assert result.exit_code == 1 and cooked == []
    assert "nowhere" in result.stderr


def test_work_says_where_the_copy_is(cooked, tmp_path):
    result = run("work", "2", "--into", str(tmp_path / "mine"))
    assert result.exit_code == 0 and (tmp_path / "mine" / "02_second.ipynb").exists()
    again = run("work", "2", "--into", str(tmp_path / "mine"))
    assert again.exit_code == 1 and "--fresh NAME" in again.stderr


def test_check_names_every_breach(cooked):
    result = run("check", "1")
    assert result.exit_code == 1
    assert "01_first.ipynb does not exist" in result.stderr and "exercises, at least 3" in result.stderr
