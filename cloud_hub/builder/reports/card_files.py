"""The files that a card is read in: JSON for programs, Markdown and a page of its own for people."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

from cloud_hub.builder.reports.card import Card
from cloud_hub.builder.reports.card_pages import html_of, markdown_of
from cloud_hub.builder.reports.card_text import sections_of
from edge_cascade.durable import write_durably

REPORT: Final = "report.json"
CARD_MD: Final = "card.md"
CARD_HTML: Final = "card.html"


def discard_card(out: Path) -> None:
    """Remove what `write_card` wrote: a card that is about another bundle is worse than none."""
    for name in (REPORT, CARD_MD, CARD_HTML):
        (out / name).unlink(missing_ok=True)


def write_card(out: Path, card: Card) -> None:
    """Write `report.json`, `card.md` and `card.html` into `out`; without matplotlib the page has no plots."""
    try:
        from cloud_hub.builder.reports.card_plots import plots_of
    except ImportError:
        plots = {}
    else:
        plots = plots_of(card)
    sections = sections_of(card)
    title = f"{card.evaluation.model} {card.version}"
    report = msgspec.json.format(msgspec.json.encode(card), indent=2)
    write_durably(out / REPORT, report + b"\n")
    write_durably(out / CARD_MD, markdown_of(title, sections).encode())
    write_durably(out / CARD_HTML, html_of(title, sections, plots).encode())
