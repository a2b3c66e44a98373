import pytest

from tests.faults.loop import Loop


@pytest.fixture(scope="package")
def whole_loop(tmp_path_factory, tiny_model_dir):
    """One loop for the whole folder: starting processes is what takes the time."""
    loop = Loop(tmp_path_factory.mktemp("loop"), tiny_model_dir)
    try:
        loop.start()
        loop.sensor.start()
        yield loop
    finally:
        loop.stop()


@pytest.fixture
def loop(whole_loop):
    """The loop with brokers, hub and sensor up, whatever the test before did to them."""
    whole_loop.start()
    yield whole_loop
    assert whole_loop.tracebacks() == []


@pytest.fixture
def running_loop(loop):
    """The loop with its device up as well."""
    if not loop.device.program.is_running:
        loop.device.start()
    loop.device.wait_ready()
    return loop


@pytest.fixture
def idle_loop(loop):
    """The loop without its device, for tests that bring one of their own."""
    loop.device.stop()
    return loop
