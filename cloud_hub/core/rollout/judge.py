"""Is the new bundle worse, is it not worse? Judged on pairs, at any time. No I/O, no clock, no chance.

Both bundles answered the same input. Where they give the same label, neither is better, and nobody needs to
know the right one. Where they differ, the reference (a human's label, else the full model's) says whether the
pair was lost (old right, new wrong), won (old wrong, new right) or neither. With X = 1, -1 and 0 for these,
the expectation of X is how much accuracy the new bundle costs: `drop`, in 0..1; 0.01 is a point.

Two bets are laid on the pairs as they come:

- `worse`, against "drop <= tolerated": the capital is multiplied by 1 + bet * (X - tolerated). At a tolerance
  of zero only lost and won pairs move it: it is a bet on "of these, more are lost than won".
- `fine`, against "drop >= max_drop": 1 + bet * (max_drop - X). Here every pair counts, for the promise is
  about points of all samples.

If what is betted against is true, neither capital is expected to grow, whatever came before; so the chance
that it ever reaches 1 / alpha is at most alpha (Ville 1939), however often and whenever one looks (Ramdas,
Grünwald, Vovk and Shafer 2023, "Game-theoretic statistics and safe anytime-valid inference"). Betting on a
bounded mean is Waudby-Smith and Ramdas 2024 (arXiv 2010.09686, section 4). Capital is spread over a fixed
grid of bets and never moved: so it depends on the counts alone, not on their order, and there is no seed.

Which pairs may be counted:

- Audits that the hub runs through both bundles, and live inputs that the canary shadows: both drawn by a coin
  before any answer was known. Each input once, though both may see it.
- Not: inputs that are there because a gate asked. A gate asks where its own bundle is unsure, so among these
  pairs the bundle whose gate asked looks worse than it is.
- A shadowed pair that differs and has no reference yet is `pending`. It is no evidence that the new one is
  worse, and counts as lost against `fine`: its slower sisters must not make a release pass.

Inputs of one board within minutes may be one scene that repeats: a hundred of those are not a hundred pairs,
and betting as if they were halts good releases (docs/benchmarks.md has figures). So pairs come in *scenes*. A
scene is one factor of the capital, with the mean of its pairs for X. How much its pairs repeat each other is
not known; half of the capital bets as on one pair, half as on pairs that are strangers, and the half that is
right wins. What the bounds assume: at each scene, given those before and how many pairs it has, the expected
drop is on the right side. Scenes are counted when they are over.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Final, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

Labels: TypeAlias = NDArray[np.int64]
Counts: TypeAlias = NDArray[np.float64]

NO_REFERENCE: Final = -1
"""In an array of reference labels: nobody has said yet."""

_BETS: Final = np.array((0.05, 0.1, 0.2, 0.4, 0.65, 0.9))
"""On one pair. The best is about (drop - tolerated) / (share lost or won); in 0..1 whatever the networks."""
_LARGEST_BET: Final = 0.9

_PRIOR_PAIRS: Final = 20
_PRIOR_DISCORDANT: Final = 2


@dataclass(frozen=True, slots=True)
class JudgeRules:
    """`alpha`: how often a release no worse than `tolerated` may ever be halted. `beta`: how often one that
    is worse by `max_drop` or more may ever pass. Both over the whole rollout, all looks together.
    """

    alpha: float = 0.04
    beta: float = 0.05
    max_drop: float = 0.01
    tolerated: float = 0.0

    def __post_init__(self) -> None:
        if not (0.0 < self.alpha < 1.0 and 0.0 < self.beta < 1.0):
            raise ValueError(f"judge: alpha {self.alpha} or beta {self.beta} is not in 0..1")
        if not 0.0 <= self.tolerated < self.max_drop < 0.5:
            raise ValueError(
                f"judge: tolerated {self.tolerated} must be at least 0 and below max_drop {self.max_drop}, "
                "and that below 0.5"
            )


class Scene(msgspec.Struct, frozen=True, order=True):
    """Pairs that may repeat each other: `size` of them, lost, won, pending. Seen `times` times."""

    size: int
    lost: int
    won: int
    pending: int
    times: int = 1


class Pairs(msgspec.Struct, frozen=True):
    """Counts of pairs. `differing` gave different labels; of these some are lost, some won, some pending.

    `scenes` are those of two pairs or more. They are within the counts; the other pairs are strangers.
    """

    count: int = 0
    differing: int = 0
    lost: int = 0
    won: int = 0
    pending: int = 0
    scenes: tuple[Scene, ...] = ()

    def __post_init__(self) -> None:
        known = self.lost + self.won + self.pending
        alone = self.alone
        rest = alone.size - alone.lost - alone.won - alone.pending
        if not known <= self.differing <= self.count or min(alone.lost, alone.won, alone.pending, rest) < 0:
            raise ValueError(
                f"pairs: lost {self.lost}, won {self.won} and pending {self.pending} of {self.differing} "
                f"differing of {self.count}, in {sum(scene.times for scene in self.scenes)} scenes"
            )

    def __add__(self, other: Pairs) -> Pairs:
        """Both together."""
        times: Counter[tuple[int, int, int, int]] = Counter()
        for scene in (*self.scenes, *other.scenes):
            times[scene.size, scene.lost, scene.won, scene.pending] += scene.times
        return Pairs(
            self.count + other.count,
            self.differing + other.differing,
            self.lost + other.lost,
            self.won + other.won,
            self.pending + other.pending,
            tuple(Scene(*scene, n) for scene, n in sorted(times.items())),
        )

    @property
    def alone(self) -> Scene:
        """The pairs that are no scene's."""
        return Scene(
            self.count - sum(scene.times * scene.size for scene in self.scenes),
            self.lost - sum(scene.times * scene.lost for scene in self.scenes),
            self.won - sum(scene.times * scene.won for scene in self.scenes),
            self.pending - sum(scene.times * scene.pending for scene in self.scenes),
        )

    @property
    def discordant(self) -> int:
        """Pairs on which exactly one of the two was right."""
        return self.lost + self.won


