"""Rollouts on a real store: what boards are told, what is kept, and a hub that is killed anywhere."""

from __future__ import annotations

import contextlib
import random
import tempfile
from pathlib import Path

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from sqlalchemy import update

from cloud_hub.core.rollout.events import ReleaseState
from cloud_hub.core.rollout.findings import Health, HealthRules, Metric, Worse
from cloud_hub.core.rollout.judge import JudgeRules, Pairs
from cloud_hub.core.rollout.state import SCENE_S, Outcome, Phase, RolloutLimits
from cloud_hub.core.rollout.waves import Wave
from cloud_hub.errors import NotFoundError, RolloutError, StoreUnavailableError
from cloud_hub.registry import release_directory
from cloud_hub.rollouts import run as run_module
from cloud_hub.rollouts import runner as runner_module
from cloud_hub.rollouts.orders import order
from cloud_hub.rollouts.settings import sizes_in
from cloud_hub.rollouts.start import start_rollout
from cloud_hub.rollouts.waves_file import read_plan
from cloud_hub.store import schema
from cloud_hub.store.acts import list_acts
from cloud_hub.store.desired import desire
from cloud_hub.store.rollouts import labels_of, mark_release, new_orders, new_swaps, set_labels
from cloud_hub.store.store import Store
from edge_cascade.messages import SHIPPED
from tests.hub.rollouts_fleet import GOOD, LIMITS, WAVES, WORSE, Fleet

NAMES = [f"press-{n}" for n in range(10)]


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path) as store:
        yield store


@pytest.fixture
def fleet(store):
    return Fleet(store, NAMES)


def offered(fleet, release="5"):
    return {name for name in fleet.online if (w := fleet.broker.wanted(name)) and w.release == release}


def test_a_good_release_goes_through_all_waves_and_becomes_live(fleet):
    fleet.release(5)
    rollout = fleet.start(5)
    fleet.turn()
    assert len(offered(fleet)) == 1
    assert fleet.state_of_release(5) == "canary"
    (canary,) = offered(fleet)
    wanted = fleet.broker.wanted(canary)
    assert (wanted.bundle, wanted.size_bytes) == (bytes([5]) * 32, 1005)
    assert (wanted.audit_ppm, wanted.shadow_ppm) == (100_000, 500_000)
    fleet.boards_act()
    fleet.go_on(1500)
    assert fleet.state(rollout).phase is Phase.DONE
    assert set(fleet.serves.values()) == {"5"}
    assert fleet.state_of_release(5) == "live"
    wanted = fleet.broker.wanted(canary)
    assert (wanted.audit_ppm, wanted.shadow_ppm) == (0, 0)


def test_nothing_widens_before_the_soak_is_over(fleet):
    fleet.release(5)
    fleet.start(5)
    fleet.turn()
    fleet.boards_act()
    fleet.turn(1)
    fleet.turn(98)
    assert len(offered(fleet)) == 1
    fleet.turn(2)
    assert len(offered(fleet)) == 5


def test_a_worse_release_is_halted_and_every_board_gets_the_one_before(fleet):
    fleet.release(4)
    fleet.start(4)
    fleet.go_on(1500)
    assert set(fleet.serves.values()) == {"4"}
    fleet.release(5)
    rollout = fleet.start(5)
    fleet.go_on(250)
    assert len(offered(fleet)) == 5
    fleet.evidence.said = WORSE
    fleet.go_on(100)
    state = fleet.state(rollout)
    assert state.phase is Phase.HALTED
    assert "70 lost" in state.history[-1].what
    assert set(fleet.serves.values()) == {"4"}
    assert offered(fleet) == set()
    assert {each.outcome for each in state.members.values() if each.is_offered} == {Outcome.BACK}
    assert (fleet.state_of_release(4), fleet.state_of_release(5)) == ("live", "halted")


def test_without_a_release_before_it_boards_go_back_to_what_they_were_shipped_with(fleet):
    fleet.release(5)
    fleet.start(5)
    fleet.go_on(100)
    (canary,) = offered(fleet)
    fleet.evidence.how_well = Health((Worse(Metric.MEMORY, 2.0, 1.3, 1),))
    fleet.go_on(100)
    wanted = fleet.broker.wanted(canary)
    assert (wanted.release, wanted.bundle, wanted.size_bytes) == (SHIPPED, bytes(32), 0)
    assert fleet.serves[canary] == SHIPPED


def test_every_board_goes_back_to_the_release_that_it_had_itself(store):
    fleet = Fleet(store, NAMES, labels={name: {"site": "hamburg"} for name in NAMES[:3]})
    waves = (Wave("all", share=1.0, soak_s=10.0),)
    for release, group in ((3, {}), (4, {"site": "hamburg"})):
        fleet.release(release)
        fleet.start(release, group=group, waves=waves)
        fleet.go_on(200)
    before = dict(fleet.serves)
    assert before == {name: "4" if name in NAMES[:3] else "3" for name in NAMES}
    fleet.release(5)
    rollout = fleet.start(5, waves=waves)
    assert fleet.state(rollout).previous == "3"
    fleet.turn()
    fleet.boards_act()
    assert set(fleet.serves.values()) == {"5"}
    fleet.order(rollout, "halt")
    fleet.go_on(100)
    assert fleet.serves == before


