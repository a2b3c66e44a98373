"""The board's network: the user's own with exits, one of a family, or that of a bundle that is rebased."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from rich.console import Console

from cloud_hub.builder.assemble import Cuts, cut_network
from cloud_hub.builder.collect import Stages, full_labels, full_logits, received, stages_of_bundle
from cloud_hub.builder.costs import board_ratio
from cloud_hub.builder.extra import require_extra
from cloud_hub.builder.fine_tune import FineTuned, Judges, fine_tune
from cloud_hub.builder.graphs.adopt import adopt
from cloud_hub.builder.graphs.cuts import cut_table, prepare_cuts
from cloud_hub.builder.graphs.staged import StagedGraph
from cloud_hub.builder.networks.export import export_staged
from cloud_hub.builder.networks.family import Candidate, default_family
from cloud_hub.builder.networks.selection import measure_candidate, select_candidate
from cloud_hub.builder.networks.stepwise import Descent, teach_by_steps
from cloud_hub.builder.networks.training import (
    SOFTENING,
    Distillation,
    Lesson,
    Schedule,
    train_edge,
)
from cloud_hub.builder.prepare import Prepared
from cloud_hub.builder.request import BuildRequest
from cloud_hub.builder.samples.data import data_sha256
from cloud_hub.builder.steps import Steps
from cloud_hub.errors import BuildError
from edge_cascade.bundle import Bundle
from edge_cascade.policy import Precision
from edge_cascade.preprocess import normalise

REPRESENTATIVE: Final = 1_024
"""Training samples from which int8 takes its ranges."""

EXIT_WEIGHTS: Final = (0.3, 0.6, 1.0)
"""What the exits' losses count in training, first exit first: the last one answers alone when it must."""

PEAK_RATE: Final = 3e-3


@dataclass(frozen=True, slots=True)
class EdgeNetwork:
    """The stages as they ship, and how they were made, for people to read."""

    stages: Stages
    made_by: Mapping[str, str]
    litert: Mapping[tuple[int, Precision], bytes] = field(default_factory=dict)


def make_edge_network(
    request: BuildRequest, prepared: Prepared, steps: Steps, console: Console
) -> EdgeNetwork:
    """Train or take the network that was asked for, quantise and cut it.

    Raises:
        BuildError: a network that cannot be used, or none that fits the budget.
    """
    if prepared.base is not None:
        return _rebased(prepared.base, request)
    made_by: Mapping[str, str]
    if request.edge is not None:
        staged, made_by = _with_exits(Path(request.edge), request, prepared, steps, console)
    else:
        staged, made_by = _trained(request, prepared, steps, console)
    console.print("quantising and cutting")
    cuts = cut_network(staged, prepared.splits.train.x[:REPRESENTATIVE], prepared.declaration)
    litert = litert_of(cuts) if request.litert else {}
    return EdgeNetwork(cuts.stages, {**made_by, "parameters": f"{staged.parameter_count:,}"}, litert)


def _rebased(bundle: Bundle, request: BuildRequest) -> EdgeNetwork:
    litert = {
        key: stage.litert.content for key, stage in bundle.stage_models.items() if stage.litert is not None
    }
    if request.litert and not litert:
        raise BuildError("rebase: the bundle has no stages for LiteRT: build it again with --litert")
    made_by = {"network": f"that of bundle {bundle.bundle_id[:12]}, not trained again"}
    return EdgeNetwork(stages_of_bundle(bundle), made_by, litert)


def _lesson(prepared: Prepared, console: Console) -> Lesson:
    console.print("asking the full model about the training data")
    train = prepared.splits.train
    x = normalise(train.x, prepared.declaration.preprocess)
    teacher = full_logits(prepared.full_file, x)
    y = teacher.argmax(axis=1).astype(np.int64) if train.y is None else train.y
    return Lesson(x, y, teacher)


