"""`edge-daemon history` and `edge-daemon revert`, as somebody at the board types them."""

import pytest

from edge_daemon.__main__ import main
from edge_daemon.core.swap_state import SwapState
from edge_daemon.errors import EXIT_OK, ReleaseError
from edge_daemon.releases.history import HISTORY_FILE, Entry, note
from edge_daemon.releases.state_file import Kept, save_state
from edge_daemon.releases.swapper import REVERT_FILE

MORNING_MS = 1_900_000_000_000
OLD, NEW = "ab" * 32, "cd" * 32


@pytest.fixture
def board(tmp_path):
    """A board's configuration and where its releases are."""
    config = tmp_path / "edge.toml"
    config.write_text(
        f'[device]\nid = "board"\nstate_dir = "{tmp_path / "state"}"\n'
        '[[models]]\nbundle = "digits"\n[[inlet.sources]]\ntopic = "s/{sensor}"\n',
        encoding="utf-8",
    )
    return config, tmp_path / "state" / "releases"


def took(releases, model, *entries):
    """A model that releases were taken for."""
    save_state(releases / model, Kept(SwapState(NEW, release="r1", previous=OLD)))
    for entry in entries:
        note(releases / model, entry)


def run(config, *arguments):
    command, *rest = arguments
    return main([command, "--config", str(config), *rest])


def test_history_says_what_became_of_every_release_the_oldest_first(board, capsys):
    config, releases = board
    took(
        releases,
        "digits",
        Entry(MORNING_MS, 10.0, "attempted", "r1", NEW),
        Entry(MORNING_MS + 61_000, 71.0, "committed", "r1", NEW, "200 samples"),
    )
    took(releases, "vibration", Entry(MORNING_MS, 5.0, "reverted: golden", "r2", OLD, "fp32 deviates"))
    assert run(config, "history") == EXIT_OK
    assert capsys.readouterr().out.splitlines() == [
        "2030-03-17T17:46:40Z  digits  attempted  release r1  cdcdcdcdcdcd",
        "2030-03-17T17:47:41Z  digits  committed  release r1  cdcdcdcdcdcd  200 samples",
        "2030-03-17T17:46:40Z  vibration  reverted: golden  release r2  abababababab  fp32 deviates",
    ]


def test_history_of_one_model_leaves_out_the_others(board, capsys):
    config, releases = board
    took(releases, "digits", Entry(MORNING_MS, 10.0, "committed", "r1", NEW))
    took(releases, "vibration", Entry(MORNING_MS, 5.0, "committed", "r2", OLD))
    assert run(config, "history", "--model", "vibration") == EXIT_OK
    assert [line.split("  ")[1] for line in capsys.readouterr().out.splitlines()] == ["vibration"]


def test_history_of_a_board_that_has_taken_none_is_empty(board, capsys):
    assert run(board[0], "history") == EXIT_OK
    assert capsys.readouterr().out == ""


def test_history_leaves_out_a_line_that_a_power_cut_has_damaged(board, capsys):
    config, releases = board
    took(releases, "digits", Entry(MORNING_MS, 10.0, "committed", "r1", NEW))
    with (releases / "digits" / HISTORY_FILE).open("ab") as file:
        file.write(b'{"at_ms": 12\n')
    assert run(config, "history") == EXIT_OK
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_revert_asks_the_running_daemon_and_may_be_said_again(board, capsys):
    config, releases = board
    took(releases, "digits")
    for _ in range(2):
        assert run(config, "revert") == EXIT_OK
        assert "digits: asked" in capsys.readouterr().out
    assert (releases / "digits" / REVERT_FILE).is_file()


def test_revert_wants_to_know_which_of_several_models_goes_back(board, capsys):
    config, releases = board
    took(releases, "digits")
    took(releases, "vibration")
    assert run(config, "revert") == ReleaseError.exit_code
    assert capsys.readouterr().err == (
        "edge-daemon: --model: say which one goes back; releases were taken for: digits, vibration\n"
    )
    assert run(config, "revert", "--model", "vibration") == EXIT_OK
    assert not (releases / "digits" / REVERT_FILE).exists()
    assert (releases / "vibration" / REVERT_FILE).exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("revert",), "--model: say which one goes back; releases were taken for: none"),
        (("revert", "--model", "x"), "--model: 'x' has taken no release here; there are: none"),
        (("history", "--model", "../x"), "--model: '../x' has taken no release here; there are: none"),
    ],
)
def test_what_took_no_release_is_named(board, capsys, arguments, said):
    assert run(board[0], *arguments) == ReleaseError.exit_code
    assert capsys.readouterr().err == f"edge-daemon: {said}\n"


def test_revert_that_cannot_be_written_down_says_why(board, capsys):
    config, releases = board
    took(releases, "digits")
    (releases / "digits" / REVERT_FILE).symlink_to(releases / "gone" / "elsewhere")
    assert run(config, "revert") == ReleaseError.exit_code
    assert capsys.readouterr().err.endswith("No such file or directory; run it as the daemon's user\n")
