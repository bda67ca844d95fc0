"""The pieces of a report's page: one HTML file that needs no script, no network and no other file.

Whatever text comes in is escaped here and nowhere else, and the page forbids scripts and requests
by its own policy.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from reat_fast.reporting.style import COLOURS, Picture, svg
from reat_fast.reporting.tables import Table

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

CSS = """
*, ::before, ::after { box-sizing: border-box }
:root { color-scheme: light dark; --page: #f7f7f5; --card: #fff; LIGHT }
@media (prefers-color-scheme: dark) { :root { --page: #111418; --card: #191d23; DARK } }
body { margin: 0 auto; max-width: 72rem; padding: 2.5rem clamp(1rem, 4vw, 3rem) 4rem;
  background: var(--page); color: var(--ink); font: 1rem/1.55 system-ui, sans-serif }
h1 { margin: 0; font-size: clamp(1.7rem, 5vw, 2.5rem); line-height: 1.15; letter-spacing: -.02em;
  overflow-wrap: anywhere }
h2 { margin: 3.25rem 0 1rem; font-size: 1.35rem; letter-spacing: -.01em }
h3 { margin: 0 0 .5rem; font-size: 1rem }
p { max-width: 46rem; margin: .5rem 0 1rem }
a { color: inherit; text-underline-offset: .2em }
code, pre { font: .86em/1.5 ui-monospace, monospace; overflow-wrap: anywhere }
pre { margin: 0; white-space: pre-wrap }
.kicker { margin: 0 0 .35rem; color: var(--muted); font-size: .8rem; letter-spacing: .08em;
  text-transform: uppercase }
.muted, figcaption { color: var(--muted); font-size: .875rem }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: 1.25rem 0 0; padding: 0;
  list-style: none; font-size: .9rem }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem;
  margin: 1.75rem 0 0 }
.tiles div, .card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem }
.tiles div { display: flex; flex-direction: column; padding: .8rem 1rem }
.tiles dt { color: var(--muted); font-size: .82rem }
.tiles dd { margin: 0; font-size: 1.6rem; font-weight: 600; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums }
.tiles dd small { display: block; color: var(--muted); font-size: .78rem; font-weight: 400;
  letter-spacing: 0 }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 25rem), 1fr));
  gap: 1rem; margin: 1rem 0 }
.card { margin: 0 0 1rem; padding: 1rem 1.1rem; min-width: 0 }
.cards .card { margin: 0 }
.wide { grid-column: 1 / -1 }
figcaption { margin-top: .6rem }
svg { display: block; width: 100%; height: auto }
svg text { font-family: system-ui, sans-serif !important }
.scroll { overflow-x: auto }
.wide svg { min-width: 40rem }
table { border-collapse: collapse; width: 100%; font-size: .9rem;
  font-variant-numeric: tabular-nums }
th, td { padding: .32rem .7rem; border-bottom: 1px solid var(--line); text-align: left;
  white-space: nowrap }
