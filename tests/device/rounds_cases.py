"""Terms, offers and drawn examples for the tests of rounds."""

from __future__ import annotations

import random

import numpy as np

from edge_cascade.messages import RoundOffer, RoundTerms
from edge_cascade.round_terms import encode_terms, public_key_of, sign_terms
from edge_cascade.weights import shapes_of, size_bytes_of, weights_digest
from edge_daemon.core.examples import Drawn, Origin

PRIVATE_KEY = bytes(range(32))
HUB_KEY = public_key_of(PRIVATE_KEY)
GRAPH = b"g" * 32
BASE = b"b" * 32


class Ceiling(random.Random):
    """Full jitter at its longest."""

    def uniform(self, a, b):
        return b


def terms(round_id="round-1", **changes):
    values = {
        "model": "tiny",
        "round_id": round_id,
        "graph": GRAPH,
        "training_base": BASE,
        "base_bytes": 4000,
        "encoding": "fp32",
        "top_share_ppm": 10_000,
        "epochs": 2,
        "batch_size": 8,
        "learning_rate_ppm": 50_000,
        "momentum_ppm": 900_000,
        "prox_mu_ppm": 0,
        "min_examples": 10,
        "max_examples": 100,
    }
    return RoundTerms(**values | changes)


def terms_for(bundle, round_id="round-1", *, base=None, **changes):
    """Terms that this bundle can be trained by, from `base` or its own parameters."""
    base = base or bundle.parameters()
    fitting = {
        "model": bundle.graph.model,
        "graph": bytes.fromhex(bundle.graph_sha256),
        "training_base": weights_digest(base),
        "base_bytes": size_bytes_of(shapes_of(base)),
    }
    return terms(round_id, **fitting | changes)


def offer(of, *, key=PRIVATE_KEY, seconds_left=60):
    data = encode_terms(of)
    return RoundOffer(data, sign_terms(data, key), seconds_left)


def drawn(count=40, *, seed=0, shape=(1, 128), classes=4, origin=Origin.MODEL):
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.ones(classes), count).astype(np.float32)
    return Drawn(
        x=(rng.standard_normal((count, *shape)) * 3 + 1).astype(np.float32),
        labels=rng.integers(0, classes, count),
        origins=np.full(count, origin, np.uint8),
        probabilities=probabilities,
        confidence=np.full(count, 0.95, np.float32),
    )
