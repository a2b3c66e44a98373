import pytest
from hypothesis import settings

from edge_cascade.bundle import load_bundle
from tests import bundles

# The same examples at every run, and as long as they take on a busy machine.
settings.register_profile("edge-daemon", derandomize=True, deadline=None, database=None)
settings.load_profile("edge-daemon")


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory):
    """A 1-D model: `bundle/` and `full.onnx`. Not to be changed."""
    return bundles.build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_bundle(tiny_model_dir):
    return load_bundle(tiny_model_dir / "bundle")


@pytest.fixture(scope="session")
def images_bundle(tmp_path_factory):
    """A 2-D model."""
    return load_bundle(
        bundles.build(tmp_path_factory.mktemp("images"), dimensions=2, model="images") / "bundle"
    )
