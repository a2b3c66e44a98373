"""How long one turn of the hub's rollouts takes when a whole fleet has something to say.

    python -m benchmarks.rollout.turns [--boards N ...] [--rounds N] [--json FILE]

A rollout with one wave for all, on a store of its own (SQLite in a temporary directory), and a broker that takes
everything at once. `offered`: the wave opens, and every board is there. `quiet`: nothing happens. `go`: every
second board goes. `reported`: every board says that it runs the release. `taken back`: somebody halts it.
Milliseconds of the wall clock, of ten turns; the longest of them in brackets.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from sqlalchemy import Connection, insert, update

from benchmarks.harness import machine_line, parse_options, print_table, write_json
from cloud_hub.core.rollout.findings import Health
from cloud_hub.core.rollout.judge import Pairs
from cloud_hub.core.rollout.state import RolloutState
from cloud_hub.core.rollout.waves import Wave
from cloud_hub.rollouts.orders import order
from cloud_hub.rollouts.runner import RolloutRunner
from cloud_hub.rollouts.start import start_rollout
from cloud_hub.store import schema
from cloud_hub.store.store import Store

BOARDS: Final = (100, 1000, 4000)
ROUNDS: Final = 3
RELEASE: Final = 5
MODEL: Final = "pump"
WAVES: Final = (Wave("all", share=1.0, soak_s=1e6),)
TURNS: Final = 10
"""Enough for 5,000 boards: 500 that come or go are heard a turn."""

Figures = dict[str, list[tuple[float, float]]]


class NoEvidence:
    """Nothing was seen yet; implements `cloud_hub.rollouts.ports.Evidence`."""

    def pairs(self, rollout: RolloutState, *, cases_after: int, scenes_after: int) -> tuple[Pairs, Pairs]:
        """No pair."""
        return Pairs(), Pairs()

    def health(self, rollout: RolloutState, now_s: float) -> Health:
        """No finding."""
        return Health(())


class Site:
    """A hub's store and rollouts, and the rows of so many boards."""

    def __init__(self, store: Store, boards: int) -> None:
        self._store = store
        self._names = [f"board-{number:05}" for number in range(boards)]
        self._now_s = 1e9
        seen = {"first_seen_ms": 1, "last_seen_ms": 1, "online": True}
        self._write(
            lambda c: c.execute(insert(schema.devices), [{"name": name, **seen} for name in self._names])
        )
        release = {
            "id": RELEASE, "model": MODEL, "bundle": bytes(32), "graph": bytes(32), "weights": bytes(32),
            "state": "draft", "lineage": "{}", "figures": "{}", "created_at_ms": 1, "created_by": "bench",
        }  # fmt: skip
        self._write(lambda c: c.execute(insert(schema.releases).values(release)))
        self._runner = RolloutRunner(
            store,
            lambda topic, payload, retain=False: 1,
            NoEvidence,
            prefix="edge",
            clock_s=lambda: self._now_s,
        )

    def measure(self, figures: Figures) -> None:
        """One rollout from its start to its halt."""
        rollout = self._store.database.run(
            lambda c: start_rollout(
                c,
                RELEASE,
                by="bench",
                now_ms=round(self._now_s * 1000),
                is_signed=lambda *_: True,
                waves=WAVES,
            )
        )
        figures["offered"].append(self._turns())
        figures["quiet"].append(self._turns())
        self._set_half_offline()
        figures["go"].append(self._turns())
        self._report()
        figures["reported"].append(self._turns())
        halted_ms = round(self._now_s * 1000)
        self._write(lambda c: order(c, rollout, "halt", by="bench", now_ms=halted_ms))
        figures["taken back"].append(self._turns())
        self._runner.stop()

    def _turns(self) -> tuple[float, float]:
        """Turns until everything is heard: all of them, and the longest."""
        took = []
        for _ in range(TURNS):
            self._now_s += 1.0
            began = time.perf_counter()
            self._runner.take_turn()
            took.append(1000 * (time.perf_counter() - began))
        return sum(took), max(took)

    def _set_half_offline(self) -> None:
        table = schema.devices
        half = table.c.name.in_(self._names[::2])
        self._write(lambda c: c.execute(update(table).where(half).values(online=False)))

    def _report(self) -> None:
        rows = [
            {
                "device": name, "boot": bytes(8), "seq": 1, "model": MODEL, "release": str(RELEASE),
                "bundle": bytes(32), "serving": bytes(32), "failure": "", "detail": "", "taken_at_ms": 1,
                "received_at_ms": 1,
            }
            for name in self._names
        ]  # fmt: skip
        self._write(lambda c: c.execute(insert(schema.swap_reports), rows))

    def _write(self, work: Callable[[Connection], object]) -> None:
        self._store.database.run(work)


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollout.turns")
    parser.add_argument("--boards", type=int, nargs="+", default=BOARDS, metavar="N")
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS, help="fleets of each size (default %(default)s)"
    )
    options = parse_options(parser)
    print(machine_line())
    found = {boards: _measure(boards, options.rounds) for boards in options.boards}
    names = list(found[options.boards[0]])
    print_table(
        "Ten turns, ms (the longest of them); medians of the rounds",
        ("boards", *names),
        [(str(boards), *(_shown(figures[name]) for name in names)) for boards, figures in found.items()],
    )
    write_json(options.json, found)


def _measure(boards: int, rounds: int) -> Figures:
    figures: Figures = defaultdict(list)
    for _ in range(rounds):
        with TemporaryDirectory() as directory, Store(Path(directory)) as store:
            Site(store, boards).measure(figures)
    return dict(figures)


def _shown(measured: list[tuple[float, float]]) -> str:
    total, longest = sorted(measured)[len(measured) // 2]
    return f"{total:,.0f} ({longest:,.0f})"


if __name__ == "__main__":
    main()
