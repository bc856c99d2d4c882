"""`medcook papers new`: what it writes passes the linter and imports, fails until written, and counts for nothing."""

import importlib.util
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from medcook import cli, paths, stubs
from medcook.errors import MedcookError
from medcook.methods import Moment
from medcook.papers import Facts, Row, find_row, load_ledger, status

NEW = Row(
    id="new-cells",
    title="New Cells: what nobody has cooked yet",
    kind="method",
    chapter="17_instances",
    idea="Cells are told apart.",
    claim="Above what came before.",
)
"""A paper that has no recipe, whatever becomes of those of the ledger."""


@pytest.fixture
def begun(tmp_path):
    """(recipe's path, test's path) of stubs in an empty tree."""
    return stubs.write_stubs(NEW, tmp_path)


def loaded(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[path.stem]
    return module


def test_they_lie_where_recipe_and_test_belong(begun, tmp_path):
    names = [str(path.relative_to(tmp_path)) for path in begun]
    assert names == ["medcook/recipes/instances/new_cells.py", "tests/recipes/instances/test_new_cells.py"]
    assert (tmp_path / "medcook/recipes/instances/__init__.py").exists()


def test_the_stubs_of_every_paper_pass_the_linter(tmp_path):
    for row in load_ledger():
        for name, text in stubs.stubs(row).items():
            path = tmp_path / row.id / name
            path.parent.mkdir(parents=True)
            path.write_text(text, encoding="utf-8")
    for command in ("check", "format --check"):
        settings = ["--config", str(paths.ROOT / "pyproject.toml"), "--no-cache"]
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command.split(), *settings, tmp_path], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout


def test_the_recipe_imports_and_says_what_is_missing(begun):
    module = loaded(begun[0])
    recipe = module.recipe
    assert recipe.paper == "new-cells" and recipe.arms.keys() >= {*recipe.compare, *recipe.ablation}
    nets = torch.nn.ModuleDict()
    with pytest.raises(MedcookError, match="new-cells is not written yet. Write its training step"):
        recipe.arms["method"].method.training_step(nets, None, None, Moment(0, 1))


@pytest.mark.parametrize("kind", ["method", "study", "foundation-model"])
def test_a_stub_counts_for_nothing(tmp_path, kind):
    row = NEW.model_copy(update={"kind": kind})
    recipe = loaded(stubs.write_stubs(row, tmp_path)[0]).recipe
    assert status(row, Facts(recipe)) == status(row, Facts()) == "missing"


def test_the_test_fails_until_it_is_written(begun):
    with pytest.raises(pytest.fail.Exception, match="new-cells is not tested yet"):
        loaded(begun[1]).test_what_carries_the_claim()


def test_nothing_is_overwritten(begun, tmp_path):
    begun[0].unlink()
    begun[1].write_text("mine")
    with pytest.raises(MedcookError, match="new-cells has been begun"):
        stubs.write_stubs(NEW, tmp_path)
    assert begun[1].read_text() == "mine" and not begun[0].exists()


def test_a_paper_with_a_recipe_is_not_begun_again(tmp_path):
    with pytest.raises(MedcookError, match="bcp has been begun"):
        stubs.write_stubs(find_row("bcp"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_data_set_needs_another_beginning(tmp_path):
    row = next(row for row in load_ledger() if row.kind == "dataset")
    with pytest.raises(MedcookError, match="needs a manifest"):
        stubs.write_stubs(row, tmp_path)


@pytest.mark.parametrize(("paper", "name"), [("bi-level-x", "BiLevelX"), ("3d-sam", "N3dSam"), ("a.b", "AB")])
def test_class_names_are_names(paper, name):
    assert stubs.class_name(paper) == name and name.isidentifier()


def run(*arguments: str):
    return CliRunner().invoke(cli.app, list(arguments), env={"NO_COLOR": "1", "TERM": "dumb"})


def test_the_command_writes_and_says_what_comes_next(monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setattr(stubs.write_stubs, "__defaults__", (tmp_path,))
    monkeypatch.setattr("medcook.cli.papers.find_row", {NEW.id: NEW}.get)
    result = run("papers", "new", "new-cells")
    assert result.exit_code == 0
    assert "written: medcook/recipes/instances/new_cells.py" in result.output
    assert "medcook reproduce new-cells --profile full" in result.output
    assert "evidence with an ablation" in result.output
    again = run("papers", "new", "new-cells")
    assert again.exit_code == 1 and "new-cells has been begun" in again.stderr


def test_an_unknown_paper_gets_one_sentence_with_the_nearest_ones():
    result = run("papers", "new", "bpc")
    assert result.exit_code == 1
    assert result.stderr == "medcook: There is no paper 'bpc'. Did you mean bcp?\n"
