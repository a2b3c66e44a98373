"""MQTT -> durable commit -> acknowledgement, on one thread of its own.

Whatever gathered while the last commit was on its way to the disk is the next group: under load the groups
grow, at rest a case waits for nobody. Nothing is acknowledged before its commit. When the store fails, the
group is tried again until it succeeds or the hub stops; meanwhile the intake fills up and takes no more.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar

from cloud_hub.core.delivery import Committed, Delivery, ItemId
from cloud_hub.errors import StoreRefusedError, StoreUnavailableError
from cloud_hub.intake import Intake, Taken
from cloud_hub.reading import Reader
from cloud_hub.store.store import Store
from edge_cascade.burst import Burst
from edge_cascade.codec import encode
from edge_cascade.messages import BOOT_BYTES, Acks, BaseRequest, Refusal, Rejection
from edge_cascade.mqtt import Incoming
from edge_cascade.topics import down_topic

log = logging.getLogger(__name__)

MAX_GROUP_FRAMES: Final = 256
MAX_GROUP_BYTES: Final = 8 * 2**20
FIRST_RETRY_S: Final = 0.1
LONGEST_RETRY_S: Final = 5.0
# 512 sequence numbers of 9 bytes, or 128 reasons of 160 characters of at most 4 bytes, stay below 100 KiB.
MAX_ACKED_PER_FRAME: Final = 512
MAX_REASONS_PER_FRAME: Final = 128

NO_BOOT: Final = bytes(BOOT_BYTES)
"""The boot in the acknowledgement of a frame that could not be read: nobody knows which boot it was."""

Publish = Callable[[str, bytes], object]
ItemT = TypeVar("ItemT")


@dataclass(slots=True)
class Latencies:
    """Seconds from a message's arrival to its acknowledgement: the last thousand."""

    _last: deque[float] = field(default_factory=lambda: deque(maxlen=1000))

    def add(self, seconds: float) -> None:
        """Note one."""
        self._last.append(seconds)

    def quantiles(self) -> tuple[float, float] | None:
        """Median and 99th percentile, None before the first."""
        ordered = sorted(self._last.copy())
        if not ordered:
            return None
        return ordered[len(ordered) // 2], ordered[min(len(ordered) * 99 // 100, len(ordered) - 1)]


class Ingest:
    """Takes messages from the network's thread, commits what they brought, acknowledges it."""

    def __init__(
        self,
        store: Store,
        reader: Reader,
        publish: Publish,
        *,
        prefix: str,
        intake: Intake | None = None,
        on_cases: Callable[[], None] = lambda: None,
        on_online: Callable[[frozenset[str]], None] = lambda _: None,
        on_updates: Callable[[], None] = lambda: None,
        on_swaps: Callable[[], None] = lambda: None,
        on_base_request: Callable[[BaseRequest], None] = lambda _: None,
        clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._store = store
        self._reader = reader
        self._publish = publish
        self._prefix = prefix
        self._intake = Intake() if intake is None else intake
        self._on_cases = on_cases
        self._on_online = on_online
        self._on_updates = on_updates
        self._on_swaps = on_swaps
        self._on_base_request = on_base_request
        self._clock_ms = clock_ms
        # The kinds are counters' names: few, and chosen by us.
        self._bursts: defaultdict[str, Burst] = defaultdict(Burst)
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self.latencies = Latencies()
        self.problem: str | None = None

    @property
    def waiting(self) -> int:
        """Messages that wait to be read."""
        return len(self._intake)

    @property
    def not_taken(self) -> int:
        """Messages that were left unacknowledged because the queue was full."""
        return self._intake.not_taken

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._run, name="ingest", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Take nothing more, commit and acknowledge what was taken, end the thread.

        What a failing store does not take within `timeout_s` stays unacknowledged.
        """
        self._intake.close()
        if self._thread is not None:
            self._thread.join(timeout_s)
            self._stopping.set()
            self._thread.join(timeout_s)

    def offer(self, incoming: Incoming) -> None:
        """Take a message from the network's thread, or leave it unacknowledged when the queue is full."""
        arrived_s = time.monotonic()
        if not self._intake.offer(Taken(incoming.topic, incoming.payload, arrived_s)):
            more = self._bursts["full"].note(now_s=arrived_s)
            if more is not None:
                log.warning("intake full, message left unacknowledged more=%d", more)

    def _run(self) -> None:
        while True:
            taken = self._intake.take(MAX_GROUP_FRAMES, MAX_GROUP_BYTES)
            if not taken:
                return
            try:
                self._process(taken)
            except Exception:
                # A fault of ours in one group must not end the hub; unacknowledged, it all comes again.
                log.exception("group of %d messages dropped, unacknowledged", len(taken))

    def _process(self, taken: Sequence[Taken]) -> None:
        group: list[Delivery] = []
        arrivals: list[float] = []
        for message in taken:
            delivery = self._read(message)
            if delivery is not None:
                group.append(delivery)
                arrivals.append(message.arrived_s)
                self._report_trouble(delivery, message)
        if not group:
            return
        committed = self._commit(group)
        if committed is None:
            return
        for topic, acks in acks_of(group, committed, self._prefix):
            self._publish(topic, encode(acks))
        now_s = time.monotonic()
        for arrived_s in arrivals:
            self.latencies.add(now_s - arrived_s)
        if any(delivery.cases for delivery in group):
            self._on_cases()
        if any(delivery.update is not None for delivery in group):
            self._on_updates()
        if any(delivery.swap is not None for delivery in group):
            self._on_swaps()
        if committed.came_online:
            self._on_online(committed.came_online)
        for delivery in group:
            if delivery.base_request is not None:
                self._on_base_request(delivery.base_request)

    def _read(self, message: Taken) -> Delivery | None:
        """What a message brought; None, too, where a fault of ours keeps it from being read."""
        try:
            return self._reader.read(message)
        except Exception as error:  # noqa: BLE001 - a message must not take those beside it with it
            self._log_fault(message.topic, error)
            return None

    def _commit(self, group: list[Delivery]) -> Committed | None:
        """Commit, however long it takes; None only when the hub stops first."""
        retry_s = FIRST_RETRY_S
        while True:
            try:
                committed = self._store.commit(group, now_ms=self._clock_ms())
            except StoreUnavailableError as error:
                self.problem = str(error)
                if self._bursts["store"].note(now_s=time.monotonic()) is not None:
                    log.error("store fails, nothing is acknowledged, trying again reason=%s", error)
            except StoreRefusedError as error:
                if len(group) > 1:
                    return self._commit_one_by_one(group)
                log.error("store refuses a message for good reason=%s", error)
                _strip(group[0], str(error))
            except Exception as error:  # noqa: BLE001 - as above: it comes again, and would do so for ever
                if len(group) > 1:
                    return self._commit_one_by_one(group)
                self._log_fault(f"device {group[0].device}", error)
                _forget(group[0])
                return Committed(frozenset(), frozenset())
            else:
                if self.problem is not None:
                    log.info("store works again")
                    self._bursts.pop("store", None)
                    self.problem = None
                return committed
            if self._stopping.wait(retry_s):
                return None
            retry_s = min(retry_s * 2, LONGEST_RETRY_S)

    def _commit_one_by_one(self, group: list[Delivery]) -> Committed | None:
        fresh: set[ItemId] = set()
        came_online: set[str] = set()
        for delivery in group:
            committed = self._commit([delivery])
            if committed is None:
                return None
            fresh |= committed.fresh
            came_online |= committed.came_online
        return Committed(frozenset(fresh), frozenset(came_online))

    def _log_fault(self, where: str, error: Exception) -> None:
        more = self._bursts["fault"].note(now_s=time.monotonic())
        if more is not None:
            log.error("message dropped, unacknowledged from=%s more=%d", where, more, exc_info=error)

    def _report_trouble(self, delivery: Delivery, message: Taken) -> None:
        for kind in delivery.counts:
            more = self._bursts[kind].note(now_s=message.arrived_s)
            if more is not None:
                why = delivery.refused or (delivery.rejected[0][1] if delivery.rejected else "")
                log.warning(
                    "malformed kind=%s device=%s bytes=%d more=%d reason=%s",
                    kind,
                    delivery.device,
                    len(message.payload),
                    more,
                    why,
                )


def _strip(delivery: Delivery, why: str) -> None:
    """Leave nothing of a delivery but its refusal, which any store takes."""
    _empty(delivery)
    delivery.refused = why
    delivery.counts["malformed/store"] += 1


def _forget(delivery: Delivery) -> None:
    """Leave nothing of a delivery that anybody would be told of."""
    _empty(delivery)
    delivery.device = None


def _empty(delivery: Delivery) -> None:
    delivery.cases.clear()
    delivery.rejected.clear()
    delivery.update = delivery.report = delivery.status = delivery.swap = delivery.shadow = None
    delivery.receipts = ()
    delivery.base_request = None
    delivery.counts.clear()


def acks_of(group: Sequence[Delivery], committed: Committed, prefix: str) -> Iterator[tuple[str, Acks]]:
    """The acknowledgements of a committed group with their topics, each small enough for one payload."""
    fresh = set(committed.fresh)
    by_boot: dict[tuple[str, bytes], _Answers] = {}
    for delivery in group:
        if delivery.device is None:
            continue
        answers = by_boot.setdefault((delivery.device, delivery.boot or NO_BOOT), _Answers())
        if delivery.refused is not None:
            answers.refused.append(Refusal(delivery.frame_digest, delivery.refused[:160]))
        items = [case.item for case in delivery.cases]
        items += delivery.single_items
        for item in items:
            if item in fresh:
                fresh.discard(item)
                answers.committed.append(item[2])
            else:
                answers.duplicate.append(item[2])
        answers.rejected += [Rejection(seq, reason) for seq, reason in delivery.rejected]
    for (device, boot), answers in by_boot.items():
        topic = down_topic(prefix, device, "acks")
        for acks in answers.frames(boot):
            yield topic, acks


@dataclass(slots=True)
class _Answers:
    committed: list[int] = field(default_factory=list)
    duplicate: list[int] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)

    def frames(self, boot: bytes) -> Iterator[Acks]:
        for part in _pieces(self.committed, MAX_ACKED_PER_FRAME):
            yield Acks(boot, committed=part)
        for part in _pieces(self.duplicate, MAX_ACKED_PER_FRAME):
            yield Acks(boot, duplicate=part)
        for rejected in _pieces(self.rejected, MAX_REASONS_PER_FRAME):
            yield Acks(boot, rejected=rejected)
        for refused in _pieces(self.refused, MAX_REASONS_PER_FRAME):
            yield Acks(boot, refused=refused)


def _pieces(items: list[ItemT], size: int) -> Iterator[list[ItemT]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
