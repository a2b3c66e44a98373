from edge_cascade.burst import Burst


def test_the_first_of_a_burst_gets_a_line_then_one_per_quiet_time_with_the_number_kept_back():
    burst = Burst(quiet_s=10.0)
    assert [burst.note(now_s=now_s) for now_s in (0.0, 1.0, 9.9, 10.0, 11.0, 40.0)] == [
        0,
        None,
        None,
        2,
        None,
        1,
    ]
