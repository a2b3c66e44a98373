"""The device ends without warning, or has no room: what it said it had is in the hub or in a counter on disk."""

import pytest

from tests.faults.processes import wait_until
from tests.faults.sensor import Balance


@pytest.fixture
def crashing_device(idle_loop, tmp_path):
    """Starts a device that kills itself at a crash point of its second commit: the first is a report."""
    usual = idle_loop.device

    def start(point, **tables):
        idle_loop.device = idle_loop.new_device(tmp_path.name, **tables)
        idle_loop.device.start(EDGE_CRASH_AT=f"{point}:2")
        idle_loop.device.wait_ready()
        return idle_loop.device

    yield start
    idle_loop.device.stop()
    idle_loop.device = usual


def test_killed_after_the_commit_the_case_is_sent_by_the_next_start(idle_loop, crashing_device):
    device = crashing_device("spool.after-commit")
    sensor = idle_loop.sensor
    (name,) = sensor.send()
    device.program.wait_killed()
    assert device.spooled_cases() == 1
    meanwhile = sensor.send(3)
    device.start()
    assert idle_loop.settle([name, *meanwhile]) == Balance(samples=4)
    # The message was not acknowledged, so it came again: two answers' cases, each of a start of its own.
    cases = [case for case in idle_loop.hub.cases() if case["sensor"] == name]
    assert len(cases) == 2
    assert len({case["boot"] for case in cases}) == 2


def test_killed_before_the_commit_the_sample_comes_again_and_is_in_the_hub_once(idle_loop, crashing_device):
    device = crashing_device("spool.before-commit")
    sensor = idle_loop.sensor
    (name,) = sensor.send()
    device.program.wait_killed()
    assert device.spooled_cases() == 0
    meanwhile = sensor.send(3)
    device.start()
    assert idle_loop.settle([name, *meanwhile]) == Balance(samples=4)
    assert len([case for case in idle_loop.hub.cases() if case["sensor"] == name]) == 1
    assert sensor.answers[name][-1]["id"] == sensor.verdicts[name][-1]["id"]


def test_killed_amid_many_samples_no_case_and_no_audit_is_lost(idle_loop, crashing_device):
    # The last point of the plan escalates nothing: what reaches the hub are audits, by the throw of a coin.
    device = crashing_device(
        "nowhere",
        models=[{"bundle": str(idle_loop.model_dir / "bundle"), "point": len(idle_loop.plan.points) - 1}],
        audit={"rate": 0.5, "max_per_hour": 1e6},
    )
    sensor = idle_loop.sensor
    names = sensor.send(50)
    wait_until(lambda: device.metric("edge_spool_appended_total") > 1, "the first commits")
    device.program.kill()
    names += sensor.send(50)
    device.start()
    assert idle_loop.settle(names) == Balance(samples=100)
    audited = [name for name in names if sensor.is_verdict_promised(name)]
    assert 20 < len(audited) < 80
    assert not any(answer["escalated"] for name in names for answer in sensor.answers[name])


def test_what_a_full_spool_gives_up_is_in_the_counters_on_its_disk(idle_loop, tmp_path):
    loop, usual = idle_loop, idle_loop.device
    loop.device = loop.new_device(
        tmp_path.name,
        spool={"max_bytes": 65536},
        hub={"batch_linger_s": 0.05, "ack_timeout_s": 1.0, "max_batch_bytes": 4096},
    )
    try:
        loop.device.start()
        loop.device.wait_ready()
        loop.hub_broker.kill_and_wipe()
        wait_until(lambda: not loop.device.health()["ready"], "the device to notice")
        names = loop.sensor.send(400)
        loop.sensor.wait_answered(names)
        wait_until(lambda: loop.device.metric("edge_spool_appended_total") == 401, "all cases to be stored")
        counted = loop.device.metric("edge_spool_dropped_total")
        loop.device.stop()
        dropped = loop.device.dropped_cases()
        # Priority 20: escalations. Nothing else was given up, and the metric said the same.
        assert set(dropped) == {("limit", 20)}
        assert dropped["limit", 20] == counted > 0
        assert loop.device.spooled_cases() + counted == 400
        loop.hub_broker.start()
        loop.device.start()
        result = loop.settle(names)
        loop.device.stop()
        # The report of the second start took the room of a few more.
        dropped = loop.device.dropped_cases()
        assert set(dropped) == {("limit", 20)}
        assert dropped["limit", 20] >= counted
        assert result == Balance(samples=400, missing=dropped["limit", 20])
    finally:
        loop.device.stop()
        loop.device = usual
