"""A card's words and tables, the same for every page that shows them. No I/O."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Final, Literal

from cloud_hub.builder.reports.card import Card, CurvePoint
from cloud_hub.builder.reports.recheck import Check
from edge_cascade.policy import Certificate

PlotName = Literal["curve", "rungs", "reliability"]

VOID: Final = (
    "other data: another sensor, place, population or way of preparing samples than those measured here",
    "drift: the world changes after the measurement; audits in the field are there to notice it",
    "another full model than the one whose digest stands below",
    "operating points beyond the certified one: their answers are flagged as uncertified",
)

_RELIABILITY: Final = (
    "A rung that says 90 % should be right nine times in ten. The expected calibration error (ECE) is the "
    "mean distance from that."
)
_TRADE: Final = (
    "Estimated, not certified: where the test is expected to stop for another limit on the cost. A build "
    "with that limit tests it."
)
_BASES: Final = (100, 1_000, 10_000, 100_000)


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text; the first column names the row, the others are figures."""

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Section:
    """A heading with what stands under it, in this order; `plot` comes before the table."""

    title: str
    paragraphs: tuple[str, ...] = ()
    bullets: tuple[str, ...] = ()
    plot: PlotName | None = None
    table: Table | None = None
    closing: str | None = None


def sections_of(card: Card) -> list[Section]:
    """The card from top to bottom."""
    return [
        _summary(card),
        _promise(card),
        *_checks(card.evaluation.checks, card.measured_on),
        _curve(card),
        _rungs(card),
        _reliability(card),
        *_times(card),
        *_trade(card),
        _origin(card),
    ]


def certificate_sentence(certificate: Certificate) -> str:
    """What a certificate says, for people who need not know what a threshold is."""
    cost = (
        "answered wrongly on the board although the full model would have been right"
        if certificate.kind == "loss"
        else "answered otherwise on the board than the full model would have answered"
    )
    groups = "" if certificate.groups == certificate.samples else f" in {certificate.groups:,} groups"
    return (
        f"With {_agreed(1 - certificate.delta)} confidence, at most {share_of_many(certificate.epsilon)} "
        f"samples are {cost}; measured on {certificate.samples:,} samples{groups} that trained nothing."
    )


def share_of_many(share: float) -> str:
    """A share as a count of a round number: 0.005 is `5 in 1,000`."""
    for base in _BASES:
        count = share * base
        if count >= 1 and abs(count - round(count)) < 1e-6:
            return f"{round(count):,} in {base:,}"
    # "At most" must stay true.
    return f"{ceil(share * _BASES[-1]):,} in {_BASES[-1]:,}"


def _summary(card: Card) -> Section:
    seen = card.evaluation
    return Section(
        title="In short",
        bullets=tuple(_summary_lines(card)),
        closing=f"Plan {seen.plan}, point {seen.point}, measured on {seen.samples:,} samples "
        f"({card.measured_on}); bytes at MQTT 5, batches as full as they may be, audits not counted.",
    )


def _summary_lines(card: Card) -> Iterator[str]:
    seen, uplink = card.evaluation, card.evaluation.uplink
    yield (
        f"Answered on the board: {_percent(1 - seen.upload_share)} of samples; "
        f"{_percent(seen.upload_share)} go to the hub."
    )
    yield (
        f"{_measure(card)}: {_percent(seen.cascade_accuracy)} together, {_percent(seen.full_accuracy)} the "
        f"full model alone, {_percent(seen.edge_accuracy)} the board alone."
    )
    yield (
        f"Uplink: {uplink.bytes_up['cascade']:,.1f} bytes a sample, {_less(uplink.saved['all_deflated'])} "
        f"than sending every sample deflated, {_less(uplink.saved['all_raw'])} than sending every sample "
        f"raw ({uplink.raw_dtype})."
    )
    yield (
        f"Work: {seen.mult_adds:,.0f} multiply-adds a sample on average, {_percent(seen.compute_share)} of "
        "the board's whole network."
    )


