"""The page of a paper: with evidence, without, and without a recipe."""

import pytest

from medcook.book.papers import SHOWN_LINES, Page, split_source
from medcook.evidence import load_summary
from medcook.papers import find_row
from medcook.recipes import find_recipe

SOURCE = '''"""Idea."""

import x


@dataclass
class A:
    """Shown."""


def b():
{long}


def c():
    """Too late."""


PAPER = 1

recipe = Recipe(
    paper="p",
)
'''


def test_a_recipe_is_shown_from_the_top_until_it_gets_long():
    long = "\n".join(["    pass"] * SHOWN_LINES)
    docstring, shown, rest, declared = split_source(SOURCE.replace("{long}", long))
    assert docstring == "Idea."
    assert shown == ['@dataclass\nclass A:\n    """Shown."""']
    assert [text.splitlines()[0] for text in rest] == ["def b():", "def c():"]
    assert declared == 'recipe = Recipe(\n    paper="p",\n)'


def test_the_first_definition_is_shown_however_long():
    long = "\n".join(["    pass"] * SHOWN_LINES)
    _, shown, rest, declared = split_source(f"def a():\n{long}\n")
    assert len(shown) == 1 and not rest and declared == ""


@pytest.fixture(scope="module")
def bcp() -> str:
    return Page("bcp", find_row("bcp")).markdown(has_figure=True)


def test_a_page_says_idea_claim_and_shows_the_code_that_runs(bcp):
    assert bcp.startswith("---\norphan: true\n---\n\n# ")
    assert "**Idea.**" in bcp and "**Claim.**" in bcp
    assert "def copy_paste(inside: Tensor, outside: Tensor, box: Tensor)" in bcp
    assert bcp.index("class BCP(") < bcp.index("<details>") < bcp.index("recipe = Recipe(")


def test_a_page_lists_components_and_what_tests_them(bcp):
    for component in find_recipe("bcp").components:
        assert f"<td>{component.name}</td>" in bcp
    line = next(line for line in bcp.splitlines() if "<td>copy-paste</td>" in line)
    assert "mark-implemented" in line and "<td>yes</td>" in line
    absent = next(line for line in bcp.splitlines() if "<td>common semantics</td>" in line)
    assert "mark-absent" in absent and "<td>–</td>" in absent


def test_a_page_shows_evidence_with_interval_and_provenance(bcp):
    assert "![" in bcp and "](bcp.png)" in bcp
    assert "mark-inconclusive-here" in bcp and "smallest effect" in bcp
    assert "0.8884" in bcp and f"readings of the test set: {load_summary('bcp').test_reads}" in bcp
    assert "`medcook reproduce bcp --profile full`" in bcp


def test_without_a_figure_none_is_shown():
    assert "](bcp.png)" not in Page("bcp", find_row("bcp")).markdown(has_figure=False)


def test_a_paper_without_recipe_says_so():
    new = find_row("bcp").model_copy(update={"id": "new-cells"})
    page = Page(new.id, new).markdown(has_figure=False)
    assert "Not written yet" in page and "medcook papers new new-cells" in page
    assert "## Mechanism" not in page and "## Evidence" not in page
    assert "mark-missing" in page


def test_a_claim_of_the_books_own_has_a_page_too():
    page = Page("leakage").markdown(has_figure=True)
    assert "a claim of the book's own" in page and "**Idea.**" not in page
    assert "mark-supported" in page
