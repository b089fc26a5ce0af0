"""The page of `llmctl report` in a real browser: widths, colours, pointer, not a word to others."""

import functools
import http.server
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import chromium
from tests.hub_server import serving
from tests.made_runs import curve, make_life, make_run

HOSTILE = "</script><script>document.title='pwned'</script><img src=x onerror=\"document.title=1\">"
WIDTHS = ((320, 640), (390, 844), (768, 1024), (1280, 800))


@dataclass(frozen=True)
class Served:
    """Pages in a folder, and what was asked of their server."""

    folder: Path
    url: str
    asked: list[str]


@pytest.fixture(scope="module")
def served(cli, tmp_path_factory):
    """A whole life, two of them, two runs side by side, and a run with bad intentions."""
    folder = tmp_path_factory.mktemp("pages")
    life = make_life(folder / "life")
    lives = [life, make_life(folder / "other")]
    sides = [
        make_run(
            folder / name,
            "sft",
            metrics=curve(50, start=start),
            recipe={"lr": start},
            samples=[{"step": 50, "prompt": "Q?", "response": "word " * 200}],
        )
        for name, start in (("a", 3.0), ("b" * 60, 4.0))
    ]
    hostile = make_run(
        folder / "hostile",
        "sft",
        metrics=[{"step": 1, f"score/{HOSTILE}": 1.0, "loss": 1e-9}],
        samples=[{"step": 1, "prompt": HOSTILE + "x" * 500, "response": HOSTILE}],
        recipe={"system": "y" * 900},
        command=["llmctl", "sft", "z" * 400, HOSTILE],
        status={"error": HOSTILE + "w" * 400, "exit_code": 1},
        state="failed",
    )
    for name, runs in (
        ("life", [life]),
        ("lives", lives),
        ("sides", sides),
        ("hostile", [hostile]),
    ):
        result = cli("report", *runs, "-o", folder / f"{name}.html")
        assert result.code == 0, result.err
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_request(self, *_: object) -> None:
            asked.append(self.path)

    with serving(functools.partial(Handler, directory=str(folder))) as url:
        yield Served(folder, url, asked)


@pytest.fixture
def page(browser, served):
    """Open a page: `page("life")`."""

    def visit(name: str) -> chromium.Browser:
        browser.resize(1280, 800)
        browser.prefer("light")
        browser.open(f"{served.url}/{name}.html")
        return browser

    return visit


