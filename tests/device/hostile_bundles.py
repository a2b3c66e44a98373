"""Bundles that the strict walk lets pass and that do harm once a runtime has them: whole, and valid in every digest."""

import hashlib
import shutil

import msgspec
import onnx
from onnx import TensorProto, helper

LARGE = 3 * 2**28
"""Float32 values: three gigabytes."""


def eats_memory(given):
    """Three gigabytes of zeros, made of two numbers: every board has its limit below that."""
    return [_integers("bad/shape", [LARGE])], [
        helper.make_node("Expand", ["bad/zero", "bad/shape"], ["bad/large"]),
        helper.make_node("ReduceSum", ["bad/large"], ["bad/sum"], keepdims=0),
        helper.make_node("Add", [given, "bad/sum"], ["bad/given"]),
    ]


def never_ends(given, *, size=2**18, rounds=4000):
    """Products of constants, which the runtime computes before it has a session; each leaves little behind."""
    shapes = [_integers("bad/wide", [64, size]), _integers("bad/long", [size, 64])]
    nodes = [
        helper.make_node("Expand", ["bad/zero", "bad/wide"], ["bad/a"]),
        helper.make_node("Expand", ["bad/zero", "bad/long"], ["bad/b"]),
        helper.make_node("Gemm", ["bad/a", "bad/b"], ["bad/x0"]),
    ]
    for number in range(rounds):
        nodes += [
            # No two are the same: those are computed once.
            helper.make_node("Gemm", ["bad/a", "bad/b"], [f"bad/p{number}"], alpha=2.0 + number),
            helper.make_node("Add", [f"bad/x{number}", f"bad/p{number}"], [f"bad/x{number + 1}"]),
        ]
    return shapes, [
        *nodes,
        helper.make_node("ReduceSum", [f"bad/x{rounds}"], ["bad/sum"], keepdims=0),
        helper.make_node("Add", [given, "bad/sum"], ["bad/given"]),
    ]


def make_hostile(bundle, out, harm):
    """A copy of a bundle's directory whose first stage, in both precisions, begins with `harm`."""
    shutil.copytree(bundle, out)
    manifest = out / "graph" / "manifest.json"
    graph = msgspec.json.decode(manifest.read_bytes())
    for name in graph["stages"][0]["files"].values():
        content = _harmed((out / "graph" / name).read_bytes(), harm)
        (out / "graph" / name).write_bytes(content)
        graph["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}
    manifest.write_bytes(msgspec.json.encode(graph))
    weights = msgspec.json.decode((out / "weights" / "manifest.json").read_bytes())
    weights["graph_sha256"] = hashlib.sha256(manifest.read_bytes()).hexdigest()
    (out / "weights" / "manifest.json").write_bytes(msgspec.json.encode(weights))
    return out


def _harmed(model, harm):
    loaded = onnx.load_from_string(model)
    graph = loaded.graph
    given = graph.input[0].name
    shapes, nodes = harm(given)
    zero = helper.make_tensor("bad/zero", TensorProto.FLOAT, [1], [0.0])
    graph.initializer.extend([zero, *shapes])
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name == given:
                node.input[index] = "bad/given"
    nodes += list(graph.node)
    del graph.node[:]
    graph.node.extend(nodes)
    return loaded.SerializeToString(deterministic=True)


def _integers(name, values):
    return helper.make_tensor(name, TensorProto.INT64, [len(values)], values)
