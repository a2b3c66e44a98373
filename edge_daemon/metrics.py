"""What the device counts about itself: plain integers on the hot path, read by Prometheus and by reports.

A `Tally` takes no lock. It has one writing thread; others read a copy, which CPython takes in one step. A
metric's name here is its name everywhere: `/metrics`, the report to the hub, the documentation.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from edge_cascade.health_keys import HEALTH_KEYS
from edge_daemon.core.examples import ExampleCounts
from edge_daemon.core.spooling import SpoolCounts

PREFIX: Final = "edge_"
LATENCY_BUCKETS_S: Final = (
    *(0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05),
    *(0.1, 0.2, 0.5, 1.0, 2.0, 5.0),
)
MAX_SERIES_PER_TALLY: Final = 64
"""Beyond this, label values are folded into `other`: a label may come from a sensor's payload."""

_REPORT_KEY_LENGTH: Final = 128
_REPORT_KEYS: Final = 512


class Tally:
    """A counter with labels. One thread adds."""

    __slots__ = ("_values", "help", "labels", "name")

    def __init__(self, name: str, help_text: str, *labels: str) -> None:
        self.name = PREFIX + name
        self.help = help_text
        self.labels = labels
        self._values: dict[tuple[str, ...], int] = {}

    def add(self, *values: str, n: int = 1) -> None:
        """Count `n` under these label values, in the order of `labels`."""
        try:
            self._values[values] += n
        except KeyError:
            if len(self._values) >= MAX_SERIES_PER_TALLY:
                values = ("other",) * len(self.labels)
            self._values[values] = self._values.get(values, 0) + n

    def values(self) -> dict[tuple[str, ...], int]:
        """A copy; a tally without labels has its one value from the start."""
        return self._values.copy() if self.labels or self._values else {(): 0}

    @property
    def total(self) -> int:
        """The sum over all labels."""
        return sum(self._values.copy().values())


class LatencyHistogram:
    """Seconds in fixed buckets, by model. One thread observes."""

    __slots__ = ("_by_model", "help", "name")

    def __init__(self, name: str, help_text: str) -> None:
        self.name = PREFIX + name
        self.help = help_text
        self._by_model: dict[str, tuple[list[int], list[float]]] = {}

    def observe(self, model: str, seconds: float) -> None:
        """Count one measurement."""
        try:
            counts, total = self._by_model[model]
        except KeyError:
            counts, total = self._by_model[model] = ([0] * (len(LATENCY_BUCKETS_S) + 1), [0.0])
        counts[bisect_left(LATENCY_BUCKETS_S, seconds)] += 1
        total[0] += seconds

    def values(self) -> dict[str, tuple[tuple[int, ...], float]]:
        """By model: the counts of the buckets, the last without an upper bound, and the sum in seconds."""
        return {model: (tuple(counts), total[0]) for model, (counts, total) in self._by_model.copy().items()}


@dataclass(frozen=True, slots=True)
class Reading:
    """A number that somebody else keeps, as it was when asked for. `is_total`: it only grows.

    Readings of one name have the same labels and follow each other.
    """

    name: str
    help: str
    value: int
    is_total: bool
    labels: Mapping[str, str] = field(default_factory=dict)


