"""Old metadata go, and boards that come at any time find what they need."""

import datetime
import os

import pytest

pytest.importorskip("tuf", reason="needs python-tuf")

from sqlalchemy import insert

from cloud_hub.core.collecting import CollectRules
from cloud_hub.releases.collect import collect
from cloud_hub.releases.old_metadata import KEPT_S, remove_old_metadata
from cloud_hub.store.database import Database
from cloud_hub.store.schema import releases
from cloud_hub.store.store import database_url
from edge_cascade.signed_releases import Policy, weights_target
from tests.hub.test_signing import BETTER, GRAPH, NOW, Hub, sha256

DAY = datetime.timedelta(days=1)
AT_S = 2e9
OTHER = b'{"weights": 3}'


@pytest.fixture
def hub(tmp_path):
    """Renewed on ten days, with three policies after each other; all of it written long ago."""
    hub = Hub(tmp_path)
    hub.sign()
    for day in range(1, 11):
        hub.repository.renew_online(NOW + day * DAY)
    for floor in (1, 2, 3):
        hub.repository.set_policy(Policy({"pump": floor}), keys=hub.targets_keys, now=NOW + 10 * DAY)
    for path in hub.directory.rglob("*.json"):
        os.utime(path, (AT_S, AT_S))
    return hub


def names(hub):
    return {path.name for path in (hub.directory / "metadata").iterdir()}


def policies(hub):
    return [path.name for path in (hub.directory / "blobs").iterdir()]


def test_of_every_role_but_root_the_newest_stays_and_the_policy_that_it_names(hub):
    before = hub.repository.policy()
    assert len(policies(hub)) == 3
    assert remove_old_metadata(hub.directory, now_s=AT_S + KEPT_S + 1) > 10
    kept = [name.partition(".")[2] for name in names(hub) if name != "timestamp.json"]
    assert sorted(kept) == ["root.json", "snapshot.json", "targets.json", "weights.json"]
    assert len(policies(hub)) == 1
    assert hub.repository.policy() == before == Policy({"pump": 3})
    assert remove_old_metadata(hub.directory, now_s=AT_S + KEPT_S + 1) == 0
    hub.repository.renew_online(NOW + 11 * DAY)


def test_weights_of_what_was_collected_are_signed_no_more_and_others_are(hub, tmp_path):
    kept, gone = sha256(OTHER), sha256(BETTER)
    today = NOW + 10 * DAY
    for release, weights in ((1, OTHER), (2, BETTER)):
        hub.repository.sign_weights_online(
            "tiny", release, weights=weights, graph_sha256=sha256(GRAPH), now=today
        )
    row = {"model": "tiny", "graph": bytes(32), "lineage": "{}", "figures": "{}", "created_at_ms": 1}
    # Two releases have the same weights: one of them is still there.
    parts = ((1, kept, "live"), (2, gone, "collected"), (3, kept, "collected"))
    rows = [
        {**row, "bundle": bytes([n]) * 32, "weights": bytes.fromhex(part), "state": state, "created_by": "a"}
        for n, part, state in parts
    ]
    with Database(database_url(tmp_path, None)) as database:
        database.run(lambda c: c.execute(insert(releases), rows))
        assert hub.repository.is_signed("tiny", sha256(GRAPH), gone)
        now_ms = round(today.timestamp() * 1000)
        assert collect(database, tmp_path, CollectRules(), by="ann", now_ms=now_ms) == []
    assert not hub.repository.is_signed("tiny", sha256(GRAPH), gone)
    assert hub.repository.is_signed("tiny", sha256(GRAPH), kept)
    assert hub.repository.forget_weights([weights_target("tiny", gone)], today) == 0


def test_what_was_replaced_within_a_day_stays_for_boards_on_their_way(hub):
    before = names(hub)
    assert remove_old_metadata(hub.directory, now_s=AT_S + KEPT_S - 1) == 0
    assert names(hub) == before
    assert len(policies(hub)) == 3
