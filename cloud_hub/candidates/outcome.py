"""What becomes of new weights, as values. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import msgspec

from cloud_hub.builder.write import GraphPart, WeightsPart
from cloud_hub.core.federation.guard import GuardFigures
from cloud_hub.models import HubModel
from edge_cascade.bundle import Bundle
from edge_cascade.policy import Certificate

Trainer = Literal["federated", "hub", "combined", "elsewhere"]


@dataclass(frozen=True, slots=True, eq=False)
class Base:
    """The model as the hub answers for it, and the release in the fleet: what candidates descend from."""

    model: HubModel
    bundle: Bundle


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured of a candidate. `guard` holds it against its base, both as they ship.

    `upload_share` is what its default plan is expected to send at the chosen point, `base_upload_share` what
    the base's was: of another promise, where people had labelled the base's calibration data and not the
    fleet's cases, and measured on other samples. `thresholds_from` says which cases chose the thresholds,
    `unseen` how many cases certified: 0 where the base promises nothing. `whole_release`: the graph part
    differs from the base's, why is said.
    """

    guard: GuardFigures
    certificates: Sequence[Certificate]
    default_plan: str
    upload_share: float
    base_upload_share: float
    thresholds_from: str
    unseen: int
    graph_bytes: int
    weights_bytes: int
    whole_release: str = ""


class Lineage(msgspec.Struct, frozen=True, kw_only=True):
    """Where a release comes from. `parent` is the base's bundle id, `weights` the digest of what was trained.

    `series`, `rounds` and `strategy` are there for what boards took part in; `examples` and `schedule` for
    what the hub trained.
    """

    parent: str
    weights: str
    trained: Trainer
    series: int | None = None
    rounds: int | None = None
    strategy: str | None = None
    examples: int | None = None
    schedule: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """New weights that may become a release: both parts of its bundle, and its figures."""

    graph: GraphPart
    weights: WeightsPart
    figures: Figures


@dataclass(frozen=True, slots=True)
class Waiting:
    """Nothing is wrong, but of `what` there are `has` where `needs` or more are needed; ask again later."""

    has: int
    needs: int
    what: str

    def __str__(self) -> str:
        """As a person reads it."""
        return f"{self.has} {self.what}, at least {self.needs} are needed: let the fleet send more audits"


@dataclass(frozen=True, slots=True)
class Refused:
    """These weights become no release."""

    why: str

    def __str__(self) -> str:
        """As a person reads it."""
        return self.why


Outcome: TypeAlias = Candidate | Waiting | Refused
