"""Climbs a plan's rungs for one sample or a batch. Pure but for the stages it is handed.

One thread owns a ladder: the buffers of its stages are shared from sample to sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_cascade.bundle import Bundle, StageModel
from edge_cascade.errors import BackendError, BundleError
from edge_cascade.gate import ACCEPT, CONTINUE, Exit, decide_exit, select_most_reliable
from edge_cascade.pauses import Pause, no_pause
from edge_cascade.policy import SAMPLE, Plan, Precision
from edge_cascade.preprocess import Normaliser
from edge_cascade.scores import LABEL, PROBABILITY, SCORE_COLUMN

Array = NDArray[np.float32]


class Bound(Protocol):
    """A stage with fixed buffers for one sample."""

    @property
    def features(self) -> Array | None: ...
    @property
    def head(self) -> Array: ...
    def run(self) -> None: ...


class StageRunner(Protocol):
    """A stage at a precision; every runtime offers this."""

    def bind(self, x: Array, temperature: float) -> Bound: ...
    def run_batch(self, x: Array, temperature: float) -> tuple[Array | None, Array]: ...


OpenStage = Callable[[StageModel, tuple[int, ...] | None], StageRunner]


# A Struct, because one is made per sample, and a frozen dataclass takes four times as long to make.
class Climb(msgspec.Struct, frozen=True):
    """What became of one sample.

    `answer` is the accepted exit, or the most reliable one seen if none was accepted. `failed` says that a
    stage did not run, or that every exit was NaN.
    """

    exits: tuple[Exit, ...]
    answer: Exit
    accepted: bool
    failed: bool = False


@dataclass(slots=True)
class _Step:
    """One rung, ready to run."""

    index: int
    bound: Bound
    must_agree: bool
    is_last: bool


class Ladder:
    """A bundle's plan at one of its operating points."""

    def __init__(
        self, bundle: Bundle, plan: Plan, open_stage: OpenStage, *, point: int | None = None
    ) -> None:
        """Open a runner per (stage, precision) that the plan uses.

        Raises:
            BackendError: when a runtime refuses a stage.
            BundleError: when the plan has no such point.
        """
        self.plan: Final = plan
        self._shape = bundle.graph.input_shape
        self._normaliser = Normaliser(bundle.graph.preprocess, self._shape)
        self._score_column = SCORE_COLUMN[plan.score]
        self._runners: dict[tuple[int, Precision], StageRunner] = {}
        for rung in plan.rungs:
            key = (rung.stage, rung.precision)
            if key not in self._runners:
                self._runners[key] = open_stage(
                    bundle.stage_models[key], bundle.graph.stages[rung.stage].feature_shape
                )
        self._input: Array = np.zeros(
            (1, *bundle.graph.preprocess.network_shape(bundle.graph.input_shape)), dtype=np.float32
        )
        self._sample = self._input[0]
        self._steps = self._bind_steps()
        self.set_point(plan.chosen if point is None else point)

    @property
    def point(self) -> int:
        """The index of the operating point in use."""
        return self._point

    def set_point(self, point: int) -> None:
        """Use another operating point from the next sample on.

        Raises:
            BundleError: when the plan has no such point.
        """
        if not 0 <= point < len(self.plan.points):
            raise BundleError(
                f"plan {self.plan.name!r} has points 0 to {len(self.plan.points) - 1}, not {point}"
            )
        self._point = point
        self._max_score = self.plan.points[point].max_score

    def warm_up(self, *, pause: Pause = no_pause) -> None:
        """Run every rung once on what is in the buffers, so that no sample pays for what a runtime puts off.

        `pause` is called before each.

        Raises:
            BackendError: when one of them does not run.
        """
        for step in self._steps:
            pause()
            step.bound.run()

    def climb(self, x: Array) -> Climb:
        """Classify one sample `(*input_shape) float32`, as it came off the wire or the sensor.

        Raises:
            BackendError: when the very first rung does not run.
        """
        self._normaliser.into(x, self._sample)
        exits: list[Exit] = []
        column, limits = self._score_column, self._max_score
        earlier_label: int | None = None
        for step in self._steps:
            try:
                step.bound.run()
            except BackendError:
                if not exits:
                    raise
                return Climb(tuple(exits), select_most_reliable(exits), accepted=False, failed=True)
            head = step.bound.head[0].tolist()
            exit_ = Exit(step.index, int(head[LABEL]), head[PROBABILITY], head[column])
            exits.append(exit_)
            decision = decide_exit(
                exit_.score,
                exit_.label,
                max_score=limits[step.index],
                earlier_label=earlier_label if step.must_agree else None,
                is_last=step.is_last,
            )
            if decision is ACCEPT:
                return Climb(tuple(exits), exit_, accepted=True)
            earlier_label = exit_.label
        return _unaccepted(exits)

    def climb_batch(self, x: Array) -> list[Climb]:
        """Classify `(n, *input_shape)`; each rung runs on the samples that no earlier rung accepted.

        Raises:
            BackendError: when a stage does not run.
        """
        normalised = np.empty((len(x), *self._sample.shape), dtype=np.float32)
        self._normaliser.into(x, normalised)
        exits: list[list[Exit]] = [[] for _ in x]
        climbs: dict[int, Climb] = {}
        alive = np.arange(len(x))
        # Features of the samples still alive, by the rung that made them.
        features: dict[int, Array] = {SAMPLE: normalised}
        for step, rung in zip(self._steps, self.plan.rungs, strict=True):
            if not len(alive):
                break
            runner = self._runners[rung.stage, rung.precision]
            made, head = runner.run_batch(features[rung.feeds_from], rung.temperature)
            if made is not None:
                features[step.index] = made
            keep = np.ones(len(alive), dtype=bool)
            for row, (sample, values) in enumerate(zip(alive.tolist(), head.tolist(), strict=True)):
                exit_ = Exit(step.index, int(values[LABEL]), values[PROBABILITY], values[self._score_column])
                earlier = exits[sample][-1].label if step.must_agree and exits[sample] else None
                exits[sample].append(exit_)
                decision = decide_exit(
                    exit_.score,
                    exit_.label,
                    max_score=self._max_score[step.index],
                    earlier_label=earlier,
                    is_last=step.is_last,
                )
                if decision is ACCEPT:
                    climbs[sample] = Climb(tuple(exits[sample]), exit_, accepted=True)
                keep[row] = decision is CONTINUE
            alive = alive[keep]
            features = {made_by: array[keep] for made_by, array in features.items()}
        return [climbs.get(sample) or _unaccepted(exits[sample]) for sample in range(len(x))]

    def _bind_steps(self) -> list[_Step]:
        steps: list[_Step] = []
        for index, rung in enumerate(self.plan.rungs):
            source: Array | None = self._input
            if rung.feeds_from != SAMPLE:
                source = steps[rung.feeds_from].bound.features
            if source is None:
                raise BundleError(f"plan {self.plan.name!r}: rung {rung.feeds_from} has no features to feed")
            bound = self._runners[rung.stage, rung.precision].bind(source, rung.temperature)
            steps.append(_Step(index, bound, rung.must_agree, is_last=index == len(self.plan.rungs) - 1))
        return steps


def _unaccepted(exits: list[Exit]) -> Climb:
    answer = select_most_reliable(exits)
    return Climb(tuple(exits), answer, accepted=False, failed=answer.probability != answer.probability)
