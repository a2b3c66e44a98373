"""What a weights-only release costs a board: a real candidate on real digits, every byte of HTTP counted."""

import datetime
import socket
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tuf", reason="needs python-tuf")
pytest.importorskip("sklearn", reason="needs scikit-learn")

from rich.console import Console
from sklearn.datasets import load_digits

from cloud_hub.admin.tokens import create_token
from cloud_hub.builder.assemble import Declaration
from cloud_hub.builder.build import build
from cloud_hub.builder.naive import Calibration, build_naive_bundle
from cloud_hub.builder.networks.export import export_staged
from cloud_hub.builder.networks.network import AveragePool, Conv, Dense, Flatten, Network, Relu, Stage
from cloud_hub.builder.request import make_request
from cloud_hub.candidates.base import load_base
from cloud_hub.candidates.make import Wish, make_candidate
from cloud_hub.candidates.outcome import Candidate, Lineage
from cloud_hub.candidates.training import train_on_cases
from cloud_hub.core.federation.guard import GuardRules
from cloud_hub.examples import read_examples
from cloud_hub.registry import register_draft, release_directory
from cloud_hub.releases.create import create_repository
from cloud_hub.releases.keys import make_key
from cloud_hub.releases.sign import ReleaseSigner
from cloud_hub.store.store import Store
from edge_cascade.bundle import MANIFEST, load_bundle
from edge_cascade.manifest import Preprocess, Wire
from edge_cascade.messages import Use
from edge_cascade.preprocess import normalise
from edge_cascade.training import Schedule
from edge_daemon.clock import SystemClock
from edge_daemon.config import ReleasesConfig
from edge_daemon.ports import Wanted
from edge_daemon.releases.downloader import open_downloader
from tests.builder.models import fitted, without_plots
from tests.hub.candidates import MODEL, answer, config_of, send
from tests.hub.test_fleet import listening

NOW = datetime.datetime.now(datetime.UTC)
MOST_BYTES = 200_000
SHIPPED = Path(__file__).parents[2] / "models" / "digits"
PREPROCESS = Preprocess((4.8735,), (6.0162,))
HEAD = (Flatten(), Dense(10))
NETWORK = Network(
    (1, 8, 8),
    10,
    (
        Stage((Conv(16, 3, 2, batch_norm=False), Relu()), HEAD),
        Stage((Conv(80, 3, batch_norm=False), Relu()), (AveragePool(2), *HEAD)),
        Stage((Conv(160, 3, batch_norm=False), Relu()), (AveragePool(2), *HEAD)),
    ),
)
TAUGHT, SEEN, FRESH = 600, 400, 800


def digits():
    """1,797 handwritten digits `(n, 1, 8, 8) uint8` of 0..16 and what they are, in a fixed order."""
    loaded = load_digits()
    order = np.random.default_rng(3).permutation(len(loaded.target))
    return loaded.images.astype(np.uint8)[order, None], loaded.target[order]


def in_the_field(x, count, seed):
    """Digits as other scanners give them: each grey level off by one here and there."""
    rng = np.random.default_rng(seed)
    chosen = x[rng.integers(0, len(x), count)].astype(np.int16)
    return np.clip(chosen + rng.integers(-1, 2, chosen.shape), 0, 16).astype(np.uint8)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """A certified bundle of 139,310 parameters for the digits' full model, as `cloud-hub build` writes it."""
    out = tmp_path_factory.mktemp("built")
    x, y = digits()
    plain = x[:500].astype(np.float32)
    build_naive_bundle(
        export_staged(NETWORK, fitted(NETWORK, normalise(plain, PREPROCESS), y[:500])),
        Declaration("base", tuple(map(str, range(10))), (1, 8, 8), PREPROCESS, Wire("uint8", 1.0)),
        full=(SHIPPED / "full.onnx").read_bytes(),
        representative=plain[:256],
        calibration=Calibration(plain[:200], y[:200]),
        out=out / "base",
    )
    parts = {"train": slice(500), "calibration": slice(500, 1300), "test": slice(1300, None)}
    np.savez(
        out / "data.npz",
        **{f"x_{name}": x[part] for name, part in parts.items()},
        **{f"y_{name}": y[part] for name, part in parts.items()},
    )
    with without_plots():
        build(
            make_request(
                {
                    "full": str(SHIPPED / "full.onnx"), "data": str(out / "data.npz"),
                    "rebase": str(out / "base"), "out": str(out / "model"), "model": MODEL,
                    "mean": PREPROCESS.mean, "std": PREPROCESS.std, "epsilon": 0.01, "encoding": "uint8",
                    "wire_scale": 1.0,
                }
            ),
            Console(quiet=True),
        )  # fmt: skip
    return out / "model"


