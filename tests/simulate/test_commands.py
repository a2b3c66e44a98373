"""What a simulation prints."""

from __future__ import annotations

import io

from rich.console import Console

from edge_daemon.simulate.commands import _print_learning
from edge_daemon.simulate.learning import LearningReport, RoundView, Worth


def test_the_rounds_of_a_fleet_fit_into_a_narrow_terminal():
    rounds = [
        RoundView(1, "committed", "", 20, 20, 19, 0, {}, 148_401, 18_444, 0.864, 0.892),
        RoundView(2, "rolled_back", "worse at exit 1", 20, 20, 20, 0, {}, 84_010, 9_112, 0.892, 0.852),
    ]
    worth = Worth(edge=0.8, upload_share=0.2, cascade=0.9, loss=0.01)
    learning = LearningReport("done", "", rounds, 2000, [0.78, 0.7], [0.8, 0.9], worth, "ab" * 32, worth)
    written = io.StringIO()
    _print_learning(Console(file=written, width=60), learning)
    lines = written.getvalue().splitlines()
    assert "…" not in written.getvalue()
    assert max(map(len, lines)) <= 60
    first = next(line for line in lines if line.lstrip().startswith("1 "))
    assert first.split() == ["1", "20", "19", "148,401", "18,444", "86.4%", "->", "committed"]
