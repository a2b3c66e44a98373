"""What a series' noise is worth, for people: the account of `core.federation.privacy` made from settings."""

from __future__ import annotations

import math
from collections.abc import Iterator

from cloud_hub.core.federation.privacy import PrivacyError, PrivacySpec, PrivacySpent, measure_privacy
from cloud_hub.errors import RoundError
from cloud_hub.federation.settings import SeriesSettings


def account_of(settings: SeriesSettings, *, fleet: int, delta: float) -> PrivacySpent:
    """What a series with these settings spends of each board, with the fewest votes that its quorum allows.

    Counts the rounds that are committed; each one that fails and is retried costs as much as one of them.

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
                votes=max(1, math.ceil(settings.quorum * cohort)),
            )
        )
    except PrivacyError as error:
        raise RoundError(str(error)) from error


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
    yield "not covered: escalations and audits, which are inputs; a board that adds no noise"
