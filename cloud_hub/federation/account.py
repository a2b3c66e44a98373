"""What a series' noise is worth, for people: the account of `core.federation.privacy` made from settings."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator

from cloud_hub.core.federation.privacy import (
    PrivacyError,
    PrivacySpec,
    PrivacySpent,
    effective_votes,
    measure_privacy,
)
from cloud_hub.errors import RoundError
from cloud_hub.federation.settings import SeriesSettings, votes_needed


def account_of(settings: SeriesSettings, *, fleet: int, delta: float) -> PrivacySpent:
    """What a series with these settings spends of each board, in its least favourable rounds.

    These count the fewest votes that its quorum allows, one of them as heavy and the others as light as can
    be: noise hides a vote only as far as the others' counts beside it. Counts the rounds that are committed;
    each one that fails and is retried costs as much as one of them.

    Raises:
        RoundError: without noise, with numbers out of range, or where dp-accounting is not installed.
    """
    if settings.noise_multiplier <= 0.0:
        raise RoundError("noise_multiplier is 0: without noise there is no (epsilon, delta) to account for")
    cohort = min(settings.cohort, fleet)
    try:
        return measure_privacy(
            PrivacySpec(
                clip_norm=settings.clip_norm,
                noise_multiplier=settings.noise_multiplier,
                cohort_size=cohort,
                fleet_size=fleet,
                rounds=settings.rounds,
                delta=delta,
                votes=effective_votes([1.0, *[_lightest(settings)] * (votes_needed(settings, cohort) - 1)]),
            )
        )
    except PrivacyError as error:
        raise RoundError(str(error)) from error


def _lightest(settings: SeriesSettings) -> float:
    """What a vote weighs at least beside the heaviest one: nearly nothing where it is no weighted mean.

    How such rules add noise up depends on the votes themselves: no more is claimed than for a vote alone.
    """
    match settings.strategy:
        case "fedbuff":
            return 1.0 / math.sqrt(1.0 + settings.max_staleness)
        case "median" | "trimmed" | "clipped":
            return sys.float_info.epsilon
        case _:
            return settings.min_examples / settings.max_examples


def lines_of(spent: PrivacySpent, *, delta: float) -> Iterator[str]:
    """The account in words."""
    rows = (
        (spent.update, "one update, for the hub, which sees it alone and knows whose it is"),
        (spent.device, "all updates of one board, for the hub"),
        (spent.aggregate, "all rounds together, for whoever sees the weights and nothing else"),
        (spent.aggregate_if_uniform, "the same, were cohorts drawn uniformly and in secret: they are not"),
    )
    yield f"epsilon at delta {delta:g}"
    for epsilon, what in rows:
        yield f"  {epsilon:8.3g}   {what}"
    of_one, of_mean = spent.noise_std, spent.mean_noise_std
    yield f"noise: {of_one:.3g} on each number of an update, {of_mean:.3g} on the mean's"
    yield (
        "not covered: escalations and audits, which are inputs; how many examples a board has; a board that "
        "adds no noise"
    )
