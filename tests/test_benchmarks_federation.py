"""The federation benchmark runs from end to end on random data."""

from __future__ import annotations

import sys

import msgspec
import pytest

from benchmarks.federation.__main__ import PARTS, main


@pytest.mark.parametrize("part", PARTS)
def test_every_part_runs_without_data(part, monkeypatch, tmp_path, capsys):
    file = tmp_path / "figures.json"
    monkeypatch.setattr(
        sys,
        "argv",
        ["federation", "--quick", "--processes", "1", "--only", part, "--json", str(file)],
    )
    main()
    assert part in msgspec.json.decode(file.read_bytes())["figures"]
    assert capsys.readouterr().out
