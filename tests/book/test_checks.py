"""The check of the built book finds every kind of break, and nothing else."""

import pytest

from medcook.book.checks import problems

GOOD = """
<link rel="stylesheet" href="_static/a.css?v=1"><link rel="canonical" href="https://x.org/"><script src="a.js"></script>
<h1 id="top">x</h1><a href="#top">a</a><a href="two.html#here">b</a><a href="two.html?chapter=1">c</a>
<a href="https://example.org/nowhere#x">d</a><a href="mailto:a@b.c">e</a><img src="p%20q.png">
<img src="data:image/png;,">
"""


@pytest.fixture
def book(tmp_path):
    (tmp_path / "_static").mkdir()
    for name in ("_static/a.css", "a.js", "p q.png"):
        (tmp_path / name).touch()
    (tmp_path / "index.html").write_text(GOOD)
    (tmp_path / "two.html").write_text('<p id="here"></p>')
    return tmp_path


def test_a_good_book_has_no_problems(book):
    assert problems(book) == []


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        ('<a href="three.html">x</a>', "three.html leads nowhere"),
        ('<a href="two.html#gone">x</a>', "two.html#gone names a place that is not on the page"),
        ('<a href="#gone">x</a>', "#gone names a place that is not on the page"),
        ('<img src="gone.png">', "gone.png leads nowhere"),
        ('<script src="https://cdn.org/x.js"></script>', "https://cdn.org/x.js is loaded from elsewhere"),
        ('<link rel="stylesheet" href="//cdn.org/x.css">', "//cdn.org/x.css is loaded from elsewhere"),
        ('<img src="https://x.org/p.png">', "https://x.org/p.png is loaded from elsewhere"),
    ],
)
def test_a_break_is_found(book, broken, problem):
    (book / "index.html").write_text(GOOD + broken)
    assert problems(book) == [f"index.html: {problem}"]


def test_an_empty_book_is_a_problem(tmp_path):
    assert "holds no pages" in problems(tmp_path)[0]
