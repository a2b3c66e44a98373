"""A card's plots as inline SVG, in the page's own ink so that they are read on light and dark paper.

The one module that imports matplotlib (the `build` extra).
"""

from __future__ import annotations

import io
import re
from typing import Any, Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cloud_hub.builder.reports.card import Card, CurvePoint
from cloud_hub.builder.reports.card_pages import Plot
from cloud_hub.builder.reports.card_text import PlotName, chosen_point
from cloud_hub.builder.reports.evaluate import work_share

# Read well on white and on near-black alike, and apart from each other by people who see no red and green.
_BLUE: Final = "#3b86d1"
_ORANGE: Final = "#d9801f"
_GREEN: Final = "#2a9d7a"
# Colours that nothing else uses; each is replaced by a variable of the page.
_INK: Final = "#010203"
_LINE: Final = "#040506"
_VARIABLES: Final = {_INK: "var(--ink)", _LINE: "var(--line)"}

_SETTINGS: Final[dict[Any, Any]] = {
    "svg.fonttype": "none",
    "font.family": ["sans-serif"],
    "font.size": 11,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
}
_NO_METADATA: Final = {"Creator": None, "Date": None, "Format": None, "Type": None}
_ID = re.compile(r'\bid="([^"]+)"')
_REFERENCE = re.compile(r'url\(#([^)]+)\)|href="#([^"]+)"')


def plots_of(card: Card) -> dict[PlotName, Plot]:
    """Every plot of the card; the same card gives the same bytes with one version of matplotlib."""
    return {
        "curve": Plot(_curve(card), _curve_alt(card)),
        "rungs": Plot(_rungs(card), _rungs_alt(card)),
        "reliability": Plot(_reliability(card), _reliability_alt(card)),
    }


def _curve(card: Card) -> str:
    with mpl.rc_context({**_SETTINGS, "svg.hashsalt": "curve"}):
        figure = Figure(figsize=(7.4, 4.2), layout="constrained")
        axes = figure.add_subplot()
        inner = sorted(card.curve, key=lambda each: each.bytes_up)
        axes.plot(
            [each.bytes_up for each in inner],
            [100 * each.accuracy for each in inner],
            color=_BLUE,
            linewidth=2,
        )
        _mark(axes, card.cloud_only, "full model alone", _INK, "s")
        _mark(axes, card.edge_only, "board alone", _ORANGE, "v")
        if card.naive is not None:
            _mark(axes, card.naive, "untested thresholds", _GREEN, "D")
        _mark(axes, chosen_point(card), "this bundle", _BLUE, "o")
        # What matters happens at a few percent of the bytes.
        axes.set_xscale("function", functions=(lambda x: abs(x) ** 0.5, lambda x: x**2))
        axes.set_xlim(left=0)
        axes.set_xlabel("bytes a sample on the uplink (square-root scale)")
        axes.set_ylabel(f"{_measure(card)}, %")
        axes.legend(loc="lower right")
        return _svg(figure, "curve")


def _mark(axes: Axes, point: CurvePoint, name: str, colour: str, marker: str) -> None:
    axes.plot(
        [point.bytes_up],
        [100 * point.accuracy],
        marker=marker,
        markersize=9,
        color=colour,
        linestyle="none",
        label=name,
        clip_on=False,
        zorder=3,
    )


def _curve_alt(card: Card) -> str:
    chosen = chosen_point(card)
    return (
        f"{_measure(card)} against bytes a sample. This bundle: {chosen.accuracy:.1%} at "
        f"{chosen.bytes_up:,.1f} bytes. Full model alone: {card.cloud_only.accuracy:.1%} at "
        f"{card.cloud_only.bytes_up:,.1f} bytes. Board alone: {card.edge_only.accuracy:.1%} at none."
    )


def _rungs(card: Card) -> str:
    figures = card.evaluation.rungs
    names = [f"stage {each.stage}, {each.precision}" for each in figures]
    whole = card.evaluation.network_mult_adds
    with mpl.rc_context({**_SETTINGS, "svg.hashsalt": "rungs", "axes.grid.axis": "x"}):
        figure = Figure(figsize=(7.4, 0.55 * len(names) + 1.5), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        shares = [100 * each.answers for each in figures] + [100 * card.evaluation.upload_share]
        bars = left.barh([*names, "hub"], shares, color=[_BLUE] * len(names) + [_ORANGE], height=0.6)
        left.bar_label(bars, fmt="%.1f", padding=3)
        left.set_xlabel("answers, % of samples")
        work = [100 * work_share(each.mult_adds_so_far, whole) for each in figures]
        bars = right.barh(names, work, color=_GREEN, height=0.6)
        right.bar_label(bars, fmt="%.0f", padding=3)
        right.set_xlabel("work so far, % of the network")
        for axes in (left, right):
            axes.margins(x=0.2)
        left.invert_yaxis()
        return _svg(figure, "rungs")


def _rungs_alt(card: Card) -> str:
    answers = ", ".join(f"rung {each.rung} {each.answers:.1%}" for each in card.evaluation.rungs)
    return f"Who answers: {answers}, the hub {card.evaluation.upload_share:.1%}."


def _reliability(card: Card) -> str:
    count = len(card.reliability)
    with mpl.rc_context({**_SETTINGS, "svg.hashsalt": "reliability"}):
        figure = Figure(figsize=(max(1.85 * count, 3.6), 2.7), layout="constrained")
        panels = figure.subplots(1, count, sharey=True, squeeze=False)[0]
        for axes, each in zip(panels, card.reliability, strict=True):
            rung = card.evaluation.rungs[each.rung]
            most = max(place.samples for place in each.bins)
            axes.plot([0, 100], [0, 100], color=_INK, linewidth=1, linestyle=":")
            # No line between the bins: some hold a handful of samples, as the size of their dots says.
            axes.scatter(
                [100 * place.confidence for place in each.bins],
                [100 * place.accuracy for place in each.bins],
                s=[12 + 110 * place.samples / most for place in each.bins],
                color=_BLUE,
                clip_on=False,
                zorder=3,
            )
            axes.set_title(f"stage {rung.stage}, {rung.precision}\nECE {100 * each.ece:.1f}", fontsize=10)
            axes.set(xlim=(0, 100), ylim=(0, 100), xticks=(0, 50, 100), yticks=(0, 25, 50, 75, 100))
        figure.supxlabel("probability given, %", fontsize=11)
        figure.supylabel("right, %", fontsize=11)
        return _svg(figure, "reliability")


def _reliability_alt(card: Card) -> str:
    errors = ", ".join(f"rung {each.rung} {100 * each.ece:.1f}" for each in card.reliability)
    return f"Reliability diagrams, one a rung. Expected calibration error in points: {errors}."


def _measure(card: Card) -> str:
    return "accuracy" if card.reference == "true labels" else "agreement with the full model"


def _svg(figure: Figure, name: PlotName) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata=_NO_METADATA)
    svg = buffer.getvalue()
    # The declaration and document type, with their address, belong to files of their own.
    svg = svg[svg.index("<svg") :]
    # Several plots share a page, and an id may stand there once.
    svg = _ID.sub(rf'id="{name}-\1"', svg)
    svg = _REFERENCE.sub(lambda match: match.group(0).replace("#", f"#{name}-"), svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return svg
