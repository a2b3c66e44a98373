"""Proofs by running: a model takes batches of any size, and answers as the file that came in. No files."""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray

from cloud_hub.builder.graphs.onnx_graph import run_for
from cloud_hub.builder.graphs.staged import LOGITS, Shape
from cloud_hub.errors import BuildError
from edge_cascade.backends.onnx import open_whole_model

Floats = NDArray[np.float32]

BATCH_ADVICE = "re-export with a dynamic batch axis (dynamic_axes, or dynamic_shapes with dynamo=True)"


def prove_free_batch(model: onnx.ModelProto, input_shape: Shape) -> None:
    """See that three samples at once give what they give one by one.

    Raises:
        BuildError: when they do not, or give what is no number.
    """
    three = np.random.default_rng(1).random((3, *input_shape), np.float32)
    parts = (three, three[:1], three[1:2], three[2:])
    try:
        together, *single = [run_for(model, part, [LOGITS])[0] for part in parts]
    except BuildError as error:
        raise BuildError(f"runs only on the batch of its export: {BATCH_ADVICE}") from error
    if not all(np.isfinite(values).all() for values in (together, *single)):
        raise BuildError("gives NaN or infinity on samples between 0 and 1: check the exported model")
    if len(together) != 3 or not _is_close(np.concatenate(single), together):
        raise BuildError(f"gives other answers in a batch than alone: {BATCH_ADVICE}")


def prove_same_answers(
    model: onnx.ModelProto, x: Floats, source: str, original: onnx.ModelProto, original_x: Floats
) -> None:
    """Run the model as the hub will, and see that it says of `x` what the original's value `source` says.

    `original_x` are the same samples as the original takes them.

    Raises:
        BuildError: when it does not.
        BundleError, BackendError: when the hub would not run it.
    """
    said = open_whole_model(model.SerializeToString())(x)
    expected = run_for(original, original_x, [source])[0].reshape(len(x), -1)
    if not _answers_alike(said, expected):
        raise BuildError(
            f"its output {source} changed while it was taken in: re-export with opset_version=17"
        )


def _is_close(one: Floats, other: Floats) -> bool:
    scale = max(1e-3, float(np.abs(one).max(initial=0.0)))
    return one.shape == other.shape and bool(np.allclose(one, other, rtol=1e-3, atol=1e-3 * scale))


def _answers_alike(logits: Floats, expected: Floats) -> bool:
    """Whether logits say what the original's logits, probabilities or sigmoids say."""
    if not (np.isfinite(logits).all() and np.isfinite(expected).all()):
        return False
    if expected.shape[1] == 1:  # one sigmoid for two classes
        return _is_close(expected, _sigmoid(logits[:, 1:] - logits[:, :1]))
    powers = np.exp((logits - logits.max(axis=1, keepdims=True)).astype(np.float64))
    softmax = (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)
    return any(_is_close(expected, said) for said in (logits, softmax, _sigmoid(logits)))


def _sigmoid(x: Floats) -> Floats:
    # The other way round, a large negative x would overflow.
    return (0.5 + 0.5 * np.tanh(0.5 * x.astype(np.float64))).astype(np.float32)
