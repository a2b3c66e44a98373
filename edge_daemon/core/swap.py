"""How a board changes its bundle, and how it goes back. No I/O, no clock, no chance.

    downloading -> verified -> trial -> committed | reverted(reason)

One bundle is *live*: the last one that proved itself, and the one that is gone back to. An attempt brings
another one: fetched, verified, tried in a child process, then on live samples on probation, where it answers
in the live one's place without being live. Only a commit makes it live. So wherever the daemon is killed, the
state on disk names a bundle that answers: the old one, or the new one on probation.

The state is written down durably before the effects of a step are carried out. After a start, `Started` asks
again for whatever was in hand; all effects may be carried out twice.

- A crash on probation, or while the child process ran, counts if the machine did not boot in between: the
  third one reverts. A power cut does not count; but a bundle that takes the whole board down looks just like
  one, so `MAX_POWER_CUTS` of them revert, too.
- What fails in its digests or golden outputs is barred on this board for good, anything else for a while,
  twice as long each time. That is counted in running time: this board's clock may jump.
- The hub's wish is remembered: when a bar ends, it is tried again.
- A report is kept until it is delivered. Whether it ever is changes nothing: the next start reports again,
  and what was committed stays (Mender ticket #827 rolled back there).
- At most two bundles lie on disk, and the room for the second is checked before a byte is fetched: the one
  kept for `RevertAsked` goes when an attempt for a third begins.

Time is an argument, `now_s`: seconds for which a daemon has run on this board, over all its starts; it never
goes back. A power cut may lose the last of them.
"""

from __future__ import annotations

from typing import Final, TypeAlias, assert_never

from msgspec.structs import replace

from edge_daemon.core.swap_events import (
    FOR_GOOD,
    Abandon,
    Answered,
    CheckSpace,
    Delivered,
    Desired,
    Download,
    Downloaded,
    Effect,
    Event,
    Failed,
    Failure,
    GiveUp,
    Keep,
    NotServing,
    Report,
    RevertAsked,
    RunTrial,
    Serve,
    Serving,
    SpaceChecked,
    Started,
    Stopping,
    Tick,
    TrialPassed,
    Verified,
    Verify,
)
from edge_daemon.core.swap_state import (
    Attempt,
    Bar,
    End,
    Phase,
    SwapLimits,
    SwapState,
    Wish,
    bar_of,
)

MAX_CRASHES: Final = 2
"""Trials at boot after a crash; one more reverts."""
MAX_POWER_CUTS: Final = 10
FIRST_BAR_S: Final = 3600.0
LONGEST_BAR_S: Final = 7 * 86400.0
MAX_RAN: Final = 8
MAX_ENDS: Final = 32
"""Reports that wait to be delivered; the oldest goes first."""
MAX_LAPSED_BARS: Final = 64
MAX_BARS: Final = 1000
"""All of them; the oldest goes first, also one for good: the file of the state has an end."""

Step: TypeAlias = tuple[SwapState, list[Effect]]


def next_state(state: SwapState, event: Event, *, now_s: float, limits: SwapLimits) -> Step:
    """What becomes of the swap, and what is to be done once the state is on disk, in this order."""
    match event:
        case Started():
            state, effects = _started(state, event, now_s)
        case Stopping():
            return replace(state, is_stopped=True), []
        case Desired():
            wish = Wish(event.release, event.bundle, event.size_bytes)
            state, effects = _wished(state, wish, now_s)
        case RevertAsked():
            state, effects = _revert_asked(state, now_s)
        case Failed():
            state, effects = _failed(state, event, now_s)
        case SpaceChecked() | Downloaded() | Verified() | TrialPassed():
            state, effects = _stepped(state, event, now_s)
        case Serving():
            state, effects = _serving(state, event.bundle, now_s)
        case NotServing():
            state, effects = _not_serving(state, event, now_s)
        case Answered():
            state, effects = _answered(state, event, now_s, limits)
        case Delivered():
            ends = tuple(end for end in state.ends if end.attempt != event.attempt)
            return replace(state, ends=ends), []
        case Tick():
            state, effects = _with_long_probation(state, now_s, limits)
        case _:
            assert_never(event)
    return _with_next_attempt(state, effects, now_s)


