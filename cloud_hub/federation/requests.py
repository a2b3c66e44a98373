"""Boards ask for training bases: a bounded queue, and answers to those who may have one.

A request is not kept: a board that gets no answer asks again. Only a member of an open round that has not
answered is served, and only so many bytes: a board that asks for ever costs no more than a few bases, and
of the places in the queue it has no more than a few.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from cloud_hub.federation.bases import Bases
from cloud_hub.store import schema
from cloud_hub.store.members import MemberState, add_bytes_down, member_of
from cloud_hub.store.store import Store
from edge_cascade.codec import MAX_PAYLOAD_BYTES, encode, split_frame
from edge_cascade.messages import BaseRequest
from edge_cascade.topics import down_topic

MAX_WAITING: Final = 1024
MAX_WAITING_PER_BOARD: Final = 4
"""A board asks for one base per model whose round it is in."""
MAX_SERVED_AT_ONCE: Final = 16
MAX_BASES_PER_MEMBER: Final = 8
"""What a member may be sent in a round, in whole bases as float32."""
_KEPT_ANSWERS: Final = 4


@dataclass(frozen=True, slots=True)
class OpenBase:
    """The base of an open round, and how large it is."""

    round_id: str
    model: str
    digest: bytes
    size_bytes: int


class BaseRequests:
    """`ask` from any thread; `serve` from one."""

    def __init__(
        self, store: Store, bases: Bases, publish: Callable[[str, bytes], int | None], *, prefix: str
    ) -> None:
        self._store = store
        self._bases = bases
        self._publish = publish
        self._prefix = prefix
        self._gate = threading.Lock()
        self._waiting: OrderedDict[tuple[str, bytes], BaseRequest] = OrderedDict()
        self._waiting_of: Counter[str] = Counter()
        self._answers: OrderedDict[tuple[bytes, bytes], list[bytes]] = OrderedDict()
        self._counts: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._waiting)

    def ask(self, request: BaseRequest) -> None:
        """Queue a request; a repetition of one that waits replaces it, and beyond the bound it is dropped."""
        with self._gate:
            key = (request.device, request.training_base)
            if key not in self._waiting:
                its = self._waiting_of[request.device]
                if its >= MAX_WAITING_PER_BOARD or len(self._waiting) >= MAX_WAITING:
                    self._counts["base_requests/overflow"] += 1
                    return
                self._waiting_of[request.device] = its + 1
            self._waiting[key] = request

    def serve(self, find: Callable[[str, bytes], OpenBase | None]) -> None:
        """Answer some requests; `find` gives the open round of a model that starts from a base.

        Raises:
            StoreError: the request at hand is dropped; its board asks again.
        """
        for _ in range(MAX_SERVED_AT_ONCE):
            with self._gate:
                if not self._waiting:
                    break
                (device, _), request = self._waiting.popitem(last=False)
                self._waiting_of[device] -= 1
                if not self._waiting_of[device]:
                    del self._waiting_of[device]
            self._counts[f"base_requests/{self._serve(request, find)}"] += 1
        with self._gate:
            counts, self._counts = self._counts, Counter()
        if counts:
            self._store.database.run(lambda c: schema.add_to_counters(c, counts))

    def _serve(self, request: BaseRequest, find: Callable[[str, bytes], OpenBase | None]) -> str:
        base = find(request.model, request.training_base)
        if base is None:
            return "unknown"
        member = self._store.database.run(lambda c: member_of(c, base.round_id, request.device))
        if member is None or member["state"] != MemberState.ASKED.value:
            return "foreign"
        if member["bytes_down"] > MAX_BASES_PER_MEMBER * base.size_bytes + MAX_PAYLOAD_BYTES:
            return "too_often"
        topic = down_topic(self._prefix, request.device, "round")
        sent = 0
        for payload in self._answer(base.digest, request.origin):
            if self._publish(topic, payload) is None:
                break
            sent += len(payload)
        self._store.database.run(lambda c: add_bytes_down(c, base.round_id, {request.device: sent}))
        self._counts["round_bytes/down"] += sent
        return "served" if sent else "not_sent"

    def _answer(self, digest: bytes, origin: bytes) -> list[bytes]:
        """The frames of a `TrainingBase`; a cohort asks for the same one within moments."""
        key = (digest, origin)
        if key not in self._answers:
            way = self._bases.way_to(digest, origin)
            if way is None:
                return []
            self._answers[key] = split_frame(encode(way))
            while len(self._answers) > _KEPT_ANSWERS:
                self._answers.popitem(last=False)
        self._answers.move_to_end(key)
        return self._answers[key]
