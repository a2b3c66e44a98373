"""A hub whose rollouts run beside four boards: by REST, and by commands beside it."""

import pytest

from cloud_hub.__main__ import main
from cloud_hub.rollouts import settings
from cloud_hub.store.store import Store
from tests.hub.rollouts_fleet import FOUR, Fleet
from tests.hub.test_rest import Api


@pytest.fixture
def fleet(tmp_path):
    with Store(tmp_path) as store:
        yield Fleet(store, FOUR)


@pytest.fixture
def api(fleet):
    api = Api(fleet.store)
    try:
        yield api
    finally:
        api.close()


@pytest.fixture
def command(tmp_path, fleet, capsys, monkeypatch):
    """Runs one, by Ann; what it says, or why it ended with `code`. Every release counts as signed."""
    config = tmp_path / "hub.toml"
    config.write_text(f'[hub]\nstate_dir = "{tmp_path}"\n', encoding="utf-8")
    monkeypatch.setattr(settings, "is_signed_in", lambda state_dir: lambda *_: True)
    monkeypatch.setattr("getpass.getuser", lambda: "ann")

    def call(*words, code=0):
        ended = main([*map(str, words), "--config", str(config)])
        said = capsys.readouterr()
        assert ended == code, said.err
        return said.out if code == 0 else said.err

    return call
