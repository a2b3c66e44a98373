"""One model's part in rounds: its bases, its jobs, its updates. Files and arrays; no thread, no clock."""

from __future__ import annotations

import logging
import math
import os
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edge_cascade.bundle import Bundle
from edge_cascade.durable import crash_point
from edge_cascade.errors import ProtocolError
from edge_cascade.messages import BaseRequest, ClientUpdate, RoundTerms, TrainingBase
from edge_cascade.weights import FROM_ZEROS, FloatArray, weights_digest
from edge_daemon.core.rounds import RoundsState
from edge_daemon.ports import Examples
from edge_daemon.training.arrays import load_arrays
from edge_daemon.training.job import Result, job_of, write_job
from edge_daemon.training.offers import read_base
from edge_daemon.training.state import ModelState, Pending
from edge_daemon.training.supervisor import make_job_directory, remove_jobs
from edge_daemon.training.targets import least_origin
from edge_daemon.training.updates import WITH_FEEDBACK

log = logging.getLogger(__name__)

MEMORY_A_BYTE: Final = 8
"""What training takes for each byte of its inputs: copies, and what the network makes of them."""
_NOISE_SEED_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class CostLimits:
    """What a training process may take; see `child`."""

    max_memory_bytes: int


@dataclass(frozen=True, slots=True)
class Finished:
    """A training that is done and whose update is not in the spool yet."""

    terms: RoundTerms
    result: Result


