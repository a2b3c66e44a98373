"""What the hub makes of a round's step before it is added to the base. No I/O.

In the papers' words the step is the pseudo-gradient: Delta_t in Reddi 2021, minus it in Hsu 2019.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy as np

from cloud_hub.core.federation.aggregation import AggregationError, Step
from cloud_hub.core.federation.update import FloatArray

MOMENTUM: Final = "momentum"
SECOND_MOMENT: Final = "second_moment"


@dataclass(frozen=True, slots=True, eq=False)
class ServerState:
    """What a rule keeps from round to round: flat vectors in the order of a `Layout`. Empty at first."""

    vectors: Mapping[str, FloatArray] = field(default_factory=dict)

    def read(self, name: str, size: int, *, start: float) -> Step:
        """A copy of a vector in double precision, or `start` everywhere when there is none.

        Raises:
            AggregationError: when it is of another model.
        """
        vector = self.vectors.get(name)
        if vector is None:
            return np.full(size, start, np.float64)
        if vector.shape != (size,):
            raise AggregationError(f"server state {name!r} is {vector.shape}, the model has {size} numbers")
        return vector.astype(np.float64)


class ServerRule(Protocol):
    """How far to go. `step` may be overwritten."""

    def apply(self, step: Step, state: ServerState) -> tuple[Step, ServerState]:
        """What is added to the base, and the next state."""


@dataclass(frozen=True, slots=True)
class Plain:
    """x + learning_rate * Delta (McMahan 2017 with a rate of 1: the mean of the clients' weights)."""

    learning_rate: float = 1.0

    def __post_init__(self) -> None:
        _check_rate(self.learning_rate)

    def apply(self, step: Step, state: ServerState) -> tuple[Step, ServerState]:
        """What is added to the base; no state."""
        del state
        step *= self.learning_rate
        return step, ServerState()


@dataclass(frozen=True, slots=True)
class Momentum:
    """v_t = beta v_(t-1) + Delta_t; x + learning_rate * v_t (FedAvgM, Hsu 2019)."""

    learning_rate: float = 1.0
    beta: float = 0.9

    def __post_init__(self) -> None:
        _check_rate(self.learning_rate)
        _check_decay("beta", self.beta)

    def apply(self, step: Step, state: ServerState) -> tuple[Step, ServerState]:
        """What is added to the base, and the velocity."""
        velocity = state.read(MOMENTUM, step.size, start=0.0)
        velocity *= self.beta
        velocity += step
        np.multiply(velocity, self.learning_rate, out=step)
        return step, ServerState({MOMENTUM: _narrow(velocity)})


@dataclass(frozen=True, slots=True)
class Adam:
    """FedAdam (Reddi 2021, algorithm 2), without bias correction, as there.

    m_t = beta_1 m_(t-1) + (1 - beta_1) Delta_t
    v_t = beta_2 v_(t-1) + (1 - beta_2) Delta_t^2
    x + learning_rate * m_t / (sqrt(v_t) + tau)

    v starts at tau^2, the least that the paper allows: from zero, the first steps would be longest where the
    clients said least. `tau` is above zero, so that a coordinate on which nobody moved is not 0 / 0.
    """

    learning_rate: float = 0.01
    beta_1: float = 0.9
    beta_2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        _check_rate(self.learning_rate)
        _check_decay("beta_1", self.beta_1)
        _check_decay("beta_2", self.beta_2)
        # Its square is kept as float32.
        if not 1e-15 < self.tau < 1e15:
            raise ValueError(f"tau {self.tau} is not in 1e-15..1e15")

    def apply(self, step: Step, state: ServerState) -> tuple[Step, ServerState]:
        """What is added to the base, and both moments."""
        first = state.read(MOMENTUM, step.size, start=0.0)
        first *= self.beta_1
        second = state.read(SECOND_MOMENT, step.size, start=self.tau**2)
        second *= self.beta_2
        scratch = np.multiply(step, 1.0 - self.beta_1)
        first += scratch
        np.square(step, out=scratch)
        scratch *= 1.0 - self.beta_2
        second += scratch
        following = ServerState({MOMENTUM: _narrow(first), SECOND_MOMENT: _narrow(second)})
        np.sqrt(second, out=second)
        second += self.tau
        np.divide(first, second, out=step)
        step *= self.learning_rate
        return step, following


def _narrow(vector: Step) -> FloatArray:
    with np.errstate(over="ignore", under="ignore"):
        narrow = vector.astype(np.float32)
    if not np.isfinite(narrow).all():
        raise AggregationError("the server's state left the range of float32")
    return narrow


def _check_rate(rate: float) -> None:
    if not 0.0 < rate < float("inf"):
        raise ValueError(f"learning rate {rate} is not above 0 and finite")


def _check_decay(name: str, value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} {value} is not in 0..1 (exclusive)")
