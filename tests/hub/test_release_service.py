"""Releases promoted, halted, retired and collected, by commands beside a hub and over REST."""

import json

import pytest
from sqlalchemy import insert

from cloud_hub.core.collecting import CollectRules
from cloud_hub.core.rollout.events import ReleaseState
from cloud_hub.core.rollout.waves import Wave
from cloud_hub.errors import NotFoundError, RolloutError, StoreError
from cloud_hub.registry import release_directory, remove_release
from cloud_hub.releases.blobs import DELTAS
from cloud_hub.releases.collect import collect
from cloud_hub.rollouts import settings
from cloud_hub.rollouts.releases import retire
from cloud_hub.store import schema
from cloud_hub.store.acts import list_acts
from cloud_hub.store.rollouts import mark_release
from edge_cascade.messages import SHIPPED
from tests.hub.rollouts_fleet import FOUR

LATER_MS = 10**13
NOTHING_KEPT = CollectRules(keep_live=1, keep_drafts=0, min_age_s=0.0)


def files_of(fleet, tmp_path, number):
    """A release with files of its own."""
    directory = release_directory(tmp_path, (bytes([number]) * 32).hex())
    directory.mkdir(parents=True)
    (directory / "file").write_bytes(b"x" * 10 * number)
    fleet.release(number)
    return directory


def roll_out(fleet, number):
    rollout = fleet.start(number)
    fleet.go_on(2000.0)
    assert fleet.state(rollout).phase == "done"
    return rollout


def collected(fleet, tmp_path, rules=NOTHING_KEPT, **more):
    return [
        each.id for each in collect(fleet.store.database, tmp_path, rules, by="ann", now_ms=LATER_MS, **more)
    ]


def test_promoted_release_goes_to_every_board_at_once(fleet, command):
    fleet.release(5)
    rollout = command("release", "promote", 5).strip()
    fleet.go_on(100.0)
    assert fleet.state(rollout).phase == "done"
    assert fleet.serves == dict.fromkeys(FOUR, "5")
    assert fleet.state_of_release(5) == "live"


def test_promoted_release_that_boards_refuse_comes_back_all_the_same(fleet, command):
    fleet.release(5)
    fleet.fails = {(name, "5") for name in FOUR[:2]}
    rollout = command("release", "promote", 5).strip()
    fleet.go_on(200.0)
    assert fleet.state(rollout).phase == "halted"
    assert set(fleet.serves.values()) == {SHIPPED}


def test_unsigned_release_is_not_promoted(fleet, command, monkeypatch):
    fleet.release(5)
    monkeypatch.setattr(settings, "is_signed_in", lambda state_dir: lambda *_: False)
    assert "is not signed" in command("release", "promote", 5, code=RolloutError.exit_code)


def test_halting_a_release_halts_the_rollout_that_carries_it(fleet, command):
    fleet.release(5)
    rollout = fleet.start(5)
    fleet.go_on(50.0)
    assert rollout in command("release", "halt", 5, "--reason", "odd answers")
    fleet.go_on(50.0)
    assert fleet.state(rollout).phase == "halted"
    assert set(fleet.serves.values()) == {SHIPPED}
    assert "no rollout takes release 5 anywhere" in command("release", "halt", 5, code=RolloutError.exit_code)
    command("release", "halt", 9, code=NotFoundError.exit_code)


def test_release_that_boards_are_to_run_cannot_be_retired_and_another_one_can_never_be_rolled_out(
    fleet, command
):
    fleet.release(5)
    fleet.release(6)
    rollout = fleet.start(5)
    fleet.go_on(50.0)
    assert f"on its way by rollout {rollout}" in command("release", "retire", 5, code=RolloutError.exit_code)
    fleet.go_on(2000.0)
    assert "is what 4 boards are to run" in command("release", "retire", 5, code=RolloutError.exit_code)
    command("release", "retire", 6)
    command("release", "retire", 6)
    assert "retired for good" in command("rollout", "start", 6, code=RolloutError.exit_code)
    acts = json.loads(command("acts", "--json", "--subject", "release 6"))
    assert [(act["act"], act["by"]) for act in acts] == [("release.retire", "ann")]


def test_what_no_board_is_to_run_any_more_is_superseded_and_live_again_when_boards_go_back(fleet):
    fleet.release(5)
    fleet.release(6)
    roll_out(fleet, 5)
    second = roll_out(fleet, 6)
    assert (fleet.state_of_release(5), fleet.state_of_release(6)) == ("superseded", "live")
    fleet.order(second, "kill")
    fleet.go_on(100.0)
    assert set(fleet.serves.values()) == {"5"}
    assert (fleet.state_of_release(5), fleet.state_of_release(6)) == ("live", "retired")


