"""kill -9 of hub and boards at every named point of a round: it is completed or aborted, nothing counts twice."""

import pytest

from tests.builder.models import built
from tests.faults.processes import wait_until
from tests.faults.rounds import BOARDS, TrainingLoop, has_residual, is_pending, kill_child

KEPT = "not worse: "
NO_CANDIDATE = "not better beyond noise: "
LEARNING = {"rounds": 1, "learning_rate": 0.01, "epochs": 15, "alpha": 0.05}
CERTIFYING = 1500
"""Fresh holdout samples, more than enough for what the bundle promises."""


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    loop = TrainingLoop(tmp_path_factory.mktemp("rounds"), built())
    try:
        loop.teach()
        yield loop
    finally:
        loop.stop()


@pytest.fixture
def loop(taught):
    """Brokers and boards up, the hub down."""
    taught.hub_broker.start()
    for board in taught.boards.values():
        if not board.program.is_running:
            board.start()
    for board in taught.boards.values():
        board.wait_ready()
    yield taught
    assert taught.tracebacks() == []


def check_all_voted_once(series, *, rounds=1):
    """Every round was committed with one vote of each board, and the series came to its end."""
    assert [(each.outcome, each.counted, each.votes) for each in series.rounds] == [
        ("committed", len(BOARDS), list(BOARDS))
    ] * rounds
    assert all(each.why.startswith(KEPT) for each in series.rounds)
    assert series.phase == "failed"
    assert series.why.startswith(NO_CANDIDATE)


def test_a_hub_killed_at_every_point_of_one_round_completes_it(loop):
    number = loop.start_series()
    found = {}
    for point in (
        "hub.round-opened",
        "hub.round-offered",
        "hub.before-commit",
        "hub.after-commit",
        "hub.round-closing",
        "hub.round-aggregated",
        "hub.round-judged",
        "hub.round-committed",
    ):
        loop.crash_hub(point)
        (round_,) = loop.books.series(number).rounds
        found[point] = (round_.phase, len(loop.books.updates(round_.id)) > 0, round_.has_result)
    assert found == {
        "hub.round-opened": ("collecting", False, False),
        "hub.round-offered": ("collecting", False, False),
        "hub.before-commit": ("collecting", False, False),
        "hub.after-commit": ("collecting", True, False),
        "hub.round-closing": ("aggregating", True, False),
        "hub.round-aggregated": ("judging", True, True),
        "hub.round-judged": ("committing", True, True),
        "hub.round-committed": ("committed", True, True),
    }
    loop.hub.start()
    check_all_voted_once(loop.wait_ended(number))


def test_boards_killed_at_every_point_of_their_rounds_vote_once_in_each(loop):
    # The first commit of a start is a report.
    first = ("spool.before-commit:2", "spool.after-commit:2", "device.round-residual-written")
    second = ("device.round-trained", "device.round-before-append", "device.round-after-append")
    loop.hub.start()
    loop.start_boards(dict(zip(BOARDS, first, strict=True)))
    number = loop.start_series(rounds=2, encoding="sign")
    found = {}
    for name, point, next_point in zip(BOARDS, first, second, strict=True):
        board = loop.boards[name]
        board.program.wait_killed()
        found[point] = (is_pending(board), board.spooled_updates())
        board.start(EDGE_CRASH_AT=next_point)
    for name, point in zip(BOARDS, second, strict=True):
        board = loop.boards[name]
        board.program.wait_killed()
        found[point] = (is_pending(board), board.spooled_updates())
        board.start()
    # What has reached the spool may have left it before the board heard that it was there.
    _, in_spool = found.pop("device.round-after-append")
    assert in_spool <= 1
    assert found == {
        "spool.before-commit:2": (True, 0),
        "spool.after-commit:2": (True, 1),
        "device.round-residual-written": (True, 0),
        "device.round-trained": (False, 0),
        "device.round-before-append": (True, 0),
    }
    check_all_voted_once(loop.wait_ended(number), rounds=2)
    assert all(has_residual(board) for board in loop.boards.values())


def test_a_round_survives_its_hub_a_base_that_was_just_stored_a_child_and_a_board_that_dies_twice(loop):
    fetching, training, unlucky = loop.boards.values()
    loop.start_boards({BOARDS[0]: "device.round-base-stored", BOARDS[2]: "device.round-trained"})
    failed = training.metric("edge_trainings_failed_total")
    number = loop.start_series(rounds=2, encoding="topk")
    loop.hub.start(EDGE_CRASH_AT="hub.round-closing")
    kill_child(training)
    unlucky.program.wait_killed()
    unlucky.start(EDGE_CRASH_AT="device.round-after-append")
    unlucky.program.wait_killed()
    unlucky.start()
    loop.hub.program.wait_killed()
    loop.hub.start(EDGE_CRASH_AT="hub.round-closing")
    # The first base is the board's own bundle; only the second round's has to be fetched.
    fetching.program.wait_killed()
    (first, second) = loop.books.series(number).rounds
    assert (first.outcome, second.outcome) == ("committed", None)
    fetching.start()
    loop.hub.program.wait_killed()
    loop.hub.start()
    check_all_voted_once(loop.wait_ended(number), rounds=2)
    assert training.metric("edge_trainings_failed_total") == failed + 1


