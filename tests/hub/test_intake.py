from hypothesis import given
from hypothesis import strategies as st

from cloud_hub.intake import MAX_STATUS_BYTES, Intake, Taken


def status(device, number, payload=b"status"):
    return Taken(f"edge/v1/{device}/up/status", payload, float(number))


def case(device, number):
    return Taken(f"edge/v1/{device}/up/cases", b"case", float(number))


def drained(intake):
    taken = []
    while len(intake):
        taken += intake.take(7, 10**9)
    return taken


def test_ten_thousand_boards_that_come_online_at_once_are_all_heard():
    intake = Intake()
    said = [status(f"board-{number}", number) for number in range(10_000)]
    assert all(intake.offer(message) for message in said)
    assert intake.not_taken == 0
    assert drained(intake) == said


def test_aside_lies_the_newest_status_of_a_board_and_nothing_else():
    intake = Intake(max_messages=1)
    assert intake.offer(case("a", 0))
    assert not intake.offer(case("a", 1))
    assert all(intake.offer(status("a", number)) for number in range(2, 5))
    assert not intake.offer(status("b", 5, bytes(MAX_STATUS_BYTES + 1)))
    assert drained(intake) == [case("a", 0), status("a", 4)]
    assert intake.not_taken == 2


def test_when_nothing_fits_aside_the_older_status_stays_and_what_goes_is_counted():
    intake = Intake(max_messages=1, max_aside=1)
    assert intake.offer(case("a", 0))
    assert intake.offer(status("a", 1))
    assert not intake.offer(status("b", 2))
    assert intake.not_taken == 1
    assert intake.offer(status("a", 3))
    assert drained(intake) == [case("a", 0), status("a", 3)]


def test_a_closed_intake_takes_no_status_either():
    intake = Intake(max_messages=1)
    intake.close()
    assert not intake.offer(status("a", 0))


@given(
    st.lists(
        st.one_of(
            st.tuples(st.sampled_from("sc"), st.sampled_from("ab")),
            st.tuples(st.just("take"), st.integers(1, 3)),
        ),
        max_size=40,
    )
)
def test_no_status_overtakes_an_older_one_and_the_last_of_each_board_is_heard(steps):
    intake, taken, last = Intake(max_messages=2), [], {}
    for number, (kind, what) in enumerate(steps):
        if kind == "take":
            taken += intake.take(what, 10**9) if len(intake) else []
        elif kind == "c":
            intake.offer(case(what, number))
        else:
            last[what] = status(what, number)
            assert intake.offer(last[what])
    taken += drained(intake)
    assert [message.arrived_s for message in taken] == sorted(message.arrived_s for message in taken)
    for message in last.values():
        assert message in taken
