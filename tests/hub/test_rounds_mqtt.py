"""A round over a real mosquitto: retained offer, base in chunks, update acknowledged, offer gone."""

import queue

import numpy as np
import pytest

from cloud_hub.federation.settings import settings_of
from cloud_hub.federation.start import start_series
from cloud_hub.store.rounds import get_series, list_rounds
from edge_cascade.codec import Reassembler, decode, encode
from edge_cascade.deltas import encode_delta
from edge_cascade.messages import (
    Acks,
    BaseRequest,
    Chunk,
    ClientUpdate,
    RoundOffer,
    RunningModel,
    Status,
    TrainingBase,
)
from edge_cascade.mqtt import Broker, MqttSession
from edge_cascade.round_terms import decode_terms, is_signed, public_key_of
from edge_cascade.topics import down_topic, up_topic
from edge_cascade.weights import FROM_ZEROS, climb_chain, shapes_of, zeros_of
from tests.hub.fleet import BOOT, wait_until
from tests.hub.rounds_fleet import a_learner, fill_holdout
from tests.hub.test_ingest import Running
from tests.services import start_mosquitto

TIMEOUT_S = 20.0


@pytest.fixture(scope="module")
def broker(tmp_path_factory):
    with start_mosquitto(tmp_path_factory.mktemp("broker")) as broker:
        yield broker


class Link:
    """A board's session; what comes down is put together and queued by kind."""

    def __init__(self, port, name):
        self.name = name
        self._inbox = queue.Queue()
        self._chunks = Reassembler()
        self._session = MqttSession(
            Broker(port=port),
            f"{name}-test",
            subscriptions=[down_topic("edge", name, channel) for channel in ("round", "acks")],
            on_message=self._receive,
        )

    def __enter__(self):
        self._session.start()
        wait_until(lambda: self._session.is_listening, what="the board's session")
        return self

    def __exit__(self, *_):
        self._session.stop()

    def _receive(self, incoming):
        if not incoming.payload:
            self._inbox.put(None)
            return
        message = decode(incoming.payload)
        if isinstance(message, Chunk):
            whole = self._chunks.add(message)
            message = None if whole is None else decode(whole)
            if message is None:
                return
        if message != Acks(bytes(8)):
            self._inbox.put(message)

    def send(self, channel, message, *, retain=False):
        assert self._session.publish(up_topic("edge", self.name, channel), encode(message), retain=retain)

    def next_of(self, kind):
        while True:
            message = self._inbox.get(timeout=TIMEOUT_S)
            if isinstance(message, kind):
                return message


def test_a_board_is_offered_a_round_fetches_its_base_and_is_heard(tmp_path, broker, tiny_model_dir):
    learner = a_learner(tiny_model_dir)
    running = RunningModel("tiny", bytes.fromhex(learner.bundle.bundle_id), "default", 0)
    with (
        Running(tmp_path / "state", broker.port, "edge", {"tiny": learner}) as hub,
        Link(broker.port, "press-1") as board,
    ):
        fill_holdout(hub.store, learner, 60)
        board.send("status", Status("press-1", True, BOOT, "1", [running]), retain=True)
        settings = settings_of({"rounds": 1, "min_holdout": 50})
        hub.store.database.run(
            lambda c: start_series(c, learner.bundle, settings, created_by="ann", now_ms=1)
        )
        offer = board.next_of(RoundOffer)
        key = bytes.fromhex((tmp_path / "state" / "rounds.key").read_text().strip())
        assert is_signed(offer.terms, offer.signature, public_key_of(key))
        terms = decode_terms(offer.terms)
        board.send("telemetry", BaseRequest("press-1", "tiny", terms.training_base, FROM_ZEROS))
        base = board.next_of(TrainingBase)
        shapes = shapes_of(learner.bundle.parameters())
        weights = climb_chain(
            zeros_of(shapes), base.steps, expected=terms.training_base, max_bytes=terms.base_bytes
        )
        step = {name: np.full_like(array, 1e-5) for name, array in weights.items()}
        update = ClientUpdate(
            "press-1",
            BOOT,
            1,
            "tiny",
            terms.round_id,
            terms.training_base,
            30,
            "int8",
            encode_delta(step, "int8"),
        )
        board.send("update", update)
        assert board.next_of(Acks).committed == [1]
        board.next_of(type(None))
        (row,) = wait_until(
            lambda: [
                row
                for row in hub.store.database.run(lambda c: list_rounds(c, series_id=1, before=None, limit=9))
                if row["outcome"] is not None
            ],
            what="the round to end",
        )
        assert row["outcome"] == "committed"

        def said():
            row = hub.store.database.run(lambda c: get_series(c, 1))
            return row if row["why"] or row["release"] else None

        # By then a candidate was made, declined, or waits for fresh samples.
        assert wait_until(said, what="what the series came to")["phase"] in {"making", "made", "failed"}