def test_a_broker_wiped_in_the_middle_of_a_round_is_given_the_open_offers_again(loop):
    *awake, asleep = loop.boards.values()
    asleep.program.kill()
    loop.hub.start()
    voted = [board.metric("edge_rounds_completed_total") for board in awake]
    number = loop.start_series(encoding="fp32")
    wait_until(
        lambda: [board.metric("edge_rounds_completed_total") for board in awake] == [n + 1 for n in voted],
        "the votes of those that are there",
    )
    loop.hub_broker.kill_and_wipe()
    asleep.start()
    loop.hub_broker.start()
    check_all_voted_once(loop.wait_ended(number))


def test_a_hub_killed_between_rounds_without_a_cohort_counts_each_update_in_one_of_them(loop):
    # A round closes with the second vote; the third, late, may be one in the next round.
    number = loop.start_series(strategy="fedbuff", quorum=0.6, rounds=2)
    for point, ended in (
        ("hub.round-closing", 0),
        ("hub.round-committed", 1),
        ("hub.round-opened", 1),
        ("hub.round-closing", 1),
    ):
        loop.crash_hub(point)
        assert sum(each.outcome is not None for each in loop.books.series(number).rounds) == ended
    loop.hub.start()
    series = loop.wait_ended(number)
    assert [(each.outcome, each.counted, len(each.votes)) for each in series.rounds] == [
        ("committed", 2, 2)
    ] * 2
    assert series.why.startswith(NO_CANDIDATE)


def test_a_round_aborted_while_its_hub_was_dead_counts_nothing_of_what_was_committed(loop):
    for name in BOARDS[1:]:
        loop.boards[name].program.kill()
    number = loop.start_series()
    loop.crash_hub("hub.after-commit")
    (round_,) = loop.books.series(number).rounds
    assert (round_.phase, round_.votes, loop.books.updates(round_.id)) == ("collecting", [], [BOARDS[0]])
    loop.command("round", "abort", number, "--reason", "enough")
    loop.hub.start()
    series = loop.wait_ended(number)
    (round_,) = series.rounds
    assert (series.phase, series.why) == ("aborted", "enough")
    assert (round_.outcome, round_.why, round_.counted, round_.votes) == ("aborted", "enough", 0, [])
    assert round_.members == dict(zip(BOARDS, ("late", "asked", "asked"), strict=True))


def test_a_round_whose_deadline_passes_while_its_hub_restarts_is_aborted_with_its_reason(loop):
    for board in loop.boards.values():
        board.program.kill()
    number = loop.start_series(deadline_s=1)
    loop.crash_hub("hub.round-offered")
    loop.hub.start()
    series = loop.wait_ended(number)
    (round_,) = series.rounds
    assert round_.outcome == "aborted"
    assert round_.why.startswith("0 of 3 asked have answered, quorum 3, after ")
    assert series.phase == "failed"
    assert series.why.endswith(round_.why)
    assert round_.members == dict.fromkeys(BOARDS, "asked")


def test_a_hub_killed_at_every_point_of_a_candidate_makes_one_draft_of_the_series(loop):
    number = loop.start_series(**LEARNING)
    loop.hub.start()
    wait_until(lambda: f"series waits series={number} " in loop.hub.program.log, "the candidate")
    loop.hub.program.kill()
    looked_at = [loop.books.looked_at()]
    found = {}
    for point in (
        "hub.candidate-looked",
        "hub.release-written",
        "hub.release-registered",
        "hub.candidate-made",
    ):
        if len(found) < 2:
            # What was looked at for an attempt that left nothing certifies no other. What is written is kept.
            loop.add_holdout(CERTIFYING)
        loop.crash_hub(point)
        series = loop.books.series(number)
        found[point] = (series.phase, series.releases)
        looked_at.append(loop.books.looked_at())
    assert found == {
        "hub.candidate-looked": ("making", []),
        "hub.release-written": ("making", []),
        "hub.release-registered": ("making", ["draft"]),
        "hub.candidate-made": ("made", ["draft"]),
    }
    assert looked_at[0] < looked_at[1] < looked_at[2] == looked_at[3] == looked_at[4]
    loop.hub.start()
    series = loop.wait_ended(number)
    assert (series.phase, series.releases) == ("made", ["draft"])
    assert [each.votes for each in series.rounds] == [list(BOARDS)] * len(series.rounds)
