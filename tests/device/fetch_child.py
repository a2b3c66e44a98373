"""A process that fetches and verifies one bundle, to be killed: see `test_download`."""

import sys
import threading
from pathlib import Path

from edge_cascade.bundle import load_bundle
from edge_daemon.clock import SystemClock
from edge_daemon.config import ReleasesConfig
from edge_daemon.ports import Wanted
from edge_daemon.releases.downloader import open_downloader


def main(url, root, state_dir, shipped, model, release, bundle, graph, weights, size_bytes):
    config = ReleasesConfig(enabled=True, url=url, root=root, jitter_s=0.0)
    _, downloader = open_downloader(
        config, Path(state_dir), shipped={model: load_bundle(Path(shipped))}, clock=SystemClock()
    )
    wanted = Wanted(model, release, bundle, graph, weights, int(size_bytes))
    downloader.fetch(wanted, [], threading.Event())
    downloader.verify(wanted)


if __name__ == "__main__":
    main(*sys.argv[1:])
