"""The machinery of exercises, and for every chapter: stubs are told so, and model solutions pass."""

import ast
from pathlib import Path

import numpy as np
import pytest

from medcook import exercises
from medcook.errors import MedcookError
from medcook.exercises import Wrong, check, expect, expect_close
from medcook.notebooks.chapters import Chapter, all_chapters, tags

SOLUTIONS = Path(__file__).parent / "solutions"
PREFIX = "exercise-"


@pytest.fixture
def double(monkeypatch):
    """An exercise `99/double`: write a function that doubles."""
    monkeypatch.setattr(exercises, "_CHECKS", {})

    @exercises.exercise("99/double")
    def check_double(function):
        expect_close(function(np.array([1.0, 2.0])), [2.0, 4.0], "twice, please")
        expect(function(0) == 0, "zero stays zero")


def stub(value):
    raise NotImplementedError


def crash(value):
    raise KeyError("oops")


@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        (None, "write your answer"),
        (..., "write your answer"),
        (stub, "write your code"),
        (lambda value: None, "returns nothing yet"),
        (lambda value: value * 3, "twice, please"),
        (lambda value: 2.0, "has shape ()"),
        (lambda value: value + np.abs(value) if np.ndim(value) else 1, "zero stays zero"),
        (crash, "stopped with KeyError: 'oops'"),
        (5, "stopped with TypeError"),
    ],
)
def test_a_wrong_answer_gets_a_hint_and_no_traceback(double, capsys, answer, hint):
    verdict = check("99/double", answer)
    assert not verdict.solved and hint in verdict.hint
    assert f"99/double: not solved yet: {verdict.hint}" in capsys.readouterr().out


def test_a_right_answer_is_solved(double, capsys):
    assert check("99/double", lambda value: value * 2).solved
    assert "99/double: solved" in capsys.readouterr().out


def test_an_unknown_exercise_is_an_error(double):
    with pytest.raises(MedcookError, match="no exercise '99/dubble'"):
        check("99/dubble", None)


def test_tensors_are_compared_too():
    torch = pytest.importorskip("torch")
    expect_close(torch.tensor([1.0]), [1.0], "")
    with pytest.raises(Wrong, match="no"):
        expect_close(torch.tensor([1.0]), [2.0], "no")


def graded(chapter: Chapter, solutions: Path | None) -> dict[str, exercises.Verdict]:
    """Verdicts of a chapter's exercises, each run with the notebook's imports alone, as stub or with its solution."""
    cells = [cell for cell in chapter.read().cells if cell.cell_type == "code"]
    found = {}
    for cell, following in zip(cells, cells[1:], strict=False):
        if "exercise" not in tags(cell):
            continue
        name = next(tag.removeprefix(PREFIX) for tag in tags(cell) if tag.startswith(PREFIX))
        source = (solutions / f"{name}.py").read_text(encoding="utf-8") if solutions else cell.source
        verdicts: list[exercises.Verdict] = []
        space = imports(cells) | {"check": lambda *given, into=verdicts: into.append(check(*given))}
        exec(compile(source, name, "exec"), space)
        exec(compile(following.source, f"check of {name}", "exec"), space)
        found[name] = verdicts[0]
    return found


def imports(cells) -> dict:
    """What the notebook's import statements bring."""
    space: dict = {}
    for cell in cells:
        try:
            body = ast.parse(cell.source).body
        except SyntaxError:
            continue  # a cell with a magic line
        wanted = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
        exec(compile(ast.Module(wanted, []), "imports", "exec"), space)
    return space


@pytest.mark.parametrize("chapter", all_chapters(), ids=lambda chapter: chapter.name)
class TestChapters:
    def test_stubs_are_told_not_solved_yet(self, chapter):
        verdicts = graded(chapter, None)
        assert len(verdicts) >= 3
        assert [name for name, verdict in verdicts.items() if verdict.solved] == []
        assert all("stopped with" not in verdict.hint for verdict in verdicts.values()), verdicts

    def test_solutions_pass(self, chapter):
        verdicts = graded(chapter, SOLUTIONS / chapter.name)
        assert {name: verdict.hint for name, verdict in verdicts.items() if not verdict.solved} == {}

    def test_every_check_is_asked_for_and_has_a_solution(self, chapter):
        asked = {verdict.name for verdict in graded(chapter, None).values()}
        assert asked == set(exercises.exercise_names(chapter.number))
        assert {path.stem for path in (SOLUTIONS / chapter.name).glob("*.py")} == set(graded(chapter, None))


def test_an_injected_solution_replaces_the_stub(write_chapter, double, tmp_path):
    cells = [("def double(value):\n    raise NotImplementedError", "exercise", "exercise-double")]
    chapter = write_chapter("import numpy as np", *cells, "check('99/double', double)")
    assert not graded(chapter, None)["double"].solved
    (tmp_path / "double.py").write_text("def double(value):\n    return np.multiply(value, 2)\n")
    assert graded(chapter, tmp_path)["double"].solved
