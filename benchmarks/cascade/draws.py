"""How often a promise is broken: many calibration sets drawn from one pool, whose risk is known exactly.

Each draw is a calibration set of its own, divided as `cloud-hub build` divides one: temperatures, score,
thresholds and agreement come from its D_opt, the test from its D_cal; naive choices use all of it. What was
chosen is then counted on the whole pool. Draws are without replacement, so a calibration set as large as the
pool would know all of it: keep it below a half. The network is the same in every draw, and samples are
independent: no groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import print_table
from cloud_hub.builder.calibration.certify import MeasuredLadder, Targets, certify
from cloud_hub.builder.calibration.chain import ChoosePoint, optimised_chain, shared_chain
from cloud_hub.builder.calibration.naive_plan import cheapest_within
from cloud_hub.builder.calibration.outcomes import Floats, Labels, Outcomes, losses, walk
from cloud_hub.builder.calibration.p_values import SampleLosses, last_passed, upper_bounds
from cloud_hub.builder.calibration.temperature import fit_temperature
from cloud_hub.builder.calibration.track import Chain, follow, mean_costs, risk_if_answered, upload_shares
from cloud_hub.builder.calibration.units import expected_to_pass, measure, units_of
from edge_cascade.policy import Plan, Rung
from edge_cascade.scores import head_of_logits

MakeChain = Callable[[Sequence[Rung], Outcomes, ChoosePoint], Chain]

# D_opt's share of a calibration set: the split of `cloud-hub build`.
OPTIMISE_SHARE: Final = 0.3
_INTERVAL_LEVEL: Final = 0.05


@dataclass(frozen=True, slots=True)
class Trial:
    """What is drawn and what is promised of it."""

    samples: int
    epsilon: float
    delta: float


@dataclass(frozen=True, slots=True)
class PoolLadder:
    """A ladder not calibrated yet: rungs whose temperature means nothing, their logits `(rungs, n, classes)`."""

    name: str
    rungs: tuple[Rung, ...]
    logits: Floats


@dataclass(frozen=True, slots=True)
class Pool:
    """Independent samples whose whole is the truth; the first ladder is the one that thresholds are compared on."""

    ladders: tuple[PoolLadder, ...]
    full_labels: Labels
    labels: Labels

    def __len__(self) -> int:
        return len(self.labels)

    def calibrated(self, ladder: PoolLadder, fit_rows: NDArray[np.intp]) -> tuple[tuple[Rung, ...], Outcomes]:
        """The rungs with temperatures fitted to these rows, and what they then say of the whole pool."""
        rungs, heads = [], []
        for rung, logits in zip(ladder.rungs, ladder.logits, strict=True):
            temperature = fit_temperature(logits[fit_rows], self.labels[fit_rows])
            rungs.append(msgspec.structs.replace(rung, temperature=temperature))
            heads.append(head_of_logits(logits, temperature))
        return tuple(rungs), Outcomes(np.stack(heads), self.full_labels, self.labels)


@dataclass(frozen=True, slots=True)
class Deployed:
    """What one choice of thresholds does on the whole pool; of several plans `risk` is the largest."""

    risk: float
    upload_share: float
    compute_share: float


@dataclass(frozen=True, slots=True)
class Kept:
    """How one way of choosing kept the promise over all draws.

    `interval` holds the share of draws that broke it with confidence 0.95 (Clopper and Pearson). The other
    figures are means over the draws.
    """

    way: str
    draws: int
    broken: int
    interval: tuple[float, float]
    risk: float
    upload_share: float
    compute_share: float

    @property
    def broken_share(self) -> float:
        """The share of draws whose thresholds have a risk above epsilon on the pool."""
        return self.broken / self.draws


def run_draws(
    pool: Pool, trial: Trial, *, draws: int = 400, seed: int = 0, processes: int = 1
) -> tuple[Kept, ...]:
    """Draw calibration sets from a pool of independent samples, and choose on each in every way.

    Raises:
        ValueError: if the pool is less than twice a calibration set.
    """
    if len(pool) < 2 * trial.samples:
        raise ValueError(f"{len(pool)} samples are no pool for independent draws of {trial.samples}")
    one = partial(_one_draw, pool, trial)
    seeds = np.random.SeedSequence(seed).spawn(draws)
    if processes == 1:
        results = [one(each) for each in seeds]
    else:
        with ProcessPoolExecutor(processes) as executor:
            results = list(executor.map(one, seeds, chunksize=max(draws // (4 * processes), 1)))
    return tuple(_summary(way, [result[way] for result in results], trial.epsilon) for way in results[0])


def print_draws(title: str, kept: Sequence[Kept], trial: Trial) -> None:
    """One row per way of choosing."""
    print_table(
        f"{title}: {kept[0].draws} calibration sets of {trial.samples}, "
        f"risk at most {trial.epsilon:.2%} promised with {1 - trial.delta:.0%} confidence",
        ("thresholds", "broken", "95 % interval", "mean risk", "mean upload", "mean compute"),
        [
            (
                each.way,
                f"{each.broken_share:.1%}",
                f"{each.interval[0]:.1%} to {each.interval[1]:.1%}",
                f"{each.risk:.2%}",
                f"{each.upload_share:.2%}",
                f"{each.compute_share:.1%}",
            )
            for each in kept
        ],
    )


def _one_draw(pool: Pool, trial: Trial, seed: np.random.SeedSequence) -> dict[str, Deployed]:
    order = np.random.default_rng(seed).permutation(len(pool))[: trial.samples]
    cut = round(OPTIMISE_SHARE * trial.samples)
    chosen, tested = order[:cut], order[cut:]
    ladder = pool.ladders[0]
    rungs, known = pool.calibrated(ladder, chosen)
    optimise, test = known.rows(chosen), known.rows(tested)
    all_rungs, all_known = pool.calibrated(ladder, order)
    everything = all_known.rows(order)
    return {
        "as built, all plans": _built(pool, chosen, tested, trial),
        "per rung, certified": _deploy(known, *_certified(optimised_chain, rungs, optimise, test, trial)),
        "per rung, naive": _deploy(all_known, *_naive(optimised_chain, all_rungs, everything, trial)),
        "shared, certified": _deploy(known, *_certified(shared_chain, rungs, optimise, test, trial)),
        "shared, naive": _deploy(all_known, *_naive(shared_chain, all_rungs, everything, trial)),
    }


def _built(pool: Pool, chosen: NDArray[np.intp], tested: NDArray[np.intp], trial: Trial) -> Deployed:
    """`certify` itself: delta shared by the plans that pay, every one of them held to the promise."""
    measured, known = [], {}
    for ladder in pool.ladders:
        rungs, outcomes = pool.calibrated(ladder, chosen)
        known[ladder.name] = outcomes
        measured.append(MeasuredLadder(ladder.name, rungs, outcomes.rows(chosen), outcomes.rows(tested)))
    made = certify(measured, Targets(trial.epsilon, trial.delta), data_sha256="")
    deployed = {plan.name: _at_point(known[plan.name], plan) for plan in made.plans}
    return replace(deployed[made.default_plan], risk=max(each.risk for each in deployed.values()))


def _at_point(known: Outcomes, plan: Plan) -> Deployed:
    walked = walk(known, plan.rungs, plan.score, plan.points[plan.chosen].max_score)
    return Deployed(
        risk=float(np.mean(losses(known, walked))),
        upload_share=float(np.mean(walked.escalated)),
        compute_share=float(np.mean(walked.mult_adds)) / sum(rung.mult_adds for rung in plan.rungs),
    )


def _certified(
    make: MakeChain, rungs: tuple[Rung, ...], optimise: Outcomes, test: Outcomes, trial: Trial
) -> tuple[Chain, int]:
    """What `certify` does with one ladder, for either kind of chain."""
    tested = units_of(test)
    chain = make(rungs, optimise, expected_to_pass(optimise, tested, trial.epsilon, trial.delta))
    lost = measure(follow(chain, test), risk_if_answered(test), tested)
    return chain, max(last_passed(lost.p_values(trial.epsilon), trial.delta), 0)


def _naive(make: MakeChain, rungs: tuple[Rung, ...], outcomes: Outcomes, trial: Trial) -> tuple[Chain, int]:
    choose = cheapest_within(trial.epsilon, outcomes)
    chain = make(rungs, outcomes, choose)
    return chain, choose(follow(chain, outcomes))


def _deploy(pool: Outcomes, chain: Chain, point: int) -> Deployed:
    alone = Chain(chain.rungs, chain.score, chain.max_scores[point : point + 1])
    track = follow(alone, pool)
    work = [rung.mult_adds for rung in chain.rungs]
    return Deployed(
        risk=float(track.totals(risk_if_answered(pool), 0.0)[0]) / len(pool),
        upload_share=float(upload_shares(track)[0]),
        compute_share=float(mean_costs(track, work)[0]) / sum(work),
    )


def _summary(way: str, deployed: Sequence[Deployed], epsilon: float) -> Kept:
    draws = len(deployed)
    broken = sum(each.risk > epsilon for each in deployed)
    sides = np.array([broken, draws - broken], np.float64)
    above, below = upper_bounds(SampleLosses(sides, draws), _INTERVAL_LEVEL / 2)
    return Kept(
        way=way,
        draws=draws,
        broken=broken,
        interval=(1.0 - float(below), float(above)),
        risk=float(np.mean([each.risk for each in deployed])),
        upload_share=float(np.mean([each.upload_share for each in deployed])),
        compute_share=float(np.mean([each.compute_share for each in deployed])),
    )