def promises_of(card: Card) -> list[str]:
    """A sentence for each certificate of the plan: what it says of the point in use, if it reaches that."""
    seen = card.evaluation
    return [
        certificate_sentence(each)
        if seen.point <= each.last_point
        else f"The certificate of {each.kind} (at most {share_of_many(each.epsilon)}) reaches point "
        f"{each.last_point}; of the point in use ({seen.point}) it promises nothing."
        for each in card.certificates
        if each.plan == seen.plan
    ]


def _promise(card: Card) -> Section:
    title = "What is promised"
    own = [each for each in card.certificates if each.plan == card.evaluation.plan]
    if not own:
        return Section(
            title,
            ("Nothing: the thresholds fit the data they were chosen on, no test on other data was made.",),
        )
    paragraphs = promises_of(card)
    if len(own) > 1:
        paragraphs.append("Each promise has its confidence for itself; both together have less.")
    if max(each.last_point for each in own) == 0:
        paragraphs.append("No point that keeps a sample on the board passed the test: everything is sent.")
    elif card.evaluation.point > card.evaluation.certified_point:
        paragraphs.append(
            f"The point in use ({card.evaluation.point}) lies beyond the certified one "
            f"({card.evaluation.certified_point}): there nothing is promised."
        )
    paragraphs.append("The promise is void for:")
    return Section(
        title,
        tuple(paragraphs),
        bullets=VOID,
        table=Table(
            (
                "plan",
                "cost",
                "at most",
                "confidence",
                "samples",
                "groups",
                "test",
                "last point",
                "to the hub",
            ),
            tuple(
                (
                    each.plan,
                    each.kind,
                    _agreed(each.epsilon),
                    _agreed(1 - each.delta),
                    f"{each.samples:,}",
                    f"{each.groups:,}",
                    each.method,
                    f"{each.last_point}",
                    _percent(each.upload_share),
                )
                for each in card.certificates
            ),
        ),
        closing=f"Digest of the samples measured: {own[0].data_sha256}",
    )


def _checks(checks: Sequence[Check], measured_on: str) -> Iterator[Section]:
    if checks:
        yield Section(
            f"The promise held against data ({measured_on})",
            bullets=tuple(f"{check.sentence[0].upper()}{check.sentence[1:]}." for check in checks),
        )


def _curve(card: Card) -> Section:
    rows = [
        ("full model alone, everything sent", card.cloud_only),
        *([("untested thresholds, nothing promised", card.naive)] if card.naive else []),
        ("this bundle", chosen_point(card)),
        ("board alone, nothing sent", card.edge_only),
    ]
    uplink, samples = card.evaluation.uplink, card.evaluation.samples
    return Section(
        f"{_measure(card)} against bytes",
        plot="curve",
        table=Table(
            ("", _measure(card).lower(), "to the hub", "bytes a sample"),
            tuple(
                (name, _percent(each.accuracy), _percent(each.upload_share), f"{each.bytes_up:,.1f}")
                for name, each in rows
            ),
        ),
        closing=(
            f"Every sample deflated alone takes {uplink.bytes_up['one_by_one']:,.1f} bytes, raw as "
            f"{uplink.raw_dtype} {uplink.bytes_up['all_raw']:,.1f}. With TCP/IPv4 headers this bundle "
            f"takes {uplink.cascade.tcp['5'].up / samples:,.1f} bytes up and "
            f"{uplink.cascade.tcp['5'].down / samples:,.1f} down a sample."
        ),
    )


