"""A report as a browser shows it, on a desk and on a phone, light and dark: what is visible, not what is written."""

import importlib.util
import itertools
import sys
from pathlib import Path

import pytest
from figure_tables import result

from qjax.report.figures.drawing import WIDE, alone
from qjax.report.figures.kinds import KINDS, figures, one_figure
from qjax.report.page import page
from qjax.report.result import read

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("report_pictures", ROOT / "scripts" / "report_pictures.py")
pictures = sys.modules["report_pictures"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(pictures)

LACKS = pictures.missing()
HOW = "apt-get install chromium chromium-driver, pip install 'qjax[test]'"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(LACKS), reason=f"no {LACKS} on this machine: {HOW}")]
SCREENS = list(itertools.product(pictures.WIDTHS, pictures.SCHEMES))

RESULTS = [result(), read(ROOT / "experiments" / "results" / "recipes.json")]

# Every visible text: what it says, its box, its size on the screen, and its contrast to what lies below it.
MEASURE = """
const rgb = s => { const v = s.match(/[\\d.]+/g).map(Number); return v.length < 4 ? [...v, 1] : v; };
const over = (top, below) => below.map((b, n) => n < 3 ? top[n] * top[3] + b * (1 - top[3]) : 1);
const light = c => { const [r, g, b] = c.map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b; };
const ratio = (x, y) => (Math.max(x, y) + .05) / (Math.min(x, y) + .05);
const ground = stack => stack.toReversed().reduce((below, e) => {
  const style = getComputedStyle(e);
  if (e.tagName === "rect") {
    const fill = style.fill === "none" ? [0, 0, 0, 0] : rgb(style.fill);
    return over([...fill.slice(0, 3), fill[3] * style.fillOpacity], below);
  }
  return e instanceof SVGElement ? below : over(rgb(style.backgroundColor), below);
}, [255, 255, 255, 1]);
const seen = [], all = [...document.querySelectorAll("svg")];
const walker = document.createTreeWalker(document.documentElement, NodeFilter.SHOW_TEXT);
for (let node; node = walker.nextNode();) {
  const e = node.parentElement, said = node.textContent.trim();
  if (!said || e.tagName === "title" || !e.checkVisibility()) continue;
  const range = document.createRange(); range.selectNodeContents(node);
  const box = (e.tagName === "text" ? e : range).getBoundingClientRect();
  if (!box.width) continue;
  const svg = e.closest("svg"), style = getComputedStyle(e);
  const zoom = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
  const stack = document.elementsFromPoint(box.left + 3, box.top + box.height / 2);
  if (!svg && !stack.includes(e)) continue;  // of a table that is scrolled
  seen.push({said, kind: e.getAttribute("class") || "", figure: svg ? all.indexOf(svg) : -1,
    box: [box.left, box.top, box.right, box.bottom], size: parseFloat(style.fontSize) * zoom,
    contrast: ratio(light(rgb(svg ? style.fill : style.color)), light(ground(stack)))});
}
const figures = all.map(e => e.checkVisibility() && e.getBoundingClientRect())
  .map(box => box && [box.left, box.top, box.right, box.bottom]);
return {seen, figures, across: document.documentElement.scrollWidth, room: innerWidth};
"""


@pytest.fixture(scope="module")
def browser():
    with pictures.chromium() as driver:
        yield driver


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Every kind of figure, and a committed result with long tables."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page(RESULTS, "Results", "kl"), encoding="utf-8")
    return path


def meet(a, b):
    """Whether two boxes share more than a hair."""
    return min(a[2], b[2]) - max(a[0], b[0]) > 1 and min(a[3], b[3]) - max(a[1], b[1]) > 1


@pytest.mark.parametrize(("width", "scheme"), SCREENS)
def test_what_is_visible(browser, report, width, scheme):
    pictures.look(browser, report, width, scheme, 14_000)  # all of it is on the screen
    page = browser.execute_script(MEASURE)
    assert page["across"] <= page["room"] == width, "the page scrolls sideways"
    shown = [n for n, box in enumerate(page["figures"]) if box]
    one, other = (len(figures(r)) // 2 for r in RESULTS)  # each for a wide screen and for a phone
    assert one == len(KINDS) and other >= 2, "every kind is drawn, and some of the other result"
    assert len(shown) == len(page["figures"]) // 2 == 1 + one + other, "each figure once"
    for text in page["seen"]:
        assert text["size"] >= 10, text
        assert text["contrast"] >= 4.5, text
    for n in shown:
        left, top, right, bottom = page["figures"][n]
        assert right - left > min(width - 60, 600)
        texts = [text for text in page["seen"] if text["figure"] == n]
        assert sum(text["kind"].startswith("axis") for text in texts) >= 2
        for text in texts:
            x, y, x2, y2 = text["box"]
            assert x >= left - 1 and y >= top - 1 and x2 <= right + 1 and y2 <= bottom + 1, text
        for a, b in itertools.combinations(texts, 2):
            assert not meet(a["box"], b["box"]), (a, b)
    said = {text["said"] for text in page["seen"] if text["kind"].startswith("axis")}
    assert {"KL to the float model, nats a token", "relative error of weights, %", "loss, nats a token"} <= said
    assert {"Results", "rows", "Q2_K", "8.500"} <= {text["said"] for text in page["seen"]}
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")


def test_a_click_on_a_head_sorts(browser, report):
    pictures.look(browser, report, 390, "light")
    heads = "return [...document.querySelector('table').tHead.rows[0].cells].map(e => e.textContent)"
    kl = next(n for n, head in enumerate(browser.execute_script(heads)) if "KL" in head)
    column = """const [table, n] = [document.querySelector("table"), arguments[0]];
      return [...table.tBodies[0].rows].map(row => row.cells[n].dataset.key)"""
    before = [float(key) for key in browser.execute_script(column, kl)]
    assert before != sorted(before)
    for rising in (True, False):
        head = browser.find_elements("css selector", "table th button")[kl]
        browser.execute_script("arguments[0].scrollIntoView({block: 'center', inline: 'center'})", head)
        head.click()
        after = [float(key) for key in browser.execute_script(column, kl)]
        assert after == sorted(before, reverse=not rising)


def test_a_figure_alone_has_its_own_colours(browser, tmp_path):
    path = tmp_path / "kl.svg"
    path.write_text(alone(one_figure([result()], "kl", WIDE)), encoding="utf-8")
    fills = []
    for scheme in pictures.SCHEMES:
        pictures.look(browser, path, 1280, scheme)
        script = "return ['.ground', '.name'].map(s => getComputedStyle(document.querySelector(s)).fill)"
        fills.append(browser.execute_script(script))
    assert fills[0][0] == "rgb(255, 255, 255)" and fills[1][0] == "rgb(22, 24, 27)" and fills[0][1] != fills[1][1]