def _with_exits(
    edge: Path, request: BuildRequest, prepared: Prepared, steps: Steps, console: Console
) -> tuple[StagedGraph, Mapping[str, str]]:
    from cloud_hub.builder.graphs.heads import teach_by_torch, train_heads

    own = adopt(edge, sample_shape=prepared.full.input_shape, role="edge network")
    if own.classes != prepared.full.classes or own.input_shape != prepared.full.input_shape:
        raise BuildError(
            f"edge network {edge}: takes {own.input_shape} and tells {own.classes} classes apart, the full "
            f"model {prepared.full.input_shape} and {prepared.full.classes}"
        )
    plan = prepare_cuts(own, shares=request.exits, names=request.cuts or None)
    for name, shape, share in cut_table(plan):
        console.print(f"  exit behind {name} ({shape}), {share} of the work", markup=False)
    lesson = _lesson(prepared, console)
    console.print("training the exits")
    staged = train_heads(
        own,
        plan,
        lesson,
        seed=request.seed,
        share=request.distillation,
        steps=steps,
        teach=teach_by_steps if request.fine_tune else teach_by_torch,
    )
    named = f"{edge.name} with {staged.stages} exits"
    if not request.fine_tune:
        return staged, {"network": f"{named}, its trunk frozen"}
    console.print("fine-tuning the whole network")
    tuned = _fine_tuned(staged, lesson, request, prepared, steps)
    console.print(f"  {tuned.said}", markup=False)
    if not tuned.taken:
        return tuned.staged, {"network": f"{named}, its trunk frozen", "fine-tuning": tuned.said}
    training = (
        f"{request.epochs} epochs, learning rate {request.learning_rate:g}, distillation "
        f"{request.distillation:g}, seed {request.seed}"
    )
    return tuned.staged, {"network": f"{named}, fine-tuned", "training": training, "fine-tuning": tuned.said}


def _fine_tuned(
    staged: StagedGraph, lesson: Lesson, request: BuildRequest, prepared: Prepared, steps: Steps
) -> FineTuned:
    """Judged on D_opt, by its labels or the full model's answers."""
    held_out, declaration = prepared.splits.optimise, prepared.declaration
    y = held_out.y
    if y is None:
        y = full_labels(prepared.full_file, received(held_out.x, declaration.preprocess, declaration.wire))
    descent = Descent(
        epochs=request.epochs,
        batch=request.batch,
        peak_rate=request.learning_rate,
        share=request.distillation,
        seed=request.seed,
        threads=len(os.sched_getaffinity(0)),
    )
    return fine_tune(staged, lesson, descent, Judges(normalise(held_out.x, declaration.preprocess), y), steps)


def _trained(
    request: BuildRequest, prepared: Prepared, steps: Steps, console: Console
) -> tuple[StagedGraph, Mapping[str, str]]:
    require_extra("torch")
    candidate = choose_candidate(request, prepared)
    lesson = _lesson(prepared, console)
    console.print(f"training the {candidate.name} network: {candidate.network.parameter_count:,} parameters")
    schedule = Schedule(
        epochs=request.epochs,
        seed=request.seed,
        batch=request.batch,
        peak_rate=PEAK_RATE,
        threads=len(os.sched_getaffinity(0)),
    )
    distillation = Distillation(request.distillation, SOFTENING, EXIT_WEIGHTS)
    depends_on = [
        str(candidate.network),
        str(schedule),
        str(distillation),
        data_sha256(prepared.splits.train),
        str(prepared.declaration.preprocess),
        full_digest(prepared),
    ]
    parameters = steps.arrays(
        "network",
        depends_on,
        lambda checkpoint: dict(
            train_edge(
                candidate.network,
                lesson.x,
                lesson.y,
                schedule=schedule,
                distillation=distillation,
                teacher_logits=lesson.teacher,
                checkpoint=checkpoint,
            )
        ),
    )
    staged = export_staged(
        candidate.network, {name: array.astype(np.float32) for name, array in parameters.items()}
    )
    return staged, {
        "network": f"{candidate.name} of the default family",
        "training": f"{request.epochs} epochs, distillation {request.distillation:g}, seed {request.seed}",
    }


def choose_candidate(request: BuildRequest, prepared: Prepared) -> Candidate:
    """The network of the family that was asked for, or the largest within the budgets.

    Without a budget that is the medium one.
    """
    family = default_family(prepared.full.input_shape, prepared.full.classes)
    if request.size != "auto":
        return next(candidate for candidate in family if candidate.name == request.size)
    if request.budget_ms is None and request.budget_kb is None:
        return next(candidate for candidate in family if candidate.name == "medium")
    scale = 1.0
    if request.profile is not None and request.budget_ms is not None:
        scale = board_ratio(Path(request.profile)).get("fp32", 1.0)
    return select_candidate(
        family,
        budget_us=None if request.budget_ms is None else 1000.0 * request.budget_ms,
        budget_bytes=None if request.budget_kb is None else int(1000 * request.budget_kb),
        measure=lambda candidate: measure_candidate(candidate, scale=scale),
    )


def full_digest(prepared: Prepared) -> str:
    """SHA-256 of the full model's file."""
    return hashlib.sha256(prepared.full_file).hexdigest()


def litert_of(cuts: Cuts) -> Mapping[tuple[int, Precision], bytes]:
    """The same stages for LiteRT.

    Raises:
        BuildError: naming an operator that cannot be written for it.
    """
    from cloud_hub.builder.litert.stage_files import litert_files

    return litert_files(cuts.by_precision, cuts.staged)
