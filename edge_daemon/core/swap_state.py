"""What a board remembers of its bundles: values that are written down whole before every step. No I/O."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from edge_daemon.core.swap_events import Failure


class Phase(StrEnum):
    """How far an attempt is. Committed and reverted are ends: see `End`."""

    DOWNLOADING = "downloading"
    VERIFIED = "verified"
    """Its files are what was signed; the child process has not passed it yet."""
    TRIAL = "trial"
    """It answers live samples, or is about to."""


class SwapLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How long probation lasts: at least `probation_samples` and `min_probation_s`; without as many samples
    it ends after `max_probation_s`. More failed samples than `max_failed_share` (0..1) revert at once: of
    `probation_samples`, or of all that there were when these were more.
    """

    probation_samples: int = 200
    min_probation_s: float = 60.0
    max_probation_s: float = 86400.0
    max_failed_share: float = 0.02


class Wish(msgspec.Struct, frozen=True):
    """What the hub wants."""

    release: str
    bundle: str
    size_bytes: int


class Attempt(msgspec.Struct, frozen=True):
    """A bundle on its way. `is_return`: it is the one before the live one, and still on disk.

    `is_fetched`: all its bytes are on disk; from then on a crash may be its fault.
    `probation_since_s` is None until it answers; `samples` and `failed` count from there.
    """

    number: int
    release: str
    bundle: str
    size_bytes: int
    is_return: bool
    is_fetched: bool
    phase: Phase = Phase.DOWNLOADING
    crashes: int = 0
    power_cuts: int = 0
    probation_since_s: float | None = None
    samples: int = 0
    failed: int = 0


class Bar(msgspec.Struct, frozen=True):
    """A bundle is not tried until `until_s` of running time, None for ever; it failed `times` times."""

    failure: Failure
    until_s: float | None
    times: int


class End(msgspec.Struct, frozen=True):
    """How an attempt ended: committed where there is no `failure`."""

    attempt: int
    release: str
    bundle: str
    failure: Failure | None
    detail: str = ""


class SwapState(msgspec.Struct, frozen=True):
    """One model's bundles on this board, by their ids.

    `live` proved itself, `previous` did so before and is kept; `release` is what `live` came with. `number`
    is that of the last attempt. `is_wish_settled`: what the hub wants was done, or somebody at the board
    wanted otherwise. `refused` is the release of which was said that it is barred. `ends` are not delivered.
    `ran` are the bundles that proved themselves here last, whether or not they are still on disk.
    """

    live: str
    release: str = ""
    previous: str | None = None
    wish: Wish | None = None
    is_wish_settled: bool = False
    refused: str = ""
    attempt: Attempt | None = None
    number: int = 0
    bars: dict[str, Bar] = {}
    ends: tuple[End, ...] = ()
    machine_boot: str = ""
    is_stopped: bool = False
    ran: tuple[str, ...] = ()


def bar_of(state: SwapState, bundle: str) -> Bar | None:
    """The bar of a bundle, ended or not."""
    return state.bars.get(bundle)


def serving_after_start(state: SwapState) -> str:
    """The bundle that answers once the daemon runs from this state."""
    attempt = state.attempt
    return attempt.bundle if attempt is not None and attempt.phase is Phase.TRIAL else state.live
