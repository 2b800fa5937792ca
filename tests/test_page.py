"""The page in a real browser: one click, one drop, one key; errors; no host but our own."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import Page, browser
from tests.serving import CAT, DOG, Server, serving, write_bundle

CLEAN, ATTACKED = "#samples .strip:nth-of-type(1) button", "#samples .strip:nth-of-type(2) button"

PLOT_LABEL = "document.querySelector('#plot text:last-of-type').textContent"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    bundle = write_bundle(tmp_path_factory.mktemp("page") / "colours")
    with serving(bundle, tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(chromium: Page, server: Server) -> Page:
    chromium.events.clear()
    chromium.resize(1280, 800)
    chromium.goto(f"{server.url}/")
    chromium.until("document.querySelectorAll('.strip button').length === 2")
    return chromium


def click(page: Page, selector: str) -> None:
    page.evaluate(f"document.querySelector({selector!r}).click()")


def answered(page: Page, title: str) -> None:
    page.until(
        f"document.querySelector('#verdict-title').textContent === {title!r} && "
        "document.querySelector('#answer').getAttribute('aria-busy') === 'false' && "
        "document.querySelector('#verdict').checkVisibility()"
    )


def test_a_clean_sample_is_accepted_in_one_click(page: Page) -> None:
    assert page.visible("#empty")
    click(page, CLEAN)
    answered(page, "Accepted")
    assert page.text("#class-name") == "cat"
    assert page.text("#probability").endswith("%")
    assert page.evaluate("document.querySelectorAll('#top li').length") == 3
    assert "within the threshold of 0.2" in page.text("#score-line")
    assert page.evaluate("document.querySelectorAll('#plot rect').length") == 20
    assert page.evaluate(PLOT_LABEL).startswith("this image")
    radii = page.text("#radii")
    assert "estimate" in radii
    assert "not certified" in radii
    assert "1%" in radii
    assert "4.7%" in radii
    assert "\u00a0/\u00a0255" in radii
    assert page.text("#caption") == "Red all over."
    assert not page.visible("#empty")
    assert page.evaluate("document.querySelector('.strip button').getAttribute('aria-pressed')") == "true"


def test_an_attacked_sample_is_rejected_with_its_reason(page: Page) -> None:
    click(page, ATTACKED)
    answered(page, "Rejected")
    assert "change unusually steeply" in page.text("#verdict-text")
    assert "5% of clean images are rejected too" in page.text("#verdict-text")
    assert "above the threshold" in page.text("#score-line")
    assert "A rejected image carries no radius." in page.text("#radii")


def test_a_file_of_ones_own(page: Page, tmp_path: Path) -> None:
    file = tmp_path / "my dog.png"
    file.write_bytes(DOG)
    page.choose_file("#file", file)
    answered(page, "Accepted")
    assert page.text("#class-name") == "dog"
    assert page.text("#caption") == "my dog.png"
    page.until("document.querySelector('#preview').naturalWidth === 8")


def test_a_dropped_file_under_a_wrong_name_is_judged_by_its_content(page: Page) -> None:
    page.evaluate(
        "(() => { const moved = new DataTransfer();"
        f"const bytes = Uint8Array.from({list(CAT)});"
        "moved.items.add(new File([bytes], 'cat.jpg', {type: 'image/jpeg'}));"
        "window.dispatchEvent(new DragEvent('drop', {dataTransfer: moved, cancelable: true})); })()"
    )
    answered(page, "Accepted")
    assert page.text("#class-name") == "cat"


def test_a_damaged_file_is_explained_and_the_next_one_served(page: Page, tmp_path: Path) -> None:
    file = tmp_path / "cut.png"
    file.write_bytes(CAT[:40])
    page.choose_file("#file", file)
    page.until("document.querySelector('#trouble').checkVisibility()")
    assert "damaged or cut off" in page.text("#trouble-text")
    assert "corrupt_image" in page.text("#trouble-id")
    assert not page.visible("#result")
    click(page, CLEAN)
    answered(page, "Accepted")
    assert not page.visible("#trouble")


def test_on_a_narrow_screen_an_error_comes_into_view(page: Page, tmp_path: Path) -> None:
    page.resize(320, 600)
    file = tmp_path / "notes.txt"
    file.write_bytes(b"no image")
    page.choose_file("#file", file)
    page.until("document.querySelector('#trouble').checkVisibility()")
    page.until("document.querySelector('#trouble').getBoundingClientRect().top < innerHeight")


def test_the_same_file_can_be_chosen_again(page: Page, tmp_path: Path) -> None:
    file = tmp_path / "cut.png"
    file.write_bytes(CAT[:40])
    page.choose_file("#file", file)
    page.until("document.querySelector('#trouble').checkVisibility()")
    click(page, "#file")
    assert page.evaluate("document.querySelector('#file').value") == ""


def test_the_plot_appears_when_the_model_is_known_after_the_answer(
    page: Page, server: Server, tmp_path: Path
) -> None:
    file = tmp_path / "dog.png"
    file.write_bytes(DOG)
    try:
        page.call("Network.setBlockedURLs", urls=["*/model"])
        page.goto(f"{server.url}/")
        page.choose_file("#file", file)
        answered(page, "Accepted")
        assert page.evaluate("document.querySelectorAll('#plot rect').length") == 0
    finally:
        page.call("Network.setBlockedURLs", urls=[])
    page.until("document.querySelectorAll('#plot rect').length === 20")


def test_the_keyboard_is_enough(page: Page) -> None:
    for _ in range(12):
        page.press("Tab", 9)
        if page.evaluate("document.activeElement.matches('.strip button')"):
            break
    assert page.evaluate("document.activeElement.innerText") == "cat"
    page.press("Enter", 13, "\r")
    answered(page, "Accepted")


def test_the_whole_answer_is_there_for_those_who_want_it(page: Page) -> None:
    click(page, CLEAN)
    answered(page, "Accepted")
    answer = json.loads(page.evaluate("document.querySelector('#json').textContent"))
    assert answer["detector"]["name"] == "jacobian"


def test_nothing_comes_from_elsewhere_and_nothing_breaks(page: Page, server: Server) -> None:
    click(page, CLEAN)
    answered(page, "Accepted")
    requested = [e["request"]["url"] for name, e in page.events if name == "Network.requestWillBeSent"]
    assert len(requested) > 5
    assert all(url.startswith((server.url, "blob:", "data:")) for url in requested), requested
    trouble = [e for name, e in page.events if name in {"Runtime.exceptionThrown", "Log.entryAdded"}]
    assert trouble == []


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_every_width_and_both_schemes(page: Page, width: int, dark: bool) -> None:
    page.resize(width, 800, dark=dark)
    click(page, ATTACKED)
    answered(page, "Rejected")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    red = int(background.removeprefix("rgb(").split(",")[0])
    assert (red < 60) == dark
