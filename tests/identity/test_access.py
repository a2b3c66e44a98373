"""Who may do what, at a real mosquitto with the configuration that `broker config` wrote. Passwords.

That something is not delivered is seen by what comes after it: a broker keeps the order for one receiver.
"""

from contextlib import ExitStack

import pytest

from tests.identity.desk import Desk
from tests.identity.party import Party


@pytest.fixture(scope="module")
def desk(tmp_path_factory, quick_logins):
    desk = Desk(tmp_path_factory.mktemp("access"))
    for name in ("board-a", "board-b"):
        desk.type("device", "add", name, "--out", desk.keys)
    desk.type("sensor", "add", "probe", "--device", "board-a", "--out", desk.keys)
    desk.configure()
    return desk


@pytest.fixture(scope="module")
def broker(desk):
    with desk.start() as broker:
        yield broker


@pytest.fixture
def connect(desk, broker):
    with ExitStack() as stack:

        def connect(name, **options):
            party = stack.enter_context(Party(broker.port, name, desk.password_of(name), **options))
            assert party.connected == "Success"
            return party

        yield connect


@pytest.fixture
def hub(connect):
    hub = connect("hub")
    hub.subscribe("edge/v1/+/up/#")
    return hub


@pytest.fixture
def board_a(connect):
    return connect("board-a")


@pytest.fixture
def board_b(connect):
    return connect("board-b")


@pytest.mark.parametrize(
    "credentials", [(None, None), ("board-a", "wrong"), ("board-a", ""), ("nobody", "x")]
)
def test_nobody_comes_in_without_the_right_password(broker, credentials):
    with Party(broker.port, *credentials) as party:
        assert party.connected == "Not authorized"


def test_a_board_publishes_only_below_its_own_name(board_a, hub):
    assert {
        topic: board_a.may_publish(topic)
        for topic in (
            "edge/v1/board-a/up/cases",
            "edge/v1/board-b/up/cases",
            "edge/v1/board-a/down/acks",
            "edge/v1/board-b/down/acks",
            "edge/v1/board-a/other",
            "edge/v2/board-a/up/cases",
            "other/v1/board-a/up/cases",
            "results/board-a/pump",
            "results/board-b/pump",
            "sensors/board-a/pump",
            "sensors/board-b/pump",
            "labels/board-a/pump",
            "labels/board-b/pump",
            "$SYS/broker/uptime",
        )
    } == {
        "edge/v1/board-a/up/cases": True,
        "edge/v1/board-b/up/cases": False,
        "edge/v1/board-a/down/acks": False,
        "edge/v1/board-b/down/acks": False,
        "edge/v1/board-a/other": False,
        "edge/v2/board-a/up/cases": False,
        "other/v1/board-a/up/cases": False,
        "results/board-a/pump": True,
        "results/board-b/pump": False,
        "sensors/board-a/pump": False,
        "sensors/board-b/pump": False,
        "labels/board-a/pump": False,
        "labels/board-b/pump": False,
        "$SYS/broker/uptime": False,
    }
    board_a.publish("edge/v1/board-a/up/cases", b"end of one's own")
    assert hub.received_until(b"end of one's own") == [
        ("edge/v1/board-a/up/cases", b"x"),
        ("edge/v1/board-a/up/cases", b"end of one's own"),
    ]


def test_mqtt_3_acknowledges_what_is_forbidden_and_delivers_none_of_it(connect, hub):
    old = connect("board-a", version=4)
    old.publish("edge/v1/board-b/up/cases", b"forged")
    old.publish("edge/v1/board-a/up/cases", b"honest")
    assert hub.received_until(b"honest") == [("edge/v1/board-a/up/cases", b"honest")]


@pytest.mark.parametrize("form", [{"client_id": "board-b"}, {"client_id": "board-b", "expiry_s": 60}])
def test_the_client_id_of_another_board_gives_nothing(connect, hub, form):
    waiting = connect("board-b", client_id="board-b", expiry_s=60)
    waiting.subscribe("edge/v1/board-b/down/#")
    waiting.close()
    hub.publish("edge/v1/board-b/down/acks", b"kept for b")
    impostor = connect("board-a", **form)
    impostor.subscribe("edge/v1/+/down/#")
    assert not impostor.may_publish("edge/v1/board-b/up/cases", b"forged")
    hub.publish("edge/v1/board-b/down/acks", b"for b")
    hub.publish("edge/v1/board-a/down/acks", b"for a")
    assert impostor.received_until(b"for a") == [("edge/v1/board-a/down/acks", b"for a")]
    impostor.publish("edge/v1/board-a/up/cases", b"own")
    assert hub.received_until(b"own") == [("edge/v1/board-a/up/cases", b"own")]


@pytest.mark.parametrize(
    "topic_filter", ["edge/v1/+/down/#", "#", "+/+/+/+/+", "$share/any/edge/v1/+/down/#", "$share/any/#"]
)
def test_a_board_reads_only_what_is_for_it(connect, hub, topic_filter):
    listener = connect("board-a")
    listener.subscribe(topic_filter)
    hub.publish("edge/v1/board-b/down/acks", b"for b")
    hub.publish("edge/v1/board-a/down/acks", b"for a")
    assert listener.received_until(b"for a") == [("edge/v1/board-a/down/acks", b"for a")]


