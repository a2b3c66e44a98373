"""`cloud-hub build`: from a trained classifier and data to a certified bundle.

The order is what makes the certificate hold: the network learns from the training part, int8 takes its
ranges from it, temperatures, scores, chains and the choice of plans come from D_opt, and D_cal is read by
the tests; before them only for copies, groups and which classes it has. Everything that takes long is kept
beside the result until the build is finished.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from rich.console import Console
from rich.progress import Progress

from cloud_hub.builder import measure
from cloud_hub.builder.assemble import (
    BUNDLE,
    Content,
    Policy,
    ladder_steps,
    write_model,
)
from cloud_hub.builder.calibration.certify import Certified, MeasuredLadder, Targets, certify
from cloud_hub.builder.calibration.saving import check_saving
from cloud_hub.builder.collect import Stages, Step, collect, full_labels, received, stages_of_bundle
from cloud_hub.builder.costs import Costs, board_costs, int8_pays, measure_stages
from cloud_hub.builder.edge_network import EdgeNetwork, make_edge_network
from cloud_hub.builder.joined import staged_of_stages, what_learns
from cloud_hub.builder.naive import choose_naive, naive_policy
from cloud_hub.builder.prepare import Prepared, prepare
from cloud_hub.builder.reports.card import (
    Card,
    DataPart,
    Provenance,
    StageTime,
    TradeRow,
    make_card,
)
from cloud_hub.builder.reports.card_files import discard_card, write_card
from cloud_hub.builder.reports.traffic import PlanRun
from cloud_hub.builder.request import BuildRequest
from cloud_hub.builder.samples.data import Dataset, data_sha256
from cloud_hub.builder.steps import FOLDER, Steps
from cloud_hub.builder.write import recover_bundle
from cloud_hub.errors import BuildError, CertificateError
from edge_cascade.bundle import GRAPH, MANIFEST, Bundle, load_bundle
from edge_cascade.preprocess import normalise

CARD_SECONDS: Final = 0.5
"""How long the stages are timed for the card."""


@dataclass(frozen=True, slots=True)
class Built:
    """A finished build. `certified` is None where no certificate was asked for."""

    out: Path
    bundle_id: str
    card: Card
    certified: Certified | None


def build(request: BuildRequest, console: Console | None = None) -> Built:
    """Build what is asked for and write it to `request.out`.

    Raises:
        BuildError: a model, data or request that cannot be used, in one line.
        CertificateError: too little data for the promise, or a promise that needs more uploads than allowed.
    """
    console = console or Console(stderr=True)
    out = Path(request.out)
    check_out(out)
    steps = Steps(out / FOLDER)
    console.print("reading the data and the full model")
    prepared = prepare(request)
    for note in prepared.notes:
        console.print(f"  {note}", markup=False)
    built = complete(request, prepared, make_edge_network(request, prepared, steps, console), console)
    steps.discard()
    return built


def complete(request: BuildRequest, prepared: Prepared, network: EdgeNetwork, console: Console) -> Built:
    """Calibrate, certify and write a network that is ready: what is left when training is over.

    Raises:
        BuildError, CertificateError: as `build`.
    """
    out = Path(request.out)
    console.print("calibrating on what trained nothing")
    costs = _board_costs(request, prepared, network.stages)
    ladders = measure_ladders(request, prepared, network.stages, costs, console)
    policy, certified = decide(request, prepared, ladders)
    limits = what_learns(staged_of_stages(network.stages, len(prepared.declaration.labels)))
    if limits:
        console.print(f"  {limits}", markup=False)
    if certified is not None:
        check_saving(certified, epsilon=request.epsilon, max_upload=request.max_upload)
    content = Content(
        declaration=prepared.declaration,
        stages=network.stages,
        policy=policy,
        full_model=prepared.full_file,
        golden_samples=prepared.splits.calibrate.x,
        litert=network.litert,
    )
    with uninterrupted(), writing_to(out):
        # A card that is about another bundle is worse than none.
        discard_card(out)
        bundle_id = write_model(out, content)
    card = _card(request, prepared, network.made_by, ladders, certified)
    with uninterrupted(), writing_to(out):
        write_card(out, card)
    return Built(out, bundle_id, card, certified)


def check_out(out: Path) -> None:
    """Refuse a directory that cannot be written, or holds something else where the bundle goes.

    Raises:
        BuildError: before any work is done for nothing.
    """
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise BuildError(f"out: {there} is no directory: choose another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise BuildError(f"out: {there} cannot be written: choose another")
    bundle = out / BUNDLE
    if bundle.exists() and not (bundle / GRAPH / MANIFEST).is_file():
        raise BuildError(f"out: {bundle} is there and is no bundle: choose another directory or remove it")
    if out.is_dir():
        with writing_to(out):
            recover_bundle(bundle)


@contextmanager
def writing_to(out: Path) -> Iterator[None]:
    """Around writes.

    Raises:
        BuildError: for a full disk and its like, in one line.
    """
    try:
        yield
    except OSError as error:
        raise BuildError(f"{error.filename or out}: cannot be written: {error.strerror or error}") from error


def measure_ladders(
    request: BuildRequest, prepared: Prepared, stages: Stages, costs: Costs, console: Console
) -> list[MeasuredLadder]:
    """Every ladder that was asked for, on D_opt and D_cal: temperatures are fitted on D_opt alone.

    Where the costs on the board are known, int8 is left out if no stage gains by it.
    """
    splits = prepared.splits
    optimise, test = _judged(prepared, splits.optimise), _judged(prepared, splits.calibrate)
    pays = not costs or int8_pays(costs)
    wanted: dict[str, Sequence[Step]] = {
        name: steps
        for name, steps in ladder_steps(len(stages.mult_adds)).items()
        if name in request.plans and (pays or name == "fp32" or "fp32" not in request.plans)
    }
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("running every rung", total=sum(map(len, wanted.values())))
        return measure.measure_ladders(
            stages, wanted, optimise, test, costs=costs, on_rung=lambda: progress.advance(task)
        )


def _judged(prepared: Prepared, part: Dataset) -> measure.Judged:
    declaration = prepared.declaration
    return measure.Judged(
        x=normalise(part.x, declaration.preprocess),
        full_labels=full_labels(
            prepared.full_file, received(part.x, declaration.preprocess, declaration.wire)
        ),
        labels=part.y,
        groups=part.groups,
    )


def decide(
    request: BuildRequest, prepared: Prepared, ladders: Sequence[MeasuredLadder]
) -> tuple[Policy, Certified | None]:
    """The certified policy, or a naive one where the request does without a certificate."""
    if request.uncertified:
        return naive_policy(ladders, request.epsilon), None
    targets = Targets(request.epsilon, request.delta, request.disagreement_epsilon)
    try:
        certified = certify(ladders, targets, data_sha256=data_sha256(prepared.splits.calibrate))
    except CertificateError as error:
        raise CertificateError(f"{error}; or --uncertified for a bundle without a promise") from error
    return Policy(certified.plans, certified.default_plan, certified.certificates), certified


def _board_costs(request: BuildRequest, prepared: Prepared, stages: Stages) -> Costs:
    """By the board's profile; without one nothing is known of the board."""
    if request.profile is None:
        return {}
    one = normalise(prepared.splits.optimise.x[:1], prepared.declaration.preprocess)
    return board_costs(stages, one, Path(request.profile))


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Put Ctrl-C off until the block is done, so that the files of one build stay together."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


