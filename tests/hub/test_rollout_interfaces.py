"""Rollouts, labels and the audit log as people see them: REST, and the commands beside a hub."""

import json
import threading
from datetime import UTC, datetime, timedelta

import pytest

from cloud_hub.__main__ import main
from cloud_hub.errors import StoreUnavailableError
from cloud_hub.rollouts.renewal import LOOK_AGAIN_S, LOOK_S, Renewal
from tests.hub.rollouts_fleet import WELL, WORSE


def post(api, path, document, **how):
    return api.json(path, method="POST", body=json.dumps(document).encode(), token="admin", **how)


def refusal(api, path, document, status, *, token="admin"):
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    return api.problem(path, status, method="POST", body=body, token=token)


def test_a_rollout_is_started_watched_and_halted_over_rest(api, fleet):
    fleet.release(5)
    rollout = post(api, "/v1/rollouts", {"release": 5})["rollout"]
    assert api.woken == 1
    fleet.turn()
    shown = api.json(f"/v1/rollouts/{rollout}")
    assert (shown["rollout"]["phase"], shown["rollout"]["created_by"]) == ("running", "adminer")
    assert shown["waits_for"][0] == "reports: 0 committed of 1 reached of 1 devices"
    assert [each["is_offered"] for each in shown["devices"]].count(True) == 1
    assert post(api, f"/v1/rollouts/{rollout}/pause", {}) == {"rollout": rollout}
    fleet.turn()
    assert api.json(f"/v1/rollouts/{rollout}")["waits_for"][0] == "a person: it is paused"
    post(api, f"/v1/rollouts/{rollout}/halt", {"reason": "odd answers"})
    fleet.turn()
    (listed,) = api.json("/v1/rollouts?model=pump")["rollouts"]
    assert listed["phase"] == "halted"
    acts = api.json("/v1/acts?limit=20")["acts"]
    assert [(act["act"], act["by"]) for act in reversed(acts)] == [
        ("rollout.start", "adminer"),
        ("release.canary", "the rules"),
        ("rollout.pause", "adminer"),
        ("rollout.halt", "adminer"),
        ("release.halted", "the rules"),
    ]
    assert api.json(f"/v1/acts?subject=rollout%20{rollout}")["acts"][0]["detail"] == "odd answers"


def test_waves_and_limits_may_be_given_over_rest(api, fleet):
    fleet.release(5)
    waves = [{"name": "two", "count": 2}, {"name": "all", "share": 1.0, "needs_approval": True}]
    asked = {
        "release": 5,
        "waves": waves,
        "limits": {"max_failed_share": 0.0},
        "health": {"max_wait_s": 60.0, "required": ["errors"]},
        "scene_s": 30,
        "same_canaries": True,
    }
    rollout = post(api, "/v1/rollouts", asked)["rollout"]
    shown = api.json(f"/v1/rollouts/{rollout}")
    assert (shown["limits"]["max_failed_share"], shown["scene_s"]) == (0.0, 30)
    assert (shown["health_rules"]["max_wait_s"], shown["health_rules"]["required"]) == (60.0, ["errors"])
    assert {device["before"] for device in shown["devices"]} == {""}
    assert [wave["name"] for wave in api.json(f"/v1/rollouts/{rollout}")["plan"]] == ["two", "all"]
    post(api, f"/v1/rollouts/{rollout}/approve", {"wave": 1})
    fleet.turn()
    assert api.json(f"/v1/rollouts/{rollout}")["approved"] == [1]


def test_pages_of_rollouts_and_acts_follow_each_other(api, fleet):
    for number, model in ((5, "pump"), (6, "fan"), (7, "saw")):
        fleet.release(number, model=model)
        fleet.now_s += 1
        fleet.start(number)
    first = api.json("/v1/rollouts?limit=2")
    second = api.json(f"/v1/rollouts?limit=2&cursor={first['next']}")
    models = [each["model"] for page in (first, second) for each in page["rollouts"]]
    assert (models, second["next"]) == (["saw", "fan", "pump"], None)
    first = api.json("/v1/acts?limit=2")
    second = api.json(f"/v1/acts?limit=2&cursor={first['next']}")
    assert (len(first["acts"]), len(second["acts"]), second["next"]) == (2, 1, None)