def join(fleet, name):
    row = {"name": name, "first_seen_ms": 1, "last_seen_ms": 1, "online": True}
    fleet.store.database.run(lambda c: c.execute(schema.devices.insert().values(row)))
    fleet.serves[name], fleet.online[name] = SHIPPED, True


def test_more_boards_than_a_statement_has_variables_are_told_what_to_run(store):
    names = [f"board-{n}" for n in range(33_000)]
    wanted = {name: {"release": "5"} for name in names}
    told = [store.database.run(lambda c: desire(c, "pump", wanted)) for _ in range(2)]
    assert [len(each) for each in told] == [33_000, 0]


def test_what_one_site_has_tried_goes_to_all_others(store):
    names = [f"press-{n}" for n in range(40)]
    fleet = Fleet(store, names, labels={name: {"site": "hamburg"} for name in names[:20]})
    fleet.release(5)
    fleet.start(5, group={"site": "hamburg"})
    fleet.go_on(1500)
    assert sum(release == "5" for release in fleet.serves.values()) == 20
    rollout = fleet.start(5)
    fleet.turn()
    assert len(offered(fleet)) == 21
    fleet.turn(100)
    # It alone speaks for the wave, however many have run the release for long.
    assert fleet.state(rollout).enough_s is None
    fleet.go_on(2000)
    assert fleet.state(rollout).phase is Phase.DONE
    assert set(fleet.serves.values()) == {"5"}
    again = fleet.start(5)
    fleet.turn()
    assert fleet.state(again).phase is Phase.DONE


def test_a_release_that_turns_out_bad_at_the_other_sites_is_taken_from_the_first_one_too(fleet):
    for name in NAMES[:4]:
        set_labels_of(fleet, name, {"site": "hamburg"})
    fleet.release(4)
    fleet.start(4)
    fleet.go_on(1500)
    fleet.release(5)
    fleet.start(5, group={"site": "hamburg"})
    fleet.go_on(1500)
    assert len(offered(fleet)) == 4
    rollout = fleet.start(5)
    fleet.turn()
    assert len(offered(fleet)) == 5
    fleet.evidence.said = WORSE
    fleet.go_on(100)
    assert fleet.state(rollout).phase is Phase.HALTED
    assert set(fleet.serves.values()) == {"4"}


@pytest.mark.parametrize("common", ["shipped", "4"])
def test_a_board_that_was_gone_when_its_release_was_halted_is_taken_back_when_it_returns(fleet, common):
    if common == "4":
        fleet.release(4)
        fleet.start(4)
        fleet.go_on(1500)
    fleet.release(5)
    rollout = fleet.start(5)
    fleet.go_on(100)
    (canary,) = offered(fleet)
    serve_only(fleet, canary, "another model")
    fleet.turn()
    assert canary not in fleet.state(rollout).members
    fleet.order(rollout, "halt")
    fleet.turn()
    assert offered(fleet) == {canary}
    serve_only(fleet, canary, "pump")
    fleet.turn()
    assert fleet.broker.wanted(canary).release == common


def test_a_board_that_was_gone_goes_back_to_what_it_alone_ran_before(store):
    fleet = Fleet(store, NAMES, labels={NAMES[0]: {"site": "hamburg"}})
    waves = (Wave("all", share=1.0, soak_s=10.0, max_drop=None),)
    fleet.release(4)
    fleet.start(4, group={"site": "hamburg"}, waves=waves)
    fleet.go_on(200)
    fleet.release(5)
    rollout = fleet.start(5, waves=waves)
    fleet.go_on(50)
    assert fleet.serves[NAMES[0]] == "5"
    serve_only(fleet, NAMES[0], "another model")
    fleet.turn()
    fleet.order(rollout, "kill")
    fleet.restart()
    serve_only(fleet, NAMES[0], "pump")
    fleet.go_on(50)
    assert fleet.serves == {name: "4" if name == NAMES[0] else SHIPPED for name in NAMES}


def test_a_release_that_went_from_one_site_to_all_leaves_the_site_with_what_it_ran_before(store):
    fleet = Fleet(store, NAMES, labels={NAMES[0]: {"site": "hamburg"}})
    waves = (Wave("all", share=1.0, soak_s=10.0, max_drop=None),)
    for number in (4, 5):
        fleet.release(number)
        fleet.start(number, group={"site": "hamburg"}, waves=waves)
        fleet.go_on(200)
    rollout = fleet.start(5, waves=waves)
    fleet.go_on(50)
    assert set(fleet.serves.values()) == {"5"}
    fleet.order(rollout, "halt")
    fleet.go_on(50)
    assert fleet.serves == {name: "4" if name == NAMES[0] else SHIPPED for name in NAMES}


