"""How often real networks differ, and how often just one of them is right: the exits of the bundles that ship."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cloud_hub.builder.collect import collect
from cloud_hub.builder.samples.data import Dataset
from cloud_hub.core.rollout.judge import Pairs, count_pairs
from edge_cascade.bundle import load_bundle
from edge_cascade.scores import LABEL
from edge_cascade.shipped import shipped_model_dir
from edge_daemon.simulate.vibration import draw_windows

Labels = NDArray[np.int64]

_WINDOWS: Final = 2_000


@dataclass(frozen=True, slots=True)
class Compared:
    """Two networks on the same samples. `pairs` are against the true labels, `by_full` against the full model."""

    model: str
    old: str
    new: str
    old_accuracy: float
    new_accuracy: float
    pairs: Pairs
    by_full: Pairs


def compare_exits() -> Iterator[Compared]:
    """Each model's exits among themselves, and its last exit at two precisions."""
    for model, data in (("digits", _digits()), ("vibration", _vibration())):
        directory = shipped_model_dir(model)
        bundle = load_bundle(directory / "bundle")
        plans = {plan.name: plan for plan in bundle.weights.plans}
        full = (directory / "full.onnx").read_bytes()
        runs = {name: collect(bundle, plan, data, full) for name, plan in plans.items()}
        answers = {
            f"exit {exit_ + 1} {name}": run.heads[exit_, :, LABEL].astype(np.int64)
            for name, run in runs.items()
            for exit_ in range(len(run.heads))
        }
        assert data.y is not None
        for old, new in (
            ("exit 3 fp32", "exit 3 int8"),
            ("exit 3 int8", "exit 2 int8"),
            ("exit 2 int8", "exit 1 int8"),
        ):
            full_labels = runs["int8"].full_labels
            yield _compare(model, old, new, answers[old], answers[new], data.y, full_labels)


def _compare(
    model: str, old: str, new: str, was: Labels, now: Labels, labels: Labels, full_labels: Labels
) -> Compared:
    return Compared(
        model,
        old,
        new,
        float((was == labels).mean()),
        float((now == labels).mean()),
        count_pairs(was, now, labels),
        count_pairs(was, now, full_labels),
    )


def _digits() -> Dataset:
    with np.load(Path(__file__).parents[2] / "models/digits/samples.npz") as samples:
        return Dataset(samples["x_test"].astype(np.float32), samples["y_test"])


def _vibration() -> Dataset:
    windows, labels, _ = draw_windows("test", _WINDOWS, np.random.default_rng(0))
    return Dataset(windows[:, None, :], labels)
