"""What a swapper works with: the models of the board, and who does things for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from edge_cascade.bundle import Bundle
from edge_cascade.pauses import Pause, no_pause
from edge_daemon.core.swap_state import End
from edge_daemon.pipeline import Pipeline
from edge_daemon.ports import Clock, ReleaseSource
from edge_daemon.releases.trial import Trial, TriedAs
from edge_daemon.shadow import Shadowing


class Store(Protocol):
    """Where fetched bundles are: see `bundle_store`."""

    def directory_of(self, model: str, bundle: str) -> Path: ...
    def has(self, model: str, bundle: str) -> bool: ...
    def keep(self, model: str, bundles: Iterable[str]) -> None: ...
    def room_for(self, model: str, bundle: str) -> int: ...


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model, the bundle that it was installed with, and the one that answers as the swapper starts."""

    name: str
    installed: str
    installed_directory: Path
    serving: str
    how: TriedAs = field(default_factory=TriedAs)
    distrusted: str = ""
    """A live bundle with which no start has lasted (see `starts`): it answers after another attempt alone."""


@dataclass(frozen=True, slots=True)
class Hands:
    """What the swapper works with. `machine_boot` is the kernel's boot id; `was_stopped` see `Started`.

    `install` opens a bundle and has it answer; the future holds the pipeline before it. `report` queues how
    an attempt ended, with the bundle that answers now; done means committed. `on_served` and `on_shadowing`
    are called on the swapper's thread. `pause` comes between pieces of work, so that they are in no answer's
    way.
    """

    source: ReleaseSource
    store: Store
    trial: Trial
    install: Callable[[Bundle], Future[Pipeline]]
    report: Callable[[str, End, str], Future[None]]
    clock: Clock
    machine_boot: str
    on_served: Callable[[Bundle], None] = lambda _: None
    on_shadowing: Callable[[Shadowing], None] = lambda _: None
    pause: Pause = no_pause
    was_stopped: bool = False