def test_however_many_boards_come_and_go_and_answer_one_turn_hears_them_all(store):
    names = [f"board-{number}" for number in range(1500)]
    fleet = Fleet(store, names)
    fleet.release(5)
    rollout = fleet.start(5, waves=(Wave("all", share=1.0),))
    fleet.turn()
    store.database.run(lambda c: c.execute(update(schema.devices).values(online=False)))
    fleet.turn()
    members = fleet.state(rollout).members
    assert [each.online_since_s for each in members.values()] == [None] * 1500
    fleet.boards_act()
    fleet.turn()
    assert {each.outcome for each in fleet.state(rollout).members.values()} == {Outcome.COMMITTED}


def test_releases_that_go_by_and_come_back_are_in_the_audit_log(fleet):
    for number in (4, 5):
        fleet.release(number)
        rollout = fleet.start(number)
        fleet.go_on(1500)
    fleet.order(rollout, "kill", reason="noise")
    fleet.go_on(50)
    fleet.restart()
    acts = fleet.store.database.run(lambda c: list_acts(c, subject="release 4"))
    assert [(row["act"], row["act_by"]) for row in reversed(acts)] == [
        ("release.canary", "the rules"),
        ("release.live", "the rules"),
        ("release.superseded", "the rules"),
        ("release.live", "the rules"),
    ]
    assert acts[0]["detail"] == f"rollout {rollout}: killed: noise"


def serve_only(fleet, name, model):
    table = schema.devices
    models = msgspec.json.encode([{"model": model, "takes_releases": True}]).decode()
    fleet.store.database.run(
        lambda c: c.execute(update(table).where(table.c.name == name).values(models=models))
    )


def set_labels_of(fleet, name, labels):
    fleet.store.database.run(lambda c: set_labels(c, name, labels))


def test_a_board_that_joins_beside_a_rollout_gets_what_the_group_runs_also_after_a_halt(fleet):
    fleet.release(4)
    fleet.start(4)
    fleet.go_on(1500)
    fleet.release(5)
    rollout = fleet.start(5, waves=(Wave("canary", count=1), Wave("all", share=1.0)))
    fleet.go_on(100)
    join(fleet, "press-new")
    fleet.go_on(50)
    assert fleet.serves["press-new"] in {"4", "5"}
    fleet.order(rollout, "halt")
    fleet.go_on(100)
    join(fleet, "press-late")
    fleet.go_on(50)
    assert set(fleet.serves.values()) == {"4"}
    fleet.restart()
    fleet.go_on(50)
    assert set(fleet.serves.values()) == {"4"}


def test_nobody_goes_back_to_what_was_only_rolled_out_to_others(store):
    fleet = Fleet(store, NAMES, labels={name: {"site": "hamburg"} for name in NAMES[:3]})
    waves = (Wave("all", share=1.0, soak_s=10.0),)
    fleet.release(4)
    fleet.start(4, group={"site": "hamburg"}, waves=waves)
    fleet.go_on(200)
    before = dict(fleet.serves)
    fleet.release(5)
    rollout = fleet.start(5, waves=waves)
    assert fleet.state(rollout).previous == "4"
    fleet.go_on(25)
    fleet.order(rollout, "halt")
    fleet.go_on(100)
    assert fleet.serves == before


def test_nobody_goes_back_to_a_release_that_was_taken_out_of_service_meanwhile(fleet):
    fleet.release(4)
    fleet.start(4)
    fleet.go_on(1500)
    fleet.release(5)
    rollout = fleet.start(5)
    fleet.go_on(100)
    fleet.store.database.run(lambda c: mark_release(c, 4, ReleaseState.RETIRED))
    (canary,) = offered(fleet)
    fleet.order(rollout, "halt")
    fleet.go_on(100)
    assert fleet.serves[canary] == SHIPPED


def test_while_the_broker_is_away_boards_owe_no_answer(fleet):
    fleet.release(5)
    rollout = fleet.start(5)
    fleet.turn()
    fleet.hears = False
    for _ in range(5):
        fleet.turn(1000)
    assert fleet.state(rollout).phase is Phase.RUNNING
    fleet.hears = True
    fleet.turn(1999)
    assert fleet.state(rollout).phase is Phase.RUNNING
    fleet.turn(2001)
    fleet.turn(1)
    assert fleet.state(rollout).phase is Phase.HALTED


def test_a_rollout_has_the_scenes_and_the_health_that_it_was_given(fleet):
    fleet.release(5)
    rollout = fleet.start(5, scene_s=60, health=HealthRules(max_latency_factor=2.0))
    fleet.turn()
    (canary,) = offered(fleet)
    assert fleet.broker.wanted(canary).scene_s == 60
    assert fleet.state(rollout).health_rules.max_latency_factor == 2.0


