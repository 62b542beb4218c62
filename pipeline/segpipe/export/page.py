"""A page in one file that runs nothing but its own script: the frame around what `report` tells."""

from __future__ import annotations

import base64
import hashlib
from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #1c2026; --pale: #5f6875; --line: #d9dde3; --ground: #fff;
 --panel: #f6f7f9; --bad: #b3261e; --warn: #8a5a00; --good: #1b6e3c; --mark: #0072b2 }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaee; --pale: #9aa2af; --line: #3a3f48;
 --ground: #16181d; --panel: #1f2229; --bad: #ff8a80; --warn: #ffc14d; --good: #7bd89a;
 --mark: #56b4e9 } }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1240px;
 padding: 1.5em 1em 4em; color: var(--ink); background: var(--ground) }
h1 { font-size: 1.5em; margin: 0 0 .2em } h2 { font-size: 1.15em; margin: 2em 0 .5em }
h3 { font-size: 1em; margin: 1.2em 0 .3em }
p { margin: .3em 0 } a { color: var(--mark) } .pale { color: var(--pale) }
.sums { display: flex; flex-wrap: wrap; gap: .6em; margin: 1em 0 }
.sums div { background: var(--panel); border-radius: 8px; padding: .5em 1em; min-width: 7.5em }
.sums b { display: block; font-size: 1.35em; font-weight: 600 }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .3em .8em .3em 0; vertical-align: top;
 border-bottom: 1px solid var(--line) }
.over { width: 100% } .over th { white-space: nowrap; font-weight: 500; color: var(--pale) }
.over th button { all: unset; cursor: pointer } .over th button:focus-visible { outline: 2px solid }
.over th[aria-sort=ascending] button::after { content: " \\25B2" }
.over th[aria-sort=descending] button::after { content: " \\25BC" }
.number { text-align: right } .name { overflow-wrap: anywhere; min-width: 12em }
.failed { color: var(--bad); font-weight: 600 } .suspicious { color: var(--warn); font-weight: 600 }
.done, .good { color: var(--good) } .unfinished { color: var(--warn) }
details.slide { border: 1px solid var(--line); border-radius: 8px; margin: .5em 0 }
details.slide > summary { cursor: pointer; padding: .5em .8em; overflow-wrap: anywhere }
details.slide > div { padding: 0 1em 1em }
.side { display: flex; flex-wrap: wrap; gap: 1.5em; align-items: flex-start }
.side > * { min-width: 0 } .side > .picture { flex: 1 1 26em; max-width: 38em }
.side > .facts { flex: 1 1 24em } .facts td { overflow-wrap: anywhere }
.charts > div { flex: 1 1 460px }
.facts th { font-weight: 500; color: var(--pale); white-space: nowrap }
img { max-width: 100%; height: auto; border-radius: 4px }
pre { background: var(--panel); padding: .8em; white-space: pre-wrap; overflow-wrap: anywhere;
 border-radius: 6px; margin: .3em 0; font-size: 13px }
td.error { overflow-wrap: anywhere } input { font: inherit; padding: .25em .6em; width: 18em }
.chart { font-size: 11px; fill: var(--ink) } .bars, .other { fill: var(--mark); opacity: .75 }
.seam { fill: var(--warn) } .axis { stroke: var(--pale); fill: none }
.mean { stroke: var(--ink); stroke-dasharray: 4 3 }
"""

SCRIPT = """
const table = document.querySelector(".over"), body = table.tBodies[0], slides = [...body.rows];
const value = (row, column) => {
  const text = row.cells[column].dataset.value ?? row.cells[column].textContent;
  return text === "" ? NaN : isNaN(text) ? text : Number(text);
};
const compare = (a, b) => typeof a === "number" && typeof b === "number" ? a - b
  : String(a).localeCompare(String(b), undefined, {numeric: true});
for (const button of table.querySelectorAll("th button")) button.addEventListener("click", () => {
  const head = button.closest("th"), column = head.cellIndex;
  const falls = head.getAttribute("aria-sort") === "ascending";
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", falls ? "descending" : "ascending");
  const keyed = slides.map(row => [value(row, column), row]);
  const known = keyed.filter(([key]) => key === key), unknown = keyed.filter(([key]) => key !== key);
  known.sort(([a], [b]) => falls ? compare(b, a) : compare(a, b));
  body.append(...[...known, ...unknown].map(([, row]) => row));
});
document.getElementById("find").addEventListener("input", event => {
  const words = event.target.value.toLowerCase().split(" ");
  for (const row of slides) {
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every(word => text.includes(word));
  }
});
const show = () => {
  const found = document.getElementById(location.hash.slice(1)), slide = found?.closest("details");
  if (slide) { slide.open = true; slide.scrollIntoView(); }
};
addEventListener("hashchange", show);
show();
"""


def page(title: str, body: str) -> str:
    """The page. Its policy lets nothing be loaded or run but what is written here.

    Parameters
    ----------
    body
        HTML in which all that came from outside is escaped. It needs a table `.over` and an input
        `#find` for the script.
    """
    policy = "; ".join(
        (
            "default-src 'none'",
            "img-src data:",
            f"style-src '{_hash(STYLE)}'",
            f"script-src '{_hash(SCRIPT)}'",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n<body>\n{body}\n"
        f"<script>{SCRIPT}</script>\n</body></html>\n"
    )


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