class Metrics:
    """All of the device's metrics, each a field, and a registry of its own."""

    def __init__(self) -> None:
        self.samples = Tally(
            "samples", "Samples answered, by the exit that answered.", "model", "exit", "precision"
        )
        self.escalated = Tally("escalated", "Samples that the gate sent to the hub.", "model")
        self.audited = Tally("audited", "Samples that the audit coin sent to the hub.", "model")
        self.deferred = Tally("deferred", "Answers given although no rung was sure enough.", "model")
        self.uncertified = Tally("uncertified", "Answers that no certificate covers.", "model")
        self.failed = Tally("failed", "Samples that no stage could answer.", "model")
        self.shed = Tally("shed", "Samples thrown away unanswered.", "reason")
        self.malformed = Tally("malformed", "Sensor messages that could not be read.", "source")
        self.verdicts = Tally("verdicts", "Verdicts passed on.", "model", "source")
        self.rounds_offered = Tally("rounds_offered", "Offers of rounds that were believed.", "model")
        self.rounds_declined = Tally(
            "rounds_declined", "Offers not worked on, by reason; some are later.", "model", "reason"
        )
        self.rounds_joined = Tally("rounds_joined", "Trainings started.", "model")
        self.rounds_completed = Tally("rounds_completed", "Updates that the hub has.", "model")
        self.trainings_failed = Tally("trainings_failed", "Trainings that gave no update.", "model")
        self.training_ms = Tally("training_ms", "Milliseconds spent on trainings that are done.", "model")
        self.training_examples = Tally("training_examples", "Examples of trainings that are done.", "model")
        self.update_bytes = Tally("update_bytes", "Bytes of the deltas given to the spool.", "model")
        self.base_bytes = Tally("base_bytes", "Bytes of training bases received.", "model")
        self.latency = LatencyHistogram("latency_seconds", "From the sample's arrival to its answer.")
        self._spool: Callable[[], SpoolCounts] | None = None
        self._sources: list[Callable[[], Sequence[Reading]]] = []
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(_Families(self))

    def tallies(self) -> Iterator[Tally]:
        """Every tally, in the order of the fields."""
        for value in vars(self).values():
            if isinstance(value, Tally):
                yield value

    def watch_spool(self, counts: Callable[[], SpoolCounts]) -> None:
        """Read rows, bytes and drops from here whenever asked."""
        self._spool = counts
        self._sources.append(lambda: _spool_readings(counts()))

    def watch_uplink(self, counters: Callable[[], Mapping[str, int]]) -> None:
        """Read the uplink's counters (`MqttUplink.counters`) whenever asked."""
        self._sources.append(
            lambda: [
                Reading(f"{PREFIX}uplink_{name}", f"Uplink: {name.replace('_', ' ')}.", value, is_total=True)
                for name, value in counters().items()
            ]
        )

    def watch_examples(self, counts: Callable[[], ExampleCounts]) -> None:
        """Read the example store's numbers whenever asked."""
        self._sources.append(lambda: _example_readings(counts()))

    def watch(
        self, name: str, help_text: str, read: Callable[[], int | None], *, is_total: bool = True
    ) -> None:
        """Read one more number whenever asked: a queue's depth, a counter elsewhere; None is left out."""

        def source() -> list[Reading]:
            value = read()
            return [] if value is None else [Reading(PREFIX + name, help_text, value, is_total)]

        self._sources.append(source)

    def readings(self) -> Iterator[Reading]:
        """Every watched number, as it is now."""
        for source in self._sources:
            yield from source()

    def drops(self) -> dict[tuple[str, str], tuple[int, int]]:
        """Count and bytes of the rows that left the spool without the hub having them, by (reason, kind)."""
        if self._spool is None:
            return {}
        return {
            (reason.value, kind.name.lower()): (dropped.count, dropped.size_bytes)
            for (reason, kind), dropped in self._spool().drops.items()
        }

    def render(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)

    def snapshot(self) -> dict[str, int]:
        """Every number by `name{label=value,...}`, as a `Report` carries it.

        It holds so many only: those that a release's health is judged by are the last to be left out.
        """
        found: dict[str, int] = {}
        for tally in self.tallies():
            for values, count in tally.values().items():
                found[_series(tally.name, dict(zip(tally.labels, values, strict=True)))] = count
        for model, (counts, total_s) in self.latency.values().items():
            found[_series("edge_latency_count", {"model": model})] = sum(counts)
            found[_series("edge_latency_sum_us", {"model": model})] = round(total_s * 1e6)
        for reading in self.readings():
            found[_series(reading.name, reading.labels)] = reading.value
        for (reason, kind), (count, size_bytes) in self.drops().items():
            found[_series("edge_spool_dropped", {"reason": reason, "kind": kind})] = count
            found[_series("edge_spool_dropped_bytes", {"reason": reason, "kind": kind})] = size_bytes
        ordered = sorted(found, key=lambda key: not key.startswith(HEALTH_KEYS))
        return {key: max(found[key], 0) for key in ordered[:_REPORT_KEYS]}