def test_a_canary_that_reverts_halts(fleet):
    fleet.release(5)
    rollout = fleet.start(5)
    fleet.fails = {(name, "5") for name in NAMES}
    fleet.go_on(100)
    state = fleet.state(rollout)
    assert state.phase is Phase.HALTED
    assert any("reverted: golden" in entry.what for entry in state.history)


@pytest.mark.parametrize("dies_at", range(1, 5))
def test_a_hub_killed_between_state_and_effects_carries_them_out_after_its_start(fleet, monkeypatch, dies_at):
    passed = 0

    def die(name):
        nonlocal passed
        passed += 1
        if passed == dies_at:
            raise KeyboardInterrupt(name)

    fleet.release(5)
    rollout = fleet.start(5)
    monkeypatch.setattr(run_module, "crash_point", die)
    for _ in range(80):
        try:
            fleet.turn(25)
        except KeyboardInterrupt:
            fleet.runner = fleet.new_runner()
        fleet.boards_act()
    assert passed >= dies_at
    assert fleet.state(rollout).phase is Phase.DONE
    assert set(fleet.serves.values()) == {"5"}
    assert fleet.state_of_release(5) == "live"


def test_a_halt_whose_effects_were_lost_takes_back_after_the_start(fleet, monkeypatch):
    fleet.release(5)
    fleet.start(5)
    fleet.go_on(250)
    assert len(offered(fleet)) == 5

    def die(name):
        raise KeyboardInterrupt(name)

    fleet.evidence.said = WORSE
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_module, "crash_point", die)
        fleet.turn(60)
    assert len(offered(fleet)) == 5
    fleet.restart()
    assert offered(fleet) == set()
    assert fleet.state_of_release(5) == "halted"


def test_a_restart_tells_every_board_again_and_changes_nothing(fleet):
    fleet.release(5)
    rollout = fleet.start(5)
    fleet.go_on(250)
    before, told = fleet.state(rollout), dict(fleet.broker.retained)
    fleet.broker.retained.clear()
    fleet.restart()
    assert fleet.broker.retained == told
    after = fleet.state(rollout)
    assert (after.phase, after.wave, after.history) == (before.phase, before.wave, before.history)
    assert {name: each.outcome for name, each in after.members.items()} == {
        name: each.outcome for name, each in before.members.items()
    }


def test_boards_that_reported_to_a_hub_that_was_away_do_not_count_as_silent(fleet):
    fleet.release(5)
    rollout = fleet.start(5)
    fleet.turn()
    fleet.now_s += LIMITS.report_within_s + 1
    fleet.restart()
    assert fleet.state(rollout).phase is Phase.RUNNING
    fleet.boards_act()
    fleet.turn()
    assert [each.outcome for each in fleet.state(rollout).members.values()].count(Outcome.COMMITTED) == 1
    fleet.go_on(1500)
    assert fleet.state(rollout).phase is Phase.DONE


@pytest.mark.parametrize("what", ["hub", "broker", "store", "clock"])
def test_however_long_nobody_could_be_heard_no_board_counts_as_silent(fleet, what, monkeypatch):
    fleet.absent_s = 60.0
    fleet.runner = fleet.new_runner()
    fleet.release(5)
    rollout = fleet.start(5)
    fleet.turn()
    long_s = LIMITS.vanished_after_s + LIMITS.report_within_s
    match what:
        case "hub":
            fleet.now_s += long_s
            fleet.restart()
        case "broker":
            fleet.hears = False
            for _ in range(2):
                fleet.turn(long_s / 2)
            fleet.hears = True
        case "store":
            with monkeypatch.context() as patch:
                patch.setattr(runner_module, "new_swaps", away)
                for _ in range(2):
                    with pytest.raises(StoreUnavailableError):
                        fleet.turn(long_s / 2)
        case _:
            # What others say is heard first: it must not make this one late.
            fleet.report(next(name for name in NAMES if name not in offered(fleet)), "4")
            fleet.now_s += long_s
    fleet.turn(1)
    assert fleet.state(rollout).phase is Phase.RUNNING
    for _ in range(19):
        fleet.turn(50)
    assert fleet.state(rollout).phase is Phase.RUNNING
    for _ in range(2 * round(LIMITS.report_within_s / 50)):
        fleet.turn(50)
    assert fleet.state(rollout).phase is Phase.HALTED


def test_a_message_that_comes_first_does_not_hide_that_the_hub_was_away(fleet):
    fleet.release(5)
    rollout = fleet.start(5)
    fleet.turn()
    fleet.now_s += LIMITS.report_within_s + 1
    fleet.absent_s = 60.0
    fleet.runner = fleet.new_runner()
    turns = []
    fleet.runner.run_once = lambda: turns.append(1) or 1.0
    fleet.runner.start()
    fleet.runner.stop()
    table = schema.devices
    now_ms = round(fleet.now_s * 1000)
    fleet.store.database.run(lambda c: c.execute(update(table).values(last_seen_ms=now_ms)))
    fleet.turn()
    assert fleet.state(rollout).phase is Phase.RUNNING


