"""The shipped digits, run once: what the tests of reports measure."""

from functools import cache
from pathlib import Path

import numpy as np

from cloud_hub.builder.reports.inputs import Inputs, read_inputs
from edge_cascade.policy import Certificate
from edge_cascade.shipped import shipped_model_dir

SAMPLES = shipped_model_dir("digits") / "samples.npz"


@cache
def digits() -> Inputs:
    """The shipped bundle with its test samples and the full model's answers."""
    return read_inputs("digits", SAMPLES, None)


def save(path: Path, **arrays: np.ndarray) -> Path:
    """An .npz file of these arrays."""
    np.savez(path, **arrays)
    return path


def certificate(**changes) -> Certificate:
    """A loss certificate of the digits' int8 plan."""
    fields = {
        "kind": "loss",
        "plan": "int8",
        "epsilon": 0.005,
        "delta": 0.05,
        "samples": 3500,
        "groups": 3500,
        "method": "binomial",
        "data_sha256": "ab" * 32,
        "last_point": 10,
        "upload_share": 0.1,
        "mult_adds": 20000.0,
    }
    return Certificate(**(fields | changes))
