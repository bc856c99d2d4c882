"""Every rule of a notebook: a notebook that keeps it, and one that breaks it."""

import nbformat
import pytest

from medcook.notebooks.lint import output_problems, problems

MECHANISM = ("nbval-check-output", "mechanism")
GOOD = [
    *[(f"print({number})", *MECHANISM) for number in range(3)],
    *[(f"print({number})", "nbval-check-output") for number in range(3, 5)],
    *[
        cell
        for name in "abc"
        for cell in ((f"def {name}(): ...", "exercise", f"exercise-{name}"), f"check('01/{name}', {name})")
    ],
]


def found(write_chapter, *cells, **options) -> list[str]:
    return problems(write_chapter(*cells, **options).read(), "01_tiny.py")


def test_a_good_notebook_has_no_problems(write_chapter):
    assert found(write_chapter, *GOOD) == []


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("!ls", "shell or pip"),
        ("%pip install torch", "shell or pip"),
        ("%%bash\nls", "shell or pip"),
        ("import subprocess\nsubprocess.run(['ls'])", "calls subprocess.run"),
        ("import os\nos.system('ls')", "calls os.system"),
        ("path = '/home/someone/data.h5'", "absolute path '/home/someone/data.h5'"),
        ("path = '~/data'", "absolute path"),
        ("path = 'C:\\\\data'", "absolute path"),
        ("path = '../data'", "depends on the working directory"),
        ("from pathlib import Path\nfolder = Path.cwd()", "calls Path.cwd"),
        ("x = (", "not valid Python"),
    ],
)
def test_a_forbidden_line_is_named_with_its_cell(write_chapter, line, complaint):
    (problem,) = found(write_chapter, line, *GOOD)
    assert problem.startswith("01_tiny.py: cell 3 ") and complaint in problem


@pytest.mark.parametrize("line", ["%matplotlib inline", "s = f'{1}/b'", "s = 'a / b'", "s = '/'", "%time x = 1"])
def test_an_innocent_line_is_not_named(write_chapter, line):
    assert found(write_chapter, line, *GOOD) == []


def test_checks_mechanisms_and_exercises_are_counted(write_chapter):
    assert "4 cells tagged nbval-check-output, at least 5" in " ".join(found(write_chapter, *GOOD[:4], *GOOD[5:]))
    assert "2 checked cells tagged mechanism, at least 3" in " ".join(
        found(write_chapter, *GOOD[1:], ("print(0)", "nbval-check-output"))
    )
    assert "2 exercises, at least 3" in " ".join(found(write_chapter, *GOOD[:-2]))


def test_an_exercise_needs_a_name_and_a_check(write_chapter):
    assert "no check follows" in " ".join(found(write_chapter, *GOOD[:-1], "print()"))
    assert "needs one tag exercise-NAME" in " ".join(
        found(write_chapter, *GOOD[:-2], ("x = 1", "exercise"), "check(1)")
    )


def test_the_parameters_cell_comes_first_and_leaves_the_profile_open(write_chapter, header):
    text = header.replace("PROFILE = None", "PROFILE = 'full'")
    assert found(write_chapter, *GOOD, header=text) == ["01_tiny.py: the parameters cell lacks PROFILE = None"]
    text = header.replace('# %% tags=["parameters"]', '# %%\nimport os\n\n# %% tags=["parameters"]')
    assert found(write_chapter, *GOOD, header=text) == ["01_tiny.py: the parameters cell is not the first code cell"]


def test_a_checked_cell_needs_a_stored_text_output(write_chapter):
    notebook = write_chapter(*GOOD).read()
    tagged = [cell for cell in notebook.cells if "nbval-check-output" in cell.metadata.get("tags", [])]
    assert len(output_problems(notebook, "n")) == len(tagged) == 5
    for cell in tagged:
        cell.outputs = [nbformat.v4.new_output("stream", text="1\n")]
    assert output_problems(notebook, "n") == []
    tagged[0].outputs = [nbformat.v4.new_output("stream", name="stderr", text="1\n")]
    tagged[1].outputs = [nbformat.v4.new_output("display_data", {"image/png": "", "text/plain": "<Figure>"})]
    assert len(output_problems(notebook, "n")) == 2


@pytest.mark.parametrize("text", ["frozenset({'b', 'a'})", "{'b', 'a'}\n", "Facts(signs=frozenset({'b', \"it's\"}))"])
def test_a_checked_cell_prints_no_set(write_chapter, text):
    notebook = write_chapter(*GOOD).read()
    tagged = [cell for cell in notebook.cells if "nbval-check-output" in cell.metadata.get("tags", [])]
    for cell in tagged:
        cell.outputs = [nbformat.v4.new_output("stream", text="{'a': 1, 'b': 2} {0, 1} {'a'} ['b', 'a']\n")]
    assert output_problems(notebook, "n") == []
    tagged[0].outputs = [nbformat.v4.new_output("stream", text=text)]
    assert "prints a set" in " ".join(output_problems(notebook, "n"))
    tagged[0].outputs = [nbformat.v4.new_output("execute_result", {"text/plain": text})]
    assert "prints a set" in " ".join(output_problems(notebook, "n"))


def test_a_stored_error_is_named(write_chapter):
    notebook = write_chapter("1 / 0").read()
    notebook.cells[2].outputs = [nbformat.v4.new_output("error", ename="E", evalue="", traceback=[])]
    assert output_problems(notebook, "n") == ["n: cell 3 has a stored error"]


def test_a_table_that_cuts_text_off_is_named(write_chapter):
    notebook = write_chapter("1").read()
    wide = "".join(f"<td>{text}</td>" for text in ("...", "a claim that goes on and ...", "whole"))
    notebook.cells[2].outputs = [nbformat.v4.new_output("display_data", {"text/html": f"<tr>{wide}</tr>"})]
    (problem,) = output_problems(notebook, "n")
    assert problem.startswith("n: cell 3 has a table that cuts off 'a claim that goes on and ': say pd.set_option")
