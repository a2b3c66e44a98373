"""What a fleet learned in its rounds, and what that is worth on samples that nobody has seen. Reads no clock.

The hub and the boards had nothing but verdicts; the truth is used here alone, to judge.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_cascade.bundle import Bundle, load_bundle
from edge_cascade.ladder import Ladder
from edge_daemon.models import open_stage
from edge_daemon.simulate.sensors import open_source

FRESH_SAMPLES: Final = 2_000
FRESH_SEED: Final = 1_000_003
"""Apart from the seeds of the boards' sensors."""
_BATCH: Final = 256

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]


class RoundView(msgspec.Struct, frozen=True):
    """One round as the hub's REST interface shows it. `before` and `after`: the guard's, on the holdout."""

    number: int
    phase: str
    why: str
    asked: int
    answered: int
    counted: int
    late: int
    rejected: dict[str, int]
    bytes_up: int
    bytes_down: int
    before: float | None
    after: float | None


class Worth(msgspec.Struct, frozen=True):
    """A bundle on fresh samples: the board's own answers, uploads, and answers with the full model's.

    `loss`: the share that the board answered itself, and wrongly, where the full model would have been right.
    """

    edge: float
    upload_share: float
    cascade: float
    loss: float


class LearningReport(msgspec.Struct, frozen=True):
    """What became of a series of rounds; accuracies are of `fresh_samples` with their true labels.

    `exits_before` and `exits_after`: every exit alone, in fp32, with the weights that the fleet started from
    and with the last ones that the hub kept. `draft` is the bundle made of these, None where there is none.
    """

    phase: str
    why: str
    rounds: list[RoundView]
    fresh_samples: int
    exits_before: list[float]
    exits_after: list[float]
    before: Worth
    draft: str | None
    after: Worth | None


class Fresh:
    """Samples `(n, *input_shape)` of the same world that no board has seen, with their true labels `(n,)`."""

    def __init__(self, model: str, *, seed: int, drift: float, count: int = FRESH_SAMPLES) -> None:
        source = open_source(model, seed=FRESH_SEED + seed, drift=drift)
        drawn = [next(source) for _ in range(count)]
        self.x: Floats = np.stack([x for x, _ in drawn])
        self.labels: Labels = np.array([label for _, label in drawn], np.int64)

    def accuracy(self, labels: Labels) -> float:
        """The share of these labels that is right."""
        return round(float(np.mean(labels == self.labels)), 5)

    def worth_of(self, bundle: Bundle, full: Labels) -> Worth:
        """What a bundle's default plan makes of the samples; `full` are the full model's labels."""
        ladder = Ladder(bundle, bundle.plan(), open_stage)
        own = np.empty(len(self.x), np.int64)
        is_sent = np.zeros(len(self.x), bool)
        for start, chunk in _chunks(self.x):
            for offset, climb in enumerate(ladder.climb_batch(chunk)):
                own[start + offset] = climb.answer.label
                is_sent[start + offset] = not climb.accepted
        return Worth(
            edge=self.accuracy(own),
            upload_share=round(float(is_sent.mean()), 5),
            cascade=self.accuracy(np.where(is_sent, full, own)),
            loss=round(float(np.mean(~is_sent & (own != self.labels) & (full == self.labels))), 5),
        )


def round_view(shown: dict[str, Any]) -> RoundView:
    """A round of `/v1/rounds`."""
    guard = shown["guard"] or {}
    kept = {name: shown[name] for name in RoundView.__struct_fields__ if name in shown}
    return RoundView(**kept, before=guard.get("before"), after=guard.get("after"))


def learning_report(
    series: dict[str, Any],
    rounds: Sequence[RoundView],
    bundle: Bundle,
    *,
    hub_state_dir: Path,
    fresh: Fresh,
    full: Labels,
    draft: str | None,
) -> LearningReport:
    """Judge what the hub holds; it must not be running. `series` is that of `/v1/series`."""
    made = None if draft is None else load_bundle(hub_state_dir / "releases" / draft / "bundle")
    return LearningReport(
        phase=series["phase"],
        why=series["why"],
        rounds=list(rounds),
        fresh_samples=len(fresh.x),
        exits_before=_exits(bundle, bundle.parameters(), fresh),
        exits_after=_exits(bundle, _weights_of(hub_state_dir, series["base"], bundle), fresh),
        before=fresh.worth_of(bundle, full),
        draft=draft,
        after=None if made is None else fresh.worth_of(made, full),
    )


def _exits(bundle: Bundle, weights: dict[str, Floats], fresh: Fresh) -> list[float]:
    from cloud_hub.federation.evaluation import labels_of_exits

    return [fresh.accuracy(labels) for labels in labels_of_exits(bundle, weights, fresh.x)]


def _weights_of(state_dir: Path, digest: str | None, bundle: Bundle) -> dict[str, Floats]:
    """The last training base that the hub kept, out of its store."""
    from cloud_hub.federation.bases import Bases
    from cloud_hub.store.store import Store

    if digest is None:
        return bundle.parameters()
    assert bundle.train_step is not None
    with Store(state_dir) as store:
        bases = Bases(store)
        return bases.load(bases.row(bytes.fromhex(digest)), dict(bundle.train_step.shapes))


def _chunks(x: Floats) -> Iterator[tuple[int, Floats]]:
    return ((start, x[start : start + _BATCH]) for start in range(0, len(x), _BATCH))
