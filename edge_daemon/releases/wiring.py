"""Puts a board's releases together: store, source, trial and swapper, from the configuration. Starts nothing.

Only loaded where releases are wanted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edge_cascade.bundle import Bundle, load_bundle
from edge_cascade.errors import CascadeError
from edge_cascade.messages import SwapReport
from edge_cascade.pauses import Pause, no_pause
from edge_cascade.shipped import find_bundle
from edge_daemon.config import Config
from edge_daemon.core.spooling import swap_item
from edge_daemon.core.swap_state import End, SwapLimits
from edge_daemon.errors import ReleaseError
from edge_daemon.past_life import read_machine_boot, was_stopped
from edge_daemon.pipeline import Pipeline
from edge_daemon.ports import Clock, Spool
from edge_daemon.releases.downloader import open_downloader
from edge_daemon.releases.hands import Hands, ServedModel
from edge_daemon.releases.starts import has_not_lasted, note_openings
from edge_daemon.releases.state_file import DamagedStateError, read_state
from edge_daemon.releases.swapper import Swapper
from edge_daemon.releases.trial import Trial, TrialLimits, TriedAs, launch_again
from edge_daemon.shadow import Shadowing

log = logging.getLogger(__name__)

RELEASES_DIRECTORY: Final = "releases"
TRIALS_DIRECTORY: Final = ".trials"


@dataclass(frozen=True, slots=True)
class Reporter:
    """Queues how attempts ended."""

    device: str
    boot: bytes
    next_seq: Callable[[], int]
    spool: Spool
    clock: Clock

    def report(self, model: str, end: End, serving: str) -> Future[None]:
        """Done means committed in the spool."""
        message = SwapReport(
            device=self.device,
            boot=self.boot,
            seq=self.next_seq(),
            taken_at_ms=self.clock.wall_ms(),
            model=model,
            release=end.release,
            bundle=bytes.fromhex(end.bundle),
            serving=bytes.fromhex(serving),
            failure="" if end.failure is None else str(end.failure),
            detail=end.detail[:200],
        )
        return self.spool.append(swap_item(message))


def count_start(config: Config) -> None:
    """Note on disk that `run` is about to open bundles, before any may end the process; see `starts`."""
    note_openings(Path(config.device.state_dir) / RELEASES_DIRECTORY, read_machine_boot())


class BoardReleases:
    """What the daemon needs of releases: which bundle answers at start, and the swapper."""

    def __init__(self, config: Config, clock: Clock, pause: Pause = no_pause) -> None:
        """`pause` comes between pieces of work that answers would feel."""
        self._config = config
        self._clock = clock
        self._pause = pause
        self._directory = Path(config.device.state_dir) / RELEASES_DIRECTORY
        self._installed: dict[str, Bundle] = {}
        self._distrusted: dict[str, str] = {}
        """Live bundles that are not opened again by themselves, see `starts`."""
        # Filled before anything is fetched.
        self._store, self._source = open_downloader(
            config.releases,
            Path(config.device.state_dir),
            shipped=self._installed,
            clock=clock,
            pause=pause,
        )

    def live_in_place_of(self, installed: Bundle) -> Bundle | None:
        """The bundle that proved itself last, None where it is the installed one. Changes nothing on disk.

        One on probation is not among them: what may crash the daemon is only loaded by the swapper, which
        counts the start first.
        """
        model = installed.graph.model
        self._installed[model] = installed
        try:
            kept = read_state(self._directory / model)
            if kept is None or kept.state.live == installed.bundle_id:
                return None
            if has_not_lasted(self._directory / model, kept.state.live, read_machine_boot()):
                log.error(
                    "serving the installed bundle of %s: no start with bundle %s has lasted",
                    model,
                    kept.state.live[:12],
                )
                self._distrusted[model] = kept.state.live
                return None
            bundle = load_bundle(self._store.directory_of(model, kept.state.live))
            if bundle.bundle_id == kept.state.live:
                return bundle
            log.error("serving the installed bundle of %s: the files of the other are not its own", model)
        except (CascadeError, ReleaseError, DamagedStateError, OSError) as error:
            log.error("serving the installed bundle of %s: %s", model, error)
        return None

    @property
    def problem(self) -> str:
        """Why no release can be fetched until somebody acts; empty while nothing is known to be so."""
        return self._source.problem

    def make_swapper(
        self,
        serving: Mapping[str, Bundle],
        install: Callable[[Bundle], Future[Pipeline]],
        reporter: Reporter,
        on_served: Callable[[Bundle], None],
        on_shadowing: Callable[[Shadowing], None],
    ) -> Swapper:
        """`serving`: what answers as it starts, by model."""
        releases = self._config.releases
        # In the order of the configuration, as they were opened.
        configured = dict(zip(self._installed, self._config.models, strict=True))
        models = [
            ServedModel(
                name,
                installed.bundle_id,
                find_bundle(configured[name].bundle),
                serving[name].bundle_id,
                TriedAs(configured[name].plan, configured[name].point, configured[name].runtime),
                self._distrusted.get(name, ""),
            )
            for name, installed in self._installed.items()
        ]
        trial = Trial(
            self._directory / TRIALS_DIRECTORY,
            TrialLimits(
                max_latency_factor=releases.max_latency_factor,
                max_memory_factor=releases.max_memory_factor,
            ),
            again=launch_again,
            pause=self._pause,
        )
        return Swapper(
            models,
            self._directory,
            Hands(
                source=self._source,
                store=self._store,
                trial=trial,
                install=install,
                report=reporter.report,
                clock=self._clock,
                machine_boot=read_machine_boot(),
                on_served=on_served,
                on_shadowing=on_shadowing,
                pause=self._pause,
                was_stopped=was_stopped(Path(self._config.device.state_dir)),
            ),
            SwapLimits(
                probation_samples=releases.probation_samples,
                min_probation_s=releases.min_probation_s,
                max_probation_s=releases.max_probation_s,
                max_failed_share=releases.max_failed_share,
            ),
        )
