"""The notebooks of this repository: each pair agrees, keeps the rules, and stays small."""

from pathlib import Path

import pytest

from medcook.notebooks import lint
from medcook.notebooks.chapters import all_chapters, differences
from medcook.notebooks.publishing import LIMIT_BYTES
from medcook.teaching import outdated

pytestmark = pytest.mark.parametrize("chapter", all_chapters(), ids=lambda chapter: chapter.name)


def test_source_keeps_the_rules(chapter):
    assert lint.problems(chapter.read(), chapter.source.name) == []


def test_pair_agrees(chapter):
    assert differences(chapter) == []


def test_checked_cells_have_stored_outputs(chapter):
    committed = chapter.read_pair()
    assert committed is not None, f"{chapter.pair.name} is not committed"
    assert lint.output_problems(committed, chapter.pair.name) == []


def test_tables_are_those_of_the_evidence(chapter):
    """What is published says what the evidence says; else the chapter has to be cooked and published again."""
    assert outdated(chapter.name, chapter.read_pair()) == []


def test_pair_is_small_and_names_no_machine(chapter):
    text = chapter.pair.read_text(encoding="utf-8")
    assert len(text.encode()) <= LIMIT_BYTES
    assert "papermill" not in text and "injected-parameters" not in text
    assert [place for place in ("/home/", "/Users/", f"{Path.home()}/") if place in text] == []
