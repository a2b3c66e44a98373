"""Boards and a broker that take part in rounds without threads, and a store whose holdout the base answers."""

import dataclasses

import numpy as np

from cloud_hub.core.delivery import Delivery, NewStatus, NewUpdate
from cloud_hub.federation.coordinator import Coordinator
from cloud_hub.federation.evaluation import labels_of_exits
from cloud_hub.federation.settings import settings_of
from cloud_hub.federation.start import start_series
from cloud_hub.full_model import FullModelWorker
from cloud_hub.models import load_model
from edge_cascade.codec import Reassembler, decode
from edge_cascade.deltas import encode_delta
from edge_cascade.manifest import Wire
from edge_cascade.messages import (
    BaseRequest,
    Chunk,
    Reason,
    RoundOffer,
    RunningModel,
    TrainingBase,
    Use,
)
from edge_cascade.round_terms import decode_terms, is_signed, public_key_of
from edge_cascade.tensors import encode_tensor
from edge_cascade.weights import FROM_ZEROS, climb_chain, shapes_of, weights_digest, zeros_of
from tests.hub.fleet import BOOT, a_delivery, a_new_case

KEY = bytes(range(32))
QUICK = {"rounds": 1, "cohort": 5, "grace_s": 10, "deadline_s": 100, "sleeper_share": 0.0, "seed": 7}


def a_learner(model_dir):
    """The tiny model, with a full model that always answers what the bundle's last exit does."""
    model = load_model(str(model_dir / "bundle"), str(model_dir / "full.onnx"))
    bundle = model.bundle
    mean, std = bundle.graph.preprocess.mean[0], bundle.graph.preprocess.std[0]

    def run(x):
        labels = labels_of_exits(bundle, {}, (x * std + mean).astype(np.float32))[-1]
        return (8.0 * np.eye(len(bundle.graph.labels))[labels]).astype(np.float32)

    return dataclasses.replace(model, run=run)


def fill_holdout(store, model, count=60, *, first=0, seed=3):
    """Audits with a verdict, that judge and never train."""
    rng = np.random.default_rng(seed + first)
    shown = (rng.standard_normal((count, *model.input_shape)) * 3 + 1).astype(np.float32)
    audited = {"audit_ppm": 9, "escalated": False, "reason": Reason.AUDIT, "use": Use.HOLDOUT}
    cases = [
        a_new_case(
            first + index,
            device="auditor",
            model=model.name,
            tensor=encode_tensor(x, Wire("float32")),
            **audited,
        )
        for index, x in enumerate(shown)
    ]
    store.commit([a_delivery(*cases, device="auditor")], now_ms=1)
    worker = FullModelWorker(store, {model.name: model})
    while worker.answer_some(model):
        pass


class Clock:
    now_s = 1_800_000_000.0

    def __call__(self):
        return self.now_s


class Broker:
    """Keeps what is retained, hands everything to the boards, takes nothing while it is down."""

    def __init__(self):
        self.is_up = True
        self.retained = {}
        self.boards = {}
        self.published = []

    def __call__(self, topic, payload, *, retain=False):
        if not self.is_up:
            return None
        device = topic.split("/")[2]
        self.published.append((device, payload))
        if retain:
            self.retained[device] = payload
        if device in self.boards:
            self.boards[device].receive(payload)
        return 1

    @property
    def offered(self):
        """The boards before which an offer stands."""
        return {device for device, payload in self.retained.items() if payload}