def away(connection, limit):
    raise StoreUnavailableError("the database is away")


def test_a_board_that_stays_silent_beside_a_hub_at_work_halts(fleet):
    fleet.release(5)
    rollout = fleet.start(5)
    fleet.turn()
    fleet.turn(LIMITS.report_within_s + 1)
    assert fleet.state(rollout).phase is Phase.HALTED


def test_a_release_whose_size_is_not_known_is_told_once_it_is(fleet):
    fleet.release(5)
    fleet.size_error = NotFoundError("the release's files are not there")
    fleet.start(5)
    fleet.turn()
    (state,) = (state for name in NAMES if (state := fleet.broker.state_of(name)))
    assert state.models == []
    count = fleet.broker.count
    fleet.turn(1)
    assert fleet.broker.count == count
    fleet.size_error = None
    fleet.turn(1)
    (canary,) = offered(fleet)
    assert fleet.broker.wanted(canary).size_bytes == 1005


def test_a_release_without_files_has_no_size(fleet, tmp_path):
    fleet.release(5)
    size_of = sizes_in(tmp_path, fleet.store.database)
    with pytest.raises(RolloutError, match="release 5: no files in"):
        size_of(5)
    directory = release_directory(tmp_path, (bytes([5]) * 32).hex()) / "graph"
    directory.mkdir(parents=True)
    (directory / "manifest.json").write_bytes(bytes(40))
    assert size_of(5) == 40


def test_a_broker_that_was_away_is_told_when_it_is_back(fleet):
    fleet.release(5)
    fleet.broker.is_away = True
    fleet.start(5)
    fleet.turn()
    assert offered(fleet) == set()
    fleet.broker.is_away = False
    fleet.runner.connected()
    fleet.turn()
    assert len(offered(fleet)) == 1


def test_an_order_of_a_rollout_that_began_in_the_middle_of_a_turn_is_taken_in_the_next(fleet, monkeypatch):
    fleet.release(5)
    fleet.start(5)
    fleet.release(6, model="fan")
    begun = []

    def begin_and_pause(connection):
        if not begun:
            begun.append(
                start_rollout(
                    connection, 6, by="ann", now_ms=round(fleet.now_s * 1000), is_signed=lambda *_: True
                )
            )
            order(connection, begun[0], "pause", by="ann", now_ms=round(fleet.now_s * 1000))
        return new_orders(connection)

    monkeypatch.setattr(runner_module, "new_orders", begin_and_pause)
    fleet.turn()
    fleet.turn()
    assert fleet.state(begun[0]).phase is Phase.PAUSED


def test_a_board_that_comes_online_is_told_again_with_the_same_revision(fleet):
    fleet.release(5)
    fleet.start(5)
    fleet.turn()
    (canary,) = offered(fleet)
    before, count = fleet.broker.state_of(canary), fleet.broker.count
    fleet.runner.came_online([canary])
    fleet.turn()
    assert fleet.broker.count == count + 1
    assert fleet.broker.state_of(canary) == before


def test_pause_holds_the_wave_and_resume_lets_it_go_on(fleet):
    fleet.release(5)
    rollout = fleet.start(5)
    fleet.turn()
    fleet.order(rollout, "pause")
    fleet.go_on(500)
    assert len(offered(fleet)) == 1
    with pytest.raises(RolloutError, match="paused already"):
        fleet.order(rollout, "pause")
    fleet.order(rollout, "resume")
    fleet.go_on(1500)
    assert fleet.state(rollout).phase is Phase.DONE
    assert [entry.by for entry in fleet.state(rollout).history if entry.what in {"paused", "goes on"}] == [
        "ann",
        "ann",
    ]


def test_a_wave_that_needs_approval_asks_once_and_opens_with_it(fleet):
    fleet.release(5)
    waves = (WAVES[0], Wave("all", share=1.0, soak_s=0.0, needs_approval=True))
    rollout = fleet.start(5, waves=waves)
    fleet.go_on(500)
    fleet.restart()
    assert len(offered(fleet)) == 1
    acts = fleet.store.database.run(list_acts)
    assert [(row["act"], row["detail"]) for row in acts if row["act"] == "rollout.ask"] == [
        ("rollout.ask", "wave 'all'")
    ]
    with pytest.raises(RolloutError, match="wave 7 cannot be approved; those to come are 1"):
        fleet.order(rollout, "approve", wave=7)
    fleet.order(rollout, "approve")
    fleet.turn(1)
    assert len(offered(fleet)) == 10