@dataclass(frozen=True, slots=True)
class Halt:
    """Worse. Had it been no worse than tolerated, the capital would have reached `e_value` with a chance of
    at most 1 / `e_value`.
    """

    reason: str
    e_value: float
    pairs: int
    discordant: int


@dataclass(frozen=True, slots=True)
class Pass:
    """Not worse by `max_drop`; `e_value` as in `Halt`, betted against the opposite."""

    max_drop: float
    e_value: float
    pairs: int
    discordant: int


@dataclass(frozen=True, slots=True)
class Undecided:
    """Too few pairs. If it is just as good, about so many more let it pass (half the time, fewer)."""

    needs: int
    max_drop: float
    pairs: int
    discordant: int
    pending: int = 0


Judgement: TypeAlias = Halt | Pass | Undecided


@dataclass(frozen=True, slots=True)
class DriftHint:
    """How often the bundles differ: on the board's own live inputs, and on audits replayed in the hub.

    No verdict: without a reference, different is not worse. `is_suspicious` when the shares lie further
    apart than chance explains: the board computes something else than the hub, or sees other inputs.
    """

    on_board: float
    in_hub: float
    is_suspicious: bool


def count_pairs(old: Labels, new: Labels, reference: Labels, scenes: Labels | None = None) -> Pairs:
    """Pairs of answers; all are `(n,)`, `reference` is `NO_REFERENCE` where nobody has said yet.

    `scenes` numbers the scene that each input belongs to; None: they are all strangers.

    Raises:
        ValueError: when the shapes do not fit together.
    """
    scenes = np.arange(old.size) if scenes is None else scenes
    if old.ndim != 1 or not old.shape == new.shape == reference.shape == scenes.shape:
        raise ValueError(
            f"labels of shapes {old.shape} and {new.shape} for references of {reference.shape} "
            f"and scenes of {scenes.shape}"
        )
    differ = old != new
    known = reference != NO_REFERENCE
    kinds = (differ & known & (old == reference), differ & known & (new == reference), differ & ~known)
    _, scene_of, sizes = np.unique(scenes, return_inverse=True, return_counts=True)
    of_scenes = np.stack([sizes, *(np.bincount(scene_of[kind], minlength=len(sizes)) for kind in kinds)])
    alike, times = np.unique(of_scenes[:, sizes > 1], axis=1, return_counts=True)
    lost, won, pending = (int(kind.sum()) for kind in kinds)
    return Pairs(
        old.size,
        int(differ.sum()),
        lost,
        won,
        pending,
        tuple(Scene(*map(int, (*kind, n))) for kind, n in zip(alike.T, times, strict=True)),
    )


def decide_quality(pairs: Pairs, rules: JudgeRules) -> Judgement:
    """What the pairs so far say; looks may be as many as one likes."""
    sizes, lost, won, pending, times = _scenes_of(pairs)
    # What nobody has judged yet is left out of one bet, and lost in the other.
    worse = _log_capital(lost - won, sizes - pending, times, rules.tolerated)
    if worse >= -math.log(rules.alpha):
        return Halt(_worse_reason(pairs), math.exp(min(worse, 700.0)), pairs.count, pairs.discordant)
    # "drop >= max_drop" is "gain <= -max_drop": the same bet with the sides changed.
    fine = _log_capital(won - lost - pending, sizes, times, -rules.max_drop)
    if fine >= -math.log(rules.beta):
        return Pass(rules.max_drop, math.exp(min(fine, 700.0)), pairs.count, pairs.discordant)
    needs = _pairs_to_pass(pairs, rules, -math.log(rules.beta) - fine)
    return Undecided(needs, rules.max_drop, pairs.count, pairs.discordant, pairs.pending)


