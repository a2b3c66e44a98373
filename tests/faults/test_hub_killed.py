"""Hub or brokers end without warning or are not there: the device answers all the same, and nothing is lost."""

import pytest

from edge_cascade.codec import decode
from edge_cascade.messages import CaseBatch
from tests.faults.processes import DEVICE, status_of, wait_until
from tests.faults.sensor import Balance


def test_device_and_hub_start_without_any_broker_and_catch_up(loop):
    loop.device.stop()
    loop.hub.program.kill()
    loop.hub_broker.stop()
    loop.site_broker.stop()
    loop.device.start()
    loop.hub.start()
    for program in (loop.device, loop.hub):
        wait_until(lambda url=program.url: status_of(f"{url}/readyz") == 503, "an unready program")
        assert status_of(f"{program.url}/healthz") == 200
    wait_for_problems(loop.device, ["sensors' broker: no connection", "hub's broker: no connection"])
    loop.site_broker.start()
    # A broker that has never seen the device keeps nothing for it.
    wait_for_problems(loop.device, ["hub's broker: no connection"])
    names = loop.sensor.send(5)
    loop.sensor.wait_answered(names)
    loop.hub_broker.start()
    assert loop.settle(names) == Balance(samples=5)
    loop.device.wait_ready()
    loop.hub.wait_ready()


@pytest.mark.parametrize(
    ("point", "is_committed"), [("hub.before-commit", False), ("hub.after-commit", True)]
)
def test_a_hub_killed_around_its_commit_has_every_case_once(running_loop, point, is_committed):
    loop = running_loop
    duplicates = loop.device.metric("edge_uplink_duplicates_total")
    loop.hub.program.kill()
    before = loop.hub.cases_on_disk()
    loop.hub.start(EDGE_CRASH_AT=point)
    loop.hub.wait_ready()
    names = loop.sensor.send(5)
    loop.hub.program.wait_killed()
    assert (loop.hub.cases_on_disk() > before) == is_committed
    meanwhile = loop.sensor.send(5)
    loop.sensor.wait_answered([*names, *meanwhile])
    loop.hub.start()
    loop.hub.wait_ready()
    assert loop.settle([*names, *meanwhile]) == Balance(samples=10)
    # What the dead hub had committed and not acknowledged was sent again, and said to be there already.
    assert (loop.device.metric("edge_uplink_duplicates_total") > duplicates) == is_committed


def test_the_device_answers_while_the_hub_is_away_at_the_start_and_for_long(idle_loop):
    loop = idle_loop
    loop.hub.program.kill()
    loop.device.start(EDGE_DAEMON__HUB__ACK_TIMEOUT_S="0.5")
    loop.device.wait_ready()
    names = loop.sensor.send(5)
    wait_until(lambda: loop.device.metric("edge_uplink_retries_total") >= 2, "two more attempts")
    names += loop.sensor.send(5)
    loop.sensor.wait_answered(names)
    assert [loop.sensor.verdicts[name] for name in names] == [[]] * 10
    loop.hub.start()
    loop.hub.wait_ready()
    assert loop.settle(names) == Balance(samples=10)
    loop.device.stop()


def test_a_broker_killed_and_wiped_costs_no_case_and_no_verdict(running_loop):
    loop = running_loop
    names = loop.sensor.send(20)
    loop.hub_broker.kill_and_wipe()
    names += loop.sensor.send(20)
    loop.sensor.wait_answered(names)
    loop.hub_broker.start()
    names += loop.sensor.send(20)
    assert loop.settle(names) == Balance(samples=60)
    # What was retained was wiped as well; the device has said again that it is there.
    (device,) = loop.hub.get("/v1/devices")["devices"]
    assert (device["name"], device["online"]) == (DEVICE, True)


def test_verdicts_wait_for_the_sensors_broker(running_loop):
    loop = running_loop
    not_passed_on = loop.device.metric("edge_uplink_verdicts_not_passed_on_total")
    with loop.hub.program.frozen():
        names = loop.sensor.send(5)
        loop.sensor.wait_answered(names)
        loop.site_broker.stop()
    wait_until(
        lambda: loop.device.metric("edge_uplink_verdicts_not_passed_on_total") >= not_passed_on + 5,
        "the verdicts",
    )
    assert loop.hub.stats()["unconfirmed_verdicts"] == 5
    loop.site_broker.start()
    assert loop.settle(names) == Balance(samples=5)
    wait_until(lambda: loop.hub.stats()["unconfirmed_verdicts"] == 0, "the receipts")


def test_a_batch_that_is_delivered_twice_is_kept_once_and_acknowledged_again(running_loop):
    loop = running_loop
    batches = f"edge/v1/{DEVICE}/up/cases"
    with loop.party("hub") as eavesdropper:
        eavesdropper.subscribe(batches)
        names = loop.sensor.send(3)
        assert loop.settle(names) == Balance(samples=3)
        frames = []
        while sum(len(decode(frame).cases) for frame in frames) < 3:
            frames.append(eavesdropper.received.get(timeout=10)[1])
    sent = {case.seq for frame in frames for case in decode_cases(frame)}
    before = loop.hub.stats()
    acknowledged = set()
    with loop.party(DEVICE) as replayer:
        replayer.subscribe(f"edge/v1/{DEVICE}/down/acks")
        for frame in frames:
            assert replayer.publish(batches, frame) == "Success"
        while acknowledged != sent:
            acks = decode(replayer.received.get(timeout=10)[1])
            assert (acks.committed, acks.rejected, acks.refused) == ([], [], [])
            acknowledged |= set(acks.duplicate)
    assert loop.settle(names) == Balance(samples=3)
    after = loop.hub.stats()
    assert after["duplicates"] - before["duplicates"] == 3
    assert after["models"] == before["models"]


def wait_for_problems(device, problems):
    wait_until(lambda: device.health()["problems"] == problems, f"the device to say {problems}")


def decode_cases(frame):
    batch = decode(frame)
    assert isinstance(batch, CaseBatch)
    return batch.cases
