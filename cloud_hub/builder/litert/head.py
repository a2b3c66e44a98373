"""The head's five numbers as TensorFlow Lite operators: `scores.head_of_logits`, for one sample. No I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log

import numpy as np

from cloud_hub.builder.litert.writer import TfliteGraph
from edge_cascade.manifest import STAGE_HEAD
from edge_cascade.scores import HEAD_WIDTH, SMALLEST_PROBABILITY
from edge_cascade.tflite_schema import DTYPES


def add_head(graph: TfliteGraph, logits: int, temperature: int, classes: int) -> int:
    """Append what leads from logits (1, classes) and temperature (1,) to the head (1, 5), the result."""

    def number(value: float) -> int:
        return graph.constant(f"head.{value}", np.array([[value]], np.float32))

    def value(name: str, width: int = 1, dtype: str = "float32") -> int:
        return graph.value(name, (1, width), dtype)

    def apply(
        op: str,
        inputs: Sequence[int],
        name: str,
        width: int = 1,
        options: Mapping[str, float] | None = None,
    ) -> int:
        result = value(name, width)
        graph.add(op, inputs, [result], options)
        return result

    scaled = apply("DIV", [logits, temperature], "head.scaled", classes)
    probabilities = apply("SOFTMAX", [scaled], "head.probabilities", classes, {"beta": 1.0})

    floored = apply("MAXIMUM", [probabilities, number(SMALLEST_PROBABILITY)], "head.floored", classes)
    logs = apply("LOG", [floored], "head.logs", classes)
    terms = apply("MUL", [probabilities, logs], "head.terms", classes)
    axis = graph.constant("head.axis", np.array([1], np.int32))
    total = apply("SUM", [terms, axis], "head.sum", 1, {"keep_dims": True})
    entropy = apply("MUL", [total, number(-1.0 / log(classes))], "head.entropy")

    top, indices = value("head.top", 2), value("head.indices", 2, "int32")
    graph.add("TOPK_V2", [probabilities, graph.constant("head.two", np.array(2, np.int32))], [top, indices])
    split_axis = graph.constant("head.split_axis", np.array(1, np.int32))
    first, second = value("head.first"), value("head.second")
    graph.add("SPLIT", [split_axis, top], [first, second], {"num_splits": 2})
    labels = value("head.labels", 2)
    graph.add("CAST", [indices], [labels], {"in_type": DTYPES["int32"], "out_type": DTYPES["float32"]})
    label, runner_up = value("head.label"), value("head.runner_up")
    graph.add("SPLIT", [split_axis, labels], [label, runner_up], {"num_splits": 2})

    max_prob = apply("SUB", [number(1.0), first], "head.max_prob")
    margin = apply("ADD", [max_prob, second], "head.margin")
    raw = apply("CONCATENATION", [entropy, margin, max_prob], "head.raw_scores", 3, {"axis": 1})
    # Rounding may leave 0..1 by an ulp, and a score above 1 would be refused even by "accept all".
    low = apply("MAXIMUM", [raw, number(0.0)], "head.at_least_zero", 3)
    clipped = apply("MINIMUM", [low, number(1.0)], "head.clipped", 3)
    # Some processors' maximum of NaN and 0 is 0, the score of a certain answer: let NaN in again.
    nothing = apply("SUB", [first, first], "head.zero_or_nan")
    scores = apply("ADD", [clipped, nothing], "head.scores", 3)
    return apply("CONCATENATION", [label, first, scores], STAGE_HEAD, HEAD_WIDTH, {"axis": 1})
