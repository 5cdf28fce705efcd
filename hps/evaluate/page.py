"""One HTML page of tables and figures that needs nothing beside it: no network, no folder, no server.

Knows no metric and computes nothing: report.py hands it the cells that it also writes as Markdown.
"""

from base64 import b64encode
from collections.abc import Sequence
from hashlib import sha256
from html import escape
from typing import NamedTuple


class Cell(NamedTuple):
    text: str
    interval: str = ""  # "[low, high]"
    mark: str = ""  # "best", "near": its interval overlaps that of the best, or ""
    value: float | None = None  # the number that its column is sorted by, NaN last; None: a column of text


class Table(NamedTuple):
    title: str
    header: list[str]
    rows: list[list[Cell]]
    meanings: Sequence[tuple[str, str]] = ()  # (term, what it means)
    note: str = ""


class Figure(NamedTuple):
    caption: str
    alt: str
    width: int  # CSS pixels
    png: bytes


STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --faint: #636363; --line: #d9d9d9; --paper: #fff; --link: #005a9c }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e3e3e3; --faint: #a0a0a0; --line: #3d3d3d; --paper: #181818; --link: #7fbfff }
  img { filter: invert(.906) hue-rotate(180deg) }  /* white paper becomes the page's, a hue stays */
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1rem 3rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .4rem }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .5rem }
p, dl { margin: .4rem 0; max-width: 46rem }
.note, dl, small, figcaption { color: var(--faint); font-size: .85em }
dt { display: inline; color: var(--ink); font-weight: 600 }
dt::after { content: ":" }
dd { display: inline; margin: 0 }
.settings { max-width: none; display: flex; flex-wrap: wrap; gap: .1rem 1.2rem }
.scroll { overflow-x: auto }
:focus-visible { outline: 2px solid var(--link); outline-offset: -2px }
table { border-collapse: collapse; font-size: .9rem; line-height: 1.3 }
th, td { padding: .3rem .9rem; text-align: left; vertical-align: top; overflow-wrap: normal;
  border-bottom: 1px solid var(--line) }
thead th { padding: 0; vertical-align: bottom; border-bottom: 1px solid var(--ink) }
tr > :first-child { position: sticky; left: 0; z-index: 1; background: var(--paper) }
td { white-space: nowrap }
.prose { white-space: normal; min-width: 11rem; max-width: 22rem }
tbody th { font-weight: 500; padding-left: 0; min-width: 6.5rem; max-width: 14rem; overflow-wrap: anywhere }
thead th:first-child button { padding-left: 0 }
.number { text-align: right; font-variant-numeric: tabular-nums }
small { display: block }
i, button::after { display: inline-block; width: .85em; margin-right: -.85em; text-align: center }  /* takes no room */
button { width: 100%; padding: .3rem .9rem; border: 0; background: none; color: inherit; font: inherit;
  font-weight: 600; text-align: inherit; cursor: pointer }