@pytest.mark.parametrize(
    ("path", "document", "status", "says"),
    [
        ("/v1/rollouts", {"release": 99}, 404, "no release 99"),
        ("/v1/rollouts", {}, 400, 'the body must be like {"release": 5}'),
        ("/v1/rollouts", b"\xff", 400, "the body must be like"),
        ("/v1/rollouts", {"release": 5, "waves": []}, 409, "a rollout needs at least one"),
        ("/v1/rollouts", {"release": 5, "limits": {"max_failed_share": 2}}, 400, "is not in 0..1"),
        ("/v1/rollouts", {"release": 5, "group": {"site": "c"}}, 409, "no device has the labels site=c"),
        ("/v1/rollouts/none/kill", {}, 404, "no rollout 'none'"),
        ("/v1/rollouts/no-ne/kill", {}, 404, "no rollout 'no-ne'"),
        ("/v1/devices/nobody/labels", {"labels": {"site": "a"}}, 404, "no device 'nobody'"),
        ("/v1/devices/press-1/labels", {"labels": {"si te": "a"}}, 409, "a key is 1 to 64 letters"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(api, fleet, path, document, status, says):
    fleet.release(5)
    assert says in refusal(api, path, document, status)


def test_only_an_admin_changes_anything(api, fleet):
    fleet.release(5)
    assert "lacks the scope 'admin'" in refusal(api, "/v1/rollouts", {"release": 5}, 403, token="label")


def test_labels_are_set_and_taken_away_over_rest(api, fleet):
    assert api.json("/v1/devices/press-1/labels") == {"device": "press-1", "labels": {}}
    post(api, "/v1/devices/press-1/labels", {"labels": {"site": "a", "line": "2"}})
    changed = post(api, "/v1/devices/press-1/labels", {"labels": {"line": None}})
    assert changed["labels"] == {"site": "a"}
    (act, _) = api.json("/v1/acts")["acts"]
    assert (act["act"], act["subject"], act["detail"]) == ("device.label", "device press-1", "line=")


def test_the_commands_start_show_and_order(command, fleet, tmp_path):
    fleet.release(5)
    plan = tmp_path / "plan.toml"
    plan.write_text(
        '[[waves]]\nname = "one"\ncount = 1\nsoak_s = 100\nmax_drop = 0.05\n'
        '[[waves]]\nname = "all"\nshare = 1.0\nneeds_approval = true\n'
    )
    rollout = command("rollout", "start", "5", "--waves", str(plan)).strip()
    fleet.go_on(300)
    shown = command("rollout", "show", rollout)
    assert f"rollout {rollout}: release 5 of pump is running" in shown
    assert "  before    what boards were shipped with" in shown
    assert "  wave      1/2 one" in shown
    assert "  waits for approval of wave 'all'" in shown
    assert "release 5 for 4 devices, by ann" in shown
    assert command("rollout", "approve", rollout) == f"rollout {rollout}: approve ordered\n"
    fleet.go_on(50)
    assert "2/2 all" in command("rollout", "list")
    fleet.evidence.said = WORSE
    fleet.go_on(100)
    assert json.loads(command("rollout", "list", "--json"))[0]["phase"] == "halted"
    said = command("rollout", "pause", rollout, code=13)
    assert said == f"cloud-hub: rollout {rollout} is halted; start another one\n"
    assert "70 lost" in json.loads(command("rollout", "show", rollout, "--json"))["history"][-1]["what"]
    assert "rollout.approve" in command("acts")
    assert json.loads(command("acts", "--json", "--limit", "1"))[0]["act"] == "release.halted"


def test_a_group_is_chosen_by_labels(command, fleet):
    fleet.release(5)
    assert command("rollout", "label", "press-1", "site=a", "line=2") == "line=2 site=a\n"
    assert command("rollout", "label", "press-1", "line=") == "site=a\n"
    assert command("rollout", "label", "press-2") == "no labels\n"
    rollout = command("rollout", "start", "5", "--group", "site=a").strip()
    fleet.evidence.how_well = WELL
    fleet.turn()
    assert set(fleet.state(rollout).members) == {"press-1"}
    said = command("rollout", "start", "5", code=13)
    assert f"rollout {rollout} of model pump is running" in said


def test_a_hub_that_signs_nothing_starts_nothing(fleet, tmp_path, capsys):
    config = tmp_path / "hub.toml"
    config.write_text(f'[hub]\nstate_dir = "{tmp_path}"\n')
    fleet.release(5)
    assert main(["rollout", "start", "5", "--config", str(config)]) == 13
    assert "release 5 is not signed" in capsys.readouterr().err


def test_signatures_are_renewed_once_a_day_and_sooner_after_a_failure(tmp_path, caplog):
    renewed, errors = [], [StoreUnavailableError("disk full"), RuntimeError("a fault"), None]

    def renew(directory, now):
        error = errors.pop(0)
        if error is not None:
            raise error
        renewed.append((directory, now.tzinfo))

    now = datetime(2026, 7, 1, tzinfo=UTC)
    renewal = Renewal(tmp_path, renew, clock=lambda: now)
    assert renewal.run_once() == LOOK_AGAIN_S
    assert renewal.problem is None
    (tmp_path / "tuf").mkdir()
    # Within the hour, an hour later, and once the clock was set, either way.
    problems = []
    for hours in (0.0, 0.9, 1.0, -50.0, -49.5):
        now = datetime(2026, 7, 1, tzinfo=UTC) + timedelta(hours=hours)
        assert renewal.run_once() == LOOK_S
        problems.append(renewal.problem)
    why = [f"signatures not renewed: {reason}" for reason in ("disk full", "a fault")]
    assert problems == [why[0], why[0], why[1], None, None]
    assert renewed == [(tmp_path / "tuf", UTC)]
    assert "boards refuse them once they expire reason=disk full" in caplog.text


@pytest.mark.parametrize(
    ("hours", "renewals"),
    [
        ([0, 1, 23], 1),
        ([0, 23, 25], 2),
        # The machine slept, or its clock was set after the start: the thread's own waits know nothing of it.
        ([0, 24 * 365], 2),
        ([0, -2], 2),
    ],
)
def test_signatures_are_renewed_by_the_wall_clock(tmp_path, hours, renewals):
    renewed = []
    times = iter([datetime(2026, 7, 1, tzinfo=UTC) + timedelta(hours=hour) for hour in hours])
    renewal = Renewal(tmp_path, lambda _, now: renewed.append(now), clock=lambda: next(times))
    (tmp_path / "tuf").mkdir()
    assert [renewal.run_once() for _ in hours] == [LOOK_S] * len(hours)
    assert len(renewed) == renewals


def test_the_renewal_ends_with_the_hub(tmp_path):
    renewal = Renewal(tmp_path)
    renewal.start()
    renewal.stop()
    assert "renewal" not in {thread.name for thread in threading.enumerate()}