thead th { color: var(--muted); font-size: .8rem; font-weight: 500; vertical-align: bottom }
tbody th { font-weight: 500 }
tbody tr:last-child > * { border-bottom: 0 }
.number { text-align: right }
.head, .body, .tail { font-weight: 600 }
.head { color: var(--head) } .body { color: var(--body) } .tail { color: var(--tail) }
.note { border-left: 3px solid var(--series-3); padding: .1rem 0 .1rem .9rem; margin: 1rem 0 }
details > summary { cursor: pointer; padding: .2rem 0 }
details > .scroll, details > pre { margin-top: .6rem }
@media print {
  :root { --page: #fff; LIGHT } body { padding: 0; max-width: none }
  nav { display: none } h2 { break-after: avoid } .card, tr { break-inside: avoid }
  .scroll { overflow: visible } .wide svg { min-width: 0 }
  details::details-content { content-visibility: visible; block-size: auto }
}
"""


def page(
    title: str,
    kicker: str,
    lead: str,
    tiles: Sequence[tuple[str, str, str]],
    sections: Iterable[tuple[str, str]],
) -> str:
    """Put a page together.

    title, kicker, lead and tiles (label, value, detail) are text; sections are headings and HTML
    made by the functions below.
    """
    sections = [(heading, body) for heading, body in sections if body]
    links = "".join(f'<li><a href="#{_slug(h)}">{_text(h)}</a></li>' for h, _ in sections)
    shown = "".join(
        f"<div><dt>{_text(label)}</dt><dd>{_text(value)}<small>{_text(detail)}</small></dd></div>"
        for label, value, detail in tiles
    )
    bodies = "".join(
        f'<section><h2 id="{_slug(heading)}">{_text(heading)}</h2>{body}</section>\n'
        for heading, body in sections
    )
    return f"""<!DOCTYPE html>
<html lang="en">
{_head(title)}<body>
<header>
<p class="kicker">{_text(kicker)}</p>
<h1>{_text(title)}</h1>
{paragraph(lead, muted=True)}
{f'<dl class="tiles">{shown}</dl>' if shown else ""}
<nav aria-label="Contents"><ul>{links}</ul></nav>
</header>
<main>
{bodies}</main>
</body>
</html>
"""


def _head(title: str) -> str:
    css = CSS.replace("LIGHT", _variables(0)).replace("DARK", _variables(1))
    return f"""<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{_text(title)}</title>
<style>{css}</style>
</head>
"""


def _variables(index: int) -> str:
    return " ".join(f"--{name}: {shades[index]};" for name, shades in COLOURS.items())


def _slug(heading: str) -> str:
    return "-".join(heading.lower().split())


def _text(text: str) -> str:
    return html.escape(text)


def paragraph(text: str, *, muted: bool = False) -> str:
    """Write a paragraph of text."""
    return f"<p{' class=muted' if muted else ''}>{_text(text)}</p>"


def note(text: str) -> str:
    """Write what the reader should know about this report: what is missing, and why."""
    return f'<p class="note">{_text(text)}</p>'


def preformatted(title: str, text: str) -> str:
    """Write text line by line in a card."""
    return f'<div class="card"><h3>{_text(title)}</h3><pre>{_text(text)}</pre></div>'


def pictures(shown: Iterable[Picture]) -> str:
    """Write pictures as cards, two beside each other where there is room."""
    cards = "".join(
        f'<figure class="card{" wide" if picture.wide else ""}"><h3>{_text(picture.title)}</h3>'
        f'<div class="scroll">{svg(picture)}</div>'
        f"<figcaption>{_text(picture.caption)}</figcaption></figure>\n"
        for picture in shown
    )
    return f'<div class="cards">{cards}</div>' if cards else ""


def table(rows: Table, caption: str, *, words: int = 1, folded: str = "") -> str:
    """Write a table in a card; the first `words` columns hold words, the others numbers.

    Head, body and tail have their colours. folded: what to click on, where the table
    is long and begins closed.
    """
    heading, *lines = rows
    classes = ["" if k < words else ' class="number"' for k in range(len(heading))]
    head = "".join(
        f'<th scope="col"{style}>{_named_part(cell)}</th>'
        for style, cell in zip(classes, heading, strict=True)
    )
    body = "".join(f"<tr>{_cells(line, heading, classes)}</tr>" for line in lines)
    whole = (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_text(caption)}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        f"<figcaption>{_text(caption)}</figcaption>"
    )
    if folded:
        whole = f"<details><summary>{_text(folded)}</summary>{whole}</details>"
    return f'<figure class="card">{whole}</figure>'


def _cells(line: Sequence[str], heading: Sequence[str], classes: Sequence[str]) -> str:
    first, *others = (
        _named_part(cell) if name == "part" else _text(cell)
        for name, cell in zip(heading, line, strict=True)
    )
    cells = (f"<td{style}>{cell}</td>" for style, cell in zip(classes[1:], others, strict=True))
    return f'<th scope="row">{first}</th>{"".join(cells)}'


def _named_part(cell: str) -> str:
    known = cell in ("head", "body", "tail")
    return f'<span class="{cell}">{cell}</span>' if known else _text(cell)
