"""Which client updates are votes. No I/O. The memory of one update at a time.

How long an update may be depends on the cohort's norms, which are known only once all have been read. So
whoever counts reads twice: without a bound (`screen_each`), and again with the one that `decide_max_norm`
makes of it, unless nobody is above that. Nothing that a device claims is believed: its count of examples is
capped, and tensors must be those of the training base in name, shape and type.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from statistics import median_low
from typing import Final, TypeAlias

import numpy as np

from cloud_hub.core.federation.update import Layout, Update, Weights

# Short enough that BLAS keeps to one thread: its threads' waiting for each other costs more than they save.
_BLOCK: Final = 8_192
_LONGEST_NAME: Final = 64


class Reason(Enum):
    """Why an update does not count. The values name counters."""

    QUARANTINED = "quarantined"
    WRONG_BASE = "wrong_base"
    """Made from weights that this round knows nothing of."""
    STALE = "stale"
    """Made from an earlier training base, more rounds ago than this round takes."""
    REPEATED = "repeated"
    """The device has voted in this round."""
    EXAMPLES = "examples"
    """`num_examples` is not in 1..`max_examples`."""
    KEYS = "keys"
    """A tensor is missing, or one is unknown."""
    SHAPE = "shape"
    DTYPE = "dtype"
    NOT_FINITE = "not_finite"
    MALFORMED = "malformed"
    """Bytes that are no delta of this model: found by whoever reads them, before they are screened."""
    NORM = "norm"
    """Longer than the round's bound."""


NOT_A_VOTE: Final = frozenset({Reason.QUARANTINED, Reason.WRONG_BASE, Reason.STALE})
"""After these a device may still vote: a late delivery from its spool must not cost it this round."""


@dataclass(frozen=True, slots=True)
class NormRule:
    """How long an update may be (Euclidean, over all its tensors together).

    At most `factor` times the median of the cohort's norms, provided that `min_cohort` of them are above
    zero, and at most `max_norm` in any case. The median means something while fewer than half of the cohort
    lie; in a smaller cohort two liars could move it, so there only `max_norm` binds. Updates of length zero
    have no say in the median: a quiet night would otherwise bar the one device that learned something. How
    far honest norms spread depends on the data and the number of local steps: the factor is a starting point.
    """

    factor: float = 4.0
    min_cohort: int = 5
    max_norm: float = math.inf

    def __post_init__(self) -> None:
        # Written so that NaN fails as well.
        if not (self.factor >= 1.0 and self.max_norm > 0.0):
            raise ValueError(
                f"norm rule: factor {self.factor} is below 1 or max_norm {self.max_norm} not above 0"
            )


@dataclass(frozen=True, slots=True)
class RoundSpec:
    """What an update of this round must look like.

    `older_bases` gives the age in rounds of earlier training bases; those up to `max_staleness` are taken.
    """

    base: bytes
    layout: Layout
    max_examples: int
    norm_rule: NormRule = NormRule()
    older_bases: Mapping[bytes, int] = field(default_factory=dict)
    max_staleness: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Accepted:
    """A vote: well-formed, finite and within the bound. `norm` is of its whole delta."""

    update: Update
    norm: float
    staleness: int


@dataclass(frozen=True, slots=True)
class Rejected:
    """An update that does not count, and why, in one line."""

    device: str
    reason: Reason
    detail: str


Verdict: TypeAlias = Accepted | Rejected
_Fault: TypeAlias = tuple[Reason, str]


def screen_cohort(
    read: Callable[[], Iterable[Update]], spec: RoundSpec, *, quarantined: Collection[str] = frozenset()
) -> Iterator[Verdict]:
    """One verdict for each update, in the order of reading.

    `read` is called twice and must give the same updates in the same order.
    """
    norms = [
        verdict.norm
        for verdict in screen_each(read(), spec, quarantined=quarantined, max_norm=spec.norm_rule.max_norm)
        if isinstance(verdict, Accepted)
    ]
    bound = decide_max_norm(norms, spec.norm_rule)
    yield from screen_each(read(), spec, quarantined=quarantined, max_norm=bound)


