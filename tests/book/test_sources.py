"""What Sphinx is given: links between pages, the ledger's table, the chapters as they were executed."""

import nbformat
from nbformat.v4 import new_output

from medcook.book import api, sources
from medcook.book.chapters import plain, title, write_chapter
from medcook.book.ledger import ledger_page
from medcook.notebooks.chapters import Chapter, all_chapters

ENTRY = {
    "id": "bcp",
    "chapter": "04_semi_supervised",
    "kind": "method",
    "title": "Copy & paste",
    "status": "works",
    "verdict": "not supported",
    "profile": "full",
    "dataset": "acdc",
    "data": "real",
    "seeds": 3,
    "metric": "equity_scaled_dice",
    "effect": -0.02,
    "interval": [-0.03, -0.01],
}
EMPTY = dict.fromkeys(("verdict", "profile", "dataset", "data", "metric", "effect", "interval"))


def test_links_between_files_become_links_between_pages():
    text = "[a](notebooks/04_x.ipynb) [b](CONTRIBUTING.md) [c](benchmarks/) ![d](notebooks/d.png) [e](https://e.org)"
    wanted = "[a](chapters/04_x.ipynb) [b](contributing.md) [c](benchmarks.md) ![d](notebooks/d.png) [e](https://e.org)"
    assert sources.relinked(text) == wanted


def test_every_claim_of_the_index_leads_to_its_page():
    claim = "Splitting by slice instead of by patient inflates Dice."
    linked = sources._with_claims_linked(f"| {claim} | x |\n| Nobody claims this. | x |")
    assert linked == f"| [{claim}](papers/leakage.md) | x |\n| Nobody claims this. | x |"


def test_the_ledger_has_a_row_for_every_paper_and_claim():
    missing = ENTRY | EMPTY | {"id": "sat", "status": "missing", "seeds": 0, "chapter": "11_language"}
    claim = ENTRY | {"id": "labels", "kind": "own claim", "chapter": "baseline"}
    del claim["status"]
    page = ledger_page([missing, ENTRY], [claim])
    rows = [line for line in page.splitlines() if line.startswith("<tr>")]
    assert len(rows) == 3
    assert 'href="papers/bcp.html">Copy &amp; paste</a>' in rows[0] and "mark-works" in rows[0]
    assert '<td data-value="-0.02">-0.020' in rows[0] and "equity scaled dice" in rows[0]
    assert '<td data-value="">–</td>' in rows[1] and "mark-missing" in rows[1]
    assert "2 papers: 1 work, 0 in part, 1 to come; and 1 claims" in page


def test_outputs_bring_no_colours_of_their_own():
    shown = '<style>pre {color: red}</style>\n<div class="output_html"><pre>x</pre></div>'
    output = new_output("display_data", {"text/html": shown, "text/latex": "x"})
    plain(output)
    assert output.data == {"text/html": '<div class="highlight"><pre>x</pre></div>'}


def test_a_chapter_is_the_committed_notebook_and_how_to_run_it(tmp_path):
    chapter = all_chapters()[0]
    write_chapter(chapter, tmp_path)
    cells, committed = nbformat.read(tmp_path / chapter.pair.name, 4).cells, chapter.read_pair().cells
    assert [cell.source for cell in cells if cell.id != "how-to-run"] == [cell.source for cell in committed]
    assert f"medcook work {chapter.number}" in cells[1].source
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.get("outputs", []))
    assert cells[0].source.startswith(f"# {title(chapter)}")


def test_a_chapter_that_was_never_published_is_shown_without_outputs(tmp_path):
    source = tmp_path / "99_new.py"
    source.write_text(all_chapters()[0].source.read_text(encoding="utf-8"), encoding="utf-8")
    write_chapter(Chapter(source), tmp_path)
    cells = nbformat.read(tmp_path / "99_new.ipynb", 4).cells
    assert len(cells) > 10 and not any(cell.get("outputs") for cell in cells)


def test_the_reference_covers_what_is_public():
    found = api.modules()
    assert found["medcook.metrics"] and found["medcook.data.case"]
    assert not [name for name in found if "._" in name or name.startswith(("medcook.cli", "medcook.book"))]
    assert "medcook.recipes.semi_supervised.bcp" not in found
    assert api.pages(found)["medcook.data"][:2] == ["medcook.data", "medcook.data.archives"]


def test_a_package_has_one_page_with_all_its_modules():
    page = api.page("medcook.data", ["medcook.data", "medcook.data.case"])
    assert page.startswith("# medcook.data\n") and page.count("automodule") == 2
    assert "## medcook.data.case" in page