def test_a_kill_after_the_end_takes_everything_back_for_good(fleet):
    fleet.release(5)
    rollout = fleet.start(5)
    fleet.go_on(1500)
    assert set(fleet.serves.values()) == {"5"}
    with pytest.raises(RolloutError, match="is done; `cloud-hub rollout kill` takes it back"):
        fleet.order(rollout, "halt")
    fleet.order(rollout, "kill", reason="it lies")
    fleet.go_on(50)
    assert set(fleet.serves.values()) == {SHIPPED}
    assert fleet.state_of_release(5) == "retired"
    with pytest.raises(RolloutError, match="retired for good"):
        fleet.start(5)
    fleet.restart()
    assert fleet.state_of_release(5) == "retired"


def test_a_person_halts(fleet):
    fleet.release(5)
    rollout = fleet.start(5)
    fleet.go_on(250)
    fleet.order(rollout, "halt", reason="odd answers")
    fleet.go_on(50)
    assert set(fleet.serves.values()) == {SHIPPED}
    entry = next(
        entry for entry in fleet.state(rollout).history if entry.by == "ann" and "halted" in entry.what
    )
    assert entry.what == "halted: odd answers"


def test_two_groups_of_one_model_roll_out_side_by_side(store):
    labels = {name: {"site": "a" if index < 5 else "b"} for index, name in enumerate(NAMES)}
    fleet = Fleet(store, NAMES, labels=labels)
    fleet.release(5)
    fleet.release(6)
    first = fleet.start(5, group={"site": "a"})
    second = fleet.start(6, group={"site": "b"})
    with pytest.raises(RolloutError, match="of model pump is running"):
        fleet.start(6, group={"board": "big"})
    fleet.go_on(1500)
    assert {fleet.state(each).phase for each in (first, second)} == {Phase.DONE}
    assert {name: fleet.serves[name] for name in NAMES} == {
        name: "5" if labels[name]["site"] == "a" else "6" for name in NAMES
    }


def test_a_newer_rollout_closes_the_ended_one_whose_devices_it_takes(fleet):
    fleet.release(5)
    first = fleet.start(5)
    fleet.go_on(1500)
    fleet.release(6)
    second = fleet.start(6)
    assert fleet.state(second).previous == "5"
    fleet.turn()
    assert fleet.state(first).is_closed
    with pytest.raises(RolloutError, match="is closed: another one of 'pump' has its devices now"):
        fleet.order(first, "kill")
    assert len(offered(fleet, "6")) == 1
    assert len(offered(fleet, "5")) == 9


def test_a_newer_rollout_of_a_group_leaves_the_others_with_the_ended_one(store):
    labels = {name: {"site": "a" if index < 5 else "b"} for index, name in enumerate(NAMES)}
    fleet = Fleet(store, NAMES, labels=labels)
    fleet.release(5)
    first = fleet.start(5)
    fleet.go_on(1500)
    fleet.release(6)
    fleet.start(6, group={"site": "a"})
    fleet.go_on(1500)
    state = fleet.state(first)
    assert not state.is_closed
    assert set(state.members) == set(NAMES[5:])
    fleet.order(first, "kill")
    fleet.go_on(50)
    assert {fleet.serves[name] for name in NAMES[:5]} == {"6"}
    assert {fleet.serves[name] for name in NAMES[5:]} == {SHIPPED}


def test_a_board_that_joins_late_is_offered_what_was_rolled_out(store, fleet):
    fleet.release(5)
    fleet.start(5)
    fleet.go_on(1500)
    fleet.serves["late"] = SHIPPED
    fleet.online["late"] = False
    row = {"name": "late", "first_seen_ms": 1, "last_seen_ms": 1, "online": False}
    store.database.run(lambda c: c.execute(schema.devices.insert().values(row)))
    fleet.set_online("late", True)
    fleet.go_on(50)
    assert fleet.serves["late"] == "5"


def test_boards_that_do_not_serve_the_model_or_take_no_releases_are_passed_by(store, fleet):
    def says(name, *models):
        text = msgspec.json.encode(
            [{"model": model, "takes_releases": takes} for model, takes in models]
        ).decode()
        table = schema.devices
        store.database.run(
            lambda c: c.execute(table.update().where(table.c.name == name).values(models=text))
        )

    says("press-0", ("fan", True))
    says("press-1", ("pump", False), ("fan", True))
    says("press-2", ("fan", True), ("pump", True))
    fleet.release(5)
    rollout = fleet.start(5)
    assert set(fleet.state(rollout).members) == {*NAMES} - {"press-0", "press-1"}
    fleet.turn()
    says("press-2", ("pump", False))
    fleet.turn()
    assert "press-2" not in fleet.state(rollout).members


def test_a_board_whose_account_was_revoked_is_waited_for_no_more(store, fleet):
    account = {"name": "press-3", "role": "device", "created_at_ms": 1, "revoked_at_ms": None}
    store.database.run(lambda c: c.execute(schema.accounts.insert().values(account)))
    fleet.release(5)
    rollout = fleet.start(5)
    fleet.turn()
    assert "press-3" in fleet.state(rollout).members
    store.database.run(lambda c: c.execute(schema.accounts.update().values(revoked_at_ms=2)))
    fleet.turn()
    assert "press-3" not in fleet.state(rollout).members


