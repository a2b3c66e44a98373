import pytest


@pytest.fixture(autouse=True, scope="session")
def steady_times():
    """The card's times, the one thing in a build that a clock decides, are the same in every build."""
    try:
        import cloud_hub.builder.build as building
    except ImportError:
        yield  # without the packages that a build needs nothing is built
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            building,
            "measure_stages",
            lambda stages, x, *, seconds: {key: 10.0 + key[0] for key in stages.models},
        )
        yield
