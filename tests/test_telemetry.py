"""onnxruntime must not report to its vendor: not by a setting somebody may forget, but by construction."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

USE_IT = "options = onnxruntime.SessionOptions(); onnxruntime.get_available_providers(); import time; time.sleep(1)"


def files_that_appear(home, code):
    environment = {
        name: value for name, value in os.environ.items() if name in {"PATH", "LANG", "VIRTUAL_ENV"}
    }
    environment |= {"HOME": str(home), "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    assert "CI" not in environment
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=home, check=True, timeout=60)
    return sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file())


def test_nothing_appears_when_our_module_imports_onnxruntime(tmp_path):
    code = "from edge_cascade.backends import onnx; onnxruntime = onnx.onnxruntime; " + USE_IT
    assert files_that_appear(tmp_path, code) == []


def test_a_variable_that_says_otherwise_is_overruled(tmp_path):
    code = (
        "import os; os.environ['ORT_DISABLE_TELEMETRY'] = '0'; "
        "from edge_cascade.backends import onnx; onnxruntime = onnx.onnxruntime; " + USE_IT
    )
    assert files_that_appear(tmp_path, code) == []


def test_control_without_the_variable_files_do_appear(tmp_path):
    files = files_that_appear(tmp_path, "import onnxruntime; " + USE_IT)
    if not files:
        import onnxruntime

        version = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
        assert version < (1, 29), "the control saw no file: the two tests above prove nothing any more"
        pytest.skip("this onnxruntime is older than the reporting")
