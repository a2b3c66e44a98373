"""Puts a board's learning together: the store of examples and the follower of rounds. Starts nothing."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Final

from edge_cascade.bundle import Bundle
from edge_cascade.pauses import Pause, no_pause
from edge_daemon.config import Config, ModelConfig
from edge_daemon.core.rounds import RoundLimits
from edge_daemon.example_ledger import ExampleModel, OnTruth
from edge_daemon.example_store import ExampleStore
from edge_daemon.metrics import Metrics
from edge_daemon.models import Numbering, open_ladder
from edge_daemon.personal import Personal
from edge_daemon.personal import Surroundings as PersonalSurroundings
from edge_daemon.pipeline import Pipeline
from edge_daemon.ports import Clock, Spool
from edge_daemon.training.follower import Follower
from edge_daemon.training.inbox import Surroundings
from edge_daemon.training.learner import CostLimits
from edge_daemon.training.readings import VitalsReader
from edge_daemon.training.supervisor import ChildProcess
from edge_daemon.uplink import MqttUplink

log = logging.getLogger(__name__)

EXAMPLES_FILE: Final = "examples.sqlite"
ROUNDS_DIRECTORY: Final = "training"


def make_examples(
    config: Config,
    bundles: Mapping[str, Bundle],
    boot: bytes,
    rng: random.Random,
    on_truth: OnTruth | None = None,
) -> ExampleStore | None:
    """The store of examples of the models that can learn; None where none can, which is said."""
    graphs = {name: bundle.graph for name, bundle in bundles.items() if bundle.train_step is not None}
    if not graphs:
        log.warning(
            "training.enabled = true, but no bundle has a train step: nothing is kept or learned; build "
            "one that has, or set training.enabled = false"
        )
        return None
    return ExampleStore(
        Path(config.device.state_dir) / EXAMPLES_FILE,
        config.training,
        {name: ExampleModel(graph.labels, graph.input_shape, graph.wire) for name, graph in graphs.items()},
        verdicts_come=config.hub.enabled,
        boot=boot,
        chance=random.Random(rng.random()).random,  # noqa: S311 - no secret
        on_truth=on_truth,
    )


def make_personal(
    config: Config,
    configs: Mapping[str, ModelConfig],
    bundles: Mapping[str, Bundle],
    install: Callable[[Bundle], Future[Pipeline]],
    *,
    clock: Clock,
    numbering: Numbering,
    pause: Pause = no_pause,
) -> Personal | None:
    """Who has private heads answer; None where that is not wanted. `configs`: the models by name."""
    if not config.training.serve_private_heads:
        return None
    for name, model in configs.items():
        if model.runtime == "litert":
            log.warning("private heads of %s are not served: weights are inside of LiteRT's stages", name)
    served = {name: bundles[name] for name, model in configs.items() if model.runtime == "onnxruntime"}
    return Personal(
        served,
        PersonalSurroundings(
            numbering=numbering,
            clock=clock,
            open_ladder=lambda bundle: open_ladder(bundle, configs[bundle.graph.model], pause=pause),
            install=install,
        ),
    )


def make_follower(
    config: Config,
    bundles: Mapping[str, Bundle],
    examples: ExampleStore,
    spool: Spool,
    uplink: MqttUplink,
    *,
    metrics: Metrics,
    clock: Clock,
    numbering: Numbering,
    waiting: Callable[[], int],
    personal: Personal | None = None,
) -> Follower:
    """Who takes part in rounds with these examples; `waiting`: how many samples wait for their answer."""
    training = config.training
    return Follower(
        config.device.id,
        bundles,
        Path(config.device.state_dir) / ROUNDS_DIRECTORY,
        Surroundings(
            examples=examples,
            spool=spool,
            ask_for_base=uplink.ask_for_base,
            read_vitals=VitalsReader(waiting).read,
            launch=partial(ChildProcess, nice=training.nice),
            metrics=metrics,
            clock=clock,
            boot=numbering.boot,
            next_seq=numbering.next_seq,
            on_heads=(lambda *_: None) if personal is None else personal.take_heads,
        ),
        hub_key=training.key_bytes,
        vitals=training.vitals_limits,
        rounds=RoundLimits(training.max_passes),
        costs=CostLimits(training.max_memory_mb * 2**20),
    )
