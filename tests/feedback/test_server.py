"""The page of `llmctl rank` in a real browser: keys, mouse, hostile texts, widths and colours."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmctl.data.prompts import PromptExample
from llmctl.feedback.answers import open_answers
from llmctl.feedback.question_queue import QuestionQueue
from llmctl.feedback.questions import Entry, Question
from llmctl.feedback.server import listen, serving
from llmctl.feedback.session import Session
from tests import chromium
from tests.run_files import read_rows, write_rows

STORY = "Once there was a fox who wanted grapes.\n\n1. It jumped.\n2. It fell.\n\n" + "Again. " * 90
HOSTILE = (
    "<script>document.title='pwned'</script><img src=x onerror=\"document.title='pwned'\">"
    "</script><b>bold</b>&lt;{{rank.js}}" + "x" * 400
)
ROWS = [
    {"prompt": "Tell a story.", "responses": [STORY, HOSTILE, "No.", " No.\n", "مرحبا"]},
    {
        "messages": [
            {"role": "system", "content": "Be\nterse."},
            {"role": "user", "content": HOSTILE},
        ],
        "responses": ["4", "", "four"],
    },
    {"prompt": "all the same", "responses": ["a", "a"]},
    {"prompt": "Say hi.", "responses": ["hi", "bye"]},
]
ASKED = "view && view.phase === 'ask' && !busy"


def test_the_browser_is_there_in_ci():
    """A test that skips in silence proves nothing: `.ci/run` installs Chromium."""
    if not chromium.is_there() and "CI" not in os.environ:
        pytest.skip("needs chromium and chromedriver: apt-get install chromium chromium-driver")
    assert chromium.is_there(), "CI is set, and chromium or chromedriver is not installed"


@pytest.fixture
def page(browser, tmp_path):
    """A page of `llmctl rank`, open in the browser."""
    write_rows(tmp_path / "data.jsonl", ROWS)
    found = Page(browser, tmp_path)
    found.start()
    yield found
    found.end()


class Page:
    def __init__(self, browser: chromium.Browser, folder: Path) -> None:
        self.browser, self.out = browser, folder / "feedback.jsonl"
        self.data = folder / "data.jsonl"

    def start(self) -> None:
        command = [sys.executable, "-m", "llmctl", "rank", "--data", self.data, "-o", self.out]
        self.process = subprocess.Popen(
            [*map(str, command), "--annotator", "Ada <b>", "--no-browser"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.url = re.search(r"http://\S+", self.process.stderr.readline())[0]
        self.browser.resize(1280, 800)
        self.browser.prefer("light")
        self.browser.open(self.url)
        self.browser.wait(ASKED)

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()

    def rows(self) -> list[dict]:
        return read_rows(self.out)

    def texts(self) -> list[str]:
        return self.browser.js(
            "[...document.querySelectorAll('.card .text')].map(e => e.textContent)"
        )

    def places(self) -> list[str]:
        return self.browser.js("[...document.querySelectorAll('.place')].map(e => e.textContent)")

    def settle(self, count: int) -> None:
        self.browser.wait(f"view.settled === {count} && !busy")


def test_keys_rank_tie_take_back_skip_and_undo(page):
    browser = page.browser
    texts = page.texts()
    assert sorted(texts) == sorted({text.strip() for text in ROWS[0]["responses"]})
    browser.press("2", "1", "=", "4")
    assert page.places() == ["2nd, tied", "Best", "last", "2nd, tied"]
    browser.press("Backspace", "Backspace")
    assert page.places() == ["last, tied", "Best", "last, tied", "last, tied"]
    browser.press("3", "t", "1", "Enter")
    page.settle(1)
    expected = dict(zip(texts, [2, 1, 2, 3], strict=True))
    (row,) = page.rows()
    assert row["ranks"] == [expected[text.strip()] for text in ROWS[0]["responses"]]
    assert row["annotator"] == "Ada <b>"
    before = page.out.read_bytes()

    browser.press("Enter")  # nothing is picked: nothing happens
    browser.press("s")
    page.settle(2)
    assert page.rows()[1]["ranks"] is None
    browser.press("u")
    page.settle(1)
    assert page.out.read_bytes() == before
    assert page.places() == ["", "", ""]
    browser.press("2", "Enter")
    page.settle(2)
    browser.press("1", "2", "Enter")
    browser.wait("view.phase === 'done'")
    assert sorted(page.rows()[1]["ranks"]) == [1, 2, 2]
    assert browser.js("document.getElementById('out').textContent") == str(page.out)
    command = browser.js("document.getElementById('command').textContent")
    assert command == f"llmctl reward --model MODEL --data {page.out} -o runs/reward"
    assert "1 whose responses are all the same" in browser.js("document.body.innerText")
    browser.press("u")
    page.settle(2)
    browser.press("2", "Enter")
    browser.wait("view.phase === 'done'")
    browser.click("#finish")
    browser.wait("view.phase === 'stopped'")
    assert page.process.wait(20) == 0
    assert page.process.stdout.read() == f"{page.out}\n"
    assert [row["ranks"] is None for row in page.rows()] == [False, False, False]


def test_the_mouse_does_it_all_and_starting_again_goes_on(page):
    browser = page.browser
    browser.click(".card:nth-child(3) .pick")
    browser.click(".card:nth-child(1) .text")
    browser.click("#tie")
    browser.click(".card:nth-child(2) .pick")
    assert page.places() == ["2nd, tied", "2nd, tied", "Best", "last"]
    browser.click(".card:nth-child(1) .text")
    assert page.places() == ["last, tied", "2nd", "Best", "last, tied"]
    browser.click("#unpick")
    assert page.places()[1] == "last, tied"
    browser.press("Enter")  # goes to the page, not to the button that was clicked
    page.settle(1)
    browser.click("#undo")
    page.settle(0)
    browser.click("#skip")
    page.settle(1)
    browser.click(".card:nth-child(2) .pick")
    browser.click("#confirm")
    page.settle(2)
    browser.click("#stop")
    browser.wait("view.phase === 'stopped'")
    assert "1 to go" in browser.js("document.body.innerText")
    assert page.process.wait(20) == 0
    page.end()
    page.start()
    assert browser.js("view.settled") == 2
    assert browser.js("view.prompt[0][1]") == "Say hi."
    assert len(page.rows()) == 2


def test_a_double_click_acts_once(browser, tmp_path):
    """On Skip, Undo and Confirm, and on what an Undo at the end brings under the pointer."""
    rows = [{"prompt": f"Prompt {n}", "responses": [f"good {n}", f"bad {n}"]} for n in range(5)]
    write_rows(tmp_path / "data.jsonl", rows)
    page = Page(browser, tmp_path)
    page.start()

    def asked():
        browser.wait("!busy")
        return browser.js("view.prompt && view.prompt[0][1]")

    browser.double_click("#skip")
    page.settle(1)
    assert (asked(), len(page.rows())) == ("Prompt 1", 1)
    browser.press("Enter")  # goes to the page, not to the button that was clicked
    assert asked() == "Prompt 1"
    for count in (2, 3):
        browser.press("1", "Enter")
        page.settle(count)
    browser.double_click("#undo")
    page.settle(2)
    assert (asked(), len(page.rows())) == ("Prompt 2", 2)
    browser.press("1")
    browser.double_click("#confirm")
    page.settle(3)
    assert asked() == "Prompt 3"
    browser.press("1", "2")
    browser.double_click("#unpick")
    assert browser.js("picked().length") == 0, "where nothing new came, each click counts"
    for count in (4, 5):
        browser.press("1", "Enter")
        page.settle(count)
    browser.wait("view.phase === 'done'")
    browser.double_click("#end-undo")
    page.settle(4)
    assert (asked(), len(page.rows())) == ("Prompt 4", 4)
    assert browser.js("picked().length") == 0
    for count in (3, 2):
        browser.click("#undo")  # two clicks that are not a double one
        page.settle(count)
        time.sleep(0.6)
    page.end()


def test_a_keyboard_alone_reaches_the_buttons(page):
    """Tab goes to a response, Enter picks it there, and a screen reader hears what it is."""
    browser = page.browser
    browser.press("Tab", "Tab")
    focused = "document.activeElement"
    while browser.js(f"{focused}.className") != "pick":
        browser.press("Tab")
    assert browser.js(f"{focused}.matches(':focus-visible')")
    browser.press("Enter")
    assert page.places()[0] == "Best"
    assert browser.js(f"{focused}.getAttribute('aria-label')") == "Response 1: Best"
    assert browser.js(f"{focused}.getAttribute('aria-pressed')") == "true"
    assert browser.js("document.getElementById('said').textContent") == "Response 1: Best"
    assert page.rows() == []


def test_hostile_texts_are_texts(page):
    browser = page.browser
    assert HOSTILE in page.texts()
    browser.press("1", "Enter")
    page.settle(1)
    assert HOSTILE in browser.js("document.getElementById('prompt').innerText")
    assert browser.js("document.querySelectorAll('script, main img, main b').length") == 1
    assert browser.js("document.title") == "Rank: 2 of 3"
    assert browser.js("document.getElementById('annotator').textContent") == "Ada <b>"
    for script in ("el.textContent = 'window.hit = 1'", "el.src = 'https://example.com/x.js'"):
        browser.js(
            f"(el => {{ {script}; document.body.append(el) }})(document.createElement('script'))"
        )
    time.sleep(0.1)
    assert browser.js("window.hit") is None, "what is not the page's own is not run"
    assert all("Content Security Policy" in error for error in browser.errors())


def test_the_page_asks_nobody_else_and_breaks_no_rule(page):
    browser = page.browser
    asked = browser.js("performance.getEntriesByType('resource').map(e => e.name)")
    assert [re.sub(r":\d+", "", url) for url in asked] == ["http://127.0.0.1/state"]
    assert browser.js("location.search") == "", "the token is not left in the address"
    assert browser.js("document.cookie") == "", "and the cookie is out of a script's reach"
    assert browser.errors() == []


def test_the_address_works_once(page):
    browser = page.browser
    browser.open(page.url)
    browser.wait(ASKED)  # this browser has the cookie, which is what counts
    browser.devtools("Network.clearBrowserCookies")
    browser.open(page.url)
    assert "it works once" in browser.js("document.body.innerText")


def test_line_breaks_are_kept(page):
    styles = (
        "[...document.querySelectorAll('.text')].map(e => getComputedStyle(e).whiteSpaceCollapse)"
    )
    assert set(page.browser.js(styles)) == {"preserve"}
    arabic = "[...document.querySelectorAll('.card .text')].find(e => e.textContent === 'مرحبا')"
    assert page.browser.js(f"getComputedStyle({arabic}).direction") == "rtl"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_every_width_and_can_be_read(page, scheme):
    browser = page.browser
    browser.prefer(scheme)
    browser.press("2", "1")
    for width, height, columns in ((320, 640, 1), (390, 844, 1), (768, 1024, 1), (1280, 800, 2)):
        browser.resize(width, height)
        assert browser.js("document.documentElement.scrollWidth") <= width
        assert not browser.js(OVERFLOWING), width
        lefts = "new Set([...document.querySelectorAll('.card')].map(e => e.offsetLeft)).size"
        assert browser.js(lefts) == columns
        assert (
            browser.js("document.getElementById('confirm').getBoundingClientRect().bottom")
            <= height
        )
    assert browser.js(CONTRASTS) == []
    ground = browser.js("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) < 200) == (scheme == "dark")


OVERFLOWING = """[...document.querySelectorAll('main *, header *, footer *')].filter(e => {
  const box = e.getBoundingClientRect();
  return box.width && (box.right > innerWidth + 1 || box.left < -1);
}).map(e => e.id || e.className)"""

CONTRASTS = """(() => {
  const parse = color => color.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = e => {
    for (; e; e = e.parentElement) {
      const color = parse(getComputedStyle(e).backgroundColor);
      if (color.length < 4 || color[3] > 0) return color;
    }
    return [255, 255, 255];
  };
  const bad = [];
  for (const e of document.querySelectorAll('body *')) {
    const owns = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!owns || !e.checkVisibility() || e.closest('script, style, kbd, :disabled')) continue;
    const [one, two] = [light(parse(getComputedStyle(e).color)), light(behind(e))];
    const ratio = (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
    if (ratio < 4.5) bad.push([e.id || e.className || e.tagName, ratio]);
  }
  return bad;
})()"""


def test_the_page_waits_for_the_model(browser, tmp_path):
    first = Entry(PromptExample("First", "p:1"), ("a", "b"))
    supply = QuestionQueue([first, Entry(PromptExample("Second", "p:2"), None)], {})
    with open_answers(tmp_path / "a.jsonl", "Ada") as answers:
        session = Session(supply, answers, "Ada", 0)
        with serving(listen(0), session, {"out": "a.jsonl", "command": "llmctl reward"}) as url:
            browser.open(url)
            browser.wait(ASKED)
            browser.press("1", "Enter")
            browser.wait("view.phase === 'wait'")
            assert "The model is writing" in browser.js("document.body.innerText")
            supply.put(1, Question("Second", ("c", "d")))
            browser.wait(ASKED)
            browser.press("1", "Enter")
            browser.wait("view.phase === 'done'")
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 2


def test_a_server_that_went_away_is_said(page):
    page.process.kill()
    page.process.wait()
    page.browser.press("1", "Enter")
    page.browser.wait("!document.getElementById('alert').hidden")
    assert "All answers so far are kept" in page.browser.js("document.body.innerText")


def test_an_answer_that_cannot_be_kept_is_said_and_stays_picked(page):
    page.out.unlink()
    page.browser.press("2", "1", "Enter")
    page.browser.wait("!document.getElementById('alert').hidden")
    assert "another program" in page.browser.js("document.getElementById('alert').textContent")
    assert page.places()[:2] == ["2nd", "Best"]
    assert page.browser.js("view.settled") == 0


def test_a_second_window_learns_what_the_first_has_answered(page):
    browser = page.browser
    browser.js(
        "fetch('/skip', {method: 'POST', headers: {'Content-Type': 'application/json'}, "
        "body: JSON.stringify({key: view.key})}).then(() => { window.skipped = true })"
    )
    browser.wait("window.skipped")
    browser.press("1", "Enter")
    page.settle(1)
    assert [row["ranks"] for row in page.rows()] == [None]
    assert browser.js("view.prompt.length") == 2
