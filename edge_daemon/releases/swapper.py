"""The thread that swaps bundles: hears of releases, does what `core.swap` asks for. In no answer's way.

It owns the models' states. Others only put what they have heard into its inbox: the uplink (what the hub
wants), the worker (what became of a download, a verification, a trial), the spool (a report is committed).
The worker has a thread a model: what it does may take days, and holds up no other model.
Two files per model, `revert-asked` and what `state_file` writes, are all that it shares with other processes.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, assert_never

from msgspec.structs import replace

from edge_cascade.bundle import load_bundle
from edge_cascade.durable import crash_point
from edge_cascade.errors import CascadeError, first_line
from edge_cascade.messages import SHIPPED, DesiredModel, DesiredState
from edge_daemon.core.swap import next_due_s, next_state
from edge_daemon.core.swap_events import (
    Abandon,
    Answered,
    CheckSpace,
    Delivered,
    Desired,
    Download,
    Effect,
    Event,
    GiveUp,
    Keep,
    NotServing,
    Report,
    RevertAsked,
    RunTrial,
    Serve,
    Serving,
    Started,
    Stopping,
    Tick,
    Verify,
)
from edge_daemon.core.swap_state import SwapLimits, SwapState, bar_of
from edge_daemon.errors import EdgeError, StoppedError
from edge_daemon.memory import give_back_memory
from edge_daemon.ports import Wanted
from edge_daemon.releases.hands import Hands, ServedModel
from edge_daemon.releases.history import Entry, changes_of, note
from edge_daemon.releases.starts import LASTED_S, note_lasted
from edge_daemon.releases.state_file import Kept, load_state, save_state
from edge_daemon.releases.work import Worker
from edge_daemon.shadow import Shadowing

log = logging.getLogger(__name__)

REVERT_FILE: Final = "revert-asked"
LOOK_S: Final = 1.0
FLIP_S: Final = 60.0
"""Longer than any batch takes; a thread that is stuck for so long gets no new bundle."""
RETRY_S: Final = 10.0
SAVE_EVERY_S: Final = 900.0
"""Running time that a power cut may lose; more often would wear the disk."""
STOP_S: Final = 5.0


class Probation:
    """Counts live samples of one bundle; written by the inference thread, read by the swapper's."""

    __slots__ = ("bundle", "failed", "samples", "told")

    def __init__(self, bundle: str) -> None:
        self.bundle = bundle
        self.samples = 0
        self.failed = 0
        self.told = (0, 0)


@dataclass(slots=True)
class _Swap:
    """One model at work."""

    model: ServedModel
    directory: Path
    state: SwapState
    serving: str
    running_s: float = 0.0
    saved_s: float = 0.0
    wanted: Wanted | None = None
    asked: DesiredModel | None = None
    shadowing: Shadowing | None = None
    has_lasted: bool = False


@dataclass(frozen=True, slots=True)
class _Heard:
    """Something that happened to a model; None: the hub has said what it wants."""

    model: str
    event: Event | None