@contextmanager
def counting(port):
    """A relay to a port: its own, and how many bytes come back through it by what is asked, headers and all."""
    listener = socket.create_server(("127.0.0.1", 0))
    counted = Counter()

    def relay(client):
        with client, socket.create_connection(("127.0.0.1", port)) as hub:
            # One request a connection: that is how boards ask.
            asked = client.recv(65536)
            hub.sendall(asked)
            kind = asked.split(b"/")[3].decode("ascii")
            while chunk := hub.recv(65536):
                counted[kind] += len(chunk)
                client.sendall(chunk)

    def accept():
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            relay(client)

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        yield listener.getsockname()[1], counted
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def candidate_of(store, base):
    """Weights that learned from 600 cases of boards, judged on 400 and certified on 800 others."""
    x, _ = digits()
    send(store, TAUGHT, 11, x=in_the_field(x, TAUGHT, 11))
    send(store, SEEN, 12, use=Use.HOLDOUT, x=in_the_field(x, SEEN, 12))
    send(store, FRESH, 13, use=Use.HOLDOUT, x=in_the_field(x, FRESH, 13))
    answer(store, base)
    cases = read_examples(store, base.model, Use.TRAIN)
    schedule = Schedule(epochs=8, batch_size=32, learning_rate=0.003, momentum=0.9)
    trained = train_on_cases(
        base.bundle, base.bundle.parameters(), cases, schedule, soft_share=0.0, rng=np.random.default_rng(0)
    )
    return make_candidate(
        store, base, trained.weights, Wish(TAUGHT + SEEN, GuardRules(), must_be_better=False)
    )


def test_a_weights_only_release_of_139_thousand_parameters_costs_a_board_at_most_200_kilobytes(
    tmp_path, shipped
):
    state_dir = tmp_path / "hub"
    base = load_base(config_of(state_dir, shipped / "bundle"), MODEL)
    parameters = sum(array.size for array in base.bundle.parameters().values())
    keys = [make_key(tmp_path / f"{name}.pem", b"secret") for name in ("root", "targets")]
    repository = create_repository(
        state_dir / "tuf", keys[:1], keys[1:], root_threshold=1, targets_threshold=1, now=NOW
    )
    (tmp_path / "root.json").write_bytes(repository.first_root())
    graph, weights = ((shipped / "bundle" / part / MANIFEST).read_bytes() for part in ("graph", "weights"))
    repository.sign_offline(MODEL, 1, graph=graph, weights=weights, keys=keys[1:], now=NOW)
    with Store(state_dir) as store, listening(store, models={MODEL: base.model}) as port:
        candidate = candidate_of(store, base)
        assert isinstance(candidate, Candidate), candidate
        lineage = Lineage(parent=base.bundle.bundle_id, weights="00" * 32, trained="hub")
        release = register_draft(store.database, state_dir, candidate, lineage, created_by="test", now_ms=7)
        ReleaseSigner(store.database, state_dir, repository, "test", NOW).sign_online(release.id)
        token = store.database.run(
            lambda c: create_token(c, "boards", ["fetch"], now_ms=time.time_ns() // 10**6, expires_at_ms=None)
        )
        (tmp_path / "token").write_text(token, encoding="ascii")
        with counting(port) as (relay, counted):
            config = ReleasesConfig(
                enabled=True,
                url=f"http://127.0.0.1:{relay}/v1/fleet",
                root=str(tmp_path / "root.json"),
                token_file=str(tmp_path / "token"),
                jitter_s=0.0,
            )
            bundles, downloader = open_downloader(
                config, tmp_path / "board", shipped={MODEL: base.bundle}, clock=SystemClock()
            )
            wanted = Wanted(
                MODEL, str(release.id), release.bundle, release.graph, release.weights, 10 * 2**20
            )
            downloader.fetch(wanted, [shipped / "bundle"], threading.Event())
            downloader.verify(wanted)
    assert load_bundle(bundles.directory_of(MODEL, release.bundle)).bundle_id == release.bundle
    assert release.graph == base.bundle.graph_sha256
    whole = (release_directory(state_dir, release.bundle) / "weights" / "weights.safetensors").stat().st_size
    print(f"{parameters} parameters, {whole} bytes of weights; fetched: {counted}, {counted.total()} in all")
    assert parameters > 139_000
    # As a difference from what the board was shipped with: the whole blob alone would be above that.
    assert counted.keys() == {"metadata", "blobs", "deltas"}
    assert counted.total() <= MOST_BYTES < whole
