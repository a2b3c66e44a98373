"""Rounds from their offer to their end, on a real store with boards that say what a test wants."""

import dataclasses
import threading

import msgspec
import numpy as np
import pytest

from cloud_hub.errors import ModelError, RoundError, StoreUnavailableError
from cloud_hub.federation import coordinator, requests
from cloud_hub.federation.ports import Declined, HubVote, Registered, Waiting
from cloud_hub.federation.requests import MAX_WAITING, MAX_WAITING_PER_BOARD
from cloud_hub.federation.settings import settings_of
from cloud_hub.federation.start import abort_series, start_series
from cloud_hub.store import schema
from cloud_hub.store.members import members_of
from cloud_hub.store.queries import totals
from cloud_hub.store.rounds import get_series, list_rounds
from cloud_hub.store.store import Store
from edge_cascade.deltas import encode_delta
from edge_cascade.messages import BaseRequest
from edge_cascade.weights import climb_chain
from tests.hub.rounds_fleet import QUICK, World, a_learner, fill_holdout


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


def test_the_next_round_starts_from_the_last_ones_base_and_boards_reach_it_by_the_step(world):
    world.start(rounds=2)
    for board in world.boards:
        board.answer()
    world.turn()
    first, second = rounds_of(world)
    assert (first["outcome"], second["outcome"], second["base"]) == ("committed", None, first["result"])
    for board in world.asked():
        board.answer(seed=2)
    # They held the bundle's parameters, so a step of int8 was enough.
    down = {
        row["device"]: row["bytes_down"]
        for row in world.store.database.run(lambda c: members_of(c, second["id"]))
    }
    size = sum(array.nbytes for array in world.parameters.values())
    assert all(0 < amount < size // 2 for amount in down.values())
    world.turn()
    assert [row["outcome"] for row in rounds_of(world)] == ["committed", "committed"]


def test_a_board_that_holds_nothing_is_sent_the_whole_and_reaches_the_same_digest(world):
    world.start(rounds=2)
    for board in world.boards:
        board.answer()
    world.turn()
    board = world.asked()[0]
    board.ask_for_base(origin=bytes(32))
    assert board.terms.training_base in board.bases


def test_a_board_that_skipped_rounds_is_sent_all_the_steps_in_between(world):
    world.start(rounds=4, deadline_s=50, quorum=0.5)
    for seed in range(3):
        for board in world.asked()[:3]:
            board.answer(seed=seed)
        world.turn(seconds=60)
    slept = world.boards[4]
    assert len(slept.bases) == 1
    slept.ask_for_base()
    assert slept.terms.training_base in slept.bases


def test_a_request_from_outside_the_cohort_or_for_another_base_is_counted_and_not_served(world):
    world.start(cohort=3, rounds=2)
    for board in world.asked():
        board.answer()
    world.turn()
    inside = world.asked()
    outside = next(board for board in world.boards if board not in inside)
    outside.offer = inside[0].offer
    outside.ask_for_base()
    outside.offer = None
    assert len(outside.bases) == 1
    assert counter(world, "base_requests/foreign") == 1


def test_a_board_that_asks_for_ever_is_served_a_bounded_number_of_times(world):
    world.start(rounds=2)
    for board in world.boards:
        board.answer()
    world.turn()
    board = world.asked()[0]
    for _ in range(60):
        board.bases = dict(list(board.bases.items())[:1])
        board.ask_for_base(origin=bytes(32))
    served = counter(world, "base_requests/served")
    assert 1 < served < 20
    assert counter(world, "base_requests/too_often") == 60 - served


def test_a_board_that_floods_the_queue_takes_no_place_from_the_others(world):
    world.start(rounds=2)
    for board in world.boards:
        board.answer()
    world.turn()
    flooding, honest = world.asked()[:2]
    for number in range(2 * MAX_WAITING):
        world.hub.ask_for_base(BaseRequest(flooding.name, "tiny", number.to_bytes(32, "big"), bytes(32)))
    honest.ask_for_base()
    assert honest.terms.training_base in honest.bases
    assert counter(world, "base_requests/overflow") == 2 * MAX_WAITING - MAX_WAITING_PER_BOARD


def test_a_cohort_that_asks_at_once_is_served_without_waiting_for_the_next_look(world, monkeypatch):
    world.start(rounds=2)
    for board in world.boards:
        board.answer()
    world.turn()
    monkeypatch.setattr(coordinator, "POLL_S", 3600.0)
    monkeypatch.setattr(requests, "MAX_SERVED_AT_ONCE", 1)
    for board in world.asked():
        wanted, held = board.terms.training_base, next(iter(board.bases))
        world.hub.ask_for_base(BaseRequest(board.name, "tiny", wanted, held))
    all_served, deliver = threading.Event(), world.broker.__call__

    def publish(topic, payload, *, retain=False):
        taken = deliver(topic, payload, retain=retain)
        if all(board.terms.training_base in board.bases for board in world.boards):
            all_served.set()
        return taken

    monkeypatch.setattr(world.hub._requests, "_publish", publish)
    world.hub.start()
    assert all_served.wait(20.0)
    world.hub.stop()


def test_one_vote_per_device_whatever_it_sends(world):
    world.start()
    board = world.boards[0]
    assert board.answer(seed=1).fresh
    assert not board.answer(seed=2).fresh
    world.turn()
    for board in world.boards[1:]:
        board.answer()
    world.turn()
    (row,) = rounds_of(world)
    assert msgspec.json.decode(row["state"])["counted"] == 5
    assert counter(world, "updates") == 5


def test_a_late_update_is_kept_and_acknowledged_and_counts_for_nothing(world):
    world.start(rounds=2)
    late = world.boards[0]
    for board in world.boards[1:]:
        board.answer()
    world.turn()
    first_offer = late.offer
    world.turn(seconds=11)
    assert len(rounds_of(world)) == 2
    late.offer = first_offer
    assert late.answer().fresh
    world.turn()
    first, second = rounds_of(world)
    assert members(world, first["id"])[late.name] == ("late", None)
    assert (counter(world, "votes/late"), second["outcome"]) == (1, None)


def test_updates_for_rounds_that_never_were_and_from_strangers_change_nothing(world):
    world.start()
    board = world.boards[0]
    board.answer(round_id="made-up")
    board.answer(model="another")
    world.say("stranger", online=False)
    board.answer(device="stranger")
    world.turn()
    (row,) = rounds_of(world)
    assert {name for name, (state, _) in members(world, row["id"]).items() if state != "asked"} == set()
    assert (counter(world, "votes/unknown_round"), counter(world, "votes/foreign")) == (2, 1)


def test_malformed_and_hostile_updates_are_rejected_by_name_and_the_others_count(store, learner):
    world = World(store, learner, boards=9)
    world.start(cohort=9)
    good, wrong = world.boards[:5], world.boards[5:]
    for board in good:
        board.answer()
    wrong[0].answer(delta=b"\x01\x00rubbish")
    shapes = {"other": np.zeros(3, np.float32)}
    wrong[1].answer(delta=encode_delta(shapes, "int8"))
    wrong[2].answer(scale=10.0)
    wrong[3].answer(encoding="fp32")
    world.turn()
    (row,) = rounds_of(world)
    assert row["outcome"] == "committed"
    found = members(world, row["id"])
    assert {found[board.name] for board in good} == {("counted", None)}
    assert [found[board.name] for board in wrong] == [
        ("rejected", "malformed"),
        ("rejected", "malformed"),
        ("rejected", "norm"),
        ("rejected", "malformed"),
    ]
    assert counter(world, "votes/malformed") == 3


def test_an_update_from_a_base_that_the_round_does_not_know_is_no_vote(world):
    world.start()
    world.boards[0].answer(training_base=bytes(31) + b"\x01")
    world.turn()
    (row,) = rounds_of(world)
    assert members(world, row["id"])[world.boards[0].name] == ("rejected", "wrong_base")


def test_a_round_that_makes_the_model_worse_is_rolled_back_and_the_next_starts_from_the_same_base(world):
    world.start(rounds=1, max_failures=1)
    for board in world.boards:
        board.answer(scale=3.0)
    world.turn()
    first, second = rounds_of(world)
    assert (first["outcome"], second["outcome"], second["base"]) == ("rolled_back", None, first["base"])
    assert first["why"].startswith("worse at")
    guard = msgspec.json.decode(first["guard"])
    assert (guard["judgement"], guard["before"], guard["samples"]) == ("worse", 1.0, 60)
    assert guard["after"] < 0.7
    for board in world.asked():
        board.answer(scale=3.0)
    world.turn()
    series = series_of(world)
    assert (series["phase"], series["base"]) == ("failed", series["first_base"])
    assert "2 rounds in a row failed, 1 allowed" in series["why"]


def pull_down(board, share):
    """Vote for longer weights: hardly an answer changes, but what is wrong is believed more firmly."""
    board.ask_for_base()
    base = board.bases[board.terms.training_base]
    board.answer(delta=encode_delta({name: share * array for name, array in base.items()}, "int8"))


def test_rounds_that_each_lose_next_to_nothing_are_kept_only_near_the_best_base(world):
    world.start(rounds=30, max_failures=2)
    for _ in range(20):
        for board in world.asked():
            pull_down(board, 0.0005)
        world.turn()
        # What was the best base is known from the store.
        world.a_hub()
        world.turn()
        if series_of(world)["phase"] != "running":
            break
    ended = [row for row in rounds_of(world) if row["outcome"] is not None]
    guards = [msgspec.json.decode(row["guard"]) for row in ended]
    kept = [guard for guard in guards if guard["judgement"] == "kept"]
    assert len(kept) >= 2
    assert [guard["judgement"] for guard in guards[len(kept) :]] == ["drifted"] * 3
    # Each is held against the first base, which stays the best, and not against the round before.
    assert {guard["best_loss"] for guard in guards} == {guards[0]["best_loss"]}
    losses = [guard["loss"] for guard in kept]
    assert losses == sorted(losses)
    assert losses[-1] - guards[0]["best_loss"] <= 0.001
    assert guards[-1]["loss"] - guards[0]["best_loss"] > 0.001
    assert series_of(world)["base"] == ended[len(kept)]["base"]


def test_a_series_that_stalls_hands_on_what_it_has_and_says_what_to_try(world, caplog):
    candidates = []

    def make(*arguments):
        candidates.append(arguments)
        return Registered("bundle")

    world.ports["make_candidate"] = make
    world.a_hub()
    world.start(rounds=3, max_failures=0)
    for board in world.asked():
        board.answer()
    world.turn()
    for board in world.asked():
        pull_down(board, 0.01)
    world.turn()
    first, second = rounds_of(world)
    assert (first["outcome"], second["outcome"]) == ("committed", "rolled_back")
    assert [arguments[2] for arguments in candidates] == [first["result"]]
    assert series_of(world)["phase"] == "made"
    assert "series stalled series=1 rolled_back=1 committed=1" in caplog.text
    assert "try strategy median or trimmed" in caplog.text


def test_a_round_without_a_quorum_is_aborted_at_its_deadline_and_another_is_tried(world):
    world.start()
    world.boards[0].answer()
    world.turn()
    world.turn(seconds=101)
    first, second = rounds_of(world)
    assert (first["outcome"], second["outcome"]) == ("aborted", None)
    assert "1 of 5 asked have answered, quorum 3" in first["why"]


def test_votes_that_came_while_the_hub_was_busy_elsewhere_count_although_the_deadline_has_passed(world):
    world.start()
    for board in world.boards[:4]:
        board.answer()
    world.turn(seconds=500)
    (row,) = rounds_of(world)
    assert (row["outcome"], msgspec.json.decode(row["state"])["counted"]) == ("committed", 4)


def test_a_noisy_round_of_which_screening_leaves_fewer_than_the_quorum_is_rolled_back(world):
    world.start(clip_norm=1.0, noise_multiplier=1.0)
    for board in world.boards[:3]:
        board.answer(delta=b"\x01\x00rubbish")
    for board in world.boards[3:]:
        board.answer()
    world.turn()
    assert rounds_of(world)[0]["outcome"] == "rolled_back"
    assert "2 votes stood screening and 3 did not, 3 needed" in rounds_of(world)[0]["why"]


def test_a_quorum_waits_its_grace_and_then_closes_without_the_rest(world):
    world.start()
    for board in world.boards[:3]:
        board.answer()
    world.turn()
    assert rounds_of(world)[0]["outcome"] is None
    world.turn(seconds=9)
    assert rounds_of(world)[0]["outcome"] is None
    world.turn(seconds=2)
    assert rounds_of(world)[0]["outcome"] == "committed"
    assert world.broker.offered == set()


def test_repeated_faults_lead_to_quarantine_and_the_cohort_goes_on_without(store, learner):
    world = World(store, learner, boards=6)
    world.start(rounds=5, cohort=6)
    for seed in range(3):
        for board in world.asked():
            liar = board is world.boards[0]
            board.answer(seed=seed, **({"delta": b"\x01\x00rubbish"} if liar else {}))
        world.turn()
    fourth = rounds_of(world)[3]
    assert world.boards[0].name not in members(world, fourth["id"])
    assert len(members(world, fourth["id"])) == 5


@pytest.mark.parametrize("when", ["offered", "answered", "half", "done"])
def test_a_hub_that_starts_again_goes_on_where_the_store_says(world, when):
    world.start()
    if when == "half":
        for board in world.boards[:2]:
            board.answer()
        world.turn()
    if when == "answered":
        for board in world.boards:
            board.answer()
    if when == "done":
        for board in world.boards:
            board.answer()
        world.turn()
    world.broker.retained.clear()
    world.a_hub()
    world.turn()
    world.hub.connected()
    world.turn()
    for board in world.boards:
        if board.offer is not None:
            board.answer()
    world.turn()
    (row,) = rounds_of(world)
    assert (row["outcome"], msgspec.json.decode(row["state"])["counted"]) == ("committed", 5)
    assert series_of(world)["phase"] == "failed"  # no maker of candidates here
    assert world.broker.offered == set()


POINTS = [
    "hub.round-opened",
    "hub.round-offered",
    "hub.round-closing",
    "hub.round-aggregated",
    "hub.round-judged",
    "hub.round-committed",
    "hub.candidate-made",
]


class KilledError(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("outcome", ["committed", "rolled_back"])
def test_killed_at_any_point_of_a_round_it_ends_as_it_would_have_and_nothing_counts_twice(
    store, learner, monkeypatch, point, outcome
):
    made = []
    passed = []

    def make(series_id, *_):
        made.append(series_id)
        return Registered("9")

    def crash(name):
        passed.append(name)
        if name == point and passed.count(name) == 1:
            raise KilledError

    for module in ("round_run", "series_run"):
        monkeypatch.setattr(f"cloud_hub.federation.{module}.crash_point", crash)
    world = World(store, learner, make_candidate=make)
    scale = 1e-4 if outcome == "committed" else 3.0
    wanted = settings_of(QUICK | {"min_holdout": 50, "max_failures": 0})
    store.database.run(lambda c: start_series(c, learner.bundle, wanted, created_by="ann", now_ms=1))
    kills = 0
    for _ in range(8):
        try:
            world.turn()
        except KilledError:
            kills += 1
            world.broker.retained.clear()
            world.a_hub()
            world.hub.connected()
        for board in world.asked():
            board.answer(scale=scale)
    (row,) = rounds_of(world)
    assert (row["outcome"], msgspec.json.decode(row["state"])["counted"]) == (outcome, 5)
    assert counter(world, "votes/counted") == 5
    assert counter(world, f"rounds/tiny/{outcome}") == 1
    assert series_of(world)["phase"] == ("made" if outcome == "committed" else "failed")
    assert made == ([1] if outcome == "committed" else [])
    is_passed = outcome == "committed" or point not in {"hub.round-committed", "hub.candidate-made"}
    assert kills == is_passed
    assert world.broker.offered == set()


def test_a_fault_between_storing_and_doing_is_made_good_by_the_next_turn(world, monkeypatch):
    world.start()
    for board in world.boards:
        board.answer()
    real = world.store.blobs.get
    calls = []

    def failing(*place):
        calls.append(place)
        if len(calls) == 3:
            raise StoreUnavailableError("blobs: the disk is away")
        return real(*place)

    monkeypatch.setattr(world.store.blobs, "get", failing)
    with pytest.raises(StoreUnavailableError):
        world.turn()
    assert rounds_of(world)[0]["outcome"] is None
    world.turn()
    (row,) = rounds_of(world)
    assert (row["outcome"], msgspec.json.decode(row["state"])["counted"]) == ("committed", 5)


def test_a_fault_of_our_own_in_closing_ends_the_round_and_not_the_hub(world, monkeypatch, caplog):
    def broken(*_, **__):
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr("cloud_hub.federation.workshop.close_votes", broken)
    world.start(max_failures=0)
    for board in world.boards:
        board.answer()
    world.turn()
    (row,) = rounds_of(world)
    assert (row["outcome"], row["why"]) == ("rolled_back", "ZeroDivisionError: a fault")
    assert series_of(world)["phase"] == "failed"
    assert "round failed" in caplog.text


def test_offers_reach_a_broker_that_was_away_and_are_cleared_on_one_that_forgot_to(world):
    world.broker.is_up = False
    world.start()
    assert world.asked() == []
    world.broker.is_up = True
    world.broker.retained["press-4"] = b"an old offer"
    world.hub.connected()
    world.turn()
    assert len(world.asked()) == 5
    world.store.database.run(lambda c: abort_series(c, 1))
    world.turn()
    world.broker.retained["press-4"] = b"an old offer"
    world.hub.connected()
    world.turn()
    assert world.broker.offered == set()


def test_a_board_that_comes_online_is_offered_the_round_again_with_what_is_left_of_it(world):
    world.start()
    assert world.boards[0].offer.seconds_left == 100
    world.say("press-0", online=False)
    world.boards[0].offer = None
    world.clock.now_s += 40
    world.say("press-0", online=True)
    world.turn()
    assert world.boards[0].offer.seconds_left == 60


def test_a_board_that_sleeps_is_asked_all_the_same(world):
    world.say("press-0", online=False)
    number = world.start()
    assert world.boards[0] in world.asked()
    for board in world.boards:
        board.answer()
    world.turn()
    (row,) = rounds_of(world, number)
    assert set(members(world, row["id"]).values()) == {("counted", None)}
    assert len(members(world, row["id"])) == 5


def test_a_series_waits_for_boards_and_says_so(store, learner):
    world = World(store, learner, boards=0)
    world.start()
    assert rounds_of(world) == []
    assert "no device can be asked: 1 known, 0 run a bundle of this graph" in series_of(world)["why"]
    world.say("press-9", online=True, bundle="ab" * 32)
    world.turn(seconds=6)
    assert rounds_of(world) == []
    world.say("press-9", online=True)
    world.turn(seconds=6)
    assert list(members(world, rounds_of(world)[0]["id"])) == ["press-9"]
    assert series_of(world)["why"] == ""


def test_a_person_ends_a_series_and_its_round_with_it(world):
    world.start()
    world.boards[0].answer()
    world.turn()
    world.store.database.run(lambda c: abort_series(c, 1, "the plant is closed"))
    world.turn()
    (row,) = rounds_of(world)
    assert (row["outcome"], row["why"]) == ("aborted", "the plant is closed")
    series = series_of(world)
    assert (series["phase"], series["why"], series["ended_at_ms"] is None) == (
        "aborted",
        "the plant is closed",
        False,
    )
    assert world.broker.offered == set()
    with pytest.raises(RoundError, match="series 1 has ended already"):
        world.store.database.run(lambda c: abort_series(c, 1))


def test_a_candidate_that_must_wait_is_tried_again_and_one_that_is_declined_ends_the_series(store, learner):
    said = [Waiting("40 of 300 fresh samples"), Waiting("40 of 300 fresh samples"), Declined("no better")]
    world = World(store, learner, make_candidate=lambda *_: said.pop(0))
    world.start()
    for board in world.boards:
        board.answer()
    world.turn()
    assert series_of(world)["why"] == "the candidate waits: 40 of 300 fresh samples"
    world.turn(seconds=61)
    assert (series_of(world)["phase"], len(said)) == ("making", 1)
    world.a_hub()
    world.turn()
    series = series_of(world)
    assert (series["phase"], series["why"]) == ("failed", "no better")


def test_sleepers_vote_when_they_wake_whichever_round_it_is_by_then(world):
    world.start(rounds=3, strategy="fedbuff", quorum=0.4, cohort=5)
    early, sleeper = world.boards[:2], world.boards[4]
    first_offer = sleeper.offer
    for board in early:
        board.answer()
    world.turn()
    first, second = rounds_of(world)
    assert (first["outcome"], second["outcome"]) == ("committed", None)
    sleeper.offer = first_offer
    sleeper.answer()
    world.boards[2].answer(seed=5)
    world.turn()
    second = rounds_of(world)[1]
    assert second["outcome"] == "committed"
    assert members(world, second["id"])[sleeper.name] == ("counted", None)
    assert msgspec.json.decode(second["state"])["votes"] == {sleeper.name: 1, world.boards[2].name: 0}


@pytest.mark.parametrize("strategy", ["fedavgm", "fedadam"])
def test_the_rules_state_is_carried_from_round_to_round(world, strategy):
    world.start(rounds=2, strategy=strategy, server_learning_rate=1e-4)
    for seed in range(2):
        for board in world.boards:
            board.answer(seed=seed)
        world.turn()
    first, second = rounds_of(world)
    assert first["rule_blob"] is not None
    assert second["rule_blob"] not in {None, first["rule_blob"]}


def test_private_heads_are_left_as_they_are(world):
    heads = set(world.model.bundle.graph.head_parameters)
    assert heads
    world.start(private_heads=True)
    for board in world.boards:
        base = board.bases[board.terms.training_base]
        step = {n: np.full(a.shape, 1e-4, np.float32) for n, a in base.items() if n not in heads}
        board.answer(delta=encode_delta(step, "int8"))
    world.turn()
    (row,) = rounds_of(world)
    assert row["outcome"] == "committed"
    board = world.boards[0]
    way = world.hub._bases.way_to(row["result"], row["base"])
    reached = climb_chain(world.parameters, way.steps, expected=row["result"], max_bytes=2**30)
    moved = {name for name in reached if not np.array_equal(reached[name], world.parameters[name])}
    assert moved == reached.keys() - heads


def test_the_hub_votes_too_where_it_is_asked_to(store, learner):
    asked = []

    def train(model, base, schedule, *, max_examples, soft_share, seed):
        asked.append((model, schedule.epochs, max_examples, seed))
        delta = {name: np.full(array.shape, 1e-5, np.float32) for name, array in base.items()}
        return HubVote(delta, 500)

    world = World(store, learner, train_hub=train)
    world.start(include_hub=True, max_examples=100)
    for board in world.boards:
        board.answer(scale=0.0)
    world.turn()
    (row,) = rounds_of(world)
    assert asked == [("tiny", 2, 100, 7 + 1)]
    assert row["outcome"] == "committed"
    assert row["result"] != row["base"]
    assert len(members(world, row["id"])) == 5


def test_what_cannot_be_started_says_what_there_is_and_what_is_needed(store, learner):
    world = World(store, learner, holdout=20)
    with pytest.raises(RoundError, match="'tiny' has 20 holdout samples with a verdict, needs 50"):
        world.start()
    world.start(min_holdout=20)
    with pytest.raises(RoundError, match="has an open series, 1; wait, or `cloud-hub round abort 1`"):
        world.start(min_holdout=20)
    bundle = dataclasses.replace(learner.bundle, train_step=None)
    with pytest.raises(ModelError, match="no train step"):
        store.database.run(lambda c: start_series(c, bundle, settings_of({}), created_by="ann", now_ms=1))


@pytest.mark.parametrize(
    ("values", "encoding", "why"),
    [
        (5_000_000, "fp32", "an update in fp32 takes 20,000,010 bytes, at most 16,773,120 fit into a frame"),
        (17_000_000, "sign", "68,000,000 bytes of parameters are more than a training base may have"),
    ],
)
def test_a_network_that_cannot_travel_is_refused_before_boards_train_it(
    store, learner, values, encoding, why
):
    step = dataclasses.replace(learner.bundle.train_step, shapes={"w": (values,)})
    bundle = dataclasses.replace(learner.bundle, train_step=step)
    settings = settings_of({"encoding": encoding})
    with pytest.raises(ModelError, match=why):
        store.database.run(lambda c: start_series(c, bundle, settings, created_by="ann", now_ms=1))


def test_a_series_of_a_model_that_this_hub_lost_is_given_up_in_one_line(world):
    world.start()
    world.model = dataclasses.replace(world.model, name="else")
    world.a_hub()
    world.turn()
    series = series_of(world)
    assert (series["phase"], "no model 'tiny'" in series["why"]) == ("failed", True)
    assert rounds_of(world)[0]["outcome"] == "aborted"
    assert world.broker.offered == set()


def test_the_guards_window_grows_only_where_it_holds_too_few(world):
    world.start(rounds=2)
    assert series_of(world)["window_start"] == 60
    fill_holdout(world.store, world.model, 30, first=60)
    for board in world.boards:
        board.answer()
    world.turn()
    assert (series_of(world)["window_start"], rounds_of(world)[0]["why"][-13:]) == (60, "on 60 samples")
    # Cases whose verdict another full model gave count for nothing.
    world.store.database.run(
        lambda c: c.execute(
            schema.verdicts.update().where(schema.verdicts.c.case_id <= 20).values(full_model=bytes(32))
        )
    )
    for board in world.asked():
        board.answer()
    world.turn()
    assert (series_of(world)["window_start"], rounds_of(world)[1]["why"][-13:]) == (70, "on 50 samples")
