import random

from edge_daemon.audit import AuditCoin
from edge_daemon.past_life import note_start, note_stop, was_stopped
from edge_daemon.sensors import read_milli_celsius, read_rss_bytes
from tests.device.full_disk import fill_disk


def test_a_start_after_no_stop_in_the_same_boot_of_the_machine_follows_a_crash(tmp_path):
    state_dir = tmp_path / "state"
    assert not note_start(state_dir, "boot-1")
    assert note_start(state_dir, "boot-1")
    note_stop(state_dir)
    assert not note_start(state_dir, "boot-1")


def test_a_power_cut_is_no_crash(tmp_path):
    note_start(tmp_path, "boot-1")
    assert not note_start(tmp_path, "boot-2")


def test_a_board_that_cannot_write_starts_all_the_same(tmp_path):
    (tmp_path / "state").write_text("a file where a directory should be")
    assert not note_start(tmp_path / "state", "boot-1")
    note_stop(tmp_path / "state")


def test_a_stop_is_known_until_the_next_start_also_where_the_disk_takes_nothing(tmp_path, monkeypatch):
    assert not was_stopped(tmp_path)
    note_start(tmp_path, "boot-1")
    assert not was_stopped(tmp_path)
    fill_disk(monkeypatch)
    for _ in range(3):
        note_stop(tmp_path)
        assert was_stopped(tmp_path)
        assert not note_start(tmp_path, "boot-1")
        assert not was_stopped(tmp_path)
    # The next end is a crash, although the disk took nothing since.
    assert note_start(tmp_path, "boot-1")


def test_a_raised_coin_falls_more_often_tells_with_which_chance_and_keeps_its_cap():
    coin = AuditCoin(0.01, 1e9, random.Random(1))
    coin.raise_to(0.5)
    thrown = [coin.throw(now_s=float(number)) for number in range(2000)]
    assert set(thrown) == {0.0, 0.5}
    assert 900 < sum(each > 0.0 for each in thrown) < 1100
    coin.raise_to(0.0)
    assert {coin.throw(now_s=3000.0 + number) for number in range(2000)} == {0.0, 0.01}
    capped = AuditCoin(0.0, 10.0, random.Random(1))
    capped.raise_to(1.0)
    assert [capped.throw(now_s=0.0) for _ in range(12)] == [1.0] * 10 + [0.0] * 2


def test_a_raised_coin_has_a_cap_of_its_own_and_gives_it_back():
    coin = AuditCoin(0.0, 10.0, random.Random(1), 3600.0)
    coin.raise_to(1.0)
    falls = [coin.throw(now_s=float(second)) > 0.0 for second in range(1000)]
    assert all(falls)
    coin.raise_to(0.0)
    coin.rate = 1.0
    assert sum(coin.throw(now_s=1000.0) > 0.0 for _ in range(50)) <= 10


def test_a_cap_above_that_of_raised_audits_holds_while_they_are_raised():
    coin = AuditCoin(0.1, 20.0, random.Random(1), 5.0)
    coin.raise_to(1.0)
    assert sum(coin.throw(now_s=0.0) > 0.0 for _ in range(50)) == 20


def test_the_hottest_sensor_is_told_and_a_board_without_one_tells_nothing(tmp_path):
    assert read_milli_celsius(tmp_path) is None
    for number, milli in enumerate((41_000, 52_500)):
        zone = tmp_path / f"class/thermal/thermal_zone{number}"
        zone.mkdir(parents=True)
        (zone / "type").write_text(f"zone-{number}\n")
        (zone / "temp").write_text(f"{milli}\n")
    assert read_milli_celsius(tmp_path) == 52_500


def test_this_process_takes_memory():
    assert read_rss_bytes() > 2**20
