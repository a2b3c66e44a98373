"""What every rung said of every sample, and what a choice of thresholds would have cost. No I/O.

Stages are run once, by the caller; thresholds, plans, certificates and reports are then arithmetic on these
arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_cascade.policy import ACCEPT_ALL, Rung
from edge_cascade.scores import LABEL, SCORE_COLUMN, ScoreName

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Outcomes:
    """Each rung's head `(rungs, n, 5)`, the full model's labels and the true ones `(n,)`.

    `labels` is None where nobody knows the truth. `groups` `(n,)` names what belongs together (a recording,
    a subject, overlapping windows): samples of one group are not independent. None: every sample is.
    """

    heads: Floats
    full_labels: Labels
    labels: Labels | None = None
    groups: Labels | None = None

    def __len__(self) -> int:
        return len(self.full_labels)

    @property
    def reference(self) -> Labels:
        """The truth where it is known, else the full model's answer."""
        return self.full_labels if self.labels is None else self.labels

    @property
    def full_accuracy(self) -> float:
        """Share of samples that the full model gets right."""
        return float(np.mean(self.full_labels == self.reference))

    @property
    def rung_accuracy(self) -> tuple[float, ...]:
        """Share of samples that each rung alone gets right."""
        return tuple(float(np.mean(head[:, LABEL] == self.reference)) for head in self.heads)

    def rows(self, index: NDArray[np.intp]) -> Outcomes:
        """Some of the samples."""
        return Outcomes(
            heads=self.heads[:, index],
            full_labels=self.full_labels[index],
            labels=None if self.labels is None else self.labels[index],
            groups=None if self.groups is None else self.groups[index],
        )


def joined(first: Outcomes, second: Outcomes) -> Outcomes:
    """Two sets of samples as one; both have labels or none has, and the same for groups."""
    return Outcomes(
        heads=np.concatenate([first.heads, second.heads], axis=1),
        full_labels=np.concatenate([first.full_labels, second.full_labels]),
        labels=_joined(first.labels, second.labels),
        groups=_joined(first.groups, second.groups),
    )


def _joined(first: Labels | None, second: Labels | None) -> Labels | None:
    return None if first is None or second is None else np.concatenate([first, second])


@dataclass(frozen=True, slots=True)
class Walk:
    """What became of every sample at one choice of thresholds, all `(n,)`.

    `rung` is the one that accepted, -1 where none did; `label` its answer, there the full model's.
    `mult_adds` counts the rungs that were climbed.
    """

    rung: NDArray[np.intp]
    label: Labels
    mult_adds: NDArray[np.float64]

    @property
    def escalated(self) -> NDArray[np.bool_]:
        """Which samples no rung accepted."""
        missed: NDArray[np.bool_] = self.rung < 0
        return missed


def walk(outcomes: Outcomes, rungs: Sequence[Rung], score: ScoreName, max_score: Sequence[float]) -> Walk:
    """Climb the rungs with one threshold each, by the gate's rule (`edge_cascade.gate.decide_exit`)."""
    n = len(outcomes)
    accepted_by = np.full(n, -1, np.intp)
    label = outcomes.full_labels.copy()
    work = np.zeros(n)
    alive = np.ones(n, bool)
    earlier: Labels | None = None
    for index, (rung, head, limit) in enumerate(zip(rungs, outcomes.heads, max_score, strict=True)):
        own = head[:, LABEL].astype(np.int64)
        work[alive] += rung.mult_adds
        # In doubles, as a device compares: a threshold has no float32 of its own.
        accepts = alive & (head[:, SCORE_COLUMN[score]].astype(np.float64) <= limit)
        if rung.must_agree and earlier is not None and limit < ACCEPT_ALL:
            accepts &= own == earlier
        accepted_by[accepts] = index
        label[accepts] = own[accepts]
        alive &= ~accepts
        earlier = own
    return Walk(accepted_by, label, work)


def losses(outcomes: Outcomes, walked: Walk) -> NDArray[np.bool_]:
    """Where the device answers, is wrong, and the full model is right `(n,)`; needs true labels."""
    wrong: NDArray[np.bool_] = walked.label != outcomes.reference
    right: NDArray[np.bool_] = outcomes.full_labels == outcomes.reference
    return ~walked.escalated & wrong & right


def disagreements(outcomes: Outcomes, walked: Walk) -> NDArray[np.bool_]:
    """Where the device answers, and otherwise than the full model `(n,)`."""
    other: NDArray[np.bool_] = walked.label != outcomes.full_labels
    return ~walked.escalated & other