def next_due_s(state: SwapState, limits: SwapLimits) -> float | None:
    """When a `Tick` is wanted next, None if only events can move anything."""
    if state.attempt is not None:
        since_s = state.attempt.probation_since_s
        return None if since_s is None else since_s + limits.max_probation_s
    bar = None if state.wish is None or state.is_wish_settled else bar_of(state, state.wish.bundle)
    return None if bar is None else bar.until_s


# --- one attempt -------------------------------------------------------------------------------------------


def _with_next_attempt(state: SwapState, effects: list[Effect], now_s: float) -> Step:
    """Begin an attempt, if the hub wants another bundle than the live one and it may be tried."""
    wish = state.wish
    if wish is None or state.attempt is not None or state.is_wish_settled:
        return state, effects
    if wish.bundle == state.live:
        state = replace(state, number=state.number + 1, release=wish.release, is_wish_settled=True)
        return _ended(state, End(state.number, wish.release, wish.bundle, None), effects)
    bar = bar_of(state, wish.bundle)
    if bar is not None and (bar.until_s is None or now_s < bar.until_s):
        if state.refused == wish.release:
            return state, effects
        state = replace(state, number=state.number + 1, refused=wish.release)
        detail = f"failed before: {bar.failure}"
        return _ended(state, End(state.number, wish.release, wish.bundle, Failure.BARRED, detail), effects)
    number = state.number + 1
    is_here = wish.bundle == state.previous
    attempt = Attempt(
        number, wish.release, wish.bundle, wish.size_bytes, is_return=is_here, is_fetched=is_here
    )
    # The bundle before the live one makes room, unless it is the one that is wanted.
    state = replace(
        state,
        number=number,
        attempt=attempt,
        previous=state.previous if attempt.is_return else None,
    )
    return state, [*effects, *_hands_on(state, attempt)]


def _hands_on(state: SwapState, attempt: Attempt) -> list[Effect]:
    """What is to be done for an attempt at the point where it stands."""
    match attempt.phase:
        case Phase.DOWNLOADING if attempt.is_fetched:
            return [Verify(attempt.number, attempt.release, attempt.bundle)]
        case Phase.DOWNLOADING:
            return [Keep((state.live, attempt.bundle)), CheckSpace(attempt.number)]
        case Phase.VERIFIED:
            # Whether what went before may take its time is not asked again, nor beside what is taken back.
            is_known = attempt.is_return or attempt.bundle in state.ran
            against = None if is_known else state.live
            return [RunTrial(attempt.number, attempt.bundle, against)]
        case Phase.TRIAL:
            return [Serve(attempt.bundle)]
        case _:
            assert_never(attempt.phase)


def _stepped(
    state: SwapState, event: SpaceChecked | Downloaded | Verified | TrialPassed, now_s: float
) -> Step:
    attempt = state.attempt
    if attempt is None or attempt.number != event.attempt:
        return state, []
    match event:
        case SpaceChecked() if attempt.phase is Phase.DOWNLOADING and not attempt.is_fetched:
            if event.free_bytes < attempt.size_bytes:
                detail = f"{attempt.size_bytes} bytes needed, {event.free_bytes} free"
                return _revert(state, attempt, Failure.SPACE, detail, now_s)
            return state, [Download(attempt.number, attempt.release, attempt.bundle)]
        case Downloaded() if attempt.phase is Phase.DOWNLOADING and not attempt.is_fetched:
            attempt = replace(attempt, is_fetched=True)
        case Verified() if attempt.phase is Phase.DOWNLOADING and attempt.is_fetched:
            attempt = replace(attempt, phase=Phase.VERIFIED)
        case TrialPassed() if attempt.phase is Phase.VERIFIED:
            attempt = replace(attempt, phase=Phase.TRIAL)
        case _:
            # An answer that came twice.
            return state, []
    state = replace(state, attempt=attempt)
    return state, _hands_on(state, attempt)


def _failed(state: SwapState, event: Failed, now_s: float) -> Step:
    attempt = state.attempt
    if attempt is None or attempt.number != event.attempt:
        return state, []
    if attempt.is_return and event.failure is Failure.INTEGRITY:
        # It ran here once: what is damaged is this copy, not the bundle. Fetch it again.
        attempt = replace(attempt, is_return=False, is_fetched=False, phase=Phase.DOWNLOADING)
        state = replace(state, attempt=attempt, previous=None)
        return state, [Keep((state.live,)), CheckSpace(attempt.number)]
    return _revert(state, attempt, event.failure, event.detail, now_s)


