"""Makes a network slower and nothing else, for rehearsals of releases that are."""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

PIECE = 32
"""Elements of the input that the detour begins with; a network's input has at least so many."""


def with_detour(model: bytes, *, size: int, rounds: int) -> bytes:
    """The graph with its input sent through `rounds` products of `size` x `size` matrices and then unchanged.

    `size` is a multiple of `PIECE`. What the detour computes is multiplied by zero and added to the input.
    """
    loaded = onnx.load_from_string(model)
    graph = loaded.graph
    given = graph.input[0].name

    def integers(name: str, values: list[int]) -> str:
        graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, [len(values)], values))
        return name

    flat, axis = integers("slow/flat", [1, -1]), integers("slow/axis", [1])
    first, last = integers("slow/first", [0]), integers("slow/last", [PIECE])
    column, row = integers("slow/column", [size, 1]), integers("slow/row", [1, size])
    graph.initializer.append(helper.make_tensor("slow/nothing", TensorProto.FLOAT, [], [0.0]))
    nodes = [
        helper.make_node("Reshape", [given, flat], ["slow/all"]),
        helper.make_node("Slice", ["slow/all", first, last, axis], ["slow/raw"]),
        # Whatever comes in, nothing may grow beyond a float from here on.
        helper.make_node("Tanh", ["slow/raw"], ["slow/piece"]),
        helper.make_node("Concat", ["slow/piece"] * (size // PIECE), ["slow/long"], axis=1),
        helper.make_node("Reshape", ["slow/long", column], ["slow/columns"]),
        helper.make_node("Reshape", ["slow/long", row], ["slow/rows"]),
        helper.make_node("MatMul", ["slow/columns", "slow/rows"], ["slow/product"]),
        helper.make_node("Softmax", ["slow/product"], ["slow/x0"], axis=1),
    ]
    for number in range(rounds):
        here, product, there = f"slow/x{number}", f"slow/p{number}", f"slow/x{number + 1}"
        nodes += [
            helper.make_node("MatMul", [here, here], [product]),
            helper.make_node("Softmax", [product], [there], axis=1),
        ]
    nodes += [
        helper.make_node("ReduceMean", [f"slow/x{rounds}"], ["slow/mean"], keepdims=0),
        helper.make_node("Mul", ["slow/mean", "slow/nothing"], ["slow/zero"]),
        helper.make_node("Add", [given, "slow/zero"], ["slow/given"]),
    ]
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name == given:
                node.input[index] = "slow/given"
    nodes += list(graph.node)
    del graph.node[:]
    graph.node.extend(nodes)
    content: bytes = loaded.SerializeToString(deterministic=True)
    return content
