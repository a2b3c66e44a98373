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


def test_a_board_that_floods_the_queue_keeps_nobody_else_out():
    intake = Intake(max_messages=8)
    flood = [case("flood", number) for number in range(20)]
    assert [intake.offer(message) for message in flood] == [True] * 8 + [False] * 12
    quiet = [case(name, 20 + index) for index, name in enumerate("abc")]
    assert all(intake.offer(message) for message in quiet)
    assert intake.not_taken == 12 + 3
    assert drained(intake) == flood[:5] + quiet


def test_a_board_that_sends_large_messages_keeps_nobody_else_out():
    intake = Intake(max_bytes=10_000)
    large = [Taken("edge/v1/flood/up/update", bytes(1000), float(number)) for number in range(7)]
    assert all(intake.offer(message) for message in large)
    quiet = Taken("edge/v1/a/up/update", bytes(3000), 9.0)
    assert intake.offer(quiet)
    assert drained(intake) == [*large[:5], quiet]


def test_boards_that_have_as_much_do_not_push_each_other_out():
    intake = Intake(max_messages=4)
    taken = [case("ab"[number % 2], number) for number in range(4)]
    assert all(intake.offer(message) for message in taken)
    assert not intake.offer(case("a", 4))
    assert not intake.offer(case("b", 5))
    assert drained(intake) == taken


def test_a_status_gives_way_to_nobody():
    intake = Intake(max_messages=3)
    said = status("a", 0)
    assert intake.offer(said)
    assert intake.offer(case("a", 1))
    assert intake.offer(case("a", 2))
    assert intake.offer(case("b", 3))
    assert intake.offer(case("c", 4))
    assert not intake.offer(case("b", 5))
    assert drained(intake) == [said, case("b", 3), case("c", 4)]


@given(
    st.lists(
        st.one_of(
            st.tuples(st.sampled_from("abc"), st.integers(0, 900)),
            st.tuples(st.just("take"), st.integers(1, 9)),
        ),
        max_size=60,
    )
)
def test_whatever_comes_the_bounds_hold_and_whoever_was_silent_is_heard(steps):
    intake, taken, accepted, refused, spoke = Intake(max_messages=6, max_bytes=6_000), [], 0, 0, set()
    for number, (who, size) in enumerate(steps):
        if who == "take":
            taken += intake.take(size, 10**9) if len(intake) else []
            spoke = spoke if len(intake) else set()
            continue
        if intake.offer(Taken(f"edge/v1/{who}/up/cases", bytes(size), float(number))):
            accepted += 1
        else:
            refused += 1
            assert who in spoke
        spoke.add(who)
        assert len(intake) <= 6
    rest = drained(intake)
    assert sum(len(message.payload) + 256 for message in rest) <= 6_000
    taken += rest
    assert [message.arrived_s for message in taken] == sorted(message.arrived_s for message in taken)
    assert len(taken) == accepted - (intake.not_taken - refused)


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
