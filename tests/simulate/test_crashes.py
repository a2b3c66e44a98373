import pytest
from msgspec.structs import replace

from edge_daemon.core.swap_state import Attempt, Phase, SwapState
from edge_daemon.simulate.crashes import KILL_AFTER, KILLS, Victim, decide_kill

ATTEMPT = Attempt(
    1, "r1", "new", 1000, is_return=False, is_fetched=True, phase=Phase.TRIAL, probation_since_s=5.0
)


def state(**changes):
    return SwapState("old", attempt=replace(ATTEMPT, **changes))


def test_a_board_that_has_answered_for_a_moment_is_killed_as_often_as_it_takes_to_go_back():
    victim, killed = Victim(), 0
    for answers in range(0, 10 * KILL_AFTER, KILL_AFTER):
        if decide_kill(state(crashes=killed), "new", victim, answers=answers):
            killed += 1
            victim = Victim(killed, answers)
    assert victim == Victim(KILLS, KILL_AFTER * KILLS)


@pytest.mark.parametrize(
    ("found", "answers"),
    [
        (None, 100),
        (SwapState("old"), 100),
        (state(bundle="other", crashes=1), 100),
        # Answers that came late, of the process that was killed: the next one has not noted its start.
        (state(crashes=0), 100),
        # It has, and the old bundle answers still.
        (state(crashes=1, probation_since_s=None), 100),
        (state(crashes=1), 30 + KILL_AFTER - 1),
    ],
)
def test_nobody_is_killed_where_it_would_be_no_crash_of_the_release(found, answers):
    assert not decide_kill(found, "new", Victim(kills=1, answers=30), answers=answers)


def test_a_crash_that_nobody_meant_does_not_save_a_board():
    assert decide_kill(state(crashes=2), "new", Victim(kills=1, answers=30), answers=30 + KILL_AFTER)