button::after { font-size: .8em }
button:hover { color: var(--link) }
[aria-sort=ascending] button::after { content: "\\25B2" }
[aria-sort=descending] button::after { content: "\\25BC" }
figure { margin: 1.2rem 0 }
img { display: block; max-width: 100%; height: auto }
.scroll img { max-width: max(100%, 44rem) }  /* a wide figure is scrolled before it becomes too small to read */
@media (max-width: 40rem) { th, td, button { padding-left: .6rem; padding-right: .6rem } }
@media (min-width: 40rem) {  /* where few columns stand, an interval fits beside its mean */
  tbody th { min-width: 8rem }
  table:not(:has(th:nth-child(6))) small { display: inline-block; min-width: 7.5em; margin-left: .9rem;
    text-align: left }
  table:not(:has(th:nth-child(6))) thead .number { text-align: center }
}
@media print {
  body { max-width: none; padding: 0; font-size: 10pt }
  .scroll { overflow: visible }
  .scroll img { max-width: 100% }
  table { font-size: 7pt }
  th, td, button { padding: .15rem .5rem .15rem .2rem }
  tr > :first-child { position: static; min-width: 0 }
  tr, figure { break-inside: avoid }
  h2 { break-after: avoid }
}
"""

# Numbers start with the largest, texts with the first; a second click turns the order round.
SCRIPT = """
function compare(a, b, sign) {
  if (typeof a === "string") return sign * a.localeCompare(b, "en", {numeric: true});
  return isNaN(a) - isNaN(b) || sign * (a - b);
}
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const value = ({cells: {[column]: cell}}) => "value" in cell.dataset ? +cell.dataset.value : cell.textContent;
    const first = head.className === "number" ? "descending" : "ascending";
    const second = first === "ascending" ? "descending" : "ascending";
    const order = head.getAttribute("aria-sort") === first ? second : first;
    const sign = order === "ascending" ? 1 : -1;
    body.append(...[...body.rows].sort((a, b) => compare(value(a), value(b), sign)));
    heads.forEach(other => other.setAttribute("aria-sort", other === head ? order : "none"));
  }));
}
"""


def policy(style: str, script: str) -> str:
    """Content-Security-Policy of a page whose only style and script are these two texts, allowed by their hashes.

    Nothing loads from outside, nothing injected runs.
    """
    hashes = (f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'" for text in (style, script))
    return (
        "default-src 'none'; img-src data:; style-src {}; script-src {}; base-uri 'none'; form-action 'none'"
    ).format(*hashes)


def _cell(cell: Cell, first: bool, ranged: bool) -> str:
    if first:
        return f'<th scope="row">{escape(cell.text)}</th>'
    text = f"<strong>{escape(cell.text)}</strong>" if cell.mark == "best" else escape(cell.text)
    text += "<i>~</i>" if cell.mark == "near" else ""
    text += f" <small>{escape(cell.interval)}</small>" if ranged else ""  # an empty one keeps the column in line
    if cell.value is not None:
        return f'<td class="number" data-value="{cell.value!r}">{text}</td>'
    return f'<td class="prose">{text}</td>' if len(cell.text) > 30 else f"<td>{text}</td>"


def _terms(pairs: Sequence[tuple[str, str]], style: str) -> str:
    items = (f"<div><dt>{escape(term)}</dt> <dd>{escape(text)}</dd></div>" for term, text in pairs)
    return "<dl" + style + ">\n" + "\n".join(items) + "\n</dl>" if pairs else ""


def _table(table: Table, number: int) -> list[str]:
    columns = list(zip(*table.rows, strict=True))
    numeric = [any(cell.value is not None for cell in column) for column in columns]
    ranged = [any(cell.interval for cell in column) for column in columns]
    heads = (
        f'<th scope="col" aria-sort="none"{" class=number" if is_number else ""}>'
        f'<button type="button">{escape(title)}</button></th>'
        for title, is_number in zip(table.header, numeric, strict=True)
    )
    rows = (
        "<tr>" + "".join(_cell(cell, i == 0, ranged[i]) for i, cell in enumerate(row)) + "</tr>" for row in table.rows
    )
    return [
        f'<h2 id="t{number}">{escape(table.title)}</h2>',
        f'<div class="scroll" role="region" tabindex="0" aria-labelledby="t{number}">',
        f'<table aria-labelledby="t{number}">',
        f"<thead><tr>{''.join(heads)}</tr></thead>",
        "<tbody>",
        *rows,
        "</tbody></table></div>",
        f'<p class="note">{escape(table.note)}</p>' if table.note else "",
        _terms(table.meanings, ""),
    ]


def _figure(figure: Figure) -> str:
    source = b64encode(figure.png).decode()
    image = f'<img width="{figure.width}" alt="{escape(figure.alt)}" src="data:image/png;base64,{source}">'
    image = f'<div class="scroll">{image}</div>' if figure.width > 500 else image
    return f"<figure>{image}<figcaption>{escape(figure.caption)}</figcaption></figure>"


def render(
    title: str,
    subtitle: str,
    *,
    settings: Sequence[tuple[str, str]],
    legend: str,
    tables: Sequence[Table],
    figures: Sequence[Figure],
) -> str:
    """The page as one string of HTML; every text is shown as it is, whatever characters it holds.

    settings: (name, value) under the subtitle. legend: what the marks of all tables mean. Each table has a row.
    """
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy(STYLE, SCRIPT)}">',
        '<meta name="viewport" content="width=device-width">',
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
        f"<h1>{escape(title)}</h1>\n<p>{escape(subtitle)}</p>",
        _terms(settings, ' class="settings"'),
        f'<p class="note">{escape(legend)} Click a heading to sort.</p>',
    ]
    for number, table in enumerate(tables):
        parts += _table(table, number)
    parts += ["<h2>Figures</h2>", *map(_figure, figures)] if figures else []
    return "\n".join(filter(None, [*parts, f"<script>{SCRIPT}</script>\n</body>\n</html>\n"]))