def _answered(state: SwapState, event: Answered, now_s: float, limits: SwapLimits) -> Step:
    attempt = state.attempt
    if attempt is None or attempt.probation_since_s is None or event.bundle != attempt.bundle:
        return state, []
    attempt = replace(attempt, samples=attempt.samples + event.samples, failed=attempt.failed + event.failed)
    state = replace(state, attempt=attempt)
    if attempt.failed > limits.max_failed_share * max(attempt.samples, limits.probation_samples):
        detail = f"{attempt.failed} of {attempt.samples} samples failed"
        return _revert(state, attempt, Failure.PROBATION, detail, now_s)
    assert attempt.probation_since_s is not None
    has_time = now_s - attempt.probation_since_s >= limits.min_probation_s
    if attempt.samples >= limits.probation_samples and has_time:
        return _commit(state, attempt)
    return state, []


def _with_long_probation(state: SwapState, now_s: float, limits: SwapLimits) -> Step:
    """A sensor that hardly speaks must not keep a swap open for ever: no failure in so long is enough."""
    attempt = state.attempt
    if attempt is None or attempt.probation_since_s is None:
        return state, []
    if now_s - attempt.probation_since_s < limits.max_probation_s:
        return state, []
    if attempt.failed > limits.max_failed_share * attempt.samples:
        detail = f"{attempt.failed} of {attempt.samples} samples failed"
        return _revert(state, attempt, Failure.PROBATION, detail, now_s)
    return _commit(state, attempt)


# --- what serves -------------------------------------------------------------------------------------------


def _started(state: SwapState, event: Started, now_s: float) -> Step:
    is_same_boot = event.machine_boot == state.machine_boot
    was_stopped = state.is_stopped or event.was_stopped
    state = replace(state, machine_boot=event.machine_boot, is_stopped=False)
    reports: list[Effect] = [Report(end.attempt) for end in state.ends]
    attempt = state.attempt
    if attempt is None:
        return state, [Serve(state.live), *reports]
    if attempt.is_fetched and not was_stopped:
        if is_same_boot:
            # Probation starts anew. After a power cut it goes on: some boards are switched off every night.
            attempt = replace(
                attempt, crashes=attempt.crashes + 1, probation_since_s=None, samples=0, failed=0
            )
        else:
            attempt = replace(attempt, power_cuts=attempt.power_cuts + 1)
    state = replace(state, attempt=attempt)
    if attempt.crashes > MAX_CRASHES:
        detail = f"{attempt.crashes} crashes without a boot in between"
        reverted, effects = _revert(state, attempt, Failure.CRASH, detail, now_s, needs_serving=False)
    elif attempt.power_cuts > MAX_POWER_CUTS:
        detail = f"{attempt.power_cuts} boots on trial"
        reverted, effects = _revert(state, attempt, Failure.POWER, detail, now_s, needs_serving=False)
    elif attempt.phase is Phase.TRIAL:
        return state, [*_hands_on(state, attempt), *reports]
    else:
        return state, [Serve(state.live), *_hands_on(state, attempt), *reports]
    return reverted, [Serve(state.live), *effects, *reports]


def _serving(state: SwapState, bundle: str, now_s: float) -> Step:
    attempt = state.attempt
    if attempt is not None:
        if attempt.phase is Phase.TRIAL and bundle == attempt.bundle and attempt.probation_since_s is None:
            state = replace(state, attempt=replace(attempt, probation_since_s=now_s))
        return state, []
    # Only now, for what served until now may have been read from its files.
    return state, [Keep(_kept(state))] if bundle == state.live else []


def _not_serving(state: SwapState, event: NotServing, now_s: float) -> Step:
    attempt = state.attempt
    if attempt is not None and attempt.phase is Phase.TRIAL and event.bundle == attempt.bundle:
        return _revert(state, attempt, Failure.LOAD, event.detail, now_s)
    if event.bundle != state.live:
        return state, []
    if attempt is not None:
        # It may still bring one that answers; if it fails, the live one is asked once more.
        return state, []
    if state.previous is None:
        return state, [GiveUp(event.detail)]
    # The live one is damaged: what went before it is better than nothing; what is wanted is fetched again.
    state = replace(state, live=state.previous, release="", previous=None, is_wish_settled=False)
    return state, [Keep((state.live,)), Serve(state.live)]


