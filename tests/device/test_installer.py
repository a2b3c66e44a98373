"""Bundles and heads put in the place of what answers, on a real inference thread."""

import random
from concurrent.futures import Future
from itertools import count

import pytest

from edge_cascade.bundle import load_bundle
from edge_daemon.audit import AuditCoin
from edge_daemon.clock import SystemClock
from edge_daemon.config import ModelConfig
from edge_daemon.errors import ModelError, StoppedError
from edge_daemon.installer import Installer
from edge_daemon.models import Numbering, open_pipeline
from tests.bundles import build

MODEL = ModelConfig(bundle="tiny")


class FakeInference:
    """Flips nothing by itself."""

    def __init__(self):
        self.flips = []

    def install(self, model, pipeline):
        flipped = Future()
        self.flips.append(flipped)
        return flipped


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return load_bundle(build(tmp_path_factory.mktemp("other"), seed=1) / "bundle")


@pytest.fixture
def inference():
    return FakeInference()


@pytest.fixture
def installer(tiny_bundle, inference):
    clock, numbering = SystemClock(), Numbering(bytes(16), count().__next__)
    coin = AuditCoin(0.0, 0.0, random.Random(0))
    pipeline = open_pipeline(tiny_bundle, MODEL, coin, numbering, now_s=clock.monotonic_s)
    return Installer({"tiny": pipeline}, inference, {"tiny": MODEL}, numbering, clock)


def test_while_another_bundle_is_about_to_answer_no_heads_of_the_one_before_are_taken(
    installer, tiny_bundle, other
):
    installer.install(other)
    with pytest.raises(ModelError, match="another bundle answers"):
        installer.install_heads(tiny_bundle)


@pytest.mark.parametrize(
    "end",
    [lambda flipped: flipped.cancel(), lambda flipped: flipped.set_exception(StoppedError("over"))],
    ids=["cancelled", "failed"],
)
def test_a_bundle_that_never_came_to_answer_keeps_no_heads_away(
    installer, inference, tiny_bundle, other, end
):
    flipped = installer.install(other)
    end(flipped)
    installer.install_heads(tiny_bundle)
    with pytest.raises(ModelError, match="another bundle answers"):
        installer.install_heads(other)
    assert len(inference.flips) == 2


def test_of_two_that_come_one_after_the_other_the_later_stays(installer, tiny_bundle, other):
    first, _ = installer.install(other), installer.install(tiny_bundle)
    first.cancel()
    installer.install_heads(tiny_bundle)
