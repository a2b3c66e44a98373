"""Numbers as they are counted, as Prometheus reads them, and as a report carries them."""

from __future__ import annotations

import itertools
import threading

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from edge_cascade.messages import Report
from edge_daemon.core.spooling import Dropped, DropReason, Priority, SpoolCounts
from edge_daemon.metrics import LATENCY_BUCKETS_S, MAX_SERIES_PER_TALLY, Metrics


def counted():
    metrics = Metrics()
    metrics.samples.add("vibration", "0", "int8")
    metrics.samples.add("vibration", "0", "int8", n=2)
    metrics.samples.add("digits", "1", "fp32")
    metrics.shed.add("queue_full")
    metrics.latency.observe("vibration", 0.0003)
    metrics.latency.observe("vibration", 9.0)
    drops = {(DropReason.LIMIT, Priority.AUDIT): Dropped(3, 600)}
    metrics.watch_spool(
        lambda: SpoolCounts(rows=7, size_bytes=900, in_flight_rows=2, drops=drops, spool_failed=4)
    )
    metrics.watch_uplink(lambda: {"bytes_up": 12345, "retries": 1})
    metrics.watch("queue_depth", "Samples that wait.", lambda: 5, is_total=False)
    return metrics


def test_a_snapshot_names_every_number_with_its_labels():
    assert counted().snapshot() == {
        "edge_samples{model=vibration,exit=0,precision=int8}": 3,
        "edge_samples{model=digits,exit=1,precision=fp32}": 1,
        "edge_shed{reason=queue_full}": 1,
        "edge_latency_count{model=vibration}": 2,
        "edge_latency_sum_us{model=vibration}": 9_000_300,
        "edge_spool_rows": 7,
        "edge_spool_bytes": 900,
        "edge_spool_in_flight_rows": 2,
        "edge_spool_deferred_rows": 0,
        "edge_spool_appended": 0,
        "edge_spool_acknowledged": 0,
        "edge_spool_commits": 0,
        "edge_spool_failed": 4,
        "edge_spool_corruptions": 0,
        "edge_uplink_bytes_up": 12345,
        "edge_uplink_retries": 1,
        "edge_queue_depth": 5,
        "edge_spool_dropped{reason=limit,kind=audit}": 3,
        "edge_spool_dropped_bytes{reason=limit,kind=audit}": 600,
    }


def test_prometheus_reads_what_was_counted():
    families = {family.name: family for family in text_string_to_metric_families(counted().render().decode())}
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in families.values()
        for sample in family.samples
    }
    assert samples["edge_samples_total", ("exit", "0"), ("model", "vibration"), ("precision", "int8")] == 3
    assert samples["edge_spool_rows",] == 7
    assert samples["edge_spool_dropped_total", ("kind", "audit"), ("reason", "limit")] == 3
    assert samples["edge_uplink_bytes_up_total",] == 12345
    assert families["edge_queue_depth"].type == "gauge"
    assert families["edge_latency_seconds"].type == "histogram"
    assert samples["edge_latency_seconds_bucket", ("le", "0.0002"), ("model", "vibration")] == 0
    assert samples["edge_latency_seconds_bucket", ("le", "0.0005"), ("model", "vibration")] == 1
    assert samples["edge_latency_seconds_bucket", ("le", "+Inf"), ("model", "vibration")] == 2
    assert samples["edge_latency_seconds_sum", ("model", "vibration")] == 9.0003


def test_a_bucket_takes_its_own_bound():
    metrics = Metrics()
    for bound in LATENCY_BUCKETS_S:
        metrics.latency.observe("m", bound)
    assert metrics.latency.values()["m"][0] == (*[1] * len(LATENCY_BUCKETS_S), 0)


def test_hostile_label_values_stay_bounded_and_fit_into_a_report():
    metrics = Metrics()
    for n in range(10 * MAX_SERIES_PER_TALLY):
        metrics.malformed.add(f"{'x' * 300}{n}")
    values = metrics.malformed.values()
    assert len(values) == MAX_SERIES_PER_TALLY + 1
    assert values["other",] == 9 * MAX_SERIES_PER_TALLY
    assert metrics.malformed.total == 10 * MAX_SERIES_PER_TALLY
    report = Report("dev-1", b"bootboot", 1, 5, metrics.snapshot())
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(report), type=Report) == report


def test_reading_while_counting_is_safe():
    metrics = counted()
    is_done = threading.Event()

    def count():
        n = 0
        while not is_done.is_set():
            n += 1
            metrics.samples.add("m", str(n % 50), "int8")
            metrics.latency.observe(f"m{n % 50}", 0.001)

    counting = threading.Thread(target=count)
    counting.start()
    for _ in range(50):
        metrics.render()
        metrics.snapshot()
    is_done.set()
    counting.join()


def test_what_health_is_judged_by_is_in_a_report_whatever_else_there_is():
    metrics = Metrics()
    for tally in metrics.tallies():
        for number in range(MAX_SERIES_PER_TALLY):
            tally.add(*itertools.repeat(str(number), len(tally.labels)))
    metrics.latency.observe("vibration", 0.001)
    metrics.watch("running_s", "Seconds.", lambda: 7, is_total=False)
    metrics.watch("celsius_milli", "Heat.", lambda: 51_000, is_total=False)
    numbers = metrics.snapshot()
    assert len(numbers) == 512
    assert (numbers["edge_running_s"], numbers["edge_celsius_milli"]) == (7, 51_000)
    assert numbers["edge_latency_count{model=vibration}"] == 1
    assert sum(key.startswith("edge_samples{") for key in numbers) == MAX_SERIES_PER_TALLY


def test_a_number_that_is_not_there_is_left_out():
    metrics = Metrics()
    metrics.watch("celsius_milli", "Heat.", lambda: None, is_total=False)
    assert "edge_celsius_milli" not in metrics.snapshot()
    assert b"edge_celsius_milli" not in metrics.render()
