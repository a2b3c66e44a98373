"""kill -9 at every named point of a round on the board: the round is completed, and nothing counts twice."""

import os
import signal
import subprocess
import sys

import pytest

from edge_daemon.training.state import ModelState

POINTS = (
    "device.round-base-stored",
    "device.round-trained",
    "device.round-before-append",
    "spool.before-commit",
    "device.round-after-append",
    "device.round-residual-written",
)


def live(state_dir, bundle_dir, crash_at=""):
    result = subprocess.run(
        [sys.executable, "-m", "tests.device.rounds_life", str(state_dir), str(bundle_dir)],
        env=os.environ | {"EDGE_CRASH_AT": crash_at},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return result, [tuple(line.split()) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("point", POINTS)
def test_a_board_killed_in_a_round_sends_one_update_and_knows_what_it_left_out(
    tmp_path, tiny_model_dir, tiny_bundle, point
):
    bundle_dir = tiny_model_dir / "bundle"
    first, before = live(tmp_path, bundle_dir, crash_at=point)
    assert first.returncode == -signal.SIGKILL, first.stderr
    second, after = live(tmp_path, bundle_dir)
    assert second.returncode == 0, second.stderr
    deliveries = before + after
    assert {round_id for _, _, round_id in deliveries} == {"round-1"}
    # The same row again is what the hub calls a duplicate; another one would be a second vote.
    assert len(set(deliveries)) == 1
    state = ModelState(tmp_path / "training" / "tiny", bytes.fromhex(tiny_bundle.graph_sha256))
    state.load()
    assert (state.voted, state.pending, state.damaged) == (("round-1",), None, 0)
    assert state.residual() is not None
    assert not list((tmp_path / "training" / "tiny").glob("job-*"))
    third, again = live(tmp_path, bundle_dir)
    assert (third.returncode, again) == (0, [])