class Learner:
    """One model that learns. Used by the follower's thread."""

    def __init__(self, bundle: Bundle, device: str, directory: Path) -> None:
        """`directory`: where all models' rounds are kept."""
        assert bundle.train_step is not None
        self.bundle = bundle
        self.model = bundle.graph.model
        self.rounds = RoundsState()
        self.finished: Finished | None = None
        self.damaged_before = 0
        self._device = device
        self._step = bundle.train_step
        self._directory = directory / self.model
        self._state = ModelState(self._directory, bytes.fromhex(bundle.graph_sha256))
        self._own_digest = weights_digest(bundle.parameters())

    def take_bundle(self, bundle: Bundle) -> None:
        """Go on with other weights of the same graph."""
        self.bundle = bundle
        self._own_digest = weights_digest(bundle.parameters())

    def for_graph_of(self, bundle: Bundle) -> Learner:
        """The same model's part in rounds of another graph; it is to be loaded."""
        after = Learner(bundle, self._device, self._directory.parent)
        after.damaged_before = self.damaged
        return after

    @property
    def damaged(self) -> int:
        """Files found damaged since the start."""
        return self.damaged_before + self._state.damaged

    @property
    def pending(self) -> Pending | None:
        """The update that has not left the spool."""
        return self._state.pending

    def load(self) -> None:
        """Read what an earlier start has left, and remove its jobs.

        Raises:
            OSError: when the disk does not let us.
        """
        self._state.load()
        remove_jobs(self._directory)
        self.rounds = RoundsState(voted=self._state.voted)

    def heads(self) -> bytes | None:
        """The private heads (safetensors) that were trained last.

        Raises:
            OSError: when the disk does not let us.
        """
        return self._state.heads()

    # --- bases ---------------------------------------------------------------------------------------------

    def has_base(self, terms: RoundTerms) -> bool:
        """Whether the weights that the round starts from are here."""
        return terms.training_base in {self._own_digest, self._state.base_digest}

    def request_for(self, terms: RoundTerms, *, from_zeros: bool) -> BaseRequest:
        """What to ask the hub for: steps from the newest base that is here, unless that went wrong."""
        origin = FROM_ZEROS if from_zeros else self._state.base_digest or self._own_digest
        return BaseRequest(self._device, self.model, terms.training_base, origin)

    def take_base(self, message: TrainingBase, terms: RoundTerms) -> None:
        """Check a base and keep it.

        Raises:
            ProtocolError: when it is not the one that the terms name.
            OSError: when the disk does not take it.
        """
        held: dict[str, FloatArray] = {}
        if message.origin != FROM_ZEROS:
            known = self._base_of(message.origin)
            if known is None:
                raise ProtocolError(f"its steps begin at {message.origin.hex()[:12]}, which is not here")
            held = known
        self._state.keep_base(read_base(message, terms, self.bundle, held))

    def _base_of(self, digest: bytes) -> dict[str, FloatArray] | None:
        if digest == self._own_digest:
            return self.bundle.parameters()
        if digest != self._state.base_digest:
            return None
        base = self._state.base()
        if base is None or weights_digest(base) != digest:
            # Damaged since: it is fetched again.
            self._state.base_digest = None
            return None
        return base

    # --- jobs ----------------------------------------------------------------------------------------------

    def prepare(
        self, terms: RoundTerms, examples: Examples, max_examples: int, *, seconds: float, costs: CostLimits
    ) -> Path:
        """Write the job of a round; its directory.

        Raises:
            ProtocolError: when the base or the examples are not there any more.
            OSError: when the disk does not take it.
        """
        base = self._base_of(terms.training_base)
        if base is None:
            raise ProtocolError("the training base is not here any more")
        max_examples = min(max_examples, self._room(costs))
        if max_examples < terms.min_examples:
            raise ProtocolError(
                f"training.max_memory_mb has room for {max_examples} examples of this model, the round asks "
                f"for {terms.min_examples}"
            )
        drawn = examples.draw(self.model, max_examples, least=least_origin(terms))
        if len(drawn) < terms.min_examples:
            raise ProtocolError(f"{len(drawn)} examples are left, the round asks for {terms.min_examples}")
        if terms.private_heads:
            base |= self._private_heads(base)
        job = job_of(
            self.bundle,
            terms,
            seed=secrets.randbits(63),
            noise_seed=os.urandom(_NOISE_SEED_BYTES),
            max_memory_bytes=costs.max_memory_bytes,
            max_seconds=max(round(seconds), 1),
        )
        directory = make_job_directory(self._directory)
        try:
            write_job(
                directory,
                job,
                step=self._step.model,
                base=base,
                examples=drawn,
                residual=self._state.residual() if terms.encoding in WITH_FEEDBACK else None,
            )
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        return directory

    def _room(self, costs: CostLimits) -> int:
        """How many examples fit: the daemon holds them too, while it writes them down."""
        return costs.max_memory_bytes // MEMORY_A_BYTE // (4 * math.prod(self._step.input_shape))

    def _private_heads(self, base: dict[str, FloatArray]) -> dict[str, FloatArray]:
        kept = self._state.heads()
        try:
            heads = {} if kept is None else load_arrays(kept)
        except ProtocolError:
            return {}
        allowed = set(self.bundle.graph.head_parameters)
        return {
            name: array
            for name, array in heads.items()
            if name in allowed and name in base and array.shape == base[name].shape
        }

    # --- updates -------------------------------------------------------------------------------------------

    def make_update(self, boot: bytes, next_seq: Callable[[], int]) -> ClientUpdate:
        """The update of the training that is done, remembered before the spool hears of it. Again: the same.

        Raises:
            OSError: when the disk does not take it.
        """
        assert self.finished is not None
        terms, result = self.finished.terms, self.finished.result
        pending = self._state.pending
        if pending is not None and pending.update.round_id == terms.round_id:
            return pending.update
        update = ClientUpdate(
            device=self._device,
            boot=boot,
            seq=next_seq(),
            model=self.model,
            round_id=terms.round_id,
            training_base=terms.training_base,
            num_examples=result.num_examples,
            encoding=terms.encoding,
            delta=result.delta,
        )
        if result.heads is not None:
            self._state.keep_heads(result.heads)
        self._state.vote(update, result.residual)
        crash_point("device.round-before-append")
        return update

    def settle(self, *, delivered: bool) -> None:
        """The pending update has left the spool.

        Raises:
            OSError: when the disk does not take it; the update then stays pending.
        """
        self._state.settle(delivered=delivered)