def test_what_was_measured_badly_widens_nothing_and_holds_up_no_kill(fleet):
    fleet.release(5)
    rollout = fleet.start(5)
    fleet.evidence.error = StoreUnavailableError("no audits can be read")
    fleet.go_on(500)
    assert len(offered(fleet)) == 1
    assert fleet.state(rollout).quality_said == "cannot be judged: no audits can be read"
    fleet.order(rollout, "kill")
    fleet.turn(1)
    assert offered(fleet) == set()


def test_boards_that_get_sick_halt_also_where_quality_cannot_be_judged(fleet):
    fleet.release(5)
    rollout = fleet.start(5)
    fleet.evidence.error = StoreUnavailableError("no audits can be read")
    fleet.evidence.how_well = Health((Worse(Metric.MEMORY, 2.0, 1.3, 1),))
    fleet.go_on(200)
    assert fleet.state(rollout).phase is Phase.HALTED


def test_evidence_is_asked_for_now_and_then_and_at_the_end_of_the_soak(store):
    fleet = Fleet(store, NAMES, look_every_s=10_000.0)
    fleet.release(5)
    fleet.start(5)
    fleet.turn()
    fleet.boards_act()
    fleet.turn(1)
    for _ in range(50):
        fleet.turn(1)
    assert fleet.evidence.asked == 1
    fleet.turn(60)
    assert fleet.evidence.asked == 2
    assert len(offered(fleet)) == 5


def test_drift_is_said_once(fleet):
    fleet.release(5)
    rollout = fleet.start(5)
    for count in (300, 400):
        fleet.evidence.shadowed = Pairs(count=count, differing=60)
        fleet.go_on(100)
    said = [e.what for e in fleet.state(rollout).history if e.what.startswith("the boards see what the hub")]
    assert len(said) == 1


def test_reports_are_noted_once_heard(fleet):
    fleet.release(5)
    fleet.start(5)
    fleet.report("press-1", "9")
    fleet.report("press-1", "9", model="fan")
    fleet.turn()
    assert fleet.store.database.run(lambda c: new_swaps(c, 10)) == []


def test_a_report_from_before_the_rollout_answers_none_of_its_offers(fleet):
    fleet.turn()
    fleet.release(5)
    for name in NAMES:
        fleet.report(name, "5")
    rollout = fleet.start(5)
    fleet.turn()
    assert {each.outcome for each in fleet.state(rollout).members.values()} == {Outcome.NONE}


def test_a_release_that_is_not_signed_or_not_there_goes_nowhere(fleet):
    with pytest.raises(NotFoundError, match="no release 5"):
        fleet.start(5)
    fleet.release(5)
    with pytest.raises(RolloutError, match="is not signed, so no board would take it"):
        fleet.start(5, is_signed=lambda *_: False)
    with pytest.raises(RolloutError, match="is one of model 'pump', not of 'fan'"):
        fleet.start(5, model="fan")
    with pytest.raises(RolloutError, match="no device has the labels site=c"):
        fleet.start(5, group={"site": "c"})


def test_a_wave_that_the_judge_cannot_judge_is_refused_at_the_start(fleet):
    fleet.release(5)
    with pytest.raises(RolloutError, match=r"waves\[1\] 'half': judge: tolerated"):
        fleet.start(5, rules=JudgeRules(max_drop=0.1, tolerated=0.02))


def test_a_halted_release_may_begin_anew(fleet):
    fleet.release(5, state="halted")
    rollout = fleet.start(5)
    fleet.go_on(1500)
    assert fleet.state(rollout).phase is Phase.DONE
    assert fleet.state_of_release(5) == "live"


def test_a_plan_is_read_from_toml_or_json(tmp_path):
    path = tmp_path / "plan.toml"
    path.write_text(
        'scene_s = 60\n[[waves]]\nname = "first"\ncount = 2\nsoak_s = 60\n[[waves]]\nname = "all"\nshare = 1.0\n'
        '[limits]\nmax_failed_share = 0.05\n[health]\nmax_error_rise = 0.02\nrequired = ["errors"]\n'
    )
    plan = read_plan(path)
    assert [wave.name for wave in plan.waves] == ["first", "all"]
    assert plan.limits.max_failed_share == 0.05
    assert (plan.scene_s, plan.health) == (60, HealthRules(max_error_rise=0.02, required={Metric.ERRORS}))
    path = tmp_path / "plan.json"
    path.write_text('{"waves": [{"name": "most", "share": 0.9}]}')
    with pytest.raises(RolloutError, match=r"plan\.json: waves: the last, 'most', must have share 1\.0"):
        read_plan(path)
    path.write_text('{"health": {"max_latency_factor": 0.5}}')
    with pytest.raises(RolloutError, match=r"plan\.json: health: a factor below 1"):
        read_plan(path)


