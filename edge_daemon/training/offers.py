"""Which offers and training bases are believed. No I/O but the import of a library (see `round_terms`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edge_cascade.bundle import Bundle
from edge_cascade.errors import ProtocolError
from edge_cascade.messages import RoundOffer, RoundTerms, TrainingBase
from edge_cascade.round_terms import decode_terms, is_signed
from edge_cascade.weights import FROM_ZEROS, FloatArray, Weights, climb_chain, size_bytes_of, zeros_of
from edge_daemon.core.rounds_events import Declined


@dataclass(frozen=True, slots=True)
class Refused:
    """An offer that is not believed. `model`: "unknown" where no name in it was believed."""

    why: Declined
    detail: str
    model: str = "unknown"


def read_offer(offer: RoundOffer, hub_key: bytes, bundles: Mapping[str, Bundle]) -> RoundTerms | Refused:
    """The terms of an offer, once everything about them was checked. `bundles`: what runs, by model."""
    # Nothing of it is read before it is known who says so.
    if not is_signed(offer.terms, offer.signature, hub_key):
        return Refused(Declined.SIGNATURE, "not signed by training.hub_key")
    try:
        terms = decode_terms(offer.terms)
    except ProtocolError as error:
        return Refused(Declined.MALFORMED, str(error))
    bundle = bundles.get(terms.model)
    if bundle is None:
        return Refused(Declined.UNKNOWN_MODEL, f"model {terms.model!r} does not run here")
    problem = _misfit(terms, bundle)
    return terms if problem is None else Refused(*problem, terms.model)


def _misfit(terms: RoundTerms, bundle: Bundle) -> tuple[Declined, str] | None:
    if bundle.train_step is None:
        return Declined.NO_TRAIN_STEP, "the bundle that runs has no train step"
    if terms.graph.hex() != bundle.graph_sha256:
        graphs = f"for the graph {terms.graph.hex()[:12]}, this board runs {bundle.graph_sha256[:12]}"
        return Declined.OTHER_GRAPH, graphs
    size_bytes = size_bytes_of(bundle.train_step.shapes)
    if terms.base_bytes != size_bytes:
        sizes = f"its base takes {terms.base_bytes} bytes, the parameters here {size_bytes}"
        return Declined.OTHER_GRAPH, sizes
    return None


def read_base(
    message: TrainingBase, terms: RoundTerms, bundle: Bundle, held: Weights
) -> dict[str, FloatArray]:
    """The base at the end of the steps, whose digest is the one that the offer names.

    `held` is what `message.origin` stands for; without a name (`FROM_ZEROS`) it is not looked at.

    Raises:
        ProtocolError: for steps that do not fit or lead elsewhere.
    """
    assert bundle.train_step is not None
    origin = zeros_of(bundle.train_step.shapes) if message.origin == FROM_ZEROS else held
    return climb_chain(origin, message.steps, expected=terms.training_base, max_bytes=terms.base_bytes)