def _card(
    request: BuildRequest,
    prepared: Prepared,
    made_by: Mapping[str, str],
    ladders: Sequence[MeasuredLadder],
    certified: Certified | None,
) -> Card:
    """The card, measured on the test part where there is one; thresholds never saw it."""
    splits = prepared.splits
    bundle = load_bundle(Path(request.out) / BUNDLE)
    plan = bundle.plan()
    part = splits.calibrate if splits.test is None else splits.test
    outcomes = collect(bundle, plan, part, prepared.full_file)
    ladder = next(ladder for ladder in ladders if ladder.name == plan.name)
    provenance = Provenance(
        held_out=splits.test is not None,
        measured_on="calibration data" if splits.test is None else "test data",
        data=tuple(_data_parts(splits.train, splits.optimise, splits.calibrate, splits.test)),
        naive=choose_naive(plan, ladder, request.epsilon),
        trade=()
        if certified is None
        else tuple(
            TradeRow(trade.epsilon, trade.upload_share, trade.mult_adds)
            for trade in certified.outlook.trades(request.epsilon)
        ),
        made_by=made_by,
        stage_times=_stage_times(bundle),
    )
    return make_card(PlanRun(bundle, plan, part.x, outcomes), provenance)


def _stage_times(bundle: Bundle) -> tuple[StageTime, ...]:
    x = normalise(bundle.golden_inputs[:1], bundle.graph.preprocess)
    costs = measure_stages(stages_of_bundle(bundle), x, seconds=CARD_SECONDS)
    return tuple(StageTime(*key, round(cost_us, 1)) for key, cost_us in costs.items())


def _data_parts(
    train: Dataset, optimise: Dataset, calibrate: Dataset, test: Dataset | None
) -> Iterator[DataPart]:
    for name, part in (
        ("training", train),
        ("thresholds (D_opt)", optimise),
        ("certificate (D_cal)", calibrate),
        ("test", test),
    ):
        if part is not None:
            groups = None if part.groups is None else len(np.unique(part.groups))
            yield DataPart(name, len(part), groups, data_sha256(part))
