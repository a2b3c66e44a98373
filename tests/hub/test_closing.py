"""From committed updates to the next weights: in the memory of a few models, whatever came in."""

import tracemalloc

import numpy as np
import pytest

from cloud_hub.core.federation.screening import NormRule, Reason, RoundSpec
from cloud_hub.core.federation.server import ServerState
from cloud_hub.core.federation.standing import Standing
from cloud_hub.core.federation.strategies import fed_avg
from cloud_hub.core.federation.update import Layout, Update
from cloud_hub.errors import NotFoundError, StoreUnavailableError
from cloud_hub.federation.closing import HUB, Finding, Votes, close_votes
from cloud_hub.store.deliveries import Place
from cloud_hub.store.members import StoredUpdate
from edge_cascade.deltas import encode_delta

BASE = bytes(31) + b"\x01"
WEIGHTS = {"a": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float32)}


def vote(device, content, *, examples=10, encoding="fp32", base=BASE):
    """An update whose place is the delta itself: what `read` makes of it."""
    return StoredUpdate(1, "r", device, "m", base, examples, encoding, Place(content, 0, len(content)))


def delta(value):
    return encode_delta({name: np.full_like(array, value) for name, array in WEIGHTS.items()}, "fp32")


def close(updates, *, read=lambda place: place.blob, own=None, standings=None, weights=WEIGHTS):
    spec = RoundSpec(BASE, Layout.of(weights), 100, NormRule())
    known = {update.device: Standing() for update in updates} | (standings or {})
    votes = Votes(updates, read, known, own)
    return close_votes(votes, weights, spec, fed_avg(), ServerState(), round_number=3)


def test_the_mean_by_examples_is_added_to_the_base():
    closed = close([vote("d1", delta(1.0), examples=10), vote("d2", delta(4.0), examples=20)])
    np.testing.assert_allclose(closed.outcome.weights["a"], 4.0, rtol=1e-6)
    np.testing.assert_allclose(closed.outcome.weights["b"], 3.0, rtol=1e-6)
    assert closed.findings == [Finding("d1"), Finding("d2")]


def test_what_cannot_be_read_is_a_rejection_and_costs_its_device_points():
    nan = bytearray(delta(1.0))
    nan[-4:] = np.float32("nan").tobytes()
    closed = close(
        [
            vote("good", delta(1.0)),
            vote("rubbish", b"\x01\x00"),
            vote("nan", bytes(nan)),
            vote("liar", delta(1.0), encoding="int8"),
            vote("greedy", delta(1.0), examples=101),
        ]
    )
    found = {finding.device: finding.reason for finding in closed.findings}
    assert found == {
        "good": None,
        "rubbish": Reason.MALFORMED,
        "nan": Reason.MALFORMED,
        "liar": Reason.MALFORMED,
        "greedy": Reason.EXAMPLES,
    }
    assert {name: standing.points for name, standing in closed.standings.items()} == {
        "good": 0,
        "rubbish": 3,
        "nan": 3,
        "liar": 3,
        "greedy": 3,
    }
    assert closed.counted == 1


def test_a_pack_that_the_hub_lost_is_no_fault_of_the_device():
    def read(place):
        raise NotFoundError("pack x is missing")

    closed = close([vote("d1", delta(1.0))], read=read)
    assert (closed.outcome, closed.findings) == (
        None,
        [Finding("d1", Reason.MALFORMED, "pack x is missing")],
    )
    assert closed.standings == {"d1": Standing()}


def test_a_store_that_is_away_ends_the_closing_and_not_the_vote():
    def read(place):
        raise StoreUnavailableError("away")

    with pytest.raises(StoreUnavailableError):
        close([vote("d1", delta(1.0))], read=read)


def test_votes_are_read_once_unless_one_is_longer_than_the_others_allow():
    reads = []

    def read(place):
        reads.append(place)
        return place.blob

    honest = [vote(f"d{index}", delta(1.0)) for index in range(5)]
    closed = close(honest, read=read)
    assert (closed.counted, len(reads)) == (5, 5)
    reads.clear()
    closed = close([*honest, vote("liar", delta(100.0))], read=read)
    assert (closed.counted, len(reads)) == (5, 12)
    assert closed.findings[-1].reason is Reason.NORM
    assert closed.standings["liar"].points == 3
    assert closed.standings["d0"] == Standing()
    np.testing.assert_allclose(closed.outcome.weights["b"], 1.0, rtol=1e-6)


def test_the_hubs_own_vote_is_screened_like_every_other():
    wrong = {"a": np.full((2, 3), np.nan, np.float32), "b": np.zeros(4, np.float32)}
    closed = close([vote("d1", delta(1.0))], own=Update(HUB, 10, BASE, wrong))
    assert closed.findings == [Finding("d1"), Finding(HUB, Reason.NOT_FINITE, "a number is infinite or NaN")]
    assert HUB not in closed.standings


def test_four_hundred_updates_of_a_megabyte_need_the_memory_of_a_few():
    weights = {"w": np.zeros(250_000, np.float32)}
    rng = np.random.default_rng(1)
    contents = [
        encode_delta({"w": rng.standard_normal(250_000).astype(np.float32)}, "fp32") for _ in range(4)
    ]
    updates = [vote(f"d{index}", contents[index % 4]) for index in range(400)]
    tracemalloc.start()
    try:
        closed = close(updates, weights=weights, read=lambda place: bytes(bytearray(place.blob)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert closed.counted == 400
    assert peak < 16 * 2**20
