"""The chain of operating points of a ladder, fixed on one set of samples. No I/O.

Learn then test (Angelopoulos et al. 2021, arXiv 2110.01052): everything that is chosen here, the score,
the rungs that must agree, the thresholds and their order, is chosen on D_opt alone. Then D_cal may be walked
along the chain by a fixed sequence of tests (`certify`), with nothing to correct for.

The chain joins the best thresholds at falling prices of uploads (`descent`). They are made to nest, because a
device moves along its chain, and a step towards fewer uploads must never close a rung; and the gaps between
them are filled, because the test can only stop at a point that is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from cloud_hub.builder.calibration.descent import (
    COMPUTE_WEIGHT,
    candidate_thresholds,
    prepare_search,
    rung_costs,
)
from cloud_hub.builder.calibration.outcomes import Outcomes
from cloud_hub.builder.calibration.track import Array, Chain, Track, follow, mean_costs, upload_shares
from edge_cascade.policy import ACCEPT_ALL, ACCEPT_NONE, Rung
from edge_cascade.scores import SCORE_COLUMN, ScoreName

MAX_POINTS: Final = 60

ChoosePoint = Callable[[Track], int]
"""Which point of a chain would be deployed, by its track over the samples that the chain is fitted to."""

MakeChain = Callable[[Sequence[Rung], ScoreName, Outcomes], Chain]
"""Makes the chain for one score and rungs whose `must_agree` is settled."""

SCORES: Final[tuple[ScoreName, ...]] = ("margin", "max_prob", "entropy")
"""The scores to choose from; on a tie the first: margin needed least uploads on most data sets."""

AGREEMENTS: Final = (False, True)
"""The agreement rules to choose from: no rung must agree with the one before it, or all must."""

# Steps along the chain before it is thinned.
_FINE: Final = 512
# Below this share nobody counts uploads.
_FEWEST_UPLOADS: Final = 1e-3


def chain_of_thresholds(rungs: Sequence[Rung], score: ScoreName, outcomes: Outcomes) -> Chain:
    """The chain for one score and rungs whose `must_agree` is settled, with a threshold for every rung."""
    search = prepare_search(rungs, score, outcomes)
    places = _nested(search.frontier())
    limits = np.column_stack(
        [candidates[column] for candidates, column in zip(search.candidates, places.T, strict=True)]
    )
    return _thinned(Chain(tuple(rungs), score, _ended(limits)), outcomes)


def chain_of_one_threshold(rungs: Sequence[Rung], score: ScoreName, outcomes: Outcomes) -> Chain:
    """The chain for one score and rungs whose `must_agree` is settled, with one threshold for all rungs."""
    limits = candidate_thresholds(outcomes.heads[:, :, SCORE_COLUMN[score]].astype(np.float64).ravel())
    shared = np.repeat(limits[:, None], len(rungs), axis=1)
    return _thinned(Chain(tuple(rungs), score, _ended(shared)), outcomes)


def optimised_chain(
    rungs: Sequence[Rung],
    outcomes: Outcomes,
    choose: ChoosePoint,
    *,
    make: MakeChain = chain_of_thresholds,
    scores: Sequence[ScoreName] = SCORES,
    agreements: Sequence[bool] = AGREEMENTS,
) -> Chain:
    """The chain that costs least of those that `make` makes for these scores and agreement rules.

    What a chain costs is what the point costs that `choose` picks of it. The first rung has nothing to agree
    with, so a ladder of one rung has no rule but False.
    """
    chains = [make(variant, score, outcomes) for variant in _variants(rungs, agreements) for score in scores]

    def cost(chain: Chain) -> float:
        track = follow(chain, outcomes)
        return float(point_costs(chain.rungs, track)[choose(track)])

    return min(chains, key=cost)


def shared_chain(rungs: Sequence[Rung], outcomes: Outcomes, choose: ChoosePoint) -> Chain:
    """As `optimised_chain`, but with one threshold for all rungs: what it is compared with."""
    return optimised_chain(rungs, outcomes, choose, make=chain_of_one_threshold)


def point_costs(chain_rungs: Sequence[Rung], track: Track) -> Array:
    """What each point costs, in uploads a sample: those it makes, and a little for what it computes."""
    costs = rung_costs(chain_rungs)
    return upload_shares(track) + COMPUTE_WEIGHT * mean_costs(track, costs) / sum(costs)


def _variants(rungs: Sequence[Rung], agreements: Sequence[bool]) -> Iterator[tuple[Rung, ...]]:
    first, *others = (msgspec.structs.replace(rung, must_agree=False) for rung in rungs)
    for must_agree in agreements:
        if others or not must_agree:
            yield (first, *(msgspec.structs.replace(rung, must_agree=must_agree) for rung in others))


def _nested(best: NDArray[np.intp]) -> NDArray[np.intp]:
    """Places from "accept nothing" over the best at every price to the cheapest, none ever falling.

    What falls is met half way: the mean of the highest place so far and the lowest one to come.
    """
    highest = np.maximum.accumulate(best, axis=0)
    lowest = np.minimum.accumulate(best[::-1], axis=0)[::-1]
    corners = np.vstack([np.zeros((1, best.shape[1]), np.intp), (highest + lowest) // 2])
    # Between two corners as many steps as the rung that moves most has places there.
    lengths = np.diff(corners, axis=0).max(axis=1)
    along = np.concatenate([[0], np.cumsum(lengths)])
    steps = np.linspace(0, along[-1], min(int(along[-1]), _FINE) + 1)
    moved = np.unique(along, return_index=True)[1]
    columns = [np.interp(steps, along[moved], corners[moved, rung]) for rung in range(corners.shape[1])]
    return np.column_stack(columns).round().astype(np.intp)


def _ended(limits: Array) -> Array:
    """The thresholds, and after them the point that escalates nothing."""
    last = limits[-1].copy()
    last[-1] = ACCEPT_ALL
    return np.vstack([np.full_like(last, ACCEPT_NONE), limits[1:], last])


def _thinned(chain: Chain, outcomes: Outcomes) -> Chain:
    """At most `MAX_POINTS` of the points, both ends among them.

    Evenly spaced in the mean of two measures of the uploads, their share and its logarithm. The certificate
    can only stop at a point that is there, and what a step between two points is worth is a part of the
    uploads, be they many or few.
    """
    if len(chain) <= MAX_POINTS:
        return chain
    uploads = np.maximum(upload_shares(follow(chain, outcomes)), _FEWEST_UPLOADS)
    progress = (1.0 - uploads) + np.log(uploads) / np.log(_FEWEST_UPLOADS)
    wanted = np.linspace(progress[0], progress[-1], MAX_POINTS)
    kept = np.unique([0, *np.searchsorted(progress, wanted[1:-1]), len(chain) - 1])
    return Chain(chain.rungs, chain.score, chain.max_scores[kept])
