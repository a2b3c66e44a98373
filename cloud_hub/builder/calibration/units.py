"""The independent units of a set of samples, and the losses of every point counted by them. No I/O."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cloud_hub.builder.calibration.chain import ChoosePoint
from cloud_hub.builder.calibration.outcomes import Outcomes
from cloud_hub.builder.calibration.p_values import GroupLosses, Losses, Method, SampleLosses, last_passed
from cloud_hub.builder.calibration.track import Array, Marks, Track, risk_if_answered, upload_shares


@dataclass(frozen=True, slots=True)
class Units:
    """Which unit each sample belongs to `(n,)`, and how many samples each unit has `(units,)`."""

    index: NDArray[np.intp]
    sizes: Array

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def method(self) -> Method:
        """How the risk is tested: units of one sample each are independent samples."""
        return "binomial" if len(self.sizes) == len(self.index) else "betting"

    @property
    def full_size(self) -> float:
        """How many units of the largest one's size the samples would fill: what betting counts."""
        return float(self.sizes.sum() / self.sizes.max())


def units_of(outcomes: Outcomes) -> Units:
    """The groups of the samples; every sample is one where none are named."""
    if outcomes.groups is None:
        return Units(np.arange(len(outcomes)), np.ones(len(outcomes)))
    _, index, counts = np.unique(outcomes.groups, return_inverse=True, return_counts=True)
    return Units(index, counts.astype(np.float64))


def measure(track: Track, if_answered: Marks, units: Units) -> Losses:
    """The losses of every point, ready to be tested; `if_answered` `(rungs, n)` marks what is one."""
    if units.method == "binomial":
        return SampleLosses(track.totals(if_answered, 0.0), len(units))
    return GroupLosses(track.totals_by_unit(if_answered, 0.0, units.index, len(units)), units.sizes)


def foresee(track: Track, if_answered: Marks | Array, own: Units, tested: Units) -> Losses:
    """The losses to expect on `tested`, from samples like them whose units are `own`. For plans, no test.

    To the losses that were seen one more unit's is added, less where little is answered: the thresholds were
    fitted to these samples, and where none of them was lost it does not follow that none will be.
    """
    answered = 1.0 - upload_shares(track)
    if tested.method == "binomial":
        share = (track.totals(if_answered, 0.0) + answered) / len(own.index)
        return SampleLosses(share * len(tested), len(tested))
    losses = track.totals_by_unit(if_answered, 0.0, own.index, len(own))
    losses += np.outer(answered, own.sizes / len(own))
    return GroupLosses(losses, own.sizes, repeats=tested.full_size / own.full_size)


def lossless(units: Units) -> Losses:
    """One point at which nothing is lost: the most that these units can show."""
    if units.method == "binomial":
        return SampleLosses(np.zeros(1), len(units))
    return GroupLosses(np.zeros((1, len(units))), units.sizes)


def expected_to_pass(outcomes: Outcomes, tested: Units, epsilon: float, level: float) -> ChoosePoint:
    """Chooses the last point that `tested` should pass if its samples are like `outcomes`; 0 if none."""
    own, risk = units_of(outcomes), risk_if_answered(outcomes)

    def choose(track: Track) -> int:
        return max(last_passed(foresee(track, risk, own, tested).p_values(epsilon), level), 0)

    return choose