def test_a_board_that_asks_for_anothers_topics_by_name_gets_nothing(connect, hub):
    listener = connect("board-a")
    listener.subscribe("edge/v1/board-b/down/acks")
    listener.subscribe("$share/any/edge/v1/board-b/down/acks")
    listener.subscribe("edge/v1/board-a/down/acks")
    hub.publish("edge/v1/board-b/down/acks", b"for b")
    hub.publish("edge/v1/board-a/down/acks", b"for a")
    assert listener.received_until(b"for a") == [("edge/v1/board-a/down/acks", b"for a")]


def test_a_board_gets_its_own_retained_message_and_no_other(connect, hub):
    hub.publish("edge/v1/board-b/down/desired", b"b's", retain=True)
    hub.publish("edge/v1/board-a/down/desired", b"a's", retain=True)
    listener = connect("board-a")
    listener.subscribe("#")
    hub.publish("edge/v1/board-a/down/acks", b"end")
    assert listener.received_until(b"end") == [
        ("edge/v1/board-a/down/desired", b"a's"),
        ("edge/v1/board-a/down/acks", b"end"),
    ]


def test_a_last_will_on_anothers_topic_is_not_carried_out(broker, connect, hub, board_b):
    for name, topic in (("forger", "edge/v1/board-b/up/status"), ("honest", "edge/v1/board-a/up/status")):
        connect("board-a", client_id=name, will=topic).vanish()
        broker.wait_for_log(f"Client {name} ")
        broker.wait_for_log(f"Client {name} closed its connection")
    board_b.publish("edge/v1/board-b/up/status", b"end")
    assert hub.received_until(b"end") == [
        ("edge/v1/board-a/up/status", b"will"),
        ("edge/v1/board-b/up/status", b"end"),
    ]


def test_a_sensor_writes_to_its_board_reads_its_results_and_nothing_else(connect, hub, board_a, board_b):
    probe = connect("probe")
    assert [
        topic
        for topic in (
            "sensors/board-a/pump",
            "sensors/board-b/pump",
            "sensors/probe/pump",
            "labels/board-a/pump",
            "labels/board-b/pump",
            "labels/probe/pump",
            "results/board-a/pump",
            "results/probe/pump",
            "edge/v1/probe/up/cases",
            "edge/v1/board-a/up/cases",
            "edge/v1/board-a/down/acks",
            "edge/v1/probe/down/acks",
        )
        if probe.may_publish(topic)
    ] == ["sensors/board-a/pump", "labels/board-a/pump"]
    probe.subscribe("#")
    hub.publish("edge/v1/board-a/down/acks", b"x")
    hub.publish("edge/v1/probe/down/acks", b"x")
    board_b.publish("results/board-b/pump", b"x")
    board_a.publish("results/board-a/pump", b"answer")
    assert probe.received_until(b"answer") == [("results/board-a/pump", b"answer")]


def test_a_board_reads_its_own_sensors_and_not_anothers(connect, hub):
    listener = connect("board-a")
    other = connect("board-b")
    probe = connect("probe")
    listener.subscribe("sensors/#")
    other.subscribe("#")
    probe.publish("sensors/board-a/pump", b"sample")
    assert listener.received_until(b"sample") == [("sensors/board-a/pump", b"sample")]
    hub.publish("edge/v1/board-b/down/acks", b"end")
    assert other.received_until(b"end")[-1:] == [("edge/v1/board-b/down/acks", b"end")]
    assert other.received.empty()


def test_a_board_reads_the_labels_of_its_own_sensors_and_not_anothers(connect, hub):
    listener, other, probe = connect("board-a"), connect("board-b"), connect("probe")
    listener.subscribe("labels/board-a/+/#")
    other.subscribe("labels/board-a/+/#")
    other.subscribe("labels/#")
    other.subscribe("edge/v1/board-b/down/acks")
    probe.publish("labels/board-a/pump", b"fault")
    assert listener.received_until(b"fault") == [("labels/board-a/pump", b"fault")]
    hub.publish("edge/v1/board-b/down/acks", b"end")
    assert other.received_until(b"end") == [("edge/v1/board-b/down/acks", b"end")]


def test_the_hub_writes_down_reads_up_and_is_no_board(connect):
    hub = connect("hub")
    assert [
        topic
        for topic in (
            "edge/v1/board-a/down/desired",
            "edge/v1/board-b/down/acks",
            "edge/v1/board-a/up/cases",
            "edge/v1/hub/up/cases",
            "edge/v1/hub/down/acks",
            "results/hub/pump",
            "results/board-a/pump",
            "sensors/board-a/pump",
            "labels/board-a/pump",
            "labels/hub/pump",
        )
        if hub.may_publish(topic)
    ] == ["edge/v1/board-a/down/desired", "edge/v1/board-b/down/acks"]


def test_new_accounts_and_revoked_ones_take_effect_at_a_reload(desk, broker):
    desk.type("device", "add", "board-c", "--out", desk.keys)
    first = desk.password_of("board-c")
    desk.rewrite_accounts()
    broker.reload()
    with Party(broker.port, "board-c", first) as board:
        assert board.may_publish("edge/v1/board-c/up/cases")
        desk.type("device", "add", "board-c", "--renew", "--out", desk.keys)
        desk.rewrite_accounts()
        broker.reload()
        assert board.is_thrown_out()
    with Party(broker.port, "board-c", first) as board:
        assert board.connected == "Not authorized"
    with Party(broker.port, "board-c", desk.password_of("board-c")) as board:
        assert board.connected == "Success"
        desk.type("device", "revoke", "board-c")
        desk.rewrite_accounts()
        broker.reload()
        assert board.is_thrown_out()
    with Party(broker.port, "board-c", desk.password_of("board-c")) as board:
        assert board.connected == "Not authorized"
