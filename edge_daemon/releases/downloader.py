"""A `ReleaseSource` over the hub's files: manifests first, then each file by digest.

A part's digest is that of its manifest, which TUF signs (see `trust`); the manifest holds the digest and
length of every file. So a file may come from a bundle that is on disk, as a difference against one, or from
the hub in pieces over days: it counts when its digest is right. What was fetched of a file survives a power
cut, and goes on by Range where the hub's file still has the same strong ETag.

The network is never at fault for good: whatever fails on the way is tried again with full jitter, and at once
when somebody exchanges the token or the authority. A file that the hub does not have, and minutes later
neither, ends the attempt. A hub that does not let this board in is named again and again, for until somebody
acts the board gets nothing. Content that has the digest that was
signed and is wrong nevertheless is `Failure.INTEGRITY`.
"""

from __future__ import annotations

import errno
import logging
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from edge_cascade.bundle import GRAPH, WEIGHTS, Bundle, load_bundle
from edge_cascade.durable import crash_point
from edge_cascade.errors import BundleError
from edge_cascade.manifest import GraphManifest
from edge_cascade.pauses import Pause, no_pause
from edge_daemon.config import ReleasesConfig
from edge_daemon.core.swap_events import Failure
from edge_daemon.errors import RefusedError, ReleaseError, StoppedError
from edge_daemon.ports import Clock, Wanted
from edge_daemon.releases.bundle_store import BundleStore
from edge_daemon.releases.content import bounds_problems_of, check_part, is_intact
from edge_daemon.releases.growing_file import PausedError
from edge_daemon.releases.http_fetch import (
    FileMark,
    HttpFleet,
    StatusError,
    UnreachableError,
    Wait,
    parse_address,
)
from edge_daemon.releases.limits import Hours, next_opening_s, parse_hours
from edge_daemon.releases.part_fetch import CutDifferenceError, PartFetch
from edge_daemon.releases.tries import Tries
from edge_daemon.releases.trust import Trust, read_root

log = logging.getLogger(__name__)

TRUST: Final = ".trust"
"""Beside the models: no model can have this name."""
LOOK_S: Final = 5.0
"""How often it is looked whether somebody has exchanged token or authority."""
CUTS_BEFORE_FILE: Final = 3
"""Tries for a difference that brought nothing; then the whole file is fetched."""


class Downloader:
    """Fetches and verifies bundles, on one thread a model. Does nothing until asked."""

    def __init__(
        self,
        store: BundleStore,
        trust: Trust,
        fleet: HttpFleet,
        *,
        shipped: Mapping[str, Bundle],
        wait: Wait,
        rng: random.Random,
        clock: Clock,
        jitter_s: float = 0.0,
        hours: Hours | None = None,
        day_s: Callable[[], float] = lambda: 0.0,
        pause: Pause = no_pause,
    ) -> None:
        """`day_s` says how many seconds the local day is old, for `hours`; `shipped` are the models' own.
        `pause` comes between pieces of work that answers would feel.
        """
        self._store = store
        self._trust = trust
        self._fleet = fleet
        self._shipped = shipped
        self._wait = wait
        self._rng = rng
        self._clock = clock
        self._jitter_s = jitter_s
        self._hours = hours
        self._day_s = day_s
        self._rest = pause
        self._denied: dict[str, str] = {}
        """By model, what the hub said last to a board that it does not let in."""

    @property
    def problem(self) -> str:
        """Why nothing can be fetched until somebody acts; empty while nothing is known to be so."""
        return next(iter(self._denied.copy().values()), "")

    def fetch(self, wanted: Wanted, held: Sequence[Path], stop: threading.Event) -> None:
        """See `ports.ReleaseSource`."""
        try:
            self._fetch(wanted, held, stop)
        finally:
            self._denied.pop(wanted.model, None)

    def _fetch(self, wanted: Wanted, held: Sequence[Path], stop: threading.Event) -> None:
        # So that a fleet that hears of a release at once does not come for it at once.
        self._pause(self._rng.uniform(0.0, self._jitter_s), stop)
        tries, cuts = Tries(), 0
        while True:
            self._wait_for_hours(stop)
            before, shown = self._fleet.bytes_received, self._fleet.credentials()
            try:
                self._fetch_once(wanted, held, stop, takes_differences=cuts < CUTS_BEFORE_FILE)
            except PausedError:
                continue
            except (UnreachableError, StatusError) as error:
                cuts += isinstance(error, CutDifferenceError)
                has_come = self._fleet.bytes_received > before
                now_s = self._clock.monotonic_s()
                following = tries.after(error, has_come=has_come, now_s=now_s, rng=self._rng)
            except OSError as error:
                raise _disk_failure(error) from error
            else:
                return
            if following.is_denied:
                self._denied[wanted.model] = following.told
            level = logging.WARNING if following.is_news else logging.DEBUG
            log.log(level, "release=%s next_try_s=%.0f %s", wanted.release, following.delay_s, following.told)
            if self._wait_for_try(following.delay_s, shown, stop):
                tries = Tries()

    def verify(self, wanted: Wanted) -> None:
        """See `ports.ReleaseSource`.

        The signatures of a bundle that was proven here before are not asked for again: a board must be able
        to go back to what ran, whatever has expired or was withdrawn since.
        """
        try:
            self._verify(wanted)
        except OSError as error:
            raise _disk_failure(error) from error
        crash_point("verify.done")

    def _verify(self, wanted: Wanted) -> None:
        directory = self._store.directory_of(wanted.model, wanted.bundle)
        is_proven = self._store.is_proven(wanted.model, wanted.bundle)
        authorised = None
        if not is_proven:
            authorised = self._trust.authorise_from_disk(
                wanted.model, wanted.release, wanted.graph, wanted.weights
            )
        try:
            bundle = load_bundle(directory, pause=self._rest)
        except BundleError as error:
            raise RefusedError(Failure.INTEGRITY, str(error)) from error
        if (bundle.bundle_id, bundle.graph_sha256, bundle.weights_sha256) != (
            wanted.bundle,
            wanted.graph,
            wanted.weights,
        ):
            raise RefusedError(Failure.INTEGRITY, f"{directory}: its parts are not those that are wanted")
        problems = _misfits(bundle.graph, wanted.model, self._shipped.get(wanted.model))
        if authorised is not None and authorised.is_online_only:
            problems += bounds_problems_of(bundle, directory, authorised.norms)
        if problems:
            raise RefusedError(Failure.INTEGRITY, "; ".join(problems))
        if not is_proven:
            self._store.prove(wanted.model, wanted.bundle)

    def _fetch_once(
        self, wanted: Wanted, held: Sequence[Path], stop: threading.Event, *, takes_differences: bool
    ) -> None:
        authorised = self._trust.authorise(wanted.model, wanted.release, wanted.graph, wanted.weights, stop)
        self._denied.pop(wanted.model, None)
        if self._store.has(wanted.model, wanted.bundle):
            directory = self._store.directory_of(wanted.model, wanted.bundle)
            if is_intact(directory, wanted):
                return
            log.warning("release=%s the copy on disk is damaged: fetched again", wanted.release)
            self._store.drop(wanted.model, wanted.bundle)
        part = self._store.begin(wanted.model, wanted.bundle)
        fetch = PartFetch(
            self._fleet, part, held, stop=stop, is_open=self._is_open, takes_differences=takes_differences
        )
        graph = check_part(fetch.manifest(GRAPH, wanted.graph, authorised.graph_size), GRAPH)
        weights = check_part(fetch.manifest(WEIGHTS, wanted.weights, authorised.weights_size), WEIGHTS)
        size_bytes = sum(entry.size_bytes for files in (graph, weights) for entry in files.values())
        if size_bytes > wanted.size_bytes:
            raise RefusedError(
                Failure.DOWNLOAD,
                f"release {wanted.release!r}: {size_bytes} bytes, only {wanted.size_bytes} were announced",
            )
        fetch.files(GRAPH, graph)
        fetch.weights(wanted, weights)
        self._store.finish(wanted.model, wanted.bundle)
        log.info("release=%s fetched bundle=%s", wanted.release, wanted.bundle[:12])

    def _is_open(self) -> bool:
        return next_opening_s(self._hours, self._day_s()) <= 0

    def _wait_for_hours(self, stop: threading.Event) -> None:
        while (delay_s := next_opening_s(self._hours, self._day_s())) > 0:
            # In stretches: the local clock may be set meanwhile.
            self._pause(min(delay_s, 600.0), stop)

    def _wait_for_try(
        self, delay_s: float, shown: tuple[FileMark | None, ...] | None, stop: threading.Event
    ) -> bool:
        """Wait so long, or until token or authority are others than were `shown`; whether they are."""
        while delay_s > 0:
            step_s = delay_s if shown is None else min(delay_s, LOOK_S)
            self._pause(step_s, stop)
            delay_s -= step_s
            if self._fleet.credentials() != shown:
                return True
        return False

    def _pause(self, delay_s: float, stop: threading.Event) -> None:
        if stop.is_set() or (delay_s > 0 and self._wait(stop, delay_s)):
            raise StoppedError("stopped while waiting to fetch")


