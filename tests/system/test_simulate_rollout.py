"""`edge-daemon --simulate --rollout` as it is typed: real boards, hub and brokers, and what was caught where."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

pytest.importorskip("tuf", reason="needs python-tuf")

from edge_daemon.errors import EXIT_OK, EXIT_USAGE
from edge_daemon.simulate.rollout_report import EXPECTED, RolloutReport
from tests.services import require_program

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 240
START = "import sys; from edge_daemon.__main__ import main; sys.exit(main(sys.argv[1:]))"
OPTIONS = ["--devices", "2", "--samples", "120", "--rate", "30", "--seed", "3", "--model", "digits"]
KINDS = ("good", "bad", "crash", "slow")


def simulate(*options):
    return subprocess.run(
        [sys.executable, "-c", START, "--simulate", *map(str, options)],
        cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two at a time: they wait more than they work."""
    require_program("mosquitto", package="mosquitto")
    folder = tmp_path_factory.mktemp("rollouts")

    def run(kind):
        return simulate("--rollout", kind, *OPTIONS, "--json", folder / f"{kind}.json")

    with ThreadPoolExecutor(2) as pool:
        ends = dict(zip(KINDS, pool.map(run, KINDS), strict=True))
    return {kind: (end, folder / f"{kind}.json") for kind, end in ends.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_release_ends_where_it_should_and_no_sample_is_lost(runs, kind):
    end, path = runs[kind]
    assert end.returncode == EXIT_OK, end.stdout + end.stderr
    report = msgspec.json.decode(path.read_bytes(), type=RolloutReport)
    assert (report.kind, report.caught_by, report.is_as_expected) == (kind, EXPECTED[kind], True)
    assert (report.lost, report.answered) == (0, report.samples)
    outcomes = {board.outcome for board in report.boards}
    assert outcomes == ({"committed"} if kind == "good" else outcomes & {"back", "reverted", "not offered"})


def test_bad_release_was_caught_on_pairs_that_its_canary_had_seen(runs):
    report = msgspec.json.decode(runs["bad"][1].read_bytes(), type=RolloutReport)
    assert report.stopped_in == "canary"
    assert "pairs tell" in report.why
    assert report.drop >= 0.05
    assert sum(board.shadow_pairs > 0 for board in report.boards) == 1
    assert report.by_release.samples > 0


def test_crashing_release_brought_its_board_back_after_three_crashes(runs):
    report = msgspec.json.decode(runs["crash"][1].read_bytes(), type=RolloutReport)
    assert "3 crashes without a boot in between" in report.why
    assert sorted(board.starts for board in report.boards) == [1, 4]


def test_slow_release_never_answered_a_sample(runs):
    report = msgspec.json.decode(runs["slow"][1].read_bytes(), type=RolloutReport)
    assert "latency" in report.why
    assert report.by_release.samples == 0


def test_what_does_not_go_together_is_refused():
    end = simulate("--rollout", "good", "--rounds", "2")
    assert end.returncode == EXIT_USAGE
    assert "--rollout goes with none of" in end.stderr