class Board:
    """A board that answers offers when it is told to."""

    def __init__(self, world, name, base):
        self.name = name
        self._world = world
        self.bases = {weights_digest(base): base}
        self.offer = None
        self.seq = 0
        self._chunks = Reassembler()
        world.broker.boards[name] = self

    @property
    def terms(self):
        return decode_terms(self.offer.terms)

    def receive(self, payload):
        if not payload:
            self.offer = None
            return
        message = decode(payload)
        if isinstance(message, Chunk):
            whole = self._chunks.add(message)
            if whole is None:
                return
            message = decode(whole)
        match message:
            case RoundOffer():
                assert is_signed(message.terms, message.signature, public_key_of(KEY))
                self.offer = message
            case TrainingBase():
                shapes = shapes_of(next(iter(self.bases.values())))
                origin = zeros_of(shapes) if message.origin == FROM_ZEROS else self.bases[message.origin]
                wanted = message.training_base
                reached = climb_chain(origin, message.steps, expected=wanted, max_bytes=2**30)
                self.bases[wanted] = reached

    def ask_for_base(self, origin=None):
        """Ask as a board does that holds `origin`, by default whatever it holds."""
        if self.terms.training_base not in self.bases:
            held = next(iter(self.bases)) if origin is None else origin
            self._world.hub.ask_for_base(
                BaseRequest(self.name, self.terms.model, self.terms.training_base, held)
            )
            self._world.hub.take_turn()

    def answer(self, *, scale=1e-4, seed=0, examples=50, delta=None, encoding=None, **changes):
        """Commit an update: a small random step from the base of the offer."""
        terms = self.terms
        self.ask_for_base()
        base = self.bases[terms.training_base]
        rng = np.random.default_rng([seed, sum(self.name.encode())])
        step = {n: (scale * rng.standard_normal(a.shape)).astype(np.float32) for n, a in base.items()}
        content = encode_delta(step, terms.encoding) if delta is None else delta
        self.seq += 1
        values = {
            "device": self.name,
            "boot": BOOT,
            "seq": self.seq,
            "model": terms.model,
            "round_id": terms.round_id,
            "training_base": terms.training_base,
            "num_examples": examples,
            "encoding": encoding or terms.encoding,
            "delta": content,
        }
        update = NewUpdate(**(values | changes))
        return self._world.store.commit([a_delivery(device=self.name, update=update)], now_ms=2)


class World:
    """A store, a hub's coordinator on it, a broker and boards."""

    def __init__(self, store, model, boards=5, *, holdout=60, **ports):
        self.store = store
        self.model = model
        self.clock = Clock()
        self.broker = Broker()
        self.ports = ports
        if holdout:
            fill_holdout(store, model, holdout)
        self.parameters = model.bundle.parameters()
        self.boards = [Board(self, f"press-{n}", self.parameters) for n in range(boards)]
        for board in self.boards:
            self.say(board.name, online=True)
        self.hub = self.a_hub()

    def a_hub(self):
        """A coordinator, as after a start of the hub."""
        self.hub = Coordinator(
            self.store,
            self.broker,
            {self.model.name: self.model},
            prefix="edge",
            private_key=lambda: KEY,
            clock_s=self.clock,
            **self.ports,
        )
        return self.hub

    def say(self, device, *, online, bundle=None):
        digest = bytes.fromhex(bundle or self.model.bundle.bundle_id)
        # As boards do: a last will names no models.
        running = (RunningModel(self.model.name, digest, "default", 0),) if online else ()
        status = NewStatus(device, online, BOOT, "1", running)
        committed = self.store.commit(
            [Delivery(device, bytes(8), status=status)], now_ms=round(self.clock.now_s * 1000)
        )
        if committed.came_online and hasattr(self, "hub"):
            self.hub.came_online(committed.came_online)

    def start(self, **settings):
        wanted = settings_of(QUICK | {"min_holdout": 50} | settings)
        number = self.store.database.run(
            lambda c: start_series(c, self.model.bundle, wanted, created_by="ann", now_ms=1)
        )
        self.hub.wake()
        self.hub.take_turn()
        return number

    def turn(self, seconds=0.0):
        self.clock.now_s += seconds
        self.hub.wake()
        self.hub.take_turn()

    def asked(self):
        return [board for board in self.boards if board.offer is not None]
