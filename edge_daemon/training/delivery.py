"""An update's way from the learner into the spool, and what becomes of it there. On the follower's thread.

An update is kept in the learner's files before the spool is given it, and until the spool says that it is
gone: whatever comes between, it is given once more, and what the spool has already it has once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from edge_cascade.durable import crash_point
from edge_cascade.messages import ClientUpdate
from edge_daemon.core.rounds_events import UpdateNotStored, UpdateSettled, UpdateStored
from edge_daemon.core.spooling import DropReason, update_item
from edge_daemon.errors import ItemTooLargeError
from edge_daemon.training.inbox import Appended, Gone, Surroundings
from edge_daemon.training.learner import Learner

log = logging.getLogger(__name__)


class Delivery:
    """Gives updates to the spool. Answers are what the rounds of their model are to hear."""

    def __init__(self, around: Surroundings, tell: Callable[[Appended | Gone], None]) -> None:
        """`tell` is called on the spool's thread."""
        self._around = around
        self._tell = tell

    def append(self, learner: Learner) -> UpdateNotStored | None:
        """Make an update of what was learned, and give it to the spool, which tells `Appended`."""
        try:
            update = learner.make_update(self._around.boot, self._around.next_seq)
        except OSError as error:
            log.warning("update not kept model=%s: %s", learner.model, error)
            return UpdateNotStored()
        model = learner.model
        if learner.finished is not None and learner.finished.result.heads is not None:
            self._around.on_heads(model, learner.finished.result.heads)
        self._give(update, lambda problem: self._tell(Appended(model, problem)))
        return None

    def append_pending(self, learner: Learner) -> None:
        """Give the spool once more what may never have reached it."""
        if learner.pending is not None:
            self._give(learner.pending.update, lambda problem: None)

    def appended(self, learner: Learner, problem: str | None) -> UpdateStored | UpdateNotStored:
        """The spool has it, or has refused it."""
        if problem is not None:
            log.warning("update not stored model=%s: %s", learner.model, problem)
            return UpdateNotStored()
        crash_point("device.round-after-append")
        if learner.finished is not None:
            self._around.metrics.update_bytes.add(learner.model, n=len(learner.finished.result.delta))
            learner.finished = None
        return UpdateStored()

    def settle(self, learner: Learner, gone: Gone) -> UpdateSettled | None:
        """An update has left the spool; None where it is none of this learner's, or that cannot be kept."""
        pending = learner.pending
        if pending is None or not pending.is_named(gone.boot, gone.seq):
            return None
        is_delivered = gone.reason is None
        try:
            learner.settle(delivered=is_delivered)
        except OSError as error:
            # Still pending: with the next offer, or start, the spool is given it again.
            log.warning("what became of an update is not kept model=%s: %s", learner.model, error)
            return None
        if is_delivered:
            self._around.metrics.rounds_completed.add(learner.model)
        else:
            log.warning(
                "update not delivered model=%s round=%s reason=%s",
                learner.model,
                pending.update.round_id,
                gone.reason,
            )
        return UpdateSettled()

    def _give(self, update: ClientUpdate, tell: Callable[[str | None], None]) -> None:
        """`tell` hears what the disk says, on the spool's thread."""
        stored = self._around.spool.append(update_item(update))

        def hear(_: object) -> None:
            error = stored.exception()
            if isinstance(error, ItemTooLargeError):
                # As if it had been taken and dropped, or it would be given for ever.
                tell(None)
                self._tell(Gone(update.boot, update.seq, DropReason.LIMIT))
            else:
                tell(None if error is None else str(error))

        stored.add_done_callback(hear)
