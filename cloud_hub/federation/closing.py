"""From the committed updates of a round to what they together say, in the memory of a few models.

Deltas are read one after the other, and counted as they are read. Only where one turns out to be longer than
the cohort's norms allow, all are read and counted anew with that bound (see `core.federation.screening`).
What cannot be decoded is a rejection like any other. Nothing is written here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from cloud_hub.core.federation.aggregation import AggregationError
from cloud_hub.core.federation.screening import (
    Accepted,
    Reason,
    Rejected,
    RoundSpec,
    Verdict,
    decide_max_norm,
    screen_each,
)
from cloud_hub.core.federation.server import ServerState
from cloud_hub.core.federation.standing import Standing, next_standing
from cloud_hub.core.federation.strategies import Outcome, Round, Strategy
from cloud_hub.core.federation.update import Layout, Update, Weights
from cloud_hub.errors import NotFoundError
from cloud_hub.store.deliveries import Place
from cloud_hub.store.members import StoredUpdate
from edge_cascade.deltas import decode_delta, encoding_of
from edge_cascade.errors import ProtocolError

HUB: Final = "(hub)"
"""The hub's own vote. No device can be called so."""

ReadDelta = Callable[[Place], bytes]
_Unread = tuple[str, bool]
"""Why an update could not be read, and whether that is the hub's fault: a pack that is lost."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What became of a device's update: counted where there is no reason."""

    device: str
    reason: Reason | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Closed:
    """The next weights, None where no vote stood, and what was found of each update."""

    outcome: Outcome | None
    findings: list[Finding]
    standings: dict[str, Standing]

    @property
    def counted(self) -> int:
        """How many votes it is made of."""
        return 0 if self.outcome is None else self.outcome.votes


@dataclass(frozen=True, slots=True, eq=False)
class Votes:
    """The updates of a round in their order, how to read them, and what the boards' records were."""

    updates: Sequence[StoredUpdate]
    read: ReadDelta
    standings: Mapping[str, Standing]
    own: Update | None = None
    """The hub's, if it votes: screened like every other."""


def close_votes(
    votes: Votes, base: Weights, spec: RoundSpec, strategy: Strategy, state: ServerState, *, round_number: int
) -> Closed:
    """Screen the votes and combine those that stand. Neither `base` nor `state` is changed.

    Raises:
        AggregationError: when the result leaves the range of float32.
        StoreUnavailableError: when an update cannot be read now.
    """
    max_norm = spec.norm_rule.max_norm
    count = _count(votes, spec, strategy.begin(base), max_norm=max_norm, round_number=round_number)
    bound = decide_max_norm(count.norms, spec.norm_rule)
    if max(count.norms, default=0.0) > bound:
        # A second buffer beside the first would be twice the memory of a robust strategy.
        del count
        count = _count(votes, spec, strategy.begin(base), max_norm=bound, round_number=round_number)
    outcome = count.round.finish(state) if count.round.votes else None
    return Closed(outcome, count.findings, count.standings)


@dataclass(slots=True, eq=False)
class _Count:
    """What one reading of all votes came to. `norms` are those of the well-formed ones."""

    round: Round
    standings: dict[str, Standing]
    findings: list[Finding] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)


def _count(votes: Votes, spec: RoundSpec, round_: Round, *, max_norm: float, round_number: int) -> _Count:
    unread: dict[str, _Unread] = {}
    count = _Count(round_, dict(votes.standings))
    standings, findings = count.standings, count.findings

    def note(device: str, verdict: Verdict) -> None:
        if device in standings:
            standings[device] = next_standing(standings[device], verdict, round_number=round_number)

    for verdict in screen_each(_decoded(votes, spec.layout, unread), spec, max_norm=max_norm):
        match verdict:
            case Rejected(device, reason, detail):
                note(device, verdict)
                findings.append(Finding(device, reason, detail))
            case Accepted(update, norm):
                count.norms.append(norm)
                try:
                    round_.add(verdict)
                except AggregationError as error:
                    findings.append(Finding(update.device, Reason.MALFORMED, str(error)))
                    continue
                note(update.device, verdict)
                findings.append(Finding(update.device))
    for device, (why, is_ours) in unread.items():
        rejected = Rejected(device, Reason.MALFORMED, why)
        if not is_ours:
            note(device, rejected)
        findings.append(Finding(device, rejected.reason, why))
    return count


def _decoded(votes: Votes, layout: Layout, unread: dict[str, _Unread]) -> Iterator[Update]:
    """The updates that can be read; the others go into `unread`."""
    shapes, max_bytes = dict(layout.tensors), 4 * layout.size
    for stored in votes.updates:
        try:
            content = votes.read(stored.place)
            if encoding_of(content) != stored.encoding:
                raise ProtocolError(f"the delta is {encoding_of(content)}, its update says {stored.encoding}")
            delta = decode_delta(content, shapes, max_bytes=max_bytes)
        except (ProtocolError, NotFoundError) as error:
            unread[stored.device] = (str(error), isinstance(error, NotFoundError))
            continue
        yield Update(stored.device, stored.num_examples, stored.training_base, delta)
    if votes.own is not None:
        yield votes.own
