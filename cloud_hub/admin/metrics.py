"""The hub in numbers, as a document and for Prometheus. Made when asked, from one reading of the counters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from cloud_hub.admin.documents import Agreement, Latency, ModelStats, Stats
from cloud_hub.store.queries import Totals

METRICS_TYPE: Final = CONTENT_TYPE_LATEST
MAX_UNKNOWN: Final = 100
"""Models that this hub does not run are named by whoever sends cases: more names than this are one."""
OTHER: Final = "other"

_OF_MODELS: Final = frozenset({"cases", "verdicts", "failures", "agreement", "rounds"})


@dataclass(frozen=True, slots=True)
class Vitals:
    """What the running hub knows of itself, and the store does not."""

    broker_up: bool
    intake_waiting: int
    not_taken: int
    acks_latency_s: tuple[float, float] | None
    verdicts_sent: int
    ready: bool


def stats_document(totals: Totals, vitals: Vitals, known_models: Collection[str]) -> Stats:
    """What /v1/stats says. Of the models that this hub does not run the first hundred have their names, the
    rest are `other`.
    """
    counters = {name: value for name, value in totals.counters.items() if not _is_of_model(name)}
    by_model = _counted_by_model(totals.counters, known_models)
    latency = vitals.acks_latency_s
    return Stats(
        devices=totals.devices,
        devices_online=totals.devices_online,
        models={model: _model_stats(counted) for model, counted in sorted(by_model.items())},
        pending=totals.pending,
        unconfirmed_verdicts=totals.unconfirmed,
        stored_bytes=counters.get("stored_bytes", 0),
        tensor_bytes=counters.get("tensor_bytes", 0),
        duplicates=counters.get("duplicates", 0),
        updates=counters.get("updates", 0),
        votes=_below(counters, "votes/"),
        base_requests=_below(counters, "base_requests/"),
        round_bytes=_below(counters, "round_bytes/"),
        rejected=_below(counters, "rejected/"),
        malformed=_below(counters, "malformed/"),
        not_taken=vitals.not_taken,
        acks_latency=None
        if latency is None
        else Latency(p50_ms=round(latency[0] * 1000, 3), p99_ms=round(latency[1] * 1000, 3)),
    )


def render_metrics(stats: Stats, vitals: Vitals, known_models: Collection[str]) -> bytes:
    """The same for Prometheus. A model that this hub does not run counts as `other`: labels stay few."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshot(stats, vitals, known_models))
    return generate_latest(registry)


class _Snapshot(Collector):
    def __init__(self, stats: Stats, vitals: Vitals, known_models: Collection[str]) -> None:
        self._stats = stats
        self._vitals = vitals
        self._known = known_models

    def collect(self) -> Iterator[Metric]:
        stats, vitals = self._stats, self._vitals
        yield self._by_model("cases", "Cases committed, by reason", "reason", lambda one: one.cases)
        yield self._by_model("verdicts", "Current verdicts, by source", "source", lambda one: one.verdicts)
        yield self._by_model(
            "failed_cases", "Cases that the full model cannot answer", "kind", lambda one: {"any": one.failed}
        )
        yield self._by_model("rounds", "Rounds that ended, by outcome", "outcome", lambda one: one.rounds)
        for kind, label, found in (
            ("malformed_frames", "reason", stats.malformed),
            ("rejected_cases", "reason", stats.rejected),
            ("votes", "outcome", stats.votes),
            ("base_requests", "outcome", stats.base_requests),
            ("round_bytes", "direction", stats.round_bytes),
        ):
            family = CounterMetricFamily(
                f"hub_{kind}", f"{kind.replace('_', ' ')}, by {label}", labels=[label]
            )
            for reason, value in found.items():
                family.add_metric([reason], value)
            yield family
        for name, text, total in (
            ("duplicates", "Items that were here already", stats.duplicates),
            ("client_updates", "Client updates committed", stats.updates),
            ("stored_bytes", "Bytes of tensors and updates as stored", stats.stored_bytes),
            ("not_taken", "Messages left unacknowledged because the intake was full", stats.not_taken),
            ("verdicts_sent", "Verdicts sent, repetitions included", vitals.verdicts_sent),
        ):
            yield CounterMetricFamily(f"hub_{name}", text, value=total)
        for name, text, level in (
            ("devices", "Boards ever heard of", stats.devices),
            ("devices_online", "Boards online", stats.devices_online),
            ("pending_cases", "Cases without an answer", stats.pending),
            ("unconfirmed_verdicts", "Verdicts not confirmed by their boards", stats.unconfirmed_verdicts),
            ("intake_waiting", "Messages that wait to be read", vitals.intake_waiting),
            ("broker_up", "Whether the broker is connected", int(vitals.broker_up)),
            ("ready", "Whether the hub can do its work", int(vitals.ready)),
        ):
            yield GaugeMetricFamily(f"hub_{name}", text, value=level)
        if stats.acks_latency is not None:
            latency = GaugeMetricFamily(
                "hub_ack_latency_seconds",
                "Arrival to acknowledgement, last thousand messages",
                labels=["quantile"],
            )
            latency.add_metric(["0.5"], stats.acks_latency.p50_ms / 1000)
            latency.add_metric(["0.99"], stats.acks_latency.p99_ms / 1000)
            yield latency

    def _by_model(
        self, name: str, text: str, label: str, values: Callable[[ModelStats], dict[str, int]]
    ) -> Metric:
        sums: Counter[tuple[str, str]] = Counter()
        for model, one in self._stats.models.items():
            for key, value in values(one).items():
                sums[model if model in self._known else OTHER, key] += value
        family = CounterMetricFamily(f"hub_{name}", text, labels=["model", label])
        for (model, key), value in sorted(sums.items()):
            family.add_metric([model, key], value)
        return family


def _is_of_model(name: str) -> bool:
    return name.partition("/")[0] in _OF_MODELS


def _counted_by_model(counters: Mapping[str, int], known: Collection[str]) -> dict[str, Counter[str]]:
    """Counters as `cases/unsure` by the model that they name, in one pass: there may be very many names."""
    found: dict[str, Counter[str]] = {}
    unknown: set[str] = set()
    for name, value in counters.items():
        if not _is_of_model(name):
            continue
        kind, model, *rest = name.split("/")
        if model not in known and model not in unknown:
            if len(unknown) < MAX_UNKNOWN:
                unknown.add(model)
            else:
                model = OTHER
        found.setdefault(model, Counter())["/".join((kind, *rest))] += value
    return found


def _model_stats(counted: Mapping[str, int]) -> ModelStats:
    return ModelStats(
        cases=_below(counted, "cases/"),
        verdicts=_below(counted, "verdicts/"),
        failed=counted.get("failures", 0),
        audits=_agreement(counted, "agreement/audit/"),
        escalations=_agreement(counted, "agreement/escalation/"),
        rounds=_below(counted, "rounds/"),
    )


def _agreement(counted: Mapping[str, int], start: str) -> Agreement:
    same, different = counted.get(f"{start}same", 0), counted.get(f"{start}different", 0)
    total = same + different
    return Agreement(same=same, different=different, share=same / total if total else None)


def _below(counters: Mapping[str, int], start: str) -> dict[str, int]:
    return {name.removeprefix(start): value for name, value in counters.items() if name.startswith(start)}