class Swapper:
    """Swaps the bundles of all models; `start` and `stop` are called once each."""

    def __init__(
        self, models: Sequence[ServedModel], directory: Path, hands: Hands, limits: SwapLimits
    ) -> None:
        """`directory`: where states, histories and fetched bundles are, one directory a model."""
        self._models = models
        self._directory = directory
        self._hands = hands
        self._limits = limits
        self._swaps: dict[str, _Swap] = {}
        self._probations: dict[str, Probation] = {}
        self._desired: DesiredState | None = None
        self._inbox: queue.SimpleQueue[_Heard] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._worker = Worker(
            hands.source,
            hands.trial,
            lambda model, event: self._inbox.put(_Heard(model, event)),
            hands.pause,
        )
        self._started_s = hands.clock.monotonic_s()
        self.committed = 0
        self.reverted = 0
        self._thread = threading.Thread(target=self._run, name="swaps", daemon=True)

    # --- any thread ----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin; the spool is open by now, and samples are answered."""
        self._thread.start()

    def stop(self) -> None:
        """End what runs, and the thread. Its end is then no crash of a bundle on probation."""
        self._stopping.set()
        self._inbox.put(_Heard("", None))
        self._worker.stop()
        if self._thread.is_alive():
            self._thread.join(STOP_S)

    def hear(self, message: DesiredState | None) -> None:
        """What the hub wants this board to run; only the last word counts. None changes nothing."""
        if message is not None:
            self._desired = message
            self._inbox.put(_Heard("", None))

    def count(self, model: str, bundle: str, *, is_failed: bool) -> None:
        """A live sample was answered (on the inference thread)."""
        probation = self._probations.get(model)
        if probation is not None and probation.bundle == bundle:
            probation.samples += 1
            probation.failed += is_failed

    def on_probation(self, model: str) -> str | None:
        """The bundle whose live samples are counted now."""
        probation = self._probations.get(model)
        return None if probation is None else probation.bundle

    # --- the swapper's thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        with contextlib.suppress(StoppedError):
            self._hands.trial.clear()
            for model in self._models:
                self._guard(self._begin, model)
            while not self._stopping.is_set():
                with contextlib.suppress(queue.Empty):
                    self._guard(self._hear, self._inbox.get(timeout=LOOK_S))
                for swap in self._swaps.values():
                    self._guard(self._look, swap)
        for swap in self._swaps.values():
            note_lasted(swap.directory)
            with contextlib.suppress(StoppedError):
                self._guard(self._feed, swap, Stopping())

    def _guard(self, act: Callable[..., None], *arguments: object) -> None:
        try:
            act(*arguments)
        except StoppedError:
            raise
        except Exception:
            # A defect in one model's swap must not end all others.
            log.exception("defect in a swap")

    def _begin(self, model: ServedModel) -> None:
        directory = self._directory / model.name
        try:
            kept = load_state(directory)
        except OSError as error:
            log.warning("state of releases not read, beginning anew model=%s: %s", model.name, error)
            kept = None
        kept = kept or Kept(SwapState(live=model.installed))
        swap = _Swap(
            model, directory, kept.state, model.serving, running_s=kept.running_s, wanted=kept.wanted
        )
        self._swaps[model.name] = swap
        self._feed(swap, Started(self._hands.machine_boot, self._hands.was_stopped))

    def _hear(self, heard: _Heard) -> None:
        if heard.event is not None:
            self._feed(self._swaps[heard.model], heard.event)
            return
        desired, self._desired = self._desired, None
        for asked in () if desired is None else desired.models:
            if asked.model in self._swaps:
                self._wish(self._swaps[asked.model], asked)

    def _wish(self, swap: _Swap, asked: DesiredModel) -> None:
        swap.asked = asked
        if asked.release == SHIPPED:
            swap.wanted, bundle, size_bytes = None, swap.model.installed, 0
        else:
            bundle, size_bytes = asked.bundle.hex(), asked.size_bytes
            swap.wanted = Wanted(
                asked.model, asked.release, bundle, asked.graph.hex(), asked.weights.hex(), size_bytes
            )
        self._feed(swap, Desired(asked.release, bundle, size_bytes))
        self._tell_shadowing(swap)

    def _look(self, swap: _Swap) -> None:
        """What happens without anybody saying so."""
        with contextlib.suppress(FileNotFoundError):
            # Gone first: asked twice would go back and forth.
            (swap.directory / REVERT_FILE).unlink()
            self._feed(swap, RevertAsked())
        self._feed_counts(swap)
        due_s = next_due_s(swap.state, self._limits)
        if due_s is not None and due_s <= self._now_s(swap):
            self._feed(swap, Tick())
        if self._now_s(swap) - swap.saved_s > SAVE_EVERY_S:
            self._save(swap)
        if not swap.has_lasted and self._hands.clock.monotonic_s() - self._started_s > LASTED_S:
            swap.has_lasted = True
            note_lasted(swap.directory)

    def _feed_counts(self, swap: _Swap) -> None:
        attempt = swap.state.attempt
        probation = self._probations.get(swap.model.name)
        if attempt is None or attempt.probation_since_s is None:
            self._probations.pop(swap.model.name, None)
        elif probation is None or probation.bundle != attempt.bundle:
            self._probations[swap.model.name] = Probation(attempt.bundle)
        else:
            # Failures first: they are counted after their sample.
            failed, samples = probation.failed, probation.samples
            new = (samples - probation.told[0], failed - probation.told[1])
            probation.told = (samples, failed)
            self._feed(swap, Answered(attempt.bundle, *new))

    def _now_s(self, swap: _Swap) -> float:
        return swap.running_s + self._hands.clock.monotonic_s() - self._started_s

    def _save(self, swap: _Swap) -> None:
        """Write the state down. Until the disk takes it nothing follows from it.

        Raises:
            StoppedError: stopped before the disk took it.
        """
        while True:
            now_s = self._now_s(swap)
            try:
                save_state(swap.directory, Kept(swap.state, now_s, swap.wanted))
            except OSError as error:
                log.warning("state of releases not written, again in %.0f s: %s", RETRY_S, error)
            else:
                swap.saved_s = now_s
                return
            if self._stopping.wait(RETRY_S):
                raise StoppedError("the state of a swap could not be written")

    def _feed(self, swap: _Swap, event: Event) -> None:
        """One event, and all that follows from it."""
        events = deque([event])
        while events:
            before = swap.state
            swap.state, effects = next_state(
                before, events.popleft(), now_s=self._now_s(swap), limits=self._limits
            )
            # Counts alone are not worth a write: a crash begins probation anew.
            if effects or _uncounted(swap.state) != _uncounted(before):
                self._save(swap)
            self._note_changes(swap, before)
            for effect in effects:
                events += self._do(swap, effect)

    def _note_changes(self, swap: _Swap, before: SwapState) -> None:
        at_ms, running_s = self._hands.clock.wall_ms(), round(self._now_s(swap), 1)
        for what, release, bundle, detail in changes_of(before, swap.state):
            note(swap.directory, Entry(at_ms, running_s, what, release, bundle, detail))
            log.info(
                "swap model=%s %s release=%s bundle=%s %s",
                swap.model.name, what, release, bundle[:12], detail,
            )  # fmt: skip
            if what == "committed":
                crash_point("swap.committed")
                self.committed += 1
            elif what.startswith("reverted"):
                self.reverted += 1

    def _do(self, swap: _Swap, effect: Effect) -> list[Event]:
        name, hands = swap.model.name, self._hands
        match effect:
            case Keep(bundles):
                # Behind what the worker has in hand: it may still write there.
                self._worker.add(name, None, lambda _: hands.store.keep(name, bundles))
            case CheckSpace(attempt):
                state = swap.state
                size_bytes = 0 if state.attempt is None else state.attempt.size_bytes
                bundle = "" if state.attempt is None else state.attempt.bundle
                if bundle == swap.model.installed:
                    self._worker.check_space(name, attempt, lambda: size_bytes)
                else:
                    self._worker.check_space(name, attempt, lambda: hands.store.room_for(name, bundle))
            case Download(attempt, _, bundle):
                held = [self._directory_of(swap, each) for each in (swap.state.live, swap.model.installed)]
                self._worker.download(name, attempt, self._to_fetch(swap, bundle), held)
            case Verify(attempt, _, bundle):
                self._worker.verify(name, attempt, self._to_fetch(swap, bundle))
            case RunTrial(attempt, bundle, _):
                self._worker.try_out(
                    name,
                    attempt,
                    self._directory_of(swap, bundle),
                    self._compared_with(swap, effect),
                    swap.model.how,
                )
            case Serve(bundle):
                return [self._serve(swap, bundle)]
            case Abandon(attempt):
                self._worker.abandon(name, attempt)
            case Report(attempt):
                self._report(swap, attempt)
            case GiveUp(detail):
                return self._fall_back(swap, detail)
            case _:
                assert_never(effect)
        return []

    def _to_fetch(self, swap: _Swap, bundle: str) -> Wanted | None:
        """Where a bundle comes from, None for the one that is installed."""
        return None if bundle == swap.model.installed else swap.wanted

    def _directory_of(self, swap: _Swap, bundle: str) -> Path:
        if bundle == swap.model.installed:
            return swap.model.installed_directory
        return self._hands.store.directory_of(swap.model.name, bundle)

    def _compared_with(self, swap: _Swap, trial: RunTrial) -> Path | None:
        # What the board came with must be able to come back, however slow it is beside what is taken back.
        if trial.against is None or trial.bundle == swap.model.installed:
            return None
        return self._directory_of(swap, trial.against)

    # --- what serves ---------------------------------------------------------------------------------------

    def _serve(self, swap: _Swap, bundle: str) -> Event:
        if bundle == swap.model.distrusted and swap.state.attempt is None:
            return NotServing(bundle, "no start with it has lasted")
        if swap.serving != bundle:
            try:
                self._flip(swap, bundle)
            except StoppedError:
                # The daemon ends: nothing against the bundle, which answers after the next start.
                raise
            except (CascadeError, EdgeError, OSError, MemoryError, TimeoutError) as error:
                log.error("bundle not serving model=%s bundle=%s: %s", swap.model.name, bundle[:12], error)
                return NotServing(bundle, first_line(error))
            except Exception as error:
                # Nobody would say anything more of this attempt.
                log.exception("defect while a bundle is put in place model=%s", swap.model.name)
                return NotServing(bundle, f"defect: {first_line(error)}")
        return Serving(bundle)

    def _flip(self, swap: _Swap, bundle: str) -> None:
        pause = self._hands.pause
        pause()
        loaded = load_bundle(self._directory_of(swap, bundle), pause=pause)
        if loaded.bundle_id != bundle:
            raise CascadeError(f"the files are those of {loaded.bundle_id[:12]}")
        flipped = self._hands.install(loaded)
        try:
            flipped.result(FLIP_S)
        except TimeoutError:
            # Not prevented: it happened meanwhile.
            if flipped.cancel():
                raise
        swap.serving = bundle
        crash_point("swap.flipped")
        self._hands.on_served(loaded)
        pause()
        # The future has the pipeline before, and with it its sessions.
        del flipped, loaded
        give_back_memory()
        self._tell_shadowing(swap)

    def _tell_shadowing(self, swap: _Swap) -> None:
        if swap.asked is None:
            return
        state = swap.state
        other = state.live if swap.serving != state.live else state.previous
        # What somebody at the board has taken back is not loaded again.
        is_wanted = other is not None and bar_of(state, other) is None
        directory = self._directory_of(swap, other) if other is not None and is_wanted else None
        # Without what is no shadow's affair: other terms end its scenes.
        asked = replace(swap.asked, size_bytes=0, audit_ppm=0)
        shadowing = Shadowing(asked, swap.serving, directory)
        if shadowing != swap.shadowing:
            swap.shadowing = shadowing
            self._hands.on_shadowing(shadowing)

    def _fall_back(self, swap: _Swap, detail: str) -> list[Event]:
        """No fetched bundle answers: the installed one does, and what is wanted is fetched again."""
        log.error("back to the installed bundle model=%s: %s", swap.model.name, detail)
        if swap.state.live == swap.model.installed:
            return []
        swap.state = replace(
            swap.state, live=swap.model.installed, release="", previous=None, is_wish_settled=False
        )
        self._save(swap)
        return [self._serve(swap, swap.model.installed)]

    def _report(self, swap: _Swap, attempt: int) -> None:
        name = swap.model.name
        for end in swap.state.ends:
            if end.attempt == attempt:
                committed = self._hands.report(name, end, swap.serving)
                committed.add_done_callback(
                    lambda done: (
                        self._inbox.put(_Heard(name, Delivered(attempt)))
                        if done.exception() is None
                        else None
                    )
                )


def _uncounted(state: SwapState) -> SwapState:
    if state.attempt is None:
        return state
    return replace(state, attempt=replace(state.attempt, samples=0, failed=0))