def _spool_readings(counts: SpoolCounts) -> list[Reading]:
    gauges = (
        ("spool_rows", "Rows in the spool.", counts.rows),
        ("spool_bytes", "Bytes in the spool.", counts.size_bytes),
        ("spool_in_flight_rows", "Rows on their way to the hub.", counts.in_flight_rows),
        ("spool_deferred_rows", "Rows put back after the hub refused them.", counts.deferred_rows),
    )
    totals = (
        ("spool_appended", "Rows accepted since the start.", counts.appended),
        ("spool_acknowledged", "Rows that the hub has, since the start.", counts.acknowledged),
        ("spool_commits", "Transactions since the start.", counts.commits),
        ("spool_failed", "Items that the disk did not take, since the start.", counts.spool_failed),
        ("spool_corruptions", "Damaged spool files moved aside since the start.", counts.corruptions),
    )
    return [
        Reading(PREFIX + name, help_text, value, is_total)
        for group, is_total in ((gauges, False), (totals, True))
        for name, help_text, value in group
    ]


def _example_readings(counts: ExampleCounts) -> list[Reading]:
    held = {(model, origin.name.lower()): count for (model, origin), count in counts.rows.items()}
    held |= {(model, "pending"): count for model, count in counts.pending.items()}
    numbers = (
        ("examples_bytes", "What examples count against their limit.", counts.size_bytes, False),
        ("examples_stored", "Examples stored since the start.", counts.stored, True),
        ("examples_corruptions", "Damaged files moved aside since the start.", counts.corruptions, True),
    )
    return [
        *(
            Reading(f"{PREFIX}examples", "Examples kept.", count, False, {"model": model, "origin": origin})
            for (model, origin), count in sorted(held.items())
        ),
        *(Reading(PREFIX + name, text, value, is_total) for name, text, value, is_total in numbers),
        *(
            Reading(
                f"{PREFIX}examples_dropped", "Samples not kept any more.", count, True, {"reason": reason}
            )
            for reason, count in sorted(counts.dropped.items())
        ),
        *(
            Reading(f"{PREFIX}labels", "Labels from the site.", count, True, {"outcome": outcome})
            for outcome, count in sorted(counts.labels.items())
        ),
    ]


class _Families(Collector):
    """Turns the plain integers into Prometheus' families, only when they are asked for."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        for tally in self._metrics.tallies():
            family = CounterMetricFamily(tally.name, tally.help, labels=tally.labels)
            for values, count in tally.values().items():
                family.add_metric(values, count)
            yield family
        yield self._latency()
        for _, group in groupby(self._metrics.readings(), key=lambda reading: reading.name):
            yield _family(list(group))
        yield from self._drops()

    def _latency(self) -> Metric:
        latency = self._metrics.latency
        family = HistogramMetricFamily(latency.name, latency.help, labels=("model",))
        for model, (counts, total_s) in latency.values().items():
            buckets: list[tuple[str, float]] = []
            running = 0
            for bound, count in zip((*map(str, LATENCY_BUCKETS_S), "+Inf"), counts, strict=True):
                running += count
                buckets.append((bound, running))
            family.add_metric((model,), buckets, total_s)
        return family

    def _drops(self) -> Iterator[Metric]:
        dropped = CounterMetricFamily(
            "edge_spool_dropped", "Rows given up, ever; kept on disk.", labels=("reason", "kind")
        )
        size = CounterMetricFamily(
            "edge_spool_dropped_bytes", "Bytes given up, ever; kept on disk.", labels=("reason", "kind")
        )
        for labels, (count, size_bytes) in self._metrics.drops().items():
            dropped.add_metric(labels, count)
            size.add_metric(labels, size_bytes)
        yield dropped
        yield size


def _family(readings: Sequence[Reading]) -> Metric:
    first = readings[0]
    labels = tuple(first.labels)
    family = (
        CounterMetricFamily(first.name, first.help, labels=labels)
        if first.is_total
        else GaugeMetricFamily(first.name, first.help, labels=labels)
    )
    for reading in readings:
        family.add_metric(tuple(reading.labels.values()), reading.value)
    return family


def _series(name: str, labels: Mapping[str, str]) -> str:
    inside = ",".join(f"{label}={value}" for label, value in labels.items())
    return (f"{name}{{{inside}}}" if inside else name)[:_REPORT_KEY_LENGTH]
