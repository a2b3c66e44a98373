"""What memory costs answers: sessions go without a collection, and a collection looks at little."""

import contextlib
import gc
import subprocess
import sys
import weakref

import pytest

from edge_cascade.bundle import load_bundle
from edge_cascade.ladder import Ladder
from edge_daemon.memory import SWITCH_S
from edge_daemon.models import open_stage

SET_UP = """
import gc, sys
from edge_daemon.memory import favour_answers
favour_answers()
print(len(gc.get_objects()) < gc.get_freeze_count() / 10, sys.getswitchinterval())
"""


@contextlib.contextmanager
def no_collection():
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def test_a_ladder_goes_with_its_last_reference_and_needs_no_collection(tiny_model_dir):
    bundle = load_bundle(tiny_model_dir / "bundle")
    with no_collection():
        ladder = Ladder(bundle, bundle.plan(), open_stage)
        ladder.climb(bundle.golden_inputs[0])
        parts = [weakref.ref(ladder), *(weakref.ref(runner) for runner in ladder._runners.values())]
        del ladder
        assert [part() for part in parts] == [None] * len(parts)


def test_a_daemon_freezes_what_stays_and_switches_threads_often():
    done = subprocess.run([sys.executable, "-c", SET_UP], capture_output=True, text=True, check=True)
    is_little_left, interval_s = done.stdout.split()
    assert (is_little_left, float(interval_s)) == ("True", pytest.approx(SWITCH_S))