@pytest.mark.parametrize("name", ["life", "sides", "hostile"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_every_width_and_can_be_read(page, name, scheme):
    browser = page(name)
    browser.prefer(scheme)
    browser.js("document.querySelectorAll('details').forEach(e => { e.open = true })")
    for width, height in WIDTHS:
        browser.resize(width, height)
        assert browser.js(OVERFLOWING) == [], width
        assert browser.js("document.documentElement.scrollWidth") <= width
    assert browser.js(CONTRASTS) == []
    ground = browser.js("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) < 200) == (scheme == "dark")


OVERFLOWING = """[...document.querySelectorAll('body *')].filter(e => {
  const box = e.getBoundingClientRect();
  return box.width && !e.closest('.scroll, nav') && (box.right > innerWidth + 1 || box.left < -1);
}).map(e => e.className.baseVal ?? (e.id || e.className || e.tagName))"""

CONTRASTS = """(() => {
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const rgb = (color) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const color = rgb(getComputedStyle(e).backgroundColor);
      if (color[3] === 255) return color;
    }
    return rgb('white');
  };
  const bad = [];
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.getClientRects().length || ['SCRIPT', 'STYLE', 'title'].includes(e.tagName)) continue;
    const style = getComputedStyle(e);
    const svg = e instanceof SVGElement;
    const ground = e.closest('.box') ? rgb(getComputedStyle(e.closest('.box').querySelector('rect')).fill) : [];
    const back = ground[3] === 255 ? ground : behind(e);
    const [a, b] = [light(rgb(svg ? style.fill : style.color)), light(back)];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) bad.push(`${e.tagName}.${e.getAttribute('class')} ${ratio.toFixed(2)}`);
  }
  return [...new Set(bad)];
})()"""  # noqa: E501


@pytest.mark.parametrize("name", ["life", "sides", "hostile"])
def test_it_asks_for_nothing_and_complains_of_nothing(page, served, name):
    served.asked.clear()
    browser = page(name)
    assert browser.js("performance.getEntriesByType('resource').map(e => e.name)") == []
    assert served.asked == [f"/{name}.html"]
    assert browser.errors() == []
    browser.js("(() => { const s = document.createElement('script'); s.textContent = "
               "'window.hit = 1'; document.body.append(s) })()")  # fmt: skip
    assert browser.js("window.hit") is None, "no script but the page's own is run"
    assert len(browser.errors()) == 1


def test_the_pointer_reads_values(page):
    browser = page("life")
    figure = "document.querySelector('#stage-pretrain [data-chart]')"
    value = f"{figure}.querySelector('.legend b').textContent"
    before = browser.js(value)
    hover(browser, figure, 0.5)
    assert re.fullmatch(r"step \d+", browser.js(f"{figure}.querySelector('.at').textContent"))
    assert browser.js(f"{figure}.querySelector('.at').textContent") != "step 1"
    assert browser.js(value) != before
    assert browser.js(f"{figure}.querySelector('.cursor').classList.contains('on')")
    hover(browser, figure, 0.0)
    assert browser.js(f"{figure}.querySelector('.at').textContent") == "step 1"
    hover(browser, figure, 1.0)
    assert browser.js(f"{figure}.querySelector('.at').textContent") == "step 120"
    browser.js(f"{figure}.querySelector('svg').dispatchEvent(new PointerEvent('pointerleave'))")
    assert browser.js(value) == before


def hover(browser, figure, share):
    """Put the pointer on a chart, that far from its left axis to its right end."""
    browser.js(
        f"(() => {{ const s = {figure}.querySelector('svg'); const b = s.getBoundingClientRect();"
        f"const x = b.left + b.width * (48 + {share} * 340) / 400;"
        "s.dispatchEvent(new PointerEvent('pointermove', { clientX: x, clientY: b.top + 9 })) })()"
    )


def test_series_can_be_put_away_and_lines_smoothed(page):
    browser = page("sides")
    shown = "getComputedStyle(document.querySelector('.series')).display"
    assert browser.js(shown) != "none"
    browser.click(".legend button")
    assert browser.js(shown) == "none"
    assert browser.js("document.querySelector('.legend button').ariaPressed") == "false"
    browser.click(".legend button")
    assert browser.js(shown) != "none"
    smooth = "getComputedStyle(document.querySelector('.noisy .smooth')).display"
    assert browser.js(smooth) != "none"
    browser.click("#smooth")
    assert browser.js(smooth) == "none"


def test_a_keyboard_reaches_the_charts(page):
    browser = page("sides")
    for _ in range(40):
        browser.press("Tab")
        if browser.js("document.activeElement.matches('.legend button:focus-visible')"):
            break
    browser.press("Enter")
    assert browser.js("document.activeElement.ariaPressed") == "false"


@pytest.mark.parametrize(("name", "count"), [("life", 5), ("lives", 10)])
def test_boxes_lead_to_their_stages_and_hold_their_texts(page, name, count):
    browser = page(name)
    for width, kind in ((1280, "lying"), (390, "upright")):
        browser.resize(width, 844)
        boxes = f"[...document.querySelectorAll('.{kind} .box')]"
        assert (
            browser.js(f"{boxes}.filter(e => e.getBoundingClientRect().width > 0).length") == count
        )
        outside = (
            f"{boxes}.filter(e => e.getBBox().width > e.querySelector('rect').width.baseVal.value)"
        )
        assert browser.js(f"{outside}.map(e => e.textContent)") == []
    browser.click(".upright a")
    assert browser.js("location.hash") == "#stage-tokenize"


def test_what_had_to_hold_is_seen_whole_on_a_phone(page):
    browser = page("lives")
    browser.resize(390, 844)
    last = "[...document.querySelectorAll('.verdicts td:last-child')]"
    assert browser.js(f"{last}.length") == 4
    assert browser.js(f"{last}.every(e => e.getBoundingClientRect().right <= 390)")
    edge = "document.querySelector('.switch').getBoundingClientRect().right"
    assert browser.js(edge) == 390, "no link shows beside it"


def test_no_label_lies_on_another(page):
    browser = page("life")
    browser.js("document.querySelectorAll('details').forEach(e => { e.open = true })")
    assert browser.js(CLASHES) == []


CLASHES = """[...document.querySelectorAll('.chart svg')].flatMap(svg =>
  ['x', 'y'].flatMap(kind => {
    const boxes = [...svg.querySelectorAll(`text.${kind}`)].map(e => e.getBoundingClientRect());
    const clash = (a, b) => a.right > b.left && b.right > a.left && a.bottom > b.top + 1 && b.bottom > a.top + 1;
    return boxes.some((a, i) => boxes.slice(i + 1).some(b => clash(a, b))) ? [svg.ariaLabel] : [];
  }))"""  # noqa: E501


def test_hostile_texts_are_texts(page):
    browser = page("hostile")
    assert browser.js("document.title") == "hostile"
    assert browser.js("document.querySelectorAll('script').length") == 2
    assert browser.js("document.querySelectorAll('main img').length") == 0
    assert HOSTILE in browser.js("document.querySelector('.sample .text').textContent")
    assert "exit code 1" in browser.js("document.querySelector('.who').textContent")


def test_all_is_there_without_a_script(browser, served, page):
    browser = page("life")
    browser.devtools("Emulation.setScriptExecutionDisabled", value=True)
    browser.open(f"{served.url}/life.html")
    browser.devtools("Emulation.setScriptExecutionDisabled", value=False)
    lines = "[...document.querySelectorAll('.chart .line')].filter(e => e.getTotalLength() > 0)"
    assert browser.js(f"{lines}.length") > 20
    assert "step" not in browser.js("document.querySelector('.at').textContent")