def open_downloader(
    config: ReleasesConfig,
    state_dir: Path,
    *,
    shipped: Mapping[str, Bundle],
    clock: Clock,
    pause: Pause = no_pause,
) -> tuple[BundleStore, Downloader]:
    """What the configuration asks for, below `<state_dir>/releases`. Connects to nothing.

    Raises:
        ConfigError: in one line.
    """
    root = state_dir / "releases"
    address = parse_address(config.url, ca_file=config.ca_file, token_file=config.token_file)
    fleet = HttpFleet(
        address, max_bytes_per_s=config.max_kbytes_per_s * 1000, clock=clock, wait=_wait_on_event
    )
    store = BundleStore(root)
    trust = Trust(root / TRUST, root=read_root(Path(config.root)), stream=fleet.stream, clock=clock)
    downloader = Downloader(
        store,
        trust,
        fleet,
        shipped=shipped,
        wait=_wait_on_event,
        rng=random.Random(),  # noqa: S311 - spreads load, guards nothing
        clock=clock,
        jitter_s=config.jitter_s,
        hours=parse_hours(config.hours) if config.hours else None,
        day_s=_local_day_s,
        pause=pause,
    )
    return store, downloader


def _misfits(graph: GraphManifest, model: str, shipped: Bundle | None) -> list[str]:
    """Why results of the new bundle would not mean what those of the shipped one mean."""
    if graph.model != model:
        return [f"a bundle of {graph.model!r}, wanted for {model!r}"]
    if shipped is None:
        return [f"no model {model!r} on this board"]
    names = ("labels", "input_shape", "window", "wire")
    return [
        f"its {name} are {getattr(graph, name)}, those of the shipped bundle {getattr(shipped.graph, name)}"
        for name in names
        if getattr(graph, name) != getattr(shipped.graph, name)
    ]


def _disk_failure(error: OSError) -> ReleaseError:
    is_full = error.errno in {errno.ENOSPC, errno.EDQUOT}
    return RefusedError(Failure.SPACE if is_full else Failure.DOWNLOAD, f"disk: {error}")


def _wait_on_event(stop: threading.Event, delay_s: float) -> bool:
    return stop.wait(delay_s)


def _local_day_s() -> float:
    now = time.localtime()
    return now.tm_hour * 3600.0 + now.tm_min * 60 + now.tm_sec
