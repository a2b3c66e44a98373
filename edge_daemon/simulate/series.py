"""One series of rounds in the hub of a virtual fleet: started, watched to its end. Judges nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from edge_daemon.simulate.hub import SimulatedHub
from edge_daemon.simulate.learning import RoundView, round_view

# Enough audits that a holdout comes together within minutes. A fleet at work takes its time.
LEARNING_AUDITS: Final = 0.5
HOLDOUT_SHARE: Final = 0.5
ROUND_SETTINGS: Final[Mapping[str, object]] = {
    "quorum": 0.75,
    "grace_s": 2.0,
    "deadline_s": 60.0,
    "batch_size": 16,
    "min_examples": 8,
    "min_holdout": 50,
}
ROUND_PATIENCE_S: Final = 120.0
DRAFT_PATIENCE_S: Final = 60.0
POLL_S: Final = 0.25

Watch = Callable[[str], None]
"""Where the series stands, in a few words."""


class Series:
    """What the fleet learns, from the start of the series to its draft."""

    def __init__(self, hub: SimulatedHub, model: str, *, rounds: int, devices: int, seed: int) -> None:
        self._hub = hub
        self._model = model
        self._rounds = rounds
        self._settings = {**ROUND_SETTINGS, "rounds": rounds, "cohort": devices, "seed": seed}
        self._number = 0

    def run(self, watch: Watch) -> None:
        """Start it, and wait until no round of it is open any more.

        Raises:
            SimulationError: with the hub's reason not to.
        """
        self._number = self._hub.start_rounds(self._model, self._settings)

        def is_done() -> bool:
            shown = self.shown()
            watch(f"{shown['committed']}/{self._rounds} {shown['phase']}")
            return shown["phase"] not in {"asked", "running"}

        _poll(is_done, ROUND_PATIENCE_S * self._rounds)

    def wait_for_draft(self, watch: Watch) -> None:
        """Until it has its draft, or has said what it still waits for."""

        def is_done() -> bool:
            phase = str(self.shown()["phase"])
            watch(phase)
            return phase != "making"

        _poll(is_done, DRAFT_PATIENCE_S)

    def shown(self) -> dict[str, Any]:
        """The series as the hub shows it now."""
        return self._hub.series(self._number)

    def rounds(self) -> list[RoundView]:
        """Its rounds, the first one first."""
        return [round_view(each) for each in self._hub.rounds(self._number)]

    def draft(self) -> str | None:
        """The id of the bundle that was made of it."""
        release = self.shown()["release"]
        return None if release is None else self._hub.bundle_of_release(release)


def _poll(is_done: Callable[[], bool], patience_s: float) -> None:
    deadline_s = time.monotonic() + patience_s
    while not is_done() and time.monotonic() < deadline_s:
        time.sleep(POLL_S)
