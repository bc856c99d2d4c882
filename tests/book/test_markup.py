"""Plain text as Markdown and HTML, and our docstrings as reStructuredText."""

from medcook.book import markup
from medcook.book.api import as_rest


def test_text_is_not_taken_for_markup_but_code_stays_code():
    assert markup.markdown("a*b_c <d> `e_f` [g]") == r"a\*b\_c \<d\> `e_f` \[g\]"
    assert markup.inline("0.9\u00a0[0.8,\n 1]") == "0.9\u00a0[0.8, 1]"
    assert markup.inline("a < b,\n `c<d>`") == "a &lt; b, <code>c&lt;d&gt;</code>"


def test_a_table_has_no_empty_line_and_scrolls_by_itself():
    made = markup.table(["x", "y"], [["1", '<td data-value="2">2</td>']], "here", ["data-filter", ""])
    assert "" not in made.splitlines()
    assert made.startswith('<div class="table-wrapper">')
    assert '<tr><td>1</td><td data-value="2">2</td></tr>' in made
    assert '<table class="docutils" id="here">' in made and "<th data-filter>x</th>" in made


def test_a_mark_is_a_dash_where_there_is_nothing():
    assert markup.mark(None) == "–"
    assert 'class="mark mark-not-supported"' in markup.mark("not supported")


def test_folded_markdown_is_still_markdown():
    """HTML ends at the empty line; what follows is read as Markdown again."""
    assert markup.details("More", "*x*").splitlines() == [
        "<details><summary>More</summary>",
        "",
        "*x*",
        "",
        "</details>",
    ]


def test_prose_flows_and_columns_stay():
    assert markup.prose("One *two*\nthree.\n\n    x = 1") == "One \\*two\\* three.\n\n```text\n    x = 1\n```"


def test_docstrings_in_columns_stay_in_columns():
    text = ["What it does, `x` and *y*.", "", "a     the first", "bb    the second,", "      in two lines"]
    assert as_rest(text) == [
        r"What it does, ``x`` and \*y\*.",
        "",
        "::",
        "",
        "   a     the first",
        "   bb    the second,",
        "         in two lines",
        "",
    ]
