"""A rollout over a real mosquitto: what a board should run is retained, kept over a restart, taken back."""

import itertools
import queue
import signal
import time

import pytest

from cloud_hub.core.rollout.waves import Wave
from cloud_hub.registry import release_directory
from cloud_hub.rollouts.orders import order
from cloud_hub.rollouts.start import start_rollout
from cloud_hub.store import schema
from cloud_hub.store.database import Database
from cloud_hub.store.store import database_url
from edge_cascade.codec import decode, encode
from edge_cascade.messages import SHIPPED, Status
from edge_cascade.mqtt import Broker, MqttSession
from edge_cascade.topics import down_topic, up_topic
from tests.hub.fleet import BOOT, wait_until
from tests.hub.test_ingest import Running
from tests.hub.test_program import running
from tests.services import free_port, start_mosquitto

TIMEOUT_S = 20.0
_ids = itertools.count()
WAVES = (Wave("all", share=1.0),)


@pytest.fixture(scope="module")
def broker(tmp_path_factory):
    with start_mosquitto(tmp_path_factory.mktemp("broker")) as broker:
        yield broker


class Board:
    """A board's session; what it should run is queued."""

    def __init__(self, port, name="press-1", prefix="edge"):
        self.name = name
        self._prefix = prefix
        self._inbox = queue.Queue()
        self._session = MqttSession(
            Broker(port=port),
            f"{name}-{next(_ids)}",
            subscriptions=[down_topic(prefix, name, "desired")],
            on_message=lambda incoming: self._inbox.put(decode(incoming.payload)),
        )

    def __enter__(self):
        self._session.start()
        wait_until(lambda: self._session.is_listening, what="the board's session")
        return self

    def __exit__(self, *_):
        self._session.stop()

    def say_online(self):
        status = encode(Status(self.name, True, BOOT, "1"))
        assert self._session.publish(up_topic(self._prefix, self.name, "status"), status, retain=True)

    @property
    def is_untold(self):
        return self._inbox.empty()

    def next_with(self, release):
        while True:
            state = self._inbox.get(timeout=TIMEOUT_S)
            if [model.release for model in state.models] == [release]:
                return state


def now_ms():
    return time.time_ns() // 1_000_000


def a_release(connection, state_dir):
    graph = release_directory(state_dir, (bytes([5]) * 32).hex()) / "graph"
    graph.mkdir(parents=True)
    (graph / "manifest.json").write_bytes(b"{}")
    values = {
        "id": 5, "model": "pump", "bundle": bytes([5]) * 32, "graph": bytes([7]) * 32,
        "weights": bytes([8]) * 32, "state": "draft", "lineage": "{}", "figures": "{}",
        "created_at_ms": 1, "created_by": "ann",
    }  # fmt: skip
    connection.execute(schema.releases.insert().values(values))


def is_there(database, name):
    table = schema.devices
    query = table.select().where(table.c.name == name, table.c.online)
    return database.run(lambda c: c.execute(query).first()) is not None


def begin(connection):
    return start_rollout(connection, 5, by="ann", now_ms=now_ms(), is_signed=lambda *_: True, waves=WAVES)


def test_a_board_is_told_keeps_being_told_and_is_told_to_go_back(tmp_path, broker):
    with Board(broker.port) as board:
        with Running(tmp_path / "state", broker.port, "edge", {}) as hub:
            board.say_online()
            wait_until(lambda: is_there(hub.store.database, "press-1"), what="the board's status")
            hub.store.database.run(lambda c: a_release(c, tmp_path / "state"))
            rollout = hub.store.database.run(begin)
            state = board.next_with("5")
            assert (state.device, state.revision) == ("press-1", 1)
            assert state.models[0].bundle == bytes([5]) * 32
        with Board(broker.port, "press-1") as late:
            assert late.next_with("5") == state
        with Running(tmp_path / "state", broker.port, "edge", {}) as hub:
            assert board.next_with("5") == state
            hub.store.database.run(lambda c: order(c, rollout, "kill", by="ann", now_ms=now_ms()))
            assert board.next_with(SHIPPED).models[0].bundle == bytes(32)


def test_a_hub_killed_between_state_and_effects_tells_the_board_after_its_start(tmp_path, broker):
    config, prefix = tmp_path / "hub.toml", tmp_path.name
    config.write_text(
        f'[hub]\nstate_dir = "{tmp_path}/state"\nprefix = "{prefix}"\n[broker]\nport = {broker.port}\n'
        f"[http]\nport = {free_port()}\n"
    )
    with (
        Board(broker.port, prefix=prefix) as board,
        Database(database_url(tmp_path / "state", None)) as beside,
    ):
        with running(config, EDGE_CRASH_AT="hub.rollout-stored") as hub:
            hub.wait_ready()
            board.say_online()
            wait_until(lambda: is_there(beside, "press-1"), what="the board's status")
            beside.run(lambda c: a_release(c, tmp_path / "state"))
            beside.run(begin)
            assert hub.end() == -signal.SIGKILL
        assert board.is_untold
        with running(config) as hub:
            hub.wait_ready()
            assert board.next_with("5").revision == 1
            assert hub.end(signal.SIGTERM) == 0
