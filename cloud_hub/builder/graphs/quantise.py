"""Turns the whole multi-exit graph into int8 in one piece: stage by stage, accuracy is lost at the cuts.

Static QDQ, weights in int8 per output channel, activations in uint8 (Jacob et al. 2018, arXiv 1712.05877).
Heads stay float32: they are a small part of the work, and eight bits of logits would leave the scores some
hundred values to choose a threshold from.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

# Imported for its effect: it sets what must be set before the first import of onnxruntime.
import edge_cascade.backends.onnx  # noqa: F401
from cloud_hub.builder.graphs.staged import INPUT, StagedGraph, is_head_node

_BATCH = 64


def quantise(staged: StagedGraph, representative: NDArray[np.float32]) -> StagedGraph:
    """The QDQ form of a graph, its ranges read off normalised inputs `(n, *shape)`.

    Values keep their names; an initializer `w` becomes `w_quantized`, `w_scale`, `w_zero_point`.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    source = onnx.ModelProto()
    source.CopyFrom(staged.model)
    # Says that there is nothing to fuse beforehand, which the library otherwise warns about.
    onnx.helper.set_model_props(source, {"onnx.quant.pre_process": "onnxruntime.quant"})
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory) / "int8.onnx"
        quantize_static(
            source,
            target,
            _reader(representative),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            # Not QInt8: x86 builds fuse unsigned activations only, and make signed ones unsigned only where
            # one node reads them. At a cut two do, and the convolution before it would run in float.
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=[node.name for node in staged.model.graph.node if is_head_node(node)],
        )
        return replace(staged, model=onnx.load(target))


def _reader(representative: NDArray[np.float32]) -> object:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # untyped base
        def __init__(self) -> None:
            starts = range(0, len(representative), _BATCH)
            self._batches = iter([{INPUT: representative[start : start + _BATCH]} for start in starts])

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            return next(self._batches, None)

    return Reader()
