"""Whether data that nobody calibrated on contradict a certificate. No I/O.

The interval is Clopper and Pearson's (1934, Biometrika 26, 404-413), the test the exact binomial one; both
take samples for independent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from cloud_hub.builder.calibration.outcomes import Outcomes, Walk, disagreements, losses
from edge_cascade.policy import Certificate

LEVEL: Final = 0.05
"""Data contradict a certificate when they would be this rare, or rarer, if it held."""

_BISECTIONS: Final = 60


class Check(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A certificate held against data: `observed` of `samples` cost something, `risk` is their share.

    `interval` holds the true share with confidence 0.95; `p_value` is the chance of so many or more if the
    true share were `epsilon`. `sentence` says it all.
    """

    kind: Literal["loss", "disagreement"]
    epsilon: float
    delta: float
    observed: int
    samples: int
    risk: float
    interval: tuple[float, float]
    p_value: float
    contradicts: bool
    sentence: str


def check_certificate(certificate: Certificate, outcomes: Outcomes, walked: Walk) -> Check | None:
    """Hold a certificate against what became of other samples; None for a loss that nobody can know of."""
    if certificate.kind == "loss" and outcomes.labels is None:
        return None
    found = losses if certificate.kind == "loss" else disagreements
    observed, samples = int(found(outcomes, walked).sum()), len(outcomes)
    p_value = binomial_tail(observed, samples, certificate.epsilon)
    interval = clopper_pearson(observed, samples, LEVEL)
    contradicts = p_value <= LEVEL
    return Check(
        kind=certificate.kind,
        epsilon=certificate.epsilon,
        delta=certificate.delta,
        observed=observed,
        samples=samples,
        risk=observed / samples,
        interval=interval,
        p_value=p_value,
        contradicts=contradicts,
        sentence=(
            f"{certificate.kind} in {observed:,} of {samples:,} samples ({_percent(observed / samples)}, "
            f"{(1 - LEVEL) * 100:.0f} % interval {_percent(interval[0])} to {_percent(interval[1])}), "
            f"promised at most {_percent(certificate.epsilon)}: {_verdict(contradicts)} (p = {p_value:.2g})"
            f"{_caution(outcomes)}"
        ),
    )


def clopper_pearson(observed: int, samples: int, alpha: float) -> tuple[float, float]:
    """The exact interval of level 1 - `alpha` for a share of which `observed` of `samples` were seen."""
    low = high = 0.0
    if observed > 0:
        low = _bisect(lambda share: binomial_tail(observed, samples, share) > alpha / 2)
    high = 1.0
    if observed < samples:
        high = _bisect(lambda share: 1.0 - binomial_tail(observed + 1, samples, share) <= alpha / 2)
    return low, high


def binomial_tail(observed: int, samples: int, share: float) -> float:
    """The chance of `observed` or more out of `samples`, each with probability `share`."""
    if observed <= 0:
        return 1.0
    if share <= 0.0 or observed > samples:
        return 0.0
    if share >= 1.0:
        return 1.0
    # The smaller side is summed, so that nothing is lost to a subtraction from one.
    if observed > share * samples:
        return float(np.exp(_log_weights(observed, samples, samples, share)).sum())
    return float(1.0 - np.exp(_log_weights(0, observed - 1, samples, share)).sum())


def _log_weights(first: int, last: int, samples: int, share: float) -> NDArray[np.float64]:
    """Logarithms of the binomial probabilities of `first` to `last`."""
    counts = np.arange(first, last + 1)
    log_factorials = np.concatenate(([0.0], np.cumsum(np.log(np.arange(1, samples + 1)))))
    choices = log_factorials[samples] - log_factorials[counts] - log_factorials[samples - counts]
    weights: NDArray[np.float64] = choices + counts * np.log(share) + (samples - counts) * np.log1p(-share)
    return weights


def _bisect(is_above: Callable[[float], bool]) -> float:
    """The least share in 0..1 from which on `is_above` holds."""
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if is_above(middle) else (middle, high)
    return (low + high) / 2


def _percent(share: float) -> str:
    return f"{share * 100:.2f} %"


def _verdict(contradicts: bool) -> str:
    if contradicts:
        return (
            "the data contradict the certificate: they are unlike those it was measured on, or it is one of "
            "the few that do not hold"
        )
    return "the data do not contradict the certificate"


def _caution(outcomes: Outcomes) -> str:
    if outcomes.groups is None or len(np.unique(outcomes.groups)) == len(outcomes):
        return ""
    return "; samples of one group are not independent, so take interval and p as a hint"
