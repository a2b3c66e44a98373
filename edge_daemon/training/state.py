"""What a board must remember of its rounds, in files that survive a power cut. Decides nothing; no network.

    <state_dir>/training/<model>/voted       rounds that this board has trained for
                                pending      the update that has not left the spool, and what it left out
                                residual     what all updates that the hub has have left out
                                base         the training base that was fetched last
                                heads        the private heads (FedPer), never sent

Each file is the SHA-256 of the rest, and then msgpack; it is replaced as a whole. A damaged one is moved
aside and counted, and the board goes on as if it had never been: a round may then be trained twice (the hub
says "duplicate"), a residual starts from nothing, a base is fetched again.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from edge_cascade.durable import crash_point, sync_directory, write_durably
from edge_cascade.errors import ProtocolError
from edge_cascade.messages import Boot, ClientUpdate, Digest, Name, Seq
from edge_cascade.weights import FloatArray, weights_digest
from edge_daemon.core.rounds import REMEMBERED_ROUNDS
from edge_daemon.training.arrays import dump_arrays, load_arrays

log = logging.getLogger(__name__)

MAX_STATE_FILE_BYTES: Final = 256 * 2**20
_CHECK_BYTES: Final = 32


class Voted(msgspec.Struct, frozen=True):
    """The last rounds that this board has trained for, the newest at the end."""

    rounds: tuple[Name, ...]


class Pending(msgspec.Struct, frozen=True):
    """An update from before it enters the spool until after it has left.

    `residual` (safetensors, None without error feedback) counts once the hub has the update; until then the
    old one does. The update is kept whole: after a crash nobody knows whether the spool ever had it, and to
    append it again is harmless in every case.
    """

    graph: Digest
    update: ClientUpdate
    residual: bytes | None

    def is_named(self, boot: Boot, seq: Seq) -> bool:
        """Whether this is the row of that name."""
        return (self.update.boot, self.update.seq) == (boot, seq)


class KeptArrays(msgspec.Struct, frozen=True):
    """Arrays (safetensors) that belong to the parameters of one graph part."""

    graph: Digest
    arrays: bytes


KindT = TypeVar("KindT", bound=msgspec.Struct)


class ModelState:
    """The files of one model. Used by one thread."""

    def __init__(self, directory: Path, graph: bytes) -> None:
        """`graph`: digest of the graph part that runs; what was kept for another one is not given out."""
        self._directory = directory
        self._graph = graph
        self.damaged = 0
        self.voted: tuple[str, ...] = ()
        self._is_voted_saved = True
        self.pending: Pending | None = None
        self.base_digest: bytes | None = None

    def load(self) -> None:
        """Read what is there.

        Raises:
            OSError: when the directory cannot be made or read.
        """
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        for stray in self._directory.glob(".*.tmp"):
            stray.unlink(missing_ok=True)
        voted = self._read("voted", Voted)
        self.voted = () if voted is None else voted.rounds
        self.pending = self._read("pending", Pending)
        if self.pending is not None and self.pending.update.round_id not in self.voted:
            self._add_vote(self.pending.update.round_id)
        base = self.base()
        self.base_digest = None if base is None else weights_digest(base)

    def vote(self, update: ClientUpdate, residual: bytes | None) -> None:
        """Remember an update, and that its round has been voted in, before the spool hears of it.

        Raises:
            OSError: when the disk does not take it; `pending` says whether the update is remembered.
        """
        pending = Pending(self._graph, update, residual)
        self._write("pending", pending)
        # From here on the vote is known, whatever becomes of the next line: see `load`.
        self.pending = pending
        if update.round_id not in self.voted:
            self._add_vote(update.round_id)
        self._save_voted()

    def settle(self, *, delivered: bool) -> None:
        """The pending update has left the spool. What it left out counts only if the hub has it.

        Raises:
            OSError: when the disk does not take it; the update is then still pending.
        """
        assert self.pending is not None
        # Without the pending update, this alone knows of the vote.
        self._save_voted()
        if delivered and self.pending.residual is not None:
            self._write("residual", KeptArrays(self.pending.graph, self.pending.residual))
        crash_point("device.round-residual-written")
        (self._directory / "pending").unlink(missing_ok=True)
        sync_directory(self._directory)
        self.pending = None

    def keep_base(self, base: dict[str, FloatArray]) -> None:
        """Keep a training base in place of the last one.

        Raises:
            OSError: when the disk does not take it.
        """
        self._write("base", KeptArrays(self._graph, dump_arrays(base)))
        self.base_digest = weights_digest(base)
        crash_point("device.round-base-stored")

    def keep_heads(self, heads: bytes) -> None:
        """Keep the private heads (safetensors) that were trained last.

        Raises:
            OSError: when the disk does not take them.
        """
        self._write("heads", KeptArrays(self._graph, heads))

    def base(self) -> dict[str, FloatArray] | None:
        """The base that was fetched last."""
        kept = self._kept("base")
        if kept is None:
            return None
        try:
            return load_arrays(kept)
        except ProtocolError:
            return None

    def residual(self) -> bytes | None:
        """What delivered updates have left out (safetensors)."""
        return self._kept("residual")

    def heads(self) -> bytes | None:
        """The private heads (safetensors)."""
        return self._kept("heads")

    def _add_vote(self, round_id: str) -> None:
        self.voted = (*self.voted, round_id)[-REMEMBERED_ROUNDS:]
        self._is_voted_saved = False

    def _save_voted(self) -> None:
        if not self._is_voted_saved:
            self._write("voted", Voted(self.voted))
            self._is_voted_saved = True

    def _kept(self, name: str) -> bytes | None:
        kept = self._read(name, KeptArrays)
        return kept.arrays if kept is not None and kept.graph == self._graph else None

    def _read(self, name: str, kind: type[KindT]) -> KindT | None:
        path = self._directory / name
        try:
            if path.stat().st_size > MAX_STATE_FILE_BYTES:
                raise ProtocolError("too large")
            content = path.read_bytes()
            body = content[_CHECK_BYTES:]
            if hashlib.sha256(body).digest() != content[:_CHECK_BYTES]:
                raise ProtocolError("its bytes are not those that were written")
            return msgspec.msgpack.decode(body, type=kind)
        except FileNotFoundError:
            return None
        except (ProtocolError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            self.damaged += 1
            aside = path.with_name(f"{name}.corrupt")
            path.replace(aside)
            log.error("damaged file of rounds moved to %s: %s", aside, error)
            return None

    def _write(self, name: str, value: msgspec.Struct) -> None:
        body = msgspec.msgpack.encode(value)
        write_durably(self._directory / name, hashlib.sha256(body).digest() + body, mode=0o600)
