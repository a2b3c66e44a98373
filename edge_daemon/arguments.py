"""Numbers that are typed on a command line. No I/O."""

from __future__ import annotations

import argparse


def between(text: str, low: float, high: float, what: str) -> float:
    """A number from the command line, `low` to `high`; `what` says it in words.

    Raises:
        argparse.ArgumentTypeError: for anything else.
    """
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    # Written so that NaN fails as well.
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return value
