"""What stages cost: on this machine by the clock, on a board by its profile.

Without a profile nothing is measured, and what a bundle says depends on no clock. With one, what the new
stages take here is scaled by how much slower the board is, so two builds may differ in their costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from cloud_hub.builder.calibration.outcomes import Floats
from cloud_hub.builder.collect import Stages
from cloud_hub.errors import BuildError
from edge_cascade.backends.onnx import OnnxStage
from edge_cascade.bundle import StageModel, load_bundle
from edge_cascade.ladder import StageRunner
from edge_cascade.policy import Precision
from edge_cascade.profile import Pace, Profile, ProfileError, StageCost, read_profile, speed_ratio
from edge_cascade.shipped import shipped_model_dir, shipped_models
from edge_cascade.stage_timing import StageKey, open_stage_cases, runnable_cases, stage_costs
from edge_cascade.timing import Stopwatch, collector_off, measure_tight

RUNTIME: Final = "onnxruntime"
PACE: Final[Pace] = "tight"
SECONDS: Final = 3.0
"""How long a network's stages are timed together."""

Costs = Mapping[tuple[int, Precision], float]
"""Median microseconds of one sample in every (stage, precision)."""

_PAYS: Final = 0.95  # int8 answers a little differently; a few percent of time are not worth that


def measure_stages(stages: Stages, x: Floats, *, seconds: float = SECONDS) -> Costs:
    """What every (stage, precision) takes on this machine, with one normalised sample `(1, *input_shape)`."""
    models = {StageKey(*key): model for key, model in stages.models.items()}
    cases = open_stage_cases(models, stages.feature_shapes, x, _open_stage)
    with collector_off():
        timings = measure_tight(cases, seconds, Stopwatch())
    return {(key.stage, key.precision): timing.p50_us for key, timing in timings.items()}


def board_costs(stages: Stages, x: Floats, path: Path) -> Costs:
    """What every (stage, precision) is expected to take on the board whose profile is in a file.

    Raises:
        BuildError: when the profile cannot be used.
    """
    ratio = board_ratio(path)
    other = next(iter(ratio.values()))
    return {
        (stage, precision): round(cost_us * ratio.get(precision, other), 2)
        for (stage, precision), cost_us in measure_stages(stages, x).items()
    }


def check_profile(path: Path) -> None:
    """Refuse a board's profile that nothing here can be compared with, before anything is trained or timed.

    Raises:
        BuildError: when the profile cannot be read, or has nothing that can be measured here too.
    """
    there = _read(path)
    shipped = {load_bundle(shipped_model_dir(name) / "bundle").bundle_id for name in shipped_models()}
    known = [cost for cost in there.stages if cost.bundle_id in shipped]
    if not any((cost.runtime, cost.pace) == (RUNTIME, PACE) for cost in known):
        raise _nothing_shared(path, there)


def board_ratio(path: Path) -> Mapping[Precision, float]:
    """How many times longer than this machine a board takes, by precision, from the models that ship.

    Raises:
        BuildError: when the profile cannot be read, or has nothing that can be measured here too.
    """
    there = _read(path)
    ratio = speed_ratio(measure_here(there), there.stages, pace=PACE)
    if not ratio:
        raise _nothing_shared(path, there)
    return ratio


def int8_pays(costs: Costs) -> bool:
    """Whether any stage is faster in int8 than in fp32."""
    return any(
        cost_us < _PAYS * costs[stage, "fp32"]
        for (stage, precision), cost_us in costs.items()
        if precision == "int8" and (stage, "fp32") in costs
    )


def measure_here(there: Profile) -> tuple[StageCost, ...]:
    """The stages of the models that ship, as far as a board's profile has them too, on this machine."""
    measured = {cost.bundle_id for cost in there.stages}
    costs: list[StageCost] = []
    for name in shipped_models():
        bundle = load_bundle(shipped_model_dir(name) / "bundle")
        if bundle.bundle_id in measured:
            cases = runnable_cases(bundle, RUNTIME, _open_stage)
            with collector_off():
                timings = measure_tight(cases, SECONDS, Stopwatch())
            costs += stage_costs(bundle, RUNTIME, PACE, timings.items())
    return tuple(costs)


def _read(path: Path) -> Profile:
    try:
        return read_profile(path)
    except ProfileError as error:
        raise BuildError(str(error)) from error


def _nothing_shared(path: Path, there: Profile) -> BuildError:
    runtimes = sorted({cost.runtime for cost in there.stages}) or ["no runtime"]
    if RUNTIME not in runtimes:
        return BuildError(
            f"{path}: measured with {', '.join(runtimes)}, and what is compared is {RUNTIME}: measure the "
            f"board with `edge-daemon profile --runtime {RUNTIME}`"
        )
    return BuildError(
        f"{path}: holds no stage of the models that ship with this version: measure the board again"
    )


def _open_stage(stage: StageModel, feature_shape: tuple[int, ...] | None) -> StageRunner:
    return OnnxStage(stage, feature_shape)