def screen_each(
    updates: Iterable[Update],
    spec: RoundSpec,
    *,
    quarantined: Collection[str] = frozenset(),
    max_norm: float = math.inf,
) -> Iterator[Verdict]:
    """One verdict for each update, in their order.

    A device's first update from a base that this round takes is its vote, whatever becomes of it; any further
    one is `REPEATED`.
    """
    voted: set[str] = set()
    for update in updates:
        verdict = screen(update, spec, voted=voted, quarantined=quarantined, max_norm=max_norm)
        if isinstance(verdict, Accepted) or verdict.reason not in NOT_A_VOTE:
            voted.add(update.device)
        yield verdict


def decide_max_norm(norms: Sequence[float], rule: NormRule) -> float:
    """The longest that an update of this cohort may be; `norms` are those of its well-formed votes."""
    lengths = [norm for norm in norms if norm > 0.0]
    if len(lengths) < max(rule.min_cohort, 1):
        return rule.max_norm
    return min(rule.max_norm, rule.factor * median_low(lengths))


def screen(
    update: Update,
    spec: RoundSpec,
    *,
    voted: Collection[str] = frozenset(),
    quarantined: Collection[str] = frozenset(),
    max_norm: float = math.inf,
) -> Verdict:
    """Judge one update; the cheapest question first. `voted` are the devices that have had their vote."""
    fault = _fault_of_claims(update, spec, voted, quarantined) or _fault_of_form(update.delta, spec.layout)
    if fault is not None:
        return Rejected(update.device, *fault)
    norm = measure_norm(update.delta)
    if not math.isfinite(norm):
        return Rejected(update.device, Reason.NOT_FINITE, "a number is infinite or NaN")
    if norm > max_norm:
        return Rejected(update.device, Reason.NORM, f"norm {norm:.4g} is above {max_norm:.4g}")
    return Accepted(update, norm, 0 if update.base == spec.base else spec.older_bases[update.base])


def measure_norm(delta: Weights) -> float:
    """Euclidean norm over all tensors (float32), in double precision. Not finite if any number is not.

    The square of a float32 cannot overflow a double, so the sum of squares is the check for NaN as well:
    one pass over the data answers both.
    """
    scratch = np.empty(_BLOCK, np.float64)
    squares = 0.0
    # A signalling NaN raises the processor's flag when it is widened.
    with np.errstate(invalid="ignore"):
        for array in delta.values():
            flat = array.reshape(-1)
            for start in range(0, flat.size, _BLOCK):
                block = flat[start : start + _BLOCK]
                wide = scratch[: block.size]
                np.copyto(wide, block)
                squares += float(wide.dot(wide))
    return math.sqrt(squares)


def _fault_of_claims(
    update: Update, spec: RoundSpec, voted: Collection[str], quarantined: Collection[str]
) -> _Fault | None:
    if update.device in quarantined:
        return Reason.QUARANTINED, "the device is in quarantine"
    age = 0 if update.base == spec.base else spec.older_bases.get(update.base)
    if age is None:
        return Reason.WRONG_BASE, f"unknown base {update.base[:8].hex()}"
    if age > spec.max_staleness:
        return Reason.STALE, f"made {age} rounds ago, at most {spec.max_staleness} are taken"
    if update.device in voted:
        return Reason.REPEATED, "the device has voted in this round"
    if not 1 <= update.num_examples <= spec.max_examples:
        return Reason.EXAMPLES, f"{update.num_examples} examples, not in 1..{spec.max_examples}"
    return None


def _fault_of_form(delta: Weights, layout: Layout) -> _Fault | None:
    expected = dict(layout.tensors)
    if unknown := delta.keys() - expected.keys():
        return Reason.KEYS, f"unknown tensor {min(unknown)[:_LONGEST_NAME]!r}"
    if missing := expected.keys() - delta.keys():
        return Reason.KEYS, f"tensor {min(missing)[:_LONGEST_NAME]!r} is missing"
    for name, array in delta.items():
        if array.shape != expected[name]:
            return Reason.SHAPE, f"{name[:_LONGEST_NAME]!r} is {array.shape}, expected {expected[name]}"
        if array.dtype != np.float32:
            return Reason.DTYPE, f"{name[:_LONGEST_NAME]!r} is {array.dtype}, expected float32"
    return None
