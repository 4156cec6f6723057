"""A page that stands alone: its style on light and dark screens and on phones, and tables that a click on a head sorts.

A table's heads hold buttons; cells say in `data-key` what they sort by, and those of text have the class `text`.
"""

from __future__ import annotations

import html

# Of pages and figures. Text stands on `heat`, and on nothing darker or lighter than `soft` besides.
COLOURS = """
:root { color-scheme: light dark; --text: #1c1e21; --back: #fff; --soft: #f1f2f4; --line: #d9dce0; --dim: #5c636b;
  --best: #b3263f; --other: #5f7d9c; --heat: #f0a05a; --s0: #2f6db3; --s1: #b3263f; --s2: #3d8a4e; --s3: #8a5bb0;
  --s4: #b8741a; --s5: #138a8a; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e6e9; --back: #16181b; --soft: #22262a; --line: #3a3f45;
  --dim: #a0a7af; --best: #ff7d8e; --other: #8fb0d3; --heat: #93430f; --s0: #7fb2ee; --s1: #ff7d8e; --s2: #7fcf90;
  --s3: #c39be6; --s4: #e5a957; --s5: #5fd0d0; } }
"""

_STYLE = """
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 0 auto; padding: 1.2rem; color: var(--text);
  background: var(--back); overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; }
a { color: var(--best); }
nav ul { columns: 18rem; padding-left: 1.2rem; }
.wide { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; margin: .4rem 0; }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th.text, td.text, th:first-child { text-align: left; }
tbody tr:hover { background: var(--soft); }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid var(--best); }
th[aria-sort] button { color: var(--best); }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
.note, figcaption, small { color: var(--dim); font-size: .88rem; }
summary { cursor: pointer; font-weight: 600; margin: .6rem 0; }
pre { background: var(--soft); padding: .6rem .9rem; border-radius: 6px; overflow-x: auto; font-size: .85rem; }
figure { margin: 1rem 0; }
"""

_SORT = """
for (const button of document.querySelectorAll("th button")) button.onclick = () => {
  const th = button.parentElement, body = th.closest("table").tBodies[0], column = th.cellIndex;
  const up = th.getAttribute("aria-sort") !== "ascending" ? 1 : -1;
  for (const other of th.parentElement.cells) other.removeAttribute("aria-sort");
  th.setAttribute("aria-sort", up > 0 ? "ascending" : "descending");
  const key = row => {  // NaN where nothing was measured: last in either direction
    const cell = row.cells[column], raw = cell.dataset.key;
    if (raw === "") return NaN;
    return cell.className === "text" ? raw.toLowerCase() : Number(raw.replace("inf", "Infinity"));
  };
  body.append(...[...body.rows].sort((a, b) => {
    const x = key(a), y = key(b);
    if (x !== x || y !== y) return (x !== x) - (y !== y);
    return (x < y ? -1 : x > y ? 1 : 0) * up;
  }));
};
"""


def standalone(title: str, body: str, style: str = "") -> str:
    """The page.

    Args:
      title: of the window, as text.
      body: HTML, escaped.
      style: CSS besides the page's own.
    """
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{COLOURS}{_STYLE}{style}</style></head><body>\n"
        f"{body}\n<script>{_SORT}</script>\n</body></html>\n"
    )
