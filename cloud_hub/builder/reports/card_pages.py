"""A card's sections as Markdown and as one self-contained HTML page. No I/O; every text is escaped here."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from cloud_hub.builder.reports.card_text import PlotName, Section, Table

_MARKDOWN_SPECIAL = re.compile(r"([\\`*_\[\]|#~])")

# Nothing is fetched, and no script runs, whatever a label or file name holds.
_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'"
_STYLE: Final = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #5c656f; --line: #d5dae0; --paper: #ffffff;
  --tint: #f3f5f8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --soft: #a3adb8; --line: #3a424c; --paper: #15181c; --tint: #1e2329; }
}
body { margin: 0 auto; max-width: 58rem; padding: 1.5rem 1rem 4rem; color: var(--ink);
  background: var(--paper); font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
p { margin: .6rem 0; }
ul { margin: .6rem 0; padding-left: 1.3rem; }
section:first-of-type ul { list-style: none; padding: .8rem 1rem; background: var(--tint);
  border-radius: .5rem; }
.closing { color: var(--soft); font-size: .9rem; overflow-wrap: anywhere; }
figure { margin: 1rem 0; }
figure svg { display: block; width: 100%; height: auto; max-width: 46rem; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; }
th:first-child, td:first-child, .facts td { text-align: left; font-weight: normal; }
thead th { color: var(--soft); font-weight: 600; }
.facts td { overflow-wrap: anywhere; }
"""


@dataclass(frozen=True, slots=True)
class Plot:
    """An inline SVG whose ink is `var(--ink)`, and what it shows in words."""

    svg: str
    alt: str


def markdown_of(title: str, sections: Sequence[Section]) -> str:
    """The card as Markdown; plots are left to the page."""
    blocks = [f"# {_markdown(title)}"]
    for section in sections:
        blocks.append(f"## {_markdown(section.title)}")
        blocks += map(_markdown, section.paragraphs)
        if section.bullets:
            blocks.append("\n".join(f"- {_markdown(bullet)}" for bullet in section.bullets))
        if section.table is not None:
            blocks.append("\n".join(_markdown_rows(section.table)))
        if section.closing is not None:
            blocks.append(_markdown(section.closing))
    return "\n\n".join(blocks) + "\n"


def html_of(title: str, sections: Sequence[Section], plots: Mapping[PlotName, Plot]) -> str:
    """The card as a page that asks for nothing else; a section whose plot is not given does without."""
    body = "\n".join(line for section in sections for line in _html_section(section, plots))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n<h1>{escape(title)}</h1>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _markdown(text: str) -> str:
    """One line in which nothing is markup: neither Markdown's nor HTML's."""
    return escape(_MARKDOWN_SPECIAL.sub(r"\\\1", " ".join(text.split())), quote=False)


def _markdown_rows(table: Table) -> Iterator[str]:
    align = "---:" if any(table.heads) else "---"
    yield _markdown_row(table.heads)
    yield f"|---|{f'{align}|' * (len(table.heads) - 1)}"
    yield from map(_markdown_row, table.rows)


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_markdown, cells))} |"


def _html_section(section: Section, plots: Mapping[PlotName, Plot]) -> Iterator[str]:
    yield f"<section>\n<h2>{escape(section.title)}</h2>"
    for paragraph in section.paragraphs:
        yield f"<p>{escape(paragraph)}</p>"
    if section.bullets:
        yield f"<ul>{''.join(f'<li>{escape(bullet)}</li>' for bullet in section.bullets)}</ul>"
    if section.plot is not None and section.plot in plots:
        yield f"<figure>{_labelled(plots[section.plot])}</figure>"
    if section.table is not None:
        yield from _html_table(section.table)
    if section.closing is not None:
        yield f'<p class="closing">{escape(section.closing)}</p>'
    yield "</section>"


def _labelled(plot: Plot) -> str:
    return plot.svg.replace("<svg", f'<svg role="img" aria-label="{escape(plot.alt)}"', 1)


def _html_table(table: Table) -> Iterator[str]:
    is_facts = not any(table.heads)
    yield f'<div class="table"><table{" class=facts" if is_facts else ""}>'
    if not is_facts:
        heads = "".join(f"<th scope=col>{escape(head)}</th>" for head in table.heads)
        yield f"<thead><tr>{heads}</tr></thead>"
    yield "<tbody>"
    for name, *cells in table.rows:
        figures = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        yield f"<tr><th scope=row>{escape(name)}</th>{figures}</tr>"
    yield "</tbody></table></div>"
