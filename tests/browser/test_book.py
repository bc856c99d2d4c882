"""The book in a browser: no page is wider than a phone, the ledger sorts and filters, the search finds."""

from pathlib import Path

import pytest
from browser.conftest import SHOTS

HTML = Path(__file__).parents[2] / "build" / "book" / "html"
PHONE = {"width": 390, "height": 844}
LOOKED_AT = ("index", "ledger", "chapters/04_semi_supervised", "papers/bcp", "papers/sat", "api/medcook.metrics")


@pytest.fixture
def opened(browser):
    """opened(name, width) -> a page of the book; messages of the console and failed requests are in `page.troubles`."""
    if not (HTML / "index.html").exists():
        pytest.skip("needs the book: make book")
    pages = []

    def make(name: str, viewport: dict | None = None):
        page = browser.new_page(viewport=viewport or {"width": 1300, "height": 1000})
        page.troubles = []
        page.on("console", lambda message: page.troubles.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: page.troubles.append(str(error)))
        page.on("requestfailed", lambda request: page.troubles.append(f"not loaded: {request.url}"))
        page.goto((HTML / f"{name}.html").as_uri())
        pages.append(page)
        return page

    yield make
    for page in pages:
        page.close()


def shot(page, name: str) -> None:
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"book-{name.replace('/', '-')}.png")


def test_no_page_is_wider_than_a_phone(opened):
    page, wide = opened("index", PHONE), {}
    for path in sorted(HTML.rglob("*.html")):
        page.goto(path.as_uri(), wait_until="domcontentloaded")
        width = page.evaluate("document.documentElement.scrollWidth")
        if width > PHONE["width"]:
            wide[str(path.relative_to(HTML))] = width
    assert wide == {}


@pytest.mark.parametrize("width", [1024, 1320, 1920])
def test_no_page_is_wider_than_its_window(opened, width):
    page = opened("index", {"width": width, "height": 900})
    for name in LOOKED_AT:
        page.goto((HTML / f"{name}.html").as_uri(), wait_until="domcontentloaded")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name


@pytest.mark.parametrize("name", LOOKED_AT)
def test_a_page_loads_everything_it_needs(opened, name):
    for what, viewport in {"wide": None, "phone": PHONE}.items():
        page = opened(name, viewport)
        page.wait_for_load_state("networkidle")
        shot(page, f"{name}-{what}")
        assert page.troubles == []
        broken = "[...document.images].filter((one) => one.complete && !one.naturalWidth).map((one) => one.src)"
        assert page.evaluate(broken) == []


def shown(page) -> list[str]:
    """Ids of the ledger's rows that are shown, in their order."""
    return page.locator("#ledger tbody tr:not([hidden]) td:nth-child(2) code").all_inner_texts()


def test_the_ledger_filters_by_what_is_chosen_and_typed(opened):
    page = opened("ledger")
    everything = shown(page)
    page.select_option("select[name=verdict]", "supported")
    supported = shown(page)
    assert 0 < len(supported) < len(everything) and set(supported) < set(everything)
    assert set(page.locator("#ledger tbody tr:not([hidden]) td:nth-child(5)").all_inner_texts()) == {"supported"}
    page.select_option("select[name=verdict]", "")
    page.fill("input[type=search]", "copy-paste bidirectional")
    assert shown(page) == ["bcp"]
    assert page.locator(".ledger-count").inner_text() == f"1 of {len(everything)} rows"


def test_the_ledger_sorts_numbers_as_numbers_and_the_empty_last(opened):
    page = opened("ledger")
    column = "[...document.querySelectorAll('#ledger tbody tr')].map((row) => row.cells[5].dataset.value)"
    heading = page.locator("#ledger th").nth(5)
    for sign in (1, -1):
        heading.click()
        values = page.evaluate(column)
        numbers = [float(value) for value in values if value]
        assert numbers == sorted(numbers, reverse=sign < 0) and len(numbers) > 10
        assert all(values[: len(numbers)]) and not any(values[len(numbers) :])


def test_an_address_names_a_filter(opened):
    page = opened("chapters/04_semi_supervised")
    page.get_by_role("link", name="in the ledger").first.click()
    page.wait_for_selector(".ledger-count")
    assert "bcp" in shown(page) and "sat" not in shown(page)


def test_the_search_finds_a_paper_by_its_mechanism(opened):
    page = opened("index")
    page.goto(f"{(HTML / 'search.html').as_uri()}?q=copy_paste")
    page.wait_for_selector("#search-results ul.search li a", timeout=30_000)
    assert page.locator("#search-results a[href*='papers/bcp.html']").count()