def _rungs(card: Card) -> Section:
    figures = card.evaluation.rungs
    has_cost = all(each.cost_us is not None for each in figures)
    rows = [
        (
            f"{each.rung}: stage {each.stage} in {each.precision}",
            _percent(each.answers),
            "-" if each.answered_accuracy is None else _percent(each.answered_accuracy),
            _percent(each.accuracy),
            f"{each.mult_adds_so_far:,}",
            *(
                (f"{sum(other.cost_us or 0.0 for other in figures[: each.rung + 1]):,.1f}",)
                if has_cost
                else ()
            ),
        )
        for each in figures
    ]
    blank = ("-",) if has_cost else ()
    full = _percent(card.evaluation.full_accuracy)
    rows.append(("hub: full model", _percent(card.evaluation.upload_share), "-", full, "-", *blank))
    cost = ("us up to here",) if has_cost else ()
    measure = _measure(card).lower()
    return Section(
        "Who answers, and what it costs",
        plot="rungs",
        table=Table(
            ("rung", "answers", f"{measure} there", f"{measure} alone", "multiply-adds up to here", *cost),
            tuple(rows),
        ),
        closing=(
            "Microseconds are medians of one sample." if has_cost else "Time on a board was not measured."
        ),
    )


def _times(card: Card) -> Iterator[Section]:
    if not card.stage_times:
        return
    times = {(each.stage, each.precision): each.us for each in card.stage_times}
    stages = sorted({stage for stage, _ in times})
    precisions = sorted({precision for _, precision in times})
    yield Section(
        "Time on the machine that built it",
        table=Table(
            ("stage", *[f"{precision}, us" for precision in precisions]),
            tuple(
                (
                    str(stage),
                    *[
                        f"{times[stage, precision]:,.1f}" if (stage, precision) in times else "-"
                        for precision in precisions
                    ],
                )
                for stage in stages
            ),
        ),
        closing=(
            "Medians of one sample in a tight loop on one thread. A board takes other times, and int8 may "
            "pay there where it does not here: run edge-daemon bench on it."
        ),
    )


def _reliability(card: Card) -> Section:
    return Section(
        "Are the probabilities honest?",
        (_RELIABILITY,),
        plot="reliability",
        table=Table(
            ("rung", "ECE"),
            tuple((f"{each.rung}", f"{each.ece * 100:.1f} points") for each in card.reliability),
        ),
    )


def _trade(card: Card) -> Iterator[Section]:
    if card.trade:
        yield Section(
            "What another promise would cost",
            (_TRADE,),
            table=Table(
                ("at most", "to the hub"),
                tuple(
                    (
                        share_of_many(row.epsilon),
                        "too few samples" if row.upload_share is None else _percent(row.upload_share),
                    )
                    for row in card.trade
                ),
            ),
        )


def _origin(card: Card) -> Section:
    facts = [
        ("bundle", card.evaluation.bundle_id),
        ("full model", card.full_model_sha256),
        ("labels", _shortened(card.labels)),
        ("sample", f"{' x '.join(map(str, card.input_shape))}, sent as {card.encoding}"),
        *card.made_by.items(),
    ]
    for part in card.data:
        groups = "" if part.groups is None else f" in {part.groups:,} groups"
        digest = "" if part.sha256 is None else f", SHA-256 {part.sha256}"
        facts.append((f"data: {part.name}", f"{part.samples:,} samples{groups}{digest}"))
    return Section("What it was made from", table=Table(("", ""), tuple(facts)))


def chosen_point(card: Card) -> CurvePoint:
    """The point in use, on the curve."""
    return next(each for each in card.curve if each.point == card.evaluation.point)


def _measure(card: Card) -> str:
    return "Accuracy" if card.reference == "true labels" else "Agreement with the full model"


def _percent(share: float) -> str:
    """A measured share; 99.96 % must not become 100 %."""
    digits = 1 if 0.01 <= share <= 0.99 or share in {0.0, 1.0} else 2
    return f"{share * 100:.{digits}f} %"


def _less(saved: float) -> str:
    return f"{_percent(saved)} less" if saved >= 0 else f"{_percent(-saved)} more"


def _agreed(share: float) -> str:
    """A share that somebody chose."""
    return f"{share * 100:.6g} %"


def _shortened(labels: Sequence[str], limit: int = 12) -> str:
    shown = ", ".join(labels[:limit])
    return shown if len(labels) <= limit else f"{shown} and {len(labels) - limit} more"