def test_the_plan_in_the_documentation_is_one(tmp_path):
    text = (Path(__file__).parents[2] / "docs/rollouts.md").read_text(encoding="utf-8")
    path = tmp_path / "plan.toml"
    path.write_text(text.partition("```toml\n")[2].partition("```")[0])
    plan = read_plan(path)
    assert [wave.name for wave in plan.waves] == ["canary", "all"]
    assert plan.limits == RolloutLimits()
    assert (plan.health, plan.scene_s) == (HealthRules(), SCENE_S)


def test_labels_are_set_and_taken_away(fleet):
    run = fleet.store.database.run
    run(lambda c: set_labels(c, "press-1", {"site": "a", "line": "2"}))
    run(lambda c: set_labels(c, "press-1", {"site": "b", "line": None}))
    assert run(lambda c: labels_of(c, "press-1")) == {"site": "b"}
    with pytest.raises(NotFoundError, match="no device 'nobody'"):
        run(lambda c: set_labels(c, "nobody", {"site": "a"}))


def test_of_100_devices_with_30_percent_offline_at_any_time_all_end_on_the_release(store):
    names = [f"board-{n:03}" for n in range(100)]
    fleet = Fleet(store, names, look_every_s=100.0)
    chance = random.Random(7)
    fleet.release(5)
    for name in chance.sample(names, 30):
        fleet.set_online(name, is_online=False)
    rollout = fleet.start(5, limits=LIMITS)
    for _ in range(200):
        fleet.turn(25)
        fleet.boards_act()
        # Three come back, three others go: always thirty are away.
        away = [name for name in names if not fleet.online[name]]
        there = [name for name in names if fleet.online[name]]
        for name in chance.sample(away, 3):
            fleet.set_online(name, is_online=True)
        for name in chance.sample(there, 3):
            fleet.set_online(name, is_online=False)
        if fleet.state(rollout).phase is Phase.DONE:
            break
    assert fleet.state(rollout).phase is Phase.DONE
    fleet.turn(1)
    fleet.boards_act()
    assert {fleet.serves[name] for name in names if fleet.online[name]} == {"5"}
    assert sum(not is_online for is_online in fleet.online.values()) == 30
    for name in names:
        fleet.set_online(name, is_online=True)
    fleet.turn(1)
    fleet.boards_act()
    assert set(fleet.serves.values()) == {"5"}


class Days(RuleBasedStateMachine):
    """Whatever happens, and wherever the hub is killed: boards are told what the state implies."""

    @initialize()
    def begin(self):
        self.directory = tempfile.TemporaryDirectory()
        self.store = Store(Path(self.directory.name))
        self.store.open()
        self.fleet = Fleet(self.store, NAMES[:6])
        self.fleet.release(4, state="live")
        self.fleet.release(5)
        self.rollout = self.fleet.start(5, waves=(*WAVES[:2], Wave("all", 1.0, needs_approval=True)))
        self.dies_after = 0

    def teardown(self):
        if hasattr(self, "store"):
            self.store.close()
            self.directory.cleanup()

    def crash_point(self, name):
        self.dies_after -= 1
        if self.dies_after == 0:
            raise KeyboardInterrupt(name)

    @rule(seconds=st.sampled_from((1.0, 60.0, 150.0, 2500.0)), dies_after=st.integers(0, 2))
    def time_passes(self, seconds, dies_after):
        self.dies_after = dies_after
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run_module, "crash_point", self.crash_point)
            try:
                self.fleet.turn(seconds)
            except KeyboardInterrupt:
                self.fleet.runner = self.fleet.new_runner()

    @rule(name=st.sampled_from(NAMES[:6]), is_online=st.booleans())
    def come_or_go(self, name, is_online):
        self.fleet.set_online(name, is_online=is_online)

    @rule(failing=st.booleans())
    def boards_act(self, failing):
        self.fleet.fails = {("press-1", "5")} if failing else set()
        self.fleet.boards_act()

    @rule(kind=st.sampled_from(("approve", "pause", "resume", "halt", "kill")))
    def order(self, kind):
        with contextlib.suppress(RolloutError):
            self.fleet.order(self.rollout, kind)

    @rule(said=st.sampled_from((GOOD, WORSE, Pairs())))
    def measure(self, said):
        self.fleet.evidence.said = said

    @rule()
    def restart(self):
        self.fleet.restart()
        state = self.fleet.state(self.rollout)
        back = state.phase is Phase.HALTED
        for name in NAMES[:6]:
            wanted = self.fleet.broker.wanted(name)
            member = state.members[name]
            assert (wanted is not None) is member.is_offered
            if wanted is not None:
                assert wanted.release == (SHIPPED if back else "5")
                assert (wanted.audit_ppm > 0) is (state.sampling is not None)
        mark = {"halted": "retired" if state.is_killed else "halted", "done": "live"}
        expected = mark.get(state.phase.value, "canary" if state.wave >= 0 else "draft")
        assert self.fleet.state_of_release(5) == expected


TestDays = Days.TestCase
TestDays.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
