"""`cloud-hub round privacy`: the account of a series before anything is started."""

from __future__ import annotations

import json

import pytest

from cloud_hub.__main__ import main
from cloud_hub.federation.account import account_of
from cloud_hub.federation.settings import settings_of

pytest.importorskip("dp_accounting", reason="the account needs the extra privacy")

NOISY = ["--clip-norm", "1", "--noise-multiplier", "4", "--rounds", "3"]


def test_the_account_is_printed_and_said_to_programs_too(capsys):
    assert main(["round", "privacy", "--fleet", "50", *NOISY]) == 0
    text = capsys.readouterr().out
    assert "one update, for the hub" in text
    assert "escalations and audits, which are inputs" in text
    assert main(["round", "privacy", "--fleet", "50", *NOISY, "--json"]) == 0
    spent = json.loads(capsys.readouterr().out)
    assert spent["update"] < spent["device"]
    assert spent["aggregate"] < spent["device"]
    assert spent["noise_std"] == 4.0


def test_a_smaller_quorum_hides_each_board_less():
    def spent(**more):
        given = {"clip_norm": 1.0, "noise_multiplier": 4.0, "rounds": 3, "cohort": 20, **more}
        return account_of(settings_of(given), fleet=50, delta=1e-5).aggregate

    assert spent(quorum=0.2) > spent(quorum=0.9)


@pytest.mark.parametrize(
    ("settings", "hides"),
    [
        ({"min_examples": 16, "max_examples": 2000}, False),
        ({"min_examples": 50, "max_examples": 50}, True),
        ({"strategy": "median", "min_examples": 50, "max_examples": 50}, False),
        ({"strategy": "fedbuff", "max_staleness": 0}, True),
    ],
)
def test_a_vote_that_may_outweigh_all_others_is_hidden_by_its_own_noise_alone(settings, hides):
    given = {"clip_norm": 1.0, "noise_multiplier": 4.0, "rounds": 3, "cohort": 20, **settings}
    spent = account_of(settings_of(given), fleet=50, delta=1e-5)
    assert (spent.aggregate < 0.5 * spent.device) is hides


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--fleet", "50"], "noise_multiplier is 0: without noise"),
        (["--fleet", "0", *NOISY], "a fleet of 0"),
        (["--fleet", "50", "--delta", "2", *NOISY], "delta 2.0 is not in 0..1"),
        (["--fleet", "50", "--encoding", "topk", *NOISY], "error feedback brings back what noise hid"),
    ],
)
def test_an_account_that_cannot_be_made_is_one_line(options, why, capsys):
    assert main(["round", "privacy", *options]) > 0
    said = capsys.readouterr().err
    assert why in said
    assert len(said.strip().splitlines()) == 1