def decide_drift(shadowed: Pairs, audited: Pairs, *, max_sigmas: float = 4.0) -> DriftHint:
    """Compare how often the bundles differ on live inputs of the board and on audits in the hub."""
    on_board, in_hub = _share_differing(shadowed), _share_differing(audited)
    if not (shadowed.count and audited.count):
        return DriftHint(on_board, in_hub, is_suspicious=False)
    together = _share_differing(shadowed + audited)
    variance = together * (1.0 - together) * (1.0 / shadowed.count + 1.0 / audited.count)
    return DriftHint(on_board, in_hub, abs(on_board - in_hub) > max_sigmas * math.sqrt(variance))


def describe(judgement: Judgement) -> str:
    """One line for a person."""
    match judgement:
        case Halt(reason, e_value, pairs, discordant):
            return f"{reason}; {discordant} of {pairs} pairs tell, e-value {e_value:.3g}"
        case Pass(max_drop, e_value, pairs, discordant):
            return (
                f"not worse by {100 * max_drop:g} points: {discordant} of {pairs} pairs tell, "
                f"e-value {e_value:.3g}"
            )
        case Undecided(needs, max_drop, pairs, discordant, pending):
            waiting = f", {pending} wait for a verdict" if pending else ""
            return (
                f"cannot be judged to {100 * max_drop:g} points yet: {discordant} of {pairs} pairs tell"
                f"{waiting}; about {needs} more are needed"
            )


def _worse_reason(pairs: Pairs) -> str:
    drop = 100.0 * (pairs.lost - pairs.won) / pairs.count
    return f"worse: {pairs.lost} lost and {pairs.won} won, {drop:.2g} points"


def _scenes_of(pairs: Pairs) -> tuple[Counts, Counts, Counts, Counts, Counts]:
    """Size, lost, won, pending and how many scenes are so, each `(kinds,)`; strangers are scenes of one."""
    alone = pairs.alone
    same = alone.size - alone.lost - alone.won - alone.pending
    kinds = [
        (1, 1, 0, 0, alone.lost),
        (1, 0, 1, 0, alone.won),
        (1, 0, 0, 1, alone.pending),
        (1, 0, 0, 0, same),
        *((each.size, each.lost, each.won, each.pending, each.times) for each in pairs.scenes),
    ]
    sizes, lost, won, pending, times = np.array(kinds, np.float64).T
    return sizes, lost, won, pending, times


def _log_capital(sums: Counts, sizes: Counts, times: Counts, mean: float) -> float:
    """The logarithm of what a stake of 1 on "the mean of X is above `mean`" has become.

    X, in -1..1, is `sums` / `sizes` in each of `times` scenes; `mean` is in -1..1.
    """
    counted = sizes > 0
    sums, sizes, times = sums[counted], sizes[counted], times[counted]
    as_one = np.broadcast_to(_BETS[:, None], (len(_BETS), len(sizes)))
    as_strangers = np.minimum(_BETS[:, None] * sizes, _LARGEST_BET)
    # Ruin is at bet * (1 + mean) = 1; bets are shares of that.
    bets = np.concatenate([as_one, as_strangers]) / (1.0 + max(mean, 0.0))
    logs = np.log1p(bets * (sums / sizes - mean)) @ times
    return float(np.logaddexp.reduce(logs)) - math.log(len(bets))


def _pairs_to_pass(pairs: Pairs, rules: JudgeRules, missing: float) -> int:
    """How many more until the capital has grown by `missing` (natural logarithm), if neither is better."""
    discordant = (pairs.discordant + pairs.pending + _PRIOR_DISCORDANT) / (pairs.count + _PRIOR_PAIRS)
    up, down = np.log1p(_BETS * (1.0 + rules.max_drop)), np.log1p(-_BETS * (1.0 - rules.max_drop))
    growth = 0.5 * discordant * (up + down) + (1.0 - discordant) * np.log1p(_BETS * rules.max_drop)
    best = float(growth.max())
    # So many networks differ so much that no bet of the grid grows: say a number that is clearly too large.
    return math.ceil(missing / best) if best > 1e-6 else 10**6


def _share_differing(pairs: Pairs) -> float:
    return pairs.differing / pairs.count if pairs.count else 0.0