def test_release_that_a_rollout_may_take_boards_back_to_cannot_be_retired(fleet, command):
    fleet.release(5)
    fleet.release(6)
    roll_out(fleet, 5)
    rollout = fleet.start(6, waves=(Wave("all", share=1.0, soak_s=1e6),))
    fleet.go_on(100.0)
    assert set(fleet.serves.values()) == {"6"}
    # No board is to run 5 now, and it is what was live before.
    assert "release 5 is live" in command("release", "retire", 5, code=RolloutError.exit_code)
    fleet.store.database.run(lambda c: mark_release(c, 5, ReleaseState.SUPERSEDED))
    said = command("release", "retire", 5, code=RolloutError.exit_code)
    assert f"is what rollout {rollout} may take boards back to" in said
    fleet.order(rollout, "halt")
    fleet.go_on(100.0)
    assert set(fleet.serves.values()) == {"5"}


def test_board_whose_account_was_revoked_keeps_no_release_live(fleet, command):
    account = {"name": "press-3", "role": "device", "created_at_ms": 1, "revoked_at_ms": None}
    fleet.store.database.run(lambda c: c.execute(insert(schema.accounts).values(account)))
    fleet.release(5)
    fleet.release(6)
    roll_out(fleet, 5)
    fleet.store.database.run(lambda c: c.execute(schema.accounts.update().values(revoked_at_ms=2)))
    roll_out(fleet, 6)
    assert (fleet.state_of_release(5), fleet.state_of_release(6)) == ("superseded", "live")
    command("release", "retire", 5)


def test_superseded_release_can_be_rolled_out_again(fleet):
    fleet.release(5)
    fleet.release(6)
    for number in (5, 6, 5):
        roll_out(fleet, number)
    assert (fleet.state_of_release(5), fleet.state_of_release(6)) == ("live", "superseded")


def test_release_that_some_boards_keep_stays_live(fleet):
    fleet.release(5)
    fleet.release(6)
    roll_out(fleet, 5)
    fleet.start(6)
    fleet.go_on(50.0)
    assert (fleet.state_of_release(5), fleet.state_of_release(6)) == ("live", "canary")


def test_collecting_removes_files_and_marks_and_a_dry_run_does_nothing(fleet, tmp_path):
    directory = files_of(fleet, tmp_path, 5)
    assert collected(fleet, tmp_path, dry_run=True) == [5]
    assert directory.exists()
    assert fleet.state_of_release(5) == "draft"
    assert collected(fleet, tmp_path) == [5]
    assert not directory.parent.exists()
    assert fleet.state_of_release(5) == "collected"
    assert collected(fleet, tmp_path) == []


def test_what_was_collected_goes_to_no_board_and_may_still_be_retired(fleet, tmp_path, command):
    files_of(fleet, tmp_path, 5)
    assert collected(fleet, tmp_path) == [5]
    said = command("rollout", "start", 5, code=RolloutError.exit_code)
    assert "was collected, its files are gone" in said
    command("release", "retire", 5)
    assert fleet.state_of_release(5) == "retired"


def test_release_that_is_registered_anew_before_its_files_went_keeps_them(fleet, tmp_path):
    directory = files_of(fleet, tmp_path, 5)
    remove_release(fleet.store.database, tmp_path, 5, (bytes([5]) * 32).hex())
    assert directory.exists()


def test_nothing_that_a_rollout_may_lead_to_is_collected(fleet, tmp_path):
    for number in (4, 5, 6):
        files_of(fleet, tmp_path, number)
    roll_out(fleet, 4)
    roll_out(fleet, 5)
    fleet.start(6)
    fleet.go_on(50.0)
    # 4 was live once, and no rollout that is open goes back to it.
    assert collected(fleet, tmp_path) == [4]


def test_whoever_is_killed_before_the_files_went_has_them_removed_by_the_next_call(
    fleet, tmp_path, monkeypatch
):
    directory = files_of(fleet, tmp_path, 5)

    def die(name):
        raise KeyboardInterrupt(name)

    with monkeypatch.context() as patch:
        patch.setattr("cloud_hub.releases.collect.crash_point", die)
        with pytest.raises(KeyboardInterrupt):
            collected(fleet, tmp_path)
    assert (directory.exists(), fleet.state_of_release(5)) == (True, "collected")
    left = tmp_path / "releases" / ".gone.another"
    left.mkdir()
    assert collected(fleet, tmp_path) == [5]
    assert not directory.exists()
    assert not left.exists()


