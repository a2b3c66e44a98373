"""Imports point one way; what is said here is what docs/architecture.md draws."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PURE = {"edge_daemon/core", "cloud_hub/core"}
# Modules that state rules: values in, values out.
PURE_FILES = [
    *(f"edge_cascade/{name}.py" for name in ("codec", "delta_payloads", "deltas", "gate", "messages", "packing", "policy", "scores", "tensors", "topics")),
    "edge_daemon/audit.py",
]  # fmt: skip
NOT_IN_CORE = {
    "asyncio",
    "logging",
    "time",
    "random",
    "pathlib",
    "os",
    "socket",
    "threading",
    "sqlite3",
    "paho",
}


def imports_of(path):
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def top_level_imports_of(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names} | {
        node.module for node in tree.body if isinstance(node, ast.ImportFrom)
    }


def modules(*folders):
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert found, f"nothing in {folders}: the test would pass on an empty tree"
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in found]


def belongs(module, package):
    return module == package or module.startswith(package + ".")


@pytest.mark.parametrize("path", modules("edge_cascade"))
def test_what_both_halves_share_knows_neither(path):
    assert not [
        name for name in imports_of(path) if belongs(name, "edge_daemon") or belongs(name, "cloud_hub")
    ]


@pytest.mark.parametrize("path", modules("cloud_hub"))
def test_the_hub_never_imports_the_device(path):
    assert not [name for name in imports_of(path) if belongs(name, "edge_daemon")]


@pytest.mark.parametrize("path", modules("cloud_hub"))
def test_only_the_composition_roots_import_the_rest_interface(path):
    name = str(path.relative_to(ROOT / "cloud_hub"))
    if not name.startswith("admin/") and name not in {"hub.py", "__main__.py"}:
        assert not [module for module in imports_of(path) if belongs(module, "cloud_hub.admin")]


@pytest.mark.parametrize("path", modules("edge_daemon"))
def test_the_device_never_imports_the_hub_except_lazily_in_simulate(path):
    in_simulate = path.is_relative_to(ROOT / "edge_daemon/simulate")
    names = top_level_imports_of(path) if in_simulate else imports_of(path)
    assert not [name for name in names if belongs(name, "cloud_hub")]


@pytest.mark.parametrize("path", [*modules("edge_daemon/core", "cloud_hub/core"), *PURE_FILES])
def test_core_has_no_clock_files_threads_logging_or_global_chance(path):
    path = ROOT / path
    names = imports_of(path)
    allowed = (
        {"random"} if path.name in {"audit.py", "rounds.py", "sending.py"} else set()
    )  # a Random is an argument there
    assert not [name for name in names if name.split(".")[0] in NOT_IN_CORE - allowed]
    assert "async def" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", modules("edge_daemon/core", "cloud_hub/core"))
def test_core_imports_only_core_and_what_is_shared(path):
    own = path.relative_to(ROOT).parts[0]
    foreign = [name for name in imports_of(path) if belongs(name, own) and not belongs(name, f"{own}.core")]
    assert not foreign


@pytest.mark.parametrize("path", modules("edge_cascade", "edge_daemon", "cloud_hub"))
def test_only_the_backend_and_the_builders_graph_tools_import_onnxruntime(path):
    allowed = {
        "edge_cascade/backends/onnx.py",
        "cloud_hub/builder/graphs/quantise.py",
        "cloud_hub/builder/graphs/onnx_graph.py",
    }
    if str(path.relative_to(ROOT)) not in allowed:
        assert not [name for name in imports_of(path) if belongs(name, "onnxruntime")]


@pytest.mark.parametrize("path", modules("edge_cascade", "edge_daemon", "cloud_hub"))
def test_torch_and_onnx_stay_in_the_builder_and_pickle_stays_out(path):
    names = imports_of(path)
    assert not [
        name for name in names if name.split(".")[0] in {"pickle", "dill", "joblib", "marshal", "shelve"}
    ]
    if not path.is_relative_to(ROOT / "cloud_hub/builder"):
        assert not [name for name in names if name.split(".")[0] in {"torch", "onnx", "sklearn"}]


@pytest.mark.parametrize("path", modules("edge_daemon"))
def test_only_the_composition_roots_name_every_adapter(path):
    roots = {"daemon.py", "service.py", "__main__.py"}
    if path.name in roots or path.is_relative_to(ROOT / "edge_daemon/simulate"):
        return
    names = imports_of(path)
    assert not [name for name in names if belongs(name, "edge_daemon.daemon")]
    if path.name in {"pipeline.py", "inference.py"}:
        assert not [
            name
            for name in names
            if belongs(name, "edge_daemon.spool")
            or belongs(name, "edge_daemon.uplink")
            or belongs(name, "sqlite3")
        ]
