"""What every ladder of a network says of D_opt and of D_cal. No files; nothing is decided here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from msgspec.structs import replace

from cloud_hub.builder.calibration.certify import MeasuredLadder
from cloud_hub.builder.calibration.outcomes import Floats, Labels, Outcomes
from cloud_hub.builder.collect import StageRuns, Stages, Step
from cloud_hub.builder.costs import Costs


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """Normalised samples `x` (n, *network_shape) and what is known of them: see `Outcomes`."""

    x: Floats
    full_labels: Labels
    labels: Labels | None = None
    groups: Labels | None = None

    def __len__(self) -> int:
        return len(self.x)


def measure_ladders(
    stages: Stages,
    ladders: Mapping[str, Sequence[Step]],
    optimise: Judged,
    test: Judged,
    *,
    costs: Costs,
    on_rung: Callable[[], None] = lambda: None,
) -> list[MeasuredLadder]:
    """Run the ladders on both parts. Temperatures are fitted on `optimise` alone, to the truth if known.

    `costs` are what stages take on the board, for those of which it is known.
    """
    reference = optimise.full_labels if optimise.labels is None else optimise.labels
    rows = np.arange(len(optimise))
    runs = StageRuns(stages, np.concatenate([optimise.x, test.x]), on_rung=on_rung)
    measured = []
    for name, steps in ladders.items():
        rungs, heads = runs.calibrate(steps, reference, rows)
        priced = tuple(replace(rung, cost_us=costs.get((rung.stage, rung.precision))) for rung in rungs)
        measured.append(
            MeasuredLadder(
                name,
                priced,
                _outcomes(heads[:, : len(optimise)], optimise),
                _outcomes(heads[:, len(optimise) :], test),
            )
        )
    return measured


def _outcomes(heads: Floats, part: Judged) -> Outcomes:
    return Outcomes(heads, part.full_labels, part.labels, part.groups)
