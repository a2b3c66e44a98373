"""Rounds from their offer to their end, on a real store with boards that say what a test wants."""

import msgspec
import numpy as np
import pytest
from sqlalchemy import select

from cloud_hub.federation.ports import Declined, Registered, Waiting
from cloud_hub.federation.start import abort_series, start_series
from cloud_hub.store import schema
from cloud_hub.store.members import members_of
from cloud_hub.store.queries import totals
from cloud_hub.store.rounds import get_series, list_rounds
from cloud_hub.store.store import Store
from edge_cascade.deltas import encode_delta
from tests.hub.rounds_fleet import World, a_learner


@pytest.fixture(scope="session")
def learner(tiny_model_dir):
    return a_learner(tiny_model_dir)


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path) as store:
        yield store


@pytest.fixture
def world(store, learner):
    return World(store, learner)


def rounds_of(world, series=1):
    found = world.store.database.run(lambda c: list_rounds(c, series_id=series, before=None, limit=100))
    return list(reversed(found))


def series_of(world, number=1):
    return world.store.database.run(lambda c: get_series(c, number))


def members(world, round_id):
    rows = world.store.database.run(lambda c: members_of(c, round_id))
    return {row["device"]: (row["state"], row["reason"]) for row in rows}


def counter(world, name):
    return world.store.database.run(totals).counters.get(name, 0)


def test_a_full_round_is_offered_answered_aggregated_judged_committed_and_made_a_candidate(store, learner):
    made = []

    def make(series_id, model, base_digest, weights, lineage):
        made.append((series_id, model, base_digest, weights, lineage))
        return Registered("9")

    world = World(store, learner, make_candidate=make)
    number = world.start()
    assert len(world.asked()) == 5
    for board in world.boards:
        assert board.answer().fresh
    world.turn()
    (row,) = rounds_of(world)
    assert (row["outcome"], row["why"]) == (
        "committed",
        "not worse: 100.0% before, 100.0% after, on 60 samples",
    )
    assert set(members(world, row["id"]).values()) == {("counted", None)}
    series = series_of(world, number)
    assert (series["phase"], series["release"], series["base"]) == ("made", "9", row["result"])
    ((series_id, model, digest, weights, lineage),) = made
    assert (series_id, model, digest) == (number, "tiny", row["result"])
    assert [each.votes for each in lineage.rounds] == [5]
    assert lineage.first_base == row["base"] != row["result"]
    assert any(not np.array_equal(weights[name], world.parameters[name]) for name in weights)
    assert world.broker.offered == set()
