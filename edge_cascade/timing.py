"""Times calls fairly: cases take turns, so that whatever else the board does happens to all of them.

Nothing here knows what is called. The clock and the sleep are arguments.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

import msgspec
import numpy as np

from edge_cascade.profile import Count, Microseconds

Key = TypeVar("Key", bound=Hashable)
Call = Callable[[], object]

WARM_UP_CALLS: Final = 50
WARM_UP_S: Final = 0.2
BLOCK_S: Final = 0.005
MAX_BLOCK: Final = 200
MIN_ROUNDS: Final = 3
MAX_ROUNDS: Final = 2000


class Timing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Median and 99th percentile of so many calls."""

    p50_us: Microseconds
    p99_us: Microseconds
    samples: Count


@dataclass(frozen=True, slots=True)
class Case(Generic[Key]):
    """Something to time; `prepare` runs before each block (tight) or call (paced) and is not timed."""

    key: Key
    run: Call
    prepare: Call | None = None


@dataclass(frozen=True, slots=True)
class Stopwatch:
    """Where time comes from; `watch` is called between calls, never within one, with the seconds passed."""

    clock_ns: Callable[[], int] = time.perf_counter_ns
    sleep: Callable[[float], None] = time.sleep
    watch: Callable[[float], None] | None = None

    def now_s(self) -> float:
        """Seconds on the same clock."""
        return self.clock_ns() / 1e9

    def passed(self, seconds: float) -> None:
        """Tell the watch."""
        if self.watch is not None:
            self.watch(seconds)


@contextmanager
def collector_off() -> Iterator[None]:
    """Keep the garbage collector out of the figures."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def measure_tight(cases: Sequence[Case[Key]], seconds: float, watch: Stopwatch) -> dict[Key, Timing]:
    """Time blocks of calls that follow at once, in rounds over all cases, for about `seconds`.

    The median is that of the rounds' medians, so that a slow minute counts once.
    """
    sizes = {case.key: _warm_up(case, watch) for case in cases}
    blocks: dict[Key, list[np.ndarray]] = {case.key: [] for case in cases}
    clock = watch.clock_ns
    started_s = last_s = watch.now_s()
    for done in range(MAX_ROUNDS):
        if done >= MIN_ROUNDS and last_s - started_s >= seconds:
            break
        for case in cases:
            _prepare(case)
            case.run()  # the one that finds the caches as the case before left them
            taken_ns = np.empty(sizes[case.key])
            for index in range(len(taken_ns)):
                start_ns = clock()
                case.run()
                taken_ns[index] = clock() - start_ns
            blocks[case.key].append(taken_ns)
        last_s, before_s = watch.now_s(), last_s
        watch.passed(last_s - before_s)
    return {
        key: _timing(float(np.median([np.median(block) for block in taken])), np.concatenate(taken))
        for key, taken in blocks.items()
    }


def measure_paced(
    cases: Sequence[Case[Key]], gap_s: float, seconds: float, watch: Stopwatch
) -> dict[Key, Timing]:
    """Time single calls that come `gap_s` apart, the cases in turn, for about `seconds`."""
    for case in cases:
        _warm_up(case, watch)
    taken_ns: dict[Key, list[int]] = {case.key: [] for case in cases}
    clock = watch.clock_ns
    started_s = last_s = due_s = watch.now_s()
    for done in range(MAX_ROUNDS):
        if done >= MIN_ROUNDS and last_s - started_s >= seconds:
            break
        for case in cases:
            _prepare(case)
            # A call that took longer than the gap delays the next ones; they do not pile up.
            due_s = max(due_s + gap_s, watch.now_s())
            watch.sleep(max(due_s - watch.now_s(), 0.0))
            start_ns = clock()
            case.run()
            taken_ns[case.key].append(clock() - start_ns)
        last_s, before_s = watch.now_s(), last_s
        watch.passed(last_s - before_s)
    return {key: _timing(float(np.median(taken)), np.array(taken)) for key, taken in taken_ns.items()}


def measure_rate(run: Call, seconds: float, watch: Stopwatch, *, block_s: float = 0.1) -> float:
    """Calls a second that follow each other at once, over about `seconds`; the watch's time is left out."""
    clock = watch.clock_ns
    calls, spent_ns = 0, 0
    while spent_ns < seconds * 1e9:
        start_ns = now_ns = clock()
        while now_ns - start_ns < min(block_s, seconds) * 1e9:
            run()
            calls += 1
            now_ns = clock()
        spent_ns += now_ns - start_ns
        watch.passed((now_ns - start_ns) / 1e9)
    return calls / spent_ns * 1e9


def _warm_up(case: Case[Key], watch: Stopwatch) -> int:
    """Run until the runtime has settled; how many calls then make a block."""
    _prepare(case)
    start_ns = now_ns = watch.clock_ns()
    fastest_ns = float("inf")
    for _ in range(WARM_UP_CALLS):
        before_ns = now_ns
        case.run()
        now_ns = watch.clock_ns()
        fastest_ns = min(fastest_ns, now_ns - before_ns)
        if now_ns - start_ns > WARM_UP_S * 1e9:
            break
    return int(min(max(BLOCK_S * 1e9 / max(fastest_ns, 1.0), 1), MAX_BLOCK))


def _prepare(case: Case[Key]) -> None:
    if case.prepare is not None:
        case.prepare()


def _timing(p50_ns: float, taken_ns: np.ndarray) -> Timing:
    # A clock may be too coarse for a call; no call takes no time.
    p99_ns = float(np.percentile(taken_ns, 99))
    return Timing(max(p50_ns, 1.0) / 1e3, max(p99_ns, 1.0) / 1e3, len(taken_ns))
