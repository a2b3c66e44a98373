"""The roles that the device's parts play for each other. Adapters name technologies, these name none."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edge_cascade.messages import BaseRequest
from edge_daemon.core.examples import Drawn, ExampleCounts, Origin
from edge_daemon.core.spooling import Batch, DropReason, SpoolCounts, SpoolItem


class Clock(Protocol):
    """Time as an argument: what is measured never uses the wall clock."""

    def monotonic_s(self) -> float:
        """Seconds since some point that does not move."""

    def wall_ms(self) -> int:
        """Milliseconds since 1970 as this board believes."""


class Spool(Protocol):
    """The delivery contract: an accepted item stays until the hub has it or a drop counter has it.

    Every method may be called from any thread. An item is known by `(boot, seq)`; appending it twice stores
    it once. Rows leave a batch one by one: acknowledged, rejected, deferred, or all at once by `release`.
    """

    def append(self, item: SpoolItem) -> Future[None]:
        """Queue an item; never waits for the disk. Done means committed and fsynced, so: accepted.

        The future fails with `SpoolError` when nothing was stored. Its callbacks run on the spool's thread.
        """

    def claim(self, max_items: int, max_bytes: int) -> Batch | None:
        """Take rows of one key in flight: highest priority first, then oldest; one row even if too large.

        None when nothing waits, or as many batches are in flight as may be.

        Raises:
            SpoolError: when the disk does not give the rows.
        """

    def acknowledge(self, boot: bytes, seqs: Sequence[int]) -> None:
        """The hub has these: their rows go. Unknown ones are none of our business any more."""

    def reject(self, boot: bytes, seq: int, reason: DropReason) -> None:
        """Give a row up, counted in the same transaction."""

    def defer(self, boot: bytes, seqs: Sequence[int], delay_s: float) -> None:
        """Put rows back, to be claimed again only after a while."""

    def release(self, token: int) -> None:
        """Put back what is left of a batch: it will be claimed again."""

    def flush(self) -> None:
        """Wait until everything asked so far is on disk, and what has expired is gone.

        Raises:
            SpoolError: when the disk refuses.
        """

    def counts(self) -> SpoolCounts:
        """Where the spool stands; cheap."""

    def on_append(self, wake: Callable[[], None]) -> None:
        """Have `wake` called, on the spool's thread, after each commit that brought new rows."""

    def on_update_gone(self, tell: Callable[[bytes, int, DropReason | None], None]) -> None:
        """Have `tell` called, on the spool's thread, for each client update whose row is gone from the disk.

        With its `boot` and `seq`, and None where the hub has it, else the reason of the drop. A file that
        was damaged tells of nothing; nor does a crash between the commit and the call.
        """


class Examples(Protocol):
    """What this board may learn from. Any thread may ask."""

    def draw(self, model: str, max_examples: int, *, least: Origin = Origin.SELF) -> Drawn:
        """At most so many examples, balanced over the classes, with labels of origin `least` or better.

        Waits for the store's thread. Empty where there are none, or the disk does not give them.
        """

    def counts(self) -> ExampleCounts:
        """Where the store stood a moment ago; cheap."""


class Uplink(Protocol):
    """The way to the hub. Loses nothing by itself: what it sends stays in the spool until acknowledged."""

    def start(self) -> None:
        """Begin connecting and sending; does not wait and does not fail because the hub is away."""

    def stop(self, drain_s: float) -> None:
        """Send what waits for at most `drain_s`, say goodbye, end."""

    def announce(self) -> None:
        """Publish the retained status again: a model was swapped."""

    def ask_for_base(self, request: BaseRequest) -> None:
        """Ask the hub for a training base, once; whoever wants it asks again."""

    @property
    def is_up(self) -> bool:
        """Whether the broker is there."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A bundle to be fetched: digests as lower-case hex; `size_bytes` is what it takes on disk."""

    model: str
    release: str
    bundle: str
    graph: str
    weights: str
    size_bytes: int


class ReleaseSource(Protocol):
    """Where bundles come from, and who says that they are to be believed. Called from one thread a model."""

    def fetch(self, wanted: Wanted, held: Sequence[Path], stop: threading.Event) -> None:
        """Block until the bundle's files are in the store, fsynced; tries again while the network is away.

        `held` are the directories of bundles on disk: what they have of the wanted one is not fetched again.

        Raises:
            RefusedError: what came contradicts what is signed, or nobody who may has signed it.
            StoppedError: `stop` was set.
        """

    def verify(self, wanted: Wanted) -> None:
        """Check what is on disk: signatures, digests, bounds, that it loads and fits this board's model.

        Raises:
            RefusedError: with `Failure.INTEGRITY` for what will be wrong tomorrow too.
        """
