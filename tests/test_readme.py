"""The README says what the evidence says."""

from types import SimpleNamespace

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


@pytest.mark.parametrize(
    ("line", "home"),
    [
        ('repository-code: "https://github.com/someone/medcook.git"', "someone/medcook"),
        ('repository-code: "https://github.com/someone/medcook"', "someone/medcook"),
        ('repository-code: "https://example.org/medcook"', None),
        ("version: 0.1.0", None),
    ],
)
def test_chapters_have_badges_where_the_repository_has_an_address(tmp_path, monkeypatch, line, home):
    citation = tmp_path / "CITATION.cff"
    citation.write_text(f"title: medcook\n{line}\n")
    monkeypatch.setattr(readme, "CITATION", citation)
    assert readme.repository() == home
    head, rule, *lines = readme.chapters_table().splitlines()
    chapters = [text for text in lines if text.startswith("|")]
    assert {text.count("|") for text in [head, rule, *chapters]} == {5 if home else 4}
    for chapter in chapters:
        name = chapter.split("(notebooks/")[1].split(")")[0]
        binder = f"(https://mybinder.org/v2/gh/{home}/HEAD?labpath=notebooks/{name})"
        colab = f"(https://colab.research.google.com/github/{home}/blob/HEAD/notebooks/{name})"
        assert (binder in chapter) == (colab in chapter) == bool(home)
    assert (f"git+https://github.com/{home}" in lines[-1]) == bool(home)


def test_states_and_verdicts_are_counted_and_empty_ones_left_out():
    assert readme.counted([{"status": "works"}, {"status": "partial"}, {"status": "works"}]) == "2 work, 1 in part"
    verdicts = ["supported", "inconclusive here", "not supported", "inconclusive here"]
    shown = readme.fared([SimpleNamespace(verdict=verdict) for verdict in verdicts])
    assert shown == "2 inconclusive here, 1 supported, 1 not supported"