def test_files_that_somebody_else_collects_meanwhile_stop_nobody(fleet, tmp_path, monkeypatch):
    directory = files_of(fleet, tmp_path, 5)
    monkeypatch.setattr("pathlib.Path.rglob", lambda path, _: iter([directory / "file", path / "gone"]))
    assert collected(fleet, tmp_path) == [5]
    assert not directory.exists()


def test_release_that_was_retired_and_not_removed_is_removed_by_the_next_call(fleet, tmp_path):
    directory = files_of(fleet, tmp_path, 5)
    fleet.store.database.run(lambda c: retire(c, 5, by="ann", now_ms=1))
    assert collected(fleet, tmp_path) == [5]
    assert not directory.exists()
    acts = fleet.store.database.run(lambda c: list_acts(c, subject="release 5"))
    assert (acts[0]["act"], acts[0]["detail"]) == ("release.collect", "was retired")


def test_what_a_board_said_last_that_it_runs_is_kept_until_it_says_something_else(fleet, tmp_path):
    files_of(fleet, tmp_path, 5)
    fleet.report("press-1", "5", serving=bytes([5]) * 32)
    fleet.report("press-2", "5", serving=bytes([5]) * 32)
    fleet.report("press-2", "6", serving=bytes([6]) * 32)
    assert collected(fleet, tmp_path) == []
    fleet.report("press-1", "6", serving=bytes([6]) * 32)
    assert collected(fleet, tmp_path) == [5]


def test_differences_that_lead_to_what_is_gone_go_with_it(fleet, tmp_path):
    files_of(fleet, tmp_path, 5)
    (tmp_path / DELTAS).mkdir()
    left = tmp_path / DELTAS / f"{'a' * 64}.{'b' * 64}"
    left.write_bytes(b"difference")
    collected(fleet, tmp_path)
    assert not left.exists()


def test_collect_command_says_what_went(fleet, tmp_path, command):
    files_of(fleet, tmp_path, 5)
    assert "would remove 0 releases" in command("release", "collect", "--dry-run")
    options = ("--keep-drafts", 1, "--min-age-days", 0)
    assert "removed 0 releases, 0 bytes" in command("release", "collect", *options)
    files_of(fleet, tmp_path, 6)
    assert "would remove 1 releases, 50 bytes" in command("release", "collect", *options, "--dry-run")
    (gone,) = json.loads(command("release", "collect", *options, "--json"))
    assert (gone["id"], gone["state"], gone["size_bytes"]) == (5, "draft", 50)


def test_rest_does_the_same_and_wants_the_scope_for_it(fleet, tmp_path, api):
    def post(path, document, **how):
        body = json.dumps(document).encode()
        return api.json(path, method="POST", body=body, token="admin", **how)

    for number in (5, 6, 7):
        files_of(fleet, tmp_path, number)
    rollout = post("/v1/releases/5/promote", {})["rollout"]
    assert api.woken == 1
    fleet.go_on(25.0)
    assert post("/v1/releases/6/retire", {"reason": "old"}) == {"release": 6}
    assert post("/v1/registry/collect", {"min_age_days": 0, "dry_run": True})["collected"][0]["id"] == 6
    fleet.go_on(200.0)
    assert fleet.state(rollout).phase == "done"
    assert "anywhere now" in api.problem("/v1/releases/5/halt", 409, method="POST", body=b"{}", token="admin")
    for path in ("releases/5/promote", "releases/5/halt", "releases/5/retire", "registry/collect"):
        api.problem(f"/v1/{path}", 403, method="POST", body=b"{}")
    api.problem("/v1/releases/x/retire", 404, method="POST", body=b"{}", token="admin")
    api.problem("/v1/registry/collect", 400, method="POST", body=b'{"keep_live": 0}', token="admin")


def test_list_says_which_release_cannot_be_read_and_shows_the_others(fleet, command):
    fleet.release(5)
    assert json.loads(command("release", "list", "--json")) == []
    said = command("release", "list")
    assert said.splitlines()[1].split()[:3] == ["5", "pump", "draft"]
    assert "cannot be read" in said
    assert "release 5: what is kept of it cannot be read" in command(
        "release", "show", 5, code=StoreError.exit_code
    )


def test_release_that_cannot_be_read_hides_no_other_over_rest(fleet, api):
    for number in (5, 6, 7):
        fleet.release(number)
    page = api.json("/v1/releases?limit=2")
    assert page["releases"] == []
    assert [(each["id"], each["state"]) for each in page["unreadable"]] == [(7, "draft"), (6, "draft")]
    assert page["unreadable"][0]["why"].startswith("release 7: what is kept of it cannot be read")
    page = api.json(f"/v1/releases?limit=2&cursor={page['next']}")
    assert [each["id"] for each in page["unreadable"]] == [5]
    assert page["next"] is None
