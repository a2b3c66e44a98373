"""A hub's REST over TLS and a board's downloader, with real keys: from signing to a bundle on the board."""

import datetime
import shutil
import threading
import time

import pytest

pytest.importorskip("tuf", reason="needs python-tuf")

from cloud_hub.admin.tls import Certificate
from cloud_hub.admin.tokens import create_token
from cloud_hub.registry import release_directory
from cloud_hub.releases.create import create_repository
from cloud_hub.releases.keys import make_key
from cloud_hub.store.store import Store
from edge_cascade.bundle import MANIFEST, load_bundle
from edge_daemon.clock import SystemClock
from edge_daemon.config import ReleasesConfig
from edge_daemon.errors import RefusedError
from edge_daemon.ports import Wanted
from edge_daemon.releases.downloader import open_downloader
from tests.bundles import build
from tests.device.test_download import better_dir  # noqa: F401 - a fixture
from tests.device.test_http_fetch import certificate
from tests.hub.test_fleet import listening

NOW = datetime.datetime.now(datetime.UTC)


def test_a_signed_release_reaches_a_board_and_an_unsigned_one_does_not(tmp_path, better_dir):  # noqa: F811
    shipped_dir = build(tmp_path / "shipped") / "bundle"
    state_dir = tmp_path / "hub"
    better = load_bundle(better_dir)
    place = release_directory(state_dir, better.bundle_id)
    place.parent.mkdir(parents=True)
    shutil.copytree(better_dir, place)
    root, targets = (
        make_key(tmp_path / "keys/root.pem", b"secret"),
        make_key(tmp_path / "keys/t.pem", b"secret"),
    )
    repository = create_repository(
        state_dir / "tuf", [root], [targets], root_threshold=1, targets_threshold=1, now=NOW
    )
    (tmp_path / "root.json").write_bytes(repository.first_root())
    wanted = Wanted("tiny", "1", better.bundle_id, better.graph_sha256, better.weights_sha256, 10**6)
    ca, _, issuer = certificate(tmp_path, "ca")
    served = Certificate(*certificate(tmp_path, "hub", issuer=issuer)[:2])
    with Store(state_dir) as store, listening(store, served) as port:
        token = store.database.run(
            lambda c: create_token(c, "boards", ["fetch"], now_ms=time.time_ns() // 10**6, expires_at_ms=None)
        )
        (tmp_path / "token").write_text(token, encoding="ascii")
        config = ReleasesConfig(
            enabled=True,
            url=f"https://127.0.0.1:{port}/v1/fleet",
            root=str(tmp_path / "root.json"),
            token_file=str(tmp_path / "token"),
            ca_file=str(ca),
            jitter_s=0.0,
        )
        bundles, downloader = open_downloader(
            config, tmp_path / "board", shipped={"tiny": load_bundle(shipped_dir)}, clock=SystemClock()
        )
        with pytest.raises(RefusedError, match="signed by nobody"):
            downloader.fetch(wanted, [shipped_dir], threading.Event())
        repository.sign_offline(
            "tiny",
            1,
            graph=(place / "graph" / MANIFEST).read_bytes(),
            weights=(place / "weights" / MANIFEST).read_bytes(),
            keys=[targets],
            now=NOW,
        )
        downloader.fetch(wanted, [shipped_dir], threading.Event())
        downloader.verify(wanted)
    assert load_bundle(bundles.directory_of("tiny", better.bundle_id)).bundle_id == better.bundle_id
