"""Writes models as their users' exporters do: torch's two, and scikit-learn's. Judges nothing.

Imports torch, onnxscript, scikit-learn and skl2onnx only when called: none of them comes with ours but torch.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.exporters.architectures import Shape

Floats = NDArray[np.float32]


class Exporter(StrEnum):
    """Who writes the file."""

    TORCHSCRIPT = "torchscript"
    DYNAMO = "dynamo"
    SKL2ONNX = "skl2onnx"


class Batch(StrEnum):
    """What the file says of its batch axis."""

    FIXED = "batch of one"
    FREE = "free batch"


TORCH_EXPORTERS: Final = (Exporter.TORCHSCRIPT, Exporter.DYNAMO)


def export_torch(model: Any, shape: Shape, path: Path, exporter: Exporter, batch: Batch) -> Path:
    """The file of a module in inference mode.

    Raises:
        RuntimeError: where the exporter itself fails.
    """
    import torch

    is_dynamo = exporter is Exporter.DYNAMO
    given = torch.zeros(1 if batch is Batch.FIXED else 2, *shape)
    more: dict[str, Any] = {}
    if batch is Batch.FREE and is_dynamo:
        more = {"dynamic_shapes": ({0: torch.export.Dim("batch")},)}
    elif batch is Batch.FREE:
        more = {"input_names": ["in"], "dynamic_axes": {"in": {0: "batch"}}}
    with _quiet():
        torch.onnx.export(model, (given,), path, dynamo=is_dynamo, verbose=False, **more)
    return path


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters warn and log of: the packages that they miss, the paths that tracing fixes."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


def answers_of(model: Any, x: Floats) -> Floats:
    """The module's own logits."""
    import torch

    with torch.no_grad():
        return np.asarray(model(torch.from_numpy(x)).numpy(), np.float32)


@dataclass(frozen=True, slots=True)
class Estimator:
    """One of scikit-learn, not fitted; `classes` it is to tell apart."""

    name: str
    model: Any
    classes: int = 3


def estimators() -> Iterator[Estimator]:
    """What scikit-learn's users bring: with scalers, of two classes and of three, and some that are refused."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.naive_bayes import GaussianNB
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import Normalizer, StandardScaler
    from sklearn.svm import SVC

    for classes in (2, 3):
        yield Estimator("logistic regression", make_pipeline(StandardScaler(), LogisticRegression()), classes)
        yield Estimator("on unit vectors", make_pipeline(Normalizer(), LogisticRegression()), classes)
        yield Estimator("network", make_pipeline(StandardScaler(), MLPClassifier((8,), max_iter=50)), classes)
        yield Estimator("naive Bayes", GaussianNB(), classes)
    # Not of two classes: its converter writes other probabilities than the original gives.
    yield Estimator("discriminant", LinearDiscriminantAnalysis())
    yield Estimator("forest", RandomForestClassifier(3, random_state=0))
    yield Estimator("support vectors", SVC())
    yield Estimator("nearest neighbours", KNeighborsClassifier())


def noise_for_estimators(classes: int) -> tuple[Floats, NDArray[np.int64]]:
    """200 samples of six features; the class is where the first three are largest, counted modulo `classes`."""
    x = np.random.default_rng(0).normal(3.0, 2.0, (200, 6)).astype(np.float32)
    return x, x[:, :3].argmax(axis=1).astype(np.int64) % classes


def export_estimator(estimator: Estimator, path: Path) -> Path:
    """Fit to the noise in place, and write the file."""
    from skl2onnx import to_onnx

    x, y = noise_for_estimators(estimator.classes)
    with _quiet():
        estimator.model.fit(x, y)
        path.write_bytes(to_onnx(estimator.model, x[:1]).SerializeToString())
    return path


def softmax(logits: Floats) -> Floats:
    """Probabilities `(n, classes)`."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True), np.float32)
