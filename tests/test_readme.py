"""The README says what the evidence says."""

import pytest

from medcook import readme
from medcook.errors import MedcookError


def test_the_readme_is_what_its_tables_make():
    text = readme.README.read_text(encoding="utf-8")
    assert readme.filled(text) == text, "run: medcook readme"


def test_tables_replace_what_stood_between_the_marks():
    text = "<!-- chapters: x -->\nwhat stood there\n<!-- /chapters -->\n<!-- results: y -->\n<!-- /results -->"
    made = readme.filled(text)
    assert "what stood there" not in made and readme.chapters_table() in made and readme.results_table() in made


def test_a_missing_mark_is_named():
    with pytest.raises(MedcookError, match="results"):
        readme.filled("<!-- chapters: x -->\n<!-- /chapters -->")
