"""Releases are collected while boards fetch: what is desired is there, what was begun comes to its end."""

import hashlib
import http.client
import json

import pytest
from sqlalchemy import insert

from cloud_hub.admin.tokens import create_token
from cloud_hub.core.collecting import CollectRules
from cloud_hub.registry import release_directory
from cloud_hub.releases.collect import collect
from cloud_hub.store import schema
from cloud_hub.store.desired import desire
from cloud_hub.store.store import Store
from edge_cascade.bundle import GRAPH, MANIFEST
from edge_cascade.messages import SHIPPED
from tests.hub.test_fleet import listening

LONG = bytes(64 * 2**20)
SHA256 = hashlib.sha256(LONG).hexdigest()
NOTHING_KEPT = CollectRules(keep_live=1, keep_drafts=0, min_age_s=0.0)


@pytest.fixture
def store(tmp_path):
    """A hub with one release, of one file that no socket swallows whole; a board is to run it."""
    graph = release_directory(tmp_path, (bytes([5]) * 32).hex()) / GRAPH
    graph.mkdir(parents=True)
    (graph / "long").write_bytes(LONG)
    files = {"long": {"sha256": SHA256, "size_bytes": len(LONG)}}
    (graph / MANIFEST).write_text(json.dumps({"files": files}), encoding="utf-8")
    row = {
        "id": 5, "model": "pump", "bundle": bytes([5]) * 32, "graph": bytes([7]) * 32, "weights": bytes(32),
        "state": "draft", "lineage": "{}", "figures": "{}", "created_at_ms": 1, "created_by": "ann",
    }  # fmt: skip
    with Store(tmp_path) as store:
        store.database.run(lambda c: c.execute(insert(schema.releases).values(row)))
        want(store, "5")
        yield store


@pytest.fixture
def get(store):
    """Ask the hub for the file; the answer, of which nothing is read yet."""
    token = store.database.run(lambda c: create_token(c, "boards", ["fetch"], now_ms=1, expires_at_ms=None))
    connections = []

    def ask(**headers):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connections.append(connection)
        path = f"/v1/fleet/blobs/{SHA256}"
        connection.request("GET", path, headers={"Authorization": f"Bearer {token}", **headers})
        return connection.getresponse()

    with listening(store) as port:
        yield ask
        for connection in connections:
            connection.close()


def want(store, release):
    store.database.run(lambda c: desire(c, "pump", {"press-1": {"release": release}}))


def collected(store):
    found = collect(store.database, store.state_dir, NOTHING_KEPT, by="ann", now_ms=10**13)
    return [each.id for each in found]


def test_what_a_board_is_to_run_is_there_however_often_it_comes_back(store, get):
    assert collected(store) == []
    answer = get()
    assert answer.status == 200
    answer.read(1000)
    answer.close()
    assert collected(store) == []
    rest = get(Range="bytes=1000-")
    assert (rest.status, rest.read()) == (206, LONG[1000:])


def test_a_file_that_is_on_its_way_comes_whole_and_then_it_is_gone(store, get):
    answer = get()
    before = answer.read(1000)
    want(store, SHIPPED)
    assert collected(store) == [5]
    assert before + answer.read() == LONG
    assert get().status == 404
