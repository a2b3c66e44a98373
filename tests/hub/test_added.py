"""`cloud-hub release add`: a bundle that was built elsewhere becomes a draft, or it is said why not."""

import json
import shutil

import pytest

from cloud_hub.__main__ import main
from cloud_hub.errors import BuildError, ConfigError
from cloud_hub.store.releases import look_at_holdout
from cloud_hub.store.store import Store
from edge_cascade.bundle import MANIFEST, WEIGHTS, load_bundle
from edge_cascade.messages import Use
from tests.builder.models import built
from tests.bundles import build
from tests.hub.candidates import MODEL, answer, send


@pytest.fixture
def state_dir(tmp_path):
    return tmp_path / "state"


@pytest.fixture
def hub(tmp_path, state_dir, capsys):
    """`cloud-hub` with the model as it is installed; what it printed."""
    config = tmp_path / "hub.toml"
    config.write_text(
        f'[hub]\nstate_dir = "{state_dir}"\n[[models]]\nbundle = "{built() / "bundle"}"\n', encoding="utf-8"
    )

    def run(*arguments, code=0):
        assert main([*map(str, arguments), "--config", str(config)]) == code
        printed = capsys.readouterr()
        return printed.out if code == 0 else printed.err

    return run


@pytest.fixture
def other(tmp_path):
    """The installed bundle at another operating point."""
    directory = tmp_path / "other"
    shutil.copytree(built() / "bundle", directory)
    path = directory / WEIGHTS / MANIFEST
    manifest = json.loads(path.read_bytes())
    plan = manifest["plans"][0]
    plan["chosen"] = (plan["chosen"] + 1) % len(plan["points"])
    path.write_text(json.dumps(manifest), encoding="utf-8")
    return directory


def test_bundle_is_copied_registered_as_a_draft_and_written_down(hub, state_dir, other):
    wanted = load_bundle(other).bundle_id
    shown = json.loads(hub("release", "add", other, "--json"))
    shutil.rmtree(other)

    assert (shown["id"], shown["state"], shown["bundle"]) == (1, "draft", wanted)
    assert shown["lineage"] == {
        **dict.fromkeys(("series", "rounds", "strategy", "examples", "schedule")),
        "parent": load_bundle(built() / "bundle").bundle_id,
        "weights": shown["weights"],
        "trained": "elsewhere",
    }
    assert shown["figures"]["guard"]["judgement"] == "cannot_judge"
    assert shown["figures"]["whole_release"] == ""
    assert load_bundle(state_dir / "releases" / wanted / "bundle").bundle_id == wanted
    (act,) = json.loads(hub("acts", "--json"))
    assert (act["act"], act["subject"]) == ("release.add", "release 1")
    assert "elsewhere" in hub("release", "list")
    assert "trained      elsewhere" in hub("release", "show", 1)


def test_adding_twice_gives_the_release_that_there_is(hub, other):
    first = json.loads(hub("release", "add", other, "--json"))
    assert json.loads(hub("release", "add", other, "--json")) == first
    assert len(json.loads(hub("release", "list", "--json"))) == 1


def test_what_was_collected_may_be_added_again_and_is_a_draft_as_young_as_any(hub, state_dir, other):
    first = json.loads(hub("release", "add", other, "--json"))
    options = ("--min-age-days", "0", "--keep-drafts")
    assert json.loads(hub("release", "collect", *options, "1", "--json")) == []
    twin = other.parent / "twin"
    shutil.copytree(other, twin)
    path = twin / WEIGHTS / MANIFEST
    path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    hub("release", "add", twin)
    assert [each["id"] for each in json.loads(hub("release", "collect", *options, "1", "--json"))] == [1]
    assert not (state_dir / "releases" / first["bundle"]).exists()
    again = json.loads(hub("release", "add", other, "--json"))
    assert (again["id"], again["state"]) == (1, "draft")
    assert again["created_at_ms"] > first["created_at_ms"]
    assert load_bundle(state_dir / "releases" / first["bundle"] / "bundle").bundle_id == first["bundle"]


def test_it_is_judged_on_holdout_cases_that_a_guard_has_looked_at_and_on_no_others(hub, state_dir, other):
    with Store(state_dir) as store:
        send(store, 900, 12, use=Use.HOLDOUT)
        answer(store)
        store.database.run(lambda c: look_at_holdout(c, MODEL, upto_id=400))
        guard = json.loads(hub("release", "add", other, "--json"))["figures"]["guard"]

    assert (guard["judgement"], guard["samples"]) == ("kept", 400)
    # The last exit of the same weights.
    assert guard["before"] == guard["after"]


def test_what_is_no_bundle_is_refused_and_leaves_nothing(hub, state_dir, other):
    (other / WEIGHTS / "weights.safetensors").write_bytes(b"x" * 64)
    assert "weights.safetensors" in hub("release", "add", other, code=BuildError.exit_code)
    assert "no such directory" in hub("release", "add", other / "gone", code=BuildError.exit_code)
    assert json.loads(hub("release", "list", "--json")) == []
    assert not [path for path in (state_dir / "releases").glob("*") if path.name != ".lock"]


def test_bundle_of_another_model_is_refused_by_name(hub, tmp_path):
    tiny = build(tmp_path / "tiny") / "bundle"
    assert "tiny" in hub("release", "add", tiny, code=ConfigError.exit_code)


def test_bundle_with_other_labels_under_the_same_name_is_refused(hub, tmp_path):
    twin = build(tmp_path / "twin", model=MODEL) / "bundle"
    said = hub("release", "add", twin, code=BuildError.exit_code)
    assert f"its labels is not that of the hub's '{MODEL}'" in said
