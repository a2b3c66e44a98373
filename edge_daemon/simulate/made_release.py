"""A release for a virtual fleet, made of the shipped bundle: as good as that, worse, or slower. On purpose.

Each is a whole and honest bundle of its network: its golden outputs are what it computes. So nothing but what
it does in the fleet can give it away.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_cascade.bundle import Bundle, StageModel
from edge_cascade.onnx_file import inspect_model
from edge_cascade.policy import Precision
from edge_cascade.tensors import through_wire
from edge_daemon.errors import SimulationError
from edge_daemon.simulate.rollout_kinds import Kind
from edge_daemon.simulate.sensors import open_source

if TYPE_CHECKING:
    from cloud_hub.candidates.requantise import Network

REPRESENTATIVE: Final = 256
JUDGED: Final = 1_500
"""Samples on which it is measured how much worse a bad release is."""
SAMPLES_SEED: Final = 977_000
"""Of a source that no board listens to."""

EQUAL_NOISE: Final = 0.004
"""Of a weight's spread: some answers change, none gets better or worse."""
MIN_DROP: Final = 0.05
MAX_DROP: Final = 0.12
"""How much worse a bad release is."""
SLOW_SIZE: Final = 128
SLOW_ROUNDS: Final = 250
"""Products of square matrices that are multiplied by nothing in the end: many milliseconds."""

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class MadeRelease:
    """Where the bundle is, and by how much it is worse than the shipped one on samples of this kind, 0..1."""

    directory: Path
    bundle: str
    drop: float


def make_release(kind: Kind, bundle: Bundle, directory: Path, *, seed: int) -> MadeRelease:
    """Write a release of the bundle's model as `directory`.

    Raises:
        SimulationError: when no release that is bad by so much is found.
    """
    from cloud_hub.builder.assemble import Policy
    from cloud_hub.builder.write import write_bundle
    from cloud_hub.candidates.requantise import graph_part, new_weights_part

    bundle = _for_onnxruntime(bundle)
    maker = _Maker(bundle, seed)
    network, drop = maker.worse() if kind == "bad" else maker.equal()
    if kind == "slow":
        network = _slowed(network)
    weights = bundle.weights
    policy = Policy(weights.plans, weights.default_plan, ())
    bundle_id = write_bundle(
        directory, graph_part(bundle, network), new_weights_part(bundle, network, policy)
    )
    return MadeRelease(directory, bundle_id, drop)


def _for_onnxruntime(bundle: Bundle) -> Bundle:
    """Without the stages for LiteRT, which no virtual board runs."""
    stages = tuple(msgspec.structs.replace(stage, litert={}) for stage in bundle.graph.stages)
    models = {key: replace(stage, litert=None) for key, stage in bundle.stage_models.items()}
    graph = msgspec.structs.replace(bundle.graph, stages=stages)
    return replace(bundle, graph=graph, stage_models=models)


class _Maker:
    """Networks around the one that is shipped."""

    def __init__(self, bundle: Bundle, seed: int) -> None:
        self._bundle = bundle
        self._rng = np.random.default_rng(seed)
        drawn = list(islice(open_source(bundle.graph.model, seed=SAMPLES_SEED + seed, drift=0.0), JUDGED))
        self._x = np.stack([through_wire(x, bundle.graph.wire) for x, _ in drawn])
        self._right = np.array([label for _, label in drawn])
        self._directions = {
            name: self._rng.standard_normal(array.shape).astype(np.float32)
            for name, array in sorted(bundle.parameters().items())
        }

    def equal(self) -> tuple[Network, float]:
        """As good as the shipped one, and not the same."""
        network = self._moved(EQUAL_NOISE)
        return network, self._drop(network)

    def worse(self) -> tuple[Network, float]:
        """Worse by `MIN_DROP` to `MAX_DROP`: along one direction, by halving."""
        low, high = EQUAL_NOISE, 1.0
        for _ in range(12):
            noise = (low * high) ** 0.5
            network = self._moved(noise)
            drop = self._drop(network)
            if MIN_DROP <= drop <= MAX_DROP:
                return network, drop
            low, high = (noise, high) if drop < MIN_DROP else (low, noise)
        raise SimulationError(
            f"no release of {self._bundle.graph.model!r} was found that is worse by {MIN_DROP:.0%} to "
            f"{MAX_DROP:.0%}: try another --seed"
        )

    def _moved(self, noise: float) -> Network:
        from cloud_hub.candidates.requantise import requantised

        weights = {
            name: (array + noise * float(array.std()) * self._directions[name]).astype(np.float32)
            for name, array in self._bundle.parameters().items()
        }
        return requantised(self._bundle, weights, self._x[:REPRESENTATIVE])

    def _drop(self, network: Network) -> float:
        """Of the accuracy of the gate's answers."""
        return self._accuracy(self._bundle.stage_models) - self._accuracy(network.stages.models)

    def _accuracy(self, stages: Mapping[tuple[int, Precision], StageModel]) -> float:
        from edge_cascade.backends.onnx import OnnxStage
        from edge_cascade.ladder import Ladder

        bundle = replace(self._bundle, stage_models=stages)
        climbs = Ladder(bundle, bundle.plan(), OnnxStage).climb_batch(self._x)
        return float(np.mean([climb.answer.label for climb in climbs] == self._right))


def _slowed(network: Network) -> Network:
    models = {
        key: _slowed_stage(stage) if stage.stage == 0 else stage
        for key, stage in network.stages.models.items()
    }
    return replace(network, stages=replace(network.stages, models=models), whole_release="another graph")


def _slowed_stage(stage: StageModel) -> StageModel:
    from cloud_hub.builder.graphs.detour import with_detour

    content = with_detour(stage.model, size=SLOW_SIZE, rounds=SLOW_ROUNDS)
    return replace(stage, model=content, summary=inspect_model(content))
