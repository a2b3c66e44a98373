"""The follower as a whole: offers, bases, real files; a spool, a store and a child that do as they are told."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_cascade.deltas import decode_delta, encode_delta
from edge_cascade.messages import ClientUpdate, TrainingBase
from edge_cascade.weights import FROM_ZEROS, moved, shapes_of, weights_digest
from edge_daemon.clock import SystemClock
from edge_daemon.core import rounds as rules
from edge_daemon.core.examples import ExampleCounts, Origin
from edge_daemon.core.rounds import RoundLimits
from edge_daemon.core.rounds_events import Phase
from edge_daemon.core.spooling import DropReason
from edge_daemon.core.vitals import Vitals, VitalsLimits
from edge_daemon.errors import ItemTooLargeError, SpoolError
from edge_daemon.metrics import Metrics
from edge_daemon.training.arrays import dump_arrays, load_arrays
from edge_daemon.training.child import EXIT_DIVERGED
from edge_daemon.training.follower import Follower
from edge_daemon.training.inbox import Surroundings
from edge_daemon.training.job import Result, read_base, read_job, read_residual, write_result
from edge_daemon.training.learner import CostLimits, Learner
from tests.device.rounds_cases import HUB_KEY, Ceiling, drawn, offer, terms_for
from tests.device.spooling_cases import BOOT, wait_until

COOL = Vitals(celsius=50.0, other_load=0.1, free_bytes=2**30, on_battery=None, queued=0)
LIMITS = VitalsLimits(max_celsius=75.0, max_load=0.5, min_free_bytes=2**20, on_battery=False, max_queued=32)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """What is repeated is repeated within a test's patience."""
    monkeypatch.setattr(rules, "OFFER_SPREAD_S", 0.0)
    monkeypatch.setattr(rules, "LONGEST_RECHECK_S", 0.05)
    monkeypatch.setattr(rules, "SHORTEST_RECHECK_S", 0.05)
    monkeypatch.setattr(rules, "LOOK_AGAIN_S", 0.05)
    monkeypatch.setattr(rules, "CLEARED_GRACE_S", 0.0)
    monkeypatch.setattr(rules, "BASE_PATIENCE_S", 0.05)
    monkeypatch.setattr(rules, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(rules, "LONGEST_PAUSE_S", 0.05)


class FakeSpool:
    """Keeps what it is given by name; tells of its end when told to."""

    def __init__(self):
        self.rows = {}
        self.appends = 0
        self.fails = 0
        self.is_small = False
        self.tells = []

    def append(self, item):
        future = Future()
        self.appends += 1
        if self.is_small:
            future.set_exception(ItemTooLargeError("an item of 9 bytes, the spool holds 8"))
        elif self.fails:
            self.fails -= 1
            future.set_exception(SpoolError("disk full"))
        else:
            self.rows.setdefault(
                (item.key.boot, item.seq), msgspec.msgpack.decode(item.body, type=ClientUpdate)
            )
            future.set_result(None)
        return future

    def on_update_gone(self, tell):
        self.tells.append(tell)

    def settle(self, reason=None):
        (name,) = self.rows
        update = self.rows.pop(name)
        for tell in self.tells:
            tell(*name, reason)
        return update


class FakeExamples:
    def __init__(self, drawn):
        self.drawn = drawn

    def draw(self, model, max_examples, *, least=Origin.SELF):
        return self.drawn

    def counts(self):
        return ExampleCounts(rows={("tiny", Origin.MODEL): len(self.drawn)})


class FakeChild:
    """Ends when told to; `learns` is what it adds to the base."""

    pid = 1

    def __init__(self, directory, on_end):
        self.directory, self.on_end = directory, on_end
        self.is_killed = False

    def kill(self):
        self.is_killed = True
        self.on_end(-9)

    def succeed(self, *, residual=None, heads=None):
        terms = read_job(self.directory).terms
        base = read_base(self.directory)
        step = {name: np.full_like(array, 0.5) for name, array in base.items()}
        write_result(
            self.directory,
            Result(encode_delta(step, terms.encoding), 40, 1.0, 0.5, 2.0, residual, heads, ()),
        )
        self.on_end(0)

    def fail(self):
        self.on_end(3)


class World:
    """A follower, and everything around it."""

    def __init__(self, directory: Path, bundle):
        self.bundle = bundle
        self.directory = directory
        self.spool = FakeSpool()
        self.examples = FakeExamples(drawn())
        self.vitals = COOL
        self.told_heads = []
        self.requests = []
        self.children = []
        self.metrics = Metrics()
        self.follower = Follower(
            "dev-1",
            {"tiny": bundle},
            directory,
            Surroundings(
                examples=self.examples,
                spool=self.spool,
                ask_for_base=self.requests.append,
                read_vitals=lambda pid: self.vitals,
                launch=self.launch,
                metrics=self.metrics,
                clock=SystemClock(),
                boot=BOOT,
                next_seq=iter(range(7, 1000)).__next__,
                on_heads=lambda *heads: self.told_heads.append(heads),
            ),
            hub_key=HUB_KEY,
            vitals=LIMITS,
            rounds=RoundLimits(max_passes=10_000),
            costs=CostLimits(max_memory_bytes=2**30),
            rng=Ceiling(),
        )

    def launch(self, directory, on_end):
        self.children.append(FakeChild(directory, on_end))
        return self.children[-1]

    def offer(self, of, **kwargs):
        self.follower.hear(offer(of, **kwargs))

    def child(self, number=0):
        wait_until(lambda: len(self.children) > number, what=f"child {number}, {self.counts()}")
        return self.children[number]

    def appended(self):
        wait_until(lambda: self.spool.rows and self.phase() is Phase.APPENDED, what="an update is appended")
        (update,) = self.spool.rows.values()
        return update

    def phase(self):
        return self.learner.rounds.phase

    @property
    def learner(self):
        return self.follower._learners["tiny"]

    def counts(self):
        return {
            name: tally.values()
            for name, tally in vars(self.metrics).items()
            if name.startswith(("rounds_", "train", "base_", "update_"))
        }

    def count(self, name, *labels):
        return vars(self.metrics)[name].values().get(("tiny", *labels), 0)


@pytest.fixture
def begin(tmp_path, tiny_bundle):
    """A world; again: the next start on the same disk."""
    worlds = []

    def begin():
        for world in worlds:
            world.follower.stop()
        world = World(tmp_path / "training", tiny_bundle)
        world.follower.start()
        worlds.append(world)
        return world

    yield begin
    for world in worlds:
        world.follower.stop()


@pytest.fixture
def world(begin):
    return begin()


def test_from_offer_to_acknowledged_update(world, tiny_bundle):
    of = terms_for(tiny_bundle)
    world.offer(of)
    world.child().succeed()
    update = world.appended()
    base = tiny_bundle.parameters()
    delta = decode_delta(update.delta, shapes_of(base), max_bytes=2**20)
    assert all((array == 0.5).all() for array in delta.values())
    assert (update.device, update.boot, update.seq) == ("dev-1", BOOT, 7)
    assert (update.round_id, update.training_base) == ("round-1", weights_digest(base))
    assert (update.num_examples, update.encoding) == (40, "fp32")
    world.spool.settle()
    wait_until(lambda: world.count("rounds_completed") == 1)
    assert (world.count("rounds_offered"), world.count("rounds_joined")) == (1, 1)
    assert (world.count("training_ms"), world.count("training_examples")) == (2000, 40)
    assert world.count("update_bytes") == len(update.delta)
    assert world.requests == []
    assert not world.children[0].directory.exists()


def test_a_round_is_trained_once_whatever_comes_again_even_after_a_restart(begin, tiny_bundle):
    of = terms_for(tiny_bundle)
    world = begin()
    world.offer(of)
    world.child().succeed()
    world.appended()
    world.spool.settle()
    wait_until(lambda: world.count("rounds_completed") == 1)
    again = begin()
    for each in (world, again):
        each.offer(of)
    wait_until(lambda: again.count("rounds_offered") == 1)
    again.offer(terms_for(tiny_bundle, "round-2"))
    again.child().succeed()
    assert again.appended().round_id == "round-2"


def test_an_update_that_never_reached_the_spool_is_appended_at_the_next_start(begin, tiny_bundle):
    world = begin()
    world.spool.append = lambda item: Future()  # as in a crash: no answer
    world.offer(terms_for(tiny_bundle))
    world.child().succeed()
    wait_until(lambda: world.learner.pending is not None)
    again = begin()
    wait_until(lambda: again.spool.rows, what="the update")
    assert again.spool.rows[BOOT, 7].round_id == "round-1"
    again.spool.settle()
    wait_until(lambda: again.count("rounds_completed") == 1)
    assert again.learner.pending is None


def test_a_base_is_asked_for_checked_and_kept(begin, tiny_bundle):
    world = begin()
    own = tiny_bundle.parameters()
    step = {name: np.full_like(array, 0.25) for name, array in own.items()}
    base = moved(own, step)
    of = terms_for(tiny_bundle, base=base)
    world.offer(of)
    wait_until(lambda: world.requests)
    request = world.requests[0]
    assert (request.device, request.model) == ("dev-1", "tiny")
    assert (request.training_base, request.origin) == (of.training_base, weights_digest(own))
    world.follower.hear(TrainingBase("tiny", of.training_base, request.origin, [encode_delta(step, "fp32")]))
    given = read_base(world.child().directory)
    assert weights_digest(given) == of.training_base
    assert world.count("base_bytes") > 0
    again = begin()
    again.offer(of)
    assert weights_digest(read_base(again.child().directory)) == of.training_base
    assert again.requests == []


@pytest.mark.parametrize("hostile", ["other values", "cut", "unknown origin", "other shapes"])
def test_a_base_that_is_not_what_was_offered_is_asked_for_from_zeros(world, tiny_bundle, hostile):
    own = tiny_bundle.parameters()
    base = {name: array + np.float32(0.25) for name, array in own.items()}
    of = terms_for(tiny_bundle, base=base)
    good = encode_delta(base, "fp32")
    answers = {
        "other values": (FROM_ZEROS, encode_delta(own, "fp32")),
        "cut": (FROM_ZEROS, good[:-5]),
        "unknown origin": (b"?" * 32, good),
        "other shapes": (FROM_ZEROS, encode_delta({"x": np.ones(3, np.float32)}, "fp32")),
    }
    origin, step = answers[hostile]
    world.offer(of)
    wait_until(lambda: world.requests)
    world.follower.hear(TrainingBase("tiny", of.training_base, origin, [step]))
    wait_until(lambda: world.requests[-1].origin == FROM_ZEROS, what="a request from zeros")
    assert world.count("rounds_declined", "bad_base") == 1
    assert world.children == []
    world.follower.hear(TrainingBase("tiny", of.training_base, FROM_ZEROS, [good]))
    assert weights_digest(read_base(world.child().directory)) == of.training_base


def test_a_base_that_nobody_asked_for_is_not_even_queued(world, tiny_bundle):
    of = terms_for(tiny_bundle)
    for _ in range(1000):
        world.follower.hear(TrainingBase("tiny", of.training_base, FROM_ZEROS, [b"x"]))
    assert world.follower._inbox.qsize() == 0
    world.offer(of)
    world.child()
    assert world.count("base_bytes") == 0


def test_offers_that_are_not_believed_are_counted_by_reason(world, tiny_bundle, caplog):
    good = terms_for(tiny_bundle)
    signed = offer(good)
    world.offer(good, key=b"k" * 32)
    world.follower.hear(msgspec.structs.replace(signed, terms=signed.terms[:-1] + b"\x01"))
    world.offer(terms_for(tiny_bundle, model="other"))
    world.offer(terms_for(tiny_bundle, graph=b"x" * 32))
    world.offer(terms_for(tiny_bundle, base_bytes=12))
    wait_until(lambda: sum(world.metrics.rounds_declined.values().values()) == 5)
    assert world.metrics.rounds_declined.values() == {
        ("unknown", "signature"): 2,
        ("unknown", "unknown_model"): 1,
        ("tiny", "other_graph"): 2,
    }
    assert world.children == []
    refusals = [each for each in caplog.records if "refused" in each.getMessage()]
    assert len(refusals) == 1


def test_too_few_examples_wait_for_more(world, tiny_bundle):
    world.examples.drawn = drawn(5)
    world.offer(terms_for(tiny_bundle))
    wait_until(lambda: world.count("rounds_declined", "too_few_examples") == 1)
    world.examples.drawn = drawn(30)
    world.child().succeed()
    world.appended()


def test_a_training_is_killed_while_the_board_is_hot_and_begun_again(world, tiny_bundle):
    world.offer(terms_for(tiny_bundle))
    child = world.child()
    world.vitals = replace(COOL, celsius=90.0)
    wait_until(lambda: child.is_killed)
    assert world.count("rounds_declined", "not_now") == 1
    world.vitals = COOL
    world.child(1).succeed()
    world.appended()
    assert world.count("trainings_failed") == 0


def test_a_cleared_offer_kills_the_training(world, tiny_bundle):
    world.offer(terms_for(tiny_bundle))
    child = world.child()
    world.follower.hear(None)
    wait_until(lambda: child.is_killed and world.phase() is Phase.IDLE)
    assert world.count("rounds_declined", "cleared") == 1
    assert world.count("trainings_failed") == 0
    wait_until(lambda: not child.directory.exists())


def test_an_offer_that_runs_out_kills_the_training(world, tiny_bundle):
    world.offer(terms_for(tiny_bundle), seconds_left=1)
    child = world.child()
    wait_until(lambda: child.is_killed)
    assert world.count("rounds_declined", "expired") == 1


def test_a_defect_in_one_round_does_not_end_the_next(world, tiny_bundle, caplog):
    counts, world.examples.counts = world.examples.counts, None
    world.offer(terms_for(tiny_bundle))
    wait_until(lambda: "defect in the rounds" in caplog.text)
    world.examples.counts = counts
    world.offer(terms_for(tiny_bundle))
    world.child().succeed()
    world.appended()


def test_stopping_kills_the_training_at_once(world, tiny_bundle):
    world.offer(terms_for(tiny_bundle))
    child = world.child()
    wait_until(lambda: world.follower._runner.training is not None)
    world.follower.stop()
    assert child.is_killed
    assert len(world.children) == 1


def test_a_failed_child_is_tried_once_more_and_then_left(world, tiny_bundle):
    world.offer(terms_for(tiny_bundle))
    for number in range(2):
        world.child(number).fail()
    wait_until(lambda: world.count("rounds_declined", "training_failed") == 1)
    assert (len(world.children), world.count("trainings_failed")) == (2, 2)
    world.offer(terms_for(tiny_bundle, "round-2"))
    world.child(2).succeed()
    world.appended()


def test_a_training_that_diverged_is_not_tried_again_and_sends_nothing(world, tiny_bundle):
    world.offer(terms_for(tiny_bundle))
    world.child().on_end(EXIT_DIVERGED)
    wait_until(lambda: world.count("rounds_declined", "diverged") == 1)
    world.offer(terms_for(tiny_bundle))
    world.offer(terms_for(tiny_bundle, "round-2"))
    world.child(1).succeed()
    assert world.appended().round_id == "round-2"


def test_a_child_that_cannot_be_made_leaves_no_directory(world, tiny_bundle):
    def launch(directory, on_end):
        raise OSError("no more processes")

    world.follower._runner._launch = launch
    world.offer(terms_for(tiny_bundle))
    wait_until(lambda: world.count("rounds_declined", "training_failed") == 1)
    assert list(world.directory.glob("tiny/job-*")) == []


def test_an_update_that_the_spool_refuses_is_given_again_and_is_the_same(world, tiny_bundle):
    world.spool.fails = 2
    world.offer(terms_for(tiny_bundle))
    world.child().succeed()
    assert world.appended().seq == 7
    assert world.spool.appends == 3


def test_an_update_that_the_spool_will_never_hold_is_given_up(begin, tiny_bundle, caplog):
    world = begin()
    world.spool.is_small = True
    world.offer(terms_for(tiny_bundle))
    world.child().succeed()
    wait_until(lambda: "update not delivered" in caplog.text and world.learner.pending is None)
    world.offer(terms_for(tiny_bundle, "round-2"))
    world.child(1)
    again = begin()
    again.offer(terms_for(tiny_bundle))
    again.offer(terms_for(tiny_bundle, "round-3"))
    again.child().succeed()
    assert again.appended().round_id == "round-3"


def test_a_pending_update_that_the_spool_will_never_hold_is_given_up_at_the_next_start(begin, tiny_bundle):
    world = begin()
    world.spool.append = lambda item: Future()  # as in a crash: no answer
    world.offer(terms_for(tiny_bundle))
    world.child().succeed()
    wait_until(lambda: world.learner.pending is not None)
    world.follower.stop()
    again = World(world.directory, tiny_bundle)
    again.spool.is_small = True
    again.follower.start()
    wait_until(lambda: again.learner.pending is None and again.learner.rounds.voted)
    again.follower.stop()


def test_a_defect_in_the_files_of_rounds_ends_no_round(begin, tiny_bundle, monkeypatch, caplog):
    def defect(self):
        raise RuntimeError("no")

    monkeypatch.setattr(Learner, "load", defect)
    world = begin()
    world.offer(terms_for(tiny_bundle))
    world.child().succeed()
    world.appended()
    assert "defect in the files of rounds" in caplog.text


def test_what_an_update_left_out_counts_once_it_was_delivered_and_not_if_it_was_dropped(begin, tiny_bundle):
    def blob(value):
        return dump_arrays(
            {name: np.full_like(array, value) for name, array in tiny_bundle.parameters().items()}
        )

    def residual_of(child):
        values = {float(array.flat[0]) for array in read_residual(child.directory).values()}
        return values.pop() if values else None

    world = begin()
    # Residual that the child is given, residual that it leaves, and what becomes of its update.
    course = [
        (None, 0.1, None),
        (0.1, 0.2, DropReason.LIMIT),
        (0.1, 0.3, DropReason.REJECTED),
        (0.1, 0.4, None),
    ]
    for number, (given, left, reason) in enumerate(course):
        if number == 2:
            world = begin()
        world.offer(terms_for(tiny_bundle, f"round-{number}", encoding="sign"))
        child = world.child(number if number < 2 else number - 2)
        assert residual_of(child) == (given if given is None else pytest.approx(given))
        child.succeed(residual=blob(left))
        world.appended()
        world.spool.settle(reason)
        wait_until(lambda world=world: world.learner.pending is None)
    world = begin()
    world.offer(terms_for(tiny_bundle, "round-9", encoding="sign"))
    assert residual_of(world.child()) == pytest.approx(0.4)


def test_the_next_round_waits_until_the_last_update_has_left_the_spool(world, tiny_bundle):
    world.offer(terms_for(tiny_bundle, "round-1"))
    world.child().succeed()
    world.appended()
    world.offer(terms_for(tiny_bundle, "round-2"))
    wait_until(lambda: world.count("rounds_declined", "not_now") == 1)
    assert len(world.children) == 1
    world.spool.settle()
    world.child(1).succeed()
    world.appended()


def test_examples_that_memory_has_no_room_for_are_never_drawn(world, tiny_bundle):
    world.follower._costs = CostLimits(max_memory_bytes=8 * 20 * 4 * 128)
    asked, draw = [], world.examples.draw

    def note(model, max_examples, *, least):
        asked.append(max_examples)
        return draw(model, max_examples, least=least)

    world.examples.draw = note
    world.offer(terms_for(tiny_bundle))
    world.child()
    assert asked == [20]
    world.offer(terms_for(tiny_bundle, "round-2", min_examples=21))
    wait_until(lambda: world.count("rounds_declined", "training_failed") == 1)
    assert asked == [20]


def test_private_heads_are_kept_and_put_on_top_of_the_next_base(begin, tiny_bundle):
    heads = {
        name: np.full_like(tiny_bundle.parameters()[name], 9.0) for name in tiny_bundle.graph.head_parameters
    }
    world = begin()
    world.offer(terms_for(tiny_bundle, private_heads=True))
    world.child().succeed(heads=dump_arrays(heads))
    world.appended()
    assert world.told_heads == [("tiny", dump_arrays(heads))]
    world = begin()
    wait_until(lambda: world.spool.rows)
    assert world.told_heads == [("tiny", dump_arrays(heads))]
    world.spool.settle()
    wait_until(lambda: world.learner.pending is None)
    world.offer(terms_for(tiny_bundle, "round-2", private_heads=True))
    base = read_base(world.child().directory)
    own = tiny_bundle.parameters()
    for name, array in base.items():
        assert np.array_equal(array, heads.get(name, own[name]))
    world.child().kill()
    world.offer(terms_for(tiny_bundle, "round-3"))
    wait_until(lambda: len(world.children) > 1)
    wait_until(lambda: read_job(world.children[-1].directory).terms.round_id == "round-3")
    assert weights_digest(read_base(world.children[-1].directory)) == weights_digest(own)


@pytest.mark.parametrize("name", ["voted", "pending", "residual", "base", "heads"])
def test_a_damaged_file_is_moved_aside_counted_and_lived_without(begin, tmp_path, tiny_bundle, name):
    own = tiny_bundle.parameters()
    base = {key: array + np.float32(1) for key, array in own.items()}
    world = begin()
    of = terms_for(tiny_bundle, base=base, encoding="sign", private_heads=True)
    world.offer(of)
    wait_until(lambda: world.requests)
    world.follower.hear(TrainingBase("tiny", of.training_base, FROM_ZEROS, [encode_delta(base, "fp32")]))
    heads = {key: base[key] for key in tiny_bundle.graph.head_parameters}
    world.child().succeed(residual=dump_arrays(base), heads=dump_arrays(heads))
    world.appended()
    if name != "pending":
        world.spool.settle()
        wait_until(lambda: world.learner.pending is None)
    world.follower.stop()
    path = tmp_path / "training" / "tiny" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    again = begin()
    again.offer(terms_for(tiny_bundle, "round-2", base=base, encoding="sign", private_heads=True))
    if name == "base":
        wait_until(lambda: again.requests)
        again.follower.hear(TrainingBase("tiny", of.training_base, FROM_ZEROS, [encode_delta(base, "fp32")]))
    again.child()
    assert again.follower.damaged_files() == 1
    assert path.with_name(f"{name}.corrupt").exists()


def test_what_was_kept_for_another_graph_is_not_used(tmp_path, tiny_bundle):
    from edge_daemon.training.state import ModelState

    one = ModelState(tmp_path, b"1" * 32)
    one.load()
    one.keep_base(tiny_bundle.parameters())
    one.keep_heads(dump_arrays(tiny_bundle.parameters()))
    other = ModelState(tmp_path, b"2" * 32)
    other.load()
    assert (other.base_digest, other.base(), other.heads()) == (None, None, None)
    same = ModelState(tmp_path, b"1" * 32)
    same.load()
    assert same.base_digest == weights_digest(tiny_bundle.parameters())
    assert load_arrays(same.heads()).keys() == tiny_bundle.parameters().keys()


def test_a_directory_that_cannot_be_made_costs_rounds_and_nothing_else(tmp_path, tiny_bundle):
    (tmp_path / "file").write_text("in the way")
    world = World(tmp_path / "file" / "training", tiny_bundle)
    world.follower.start()
    try:
        world.offer(terms_for(tiny_bundle))
        wait_until(lambda: world.count("rounds_declined", "training_failed") == 1)
        assert world.children == []
    finally:
        world.follower.stop()
    assert "rounds" not in {thread.name for thread in threading.enumerate()}
