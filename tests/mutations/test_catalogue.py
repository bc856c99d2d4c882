"""The catalogue of deliberate errors cannot rot: each can still be made. `make mutations` makes them."""

import ast

import pytest
from mutations.catalogue import MUTATIONS
from mutations.recipes import RECIPES

from medcook.paths import ROOT

NAMES = [f"{mutation.file} {mutation.old}" for mutation in MUTATIONS]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=NAMES)
def test_its_text_stands_exactly_once_and_its_tests_exist(mutation):
    text = (ROOT / "medcook" / mutation.file).read_text(encoding="utf-8")
    assert text.count(mutation.old) == 1
    changed = text.replace(mutation.old, mutation.new)
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(text))
    assert (ROOT / "tests" / mutation.tests).is_file()


def test_there_are_thirty_and_every_chapter_has_some():
    assert len(set(MUTATIONS)) == len(MUTATIONS) >= 30
    chapters = {recipe.split("/")[0] for recipe in RECIPES}
    assert chapters >= {"data_loading", "sam_adaptation", "semi_supervised", "few_shot", "uncertainty", "fairness"}
    assert "architectures" in chapters