def _revert_asked(state: SwapState, now_s: float) -> Step:
    """Back to what went before: out of an attempt, or from the live bundle to the one kept."""
    if state.attempt is not None:
        wish_settled = replace(state, is_wish_settled=True)
        return _revert(wish_settled, state.attempt, Failure.ASKED, "", now_s)
    if state.previous is None:
        return state, []
    bars = _with_bar(state, state.live, Failure.ASKED, now_s)
    number = state.number + 1
    end = End(number, state.release, state.live, Failure.ASKED)
    state = replace(
        state,
        number=number,
        live=state.previous,
        previous=state.live,
        release="",
        bars=bars,
        is_wish_settled=True,
    )
    return _ended(state, end, [Serve(state.live)])


# --- ends --------------------------------------------------------------------------------------------------


def _wished(state: SwapState, wish: Wish, now_s: float) -> Step:
    """The hub's wish may be told again and again; only another one changes anything."""
    before = state.wish
    if before is not None and (before.release, before.bundle) == (wish.release, wish.bundle):
        # A hub that could not say the size for a moment wants nothing else for that.
        return replace(state, wish=wish), []
    state = replace(state, wish=wish, is_wish_settled=False, refused="")
    attempt = state.attempt
    if attempt is None or (attempt.bundle, attempt.release) == (wish.bundle, wish.release):
        return state, []
    return _revert(state, attempt, Failure.SUPERSEDED, f"{wish.release} is wanted", now_s)


def _commit(state: SwapState, attempt: Attempt) -> Step:
    state = replace(
        state,
        live=attempt.bundle,
        release=attempt.release,
        previous=state.live,
        attempt=None,
        is_wish_settled=True,
        bars={bundle: bar for bundle, bar in state.bars.items() if bundle != attempt.bundle},
        ran=_with_last(state.ran, state.live, attempt.bundle),
    )
    end = End(attempt.number, attempt.release, attempt.bundle, None, f"{attempt.samples} samples")
    return _ended(state, end, [Keep(_kept(state))])


def _with_last(ran: tuple[str, ...], *bundles: str) -> tuple[str, ...]:
    return (*(bundle for bundle in ran if bundle not in bundles), *bundles)[-MAX_RAN:]


def _revert(
    state: SwapState,
    attempt: Attempt,
    failure: Failure,
    detail: str,
    now_s: float,
    *,
    needs_serving: bool = True,
) -> Step:
    """End an attempt without its bundle. The live one is asked to serve: it says `Serving`, then files go."""
    bars = state.bars
    if failure is not Failure.SUPERSEDED:
        bars = _with_bar(state, attempt.bundle, failure, now_s)
    refused = state.refused if failure is Failure.SUPERSEDED else attempt.release
    state = replace(state, attempt=None, bars=bars, refused=refused)
    effects: list[Effect] = [Abandon(attempt.number), Serve(state.live)] if needs_serving else []
    return _ended(state, End(attempt.number, attempt.release, attempt.bundle, failure, detail), effects)


def _ended(state: SwapState, end: End, effects: list[Effect]) -> Step:
    return replace(state, ends=(*state.ends, end)[-MAX_ENDS:]), [*effects, Report(end.attempt)]


def _with_bar(state: SwapState, bundle: str, failure: Failure, now_s: float) -> dict[str, Bar]:
    """All bars with one more, the oldest first.

    Bars that ended are remembered for a while, so that the next one is longer; not too many of them.
    """
    bars = {barred: bar for barred, bar in state.bars.items() if barred != bundle}
    bars[bundle] = _next_bar(state.bars.get(bundle), failure, now_s)
    lapsed = [barred for barred, bar in bars.items() if bar.until_s is not None and bar.until_s <= now_s]
    gone = {*lapsed[:-MAX_LAPSED_BARS], *list(bars)[:-MAX_BARS]}
    return {barred: bar for barred, bar in bars.items() if barred not in gone}


def _next_bar(before: Bar | None, failure: Failure, now_s: float) -> Bar:
    times = 1 if before is None else before.times + 1
    if failure in FOR_GOOD:
        return Bar(failure, None, times)
    return Bar(failure, now_s + min(FIRST_BAR_S * 2.0 ** min(times - 1, 16), LONGEST_BAR_S), times)


def _kept(state: SwapState) -> tuple[str, ...]:
    return (state.live,) if state.previous is None else (state.live, state.previous)
