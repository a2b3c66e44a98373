"""What `cloud-hub build` prints at the end: what was made, what it does, what it promises."""

# ruff: noqa: T201 - what a command prints is its result

from __future__ import annotations

from rich.console import Console

from cloud_hub.builder.assemble import BUNDLE, FULL_MODEL
from cloud_hub.builder.build import Built
from cloud_hub.builder.reports.card_text import promises_of
from cloud_hub.builder.reports.tables import print_evaluation


def print_summary(built: Built) -> None:
    """Tables, the promise in a sentence, and where the files are."""
    console = Console()
    card = built.card
    print_evaluation(card.evaluation)
    promises = promises_of(card)
    for sentence in promises:
        console.print(sentence)
    if not promises:
        console.print("No certificate: the thresholds fit the calibration data and promise nothing more.")
    print(f"for the boards  {built.out / BUNDLE}  ({built.bundle_id[:12]})")
    print(f"for the hub     {built.out / FULL_MODEL}")
    print(f"to read         {built.out / 'card.html'}")
