"""Which device belongs to which step of a rollout. No I/O; chance is a hash, so that every worker agrees.

Every device has a place in 0..1, drawn by hash from a salt and its name. A wave takes the devices up to a
*cut*. Cuts are made once, when the rollout begins, so that waves have the size that they should have in the
fleet of that moment; from then on they are numbers. A device that joins later falls into a wave by its own
place, and no device ever changes its wave because another one came or went.

The salt is the rollout's id, so that the risk of being first goes round, or the model's name where the same
boards are to be the canaries of every release.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import msgspec

DAY_S: Final = 86400.0


class Sampling(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How much the devices of a wave show while it is judged: shares of their samples, 0..1.

    `audit_rate` goes to the hub whatever the answer. `shadow_share` is answered by both bundles on the
    board; of these, only the ones on which they differ go to the hub.
    """

    audit_rate: float = 0.0
    shadow_share: float = 0.0


class Wave(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One step: up to `share` (0..1) of the devices, or up to `count` of them, whichever is given.

    With `labels`, only devices that have all of these belong to it. What must hold before the next wave
    opens: `soak_s` seconds since enough devices reported, and quality that is not worse by more than
    `max_drop` (0..1; None asks nothing of quality, though worse still halts). `needs_approval` is asked for
    before this wave opens.
    """

    name: str
    share: float | None = None
    count: int | None = None
    labels: dict[str, str] = {}
    soak_s: float = DAY_S / 24
    max_drop: float | None = 0.01
    needs_approval: bool = False
    sampling: Sampling | None = None


DEFAULT_WAVES: Final = (
    Wave("canary", count=1, max_drop=0.05, sampling=Sampling(audit_rate=0.1, shadow_share=0.5)),
    Wave("10 %", share=0.1, sampling=Sampling(audit_rate=0.1, shadow_share=0.5)),
    Wave("50 %", share=0.5, soak_s=DAY_S / 4),
    Wave("all", share=1.0),
)
"""One board shows that nothing is badly wrong before ten show that nothing is wrong."""


class Device(msgspec.Struct, frozen=True):
    """A device as the roster knows it. `release` is the one that it should run, empty where that is none."""

    name: str
    labels: dict[str, str] = {}
    is_online: bool = True
    release: str = ""


class Cut(msgspec.Struct, frozen=True):
    """The devices with these `labels` whose place is at most `up_to`."""

    up_to: float
    labels: dict[str, str] = {}


def check_waves(waves: Sequence[Wave]) -> None:
    """Refuse a plan that contradicts itself or leaves devices out.

    Raises:
        ValueError: naming the wave and what is wrong with it.
    """
    if not waves:
        raise ValueError("waves: a rollout needs at least one")
    reached = 0.0
    for index, wave in enumerate(waves):
        where = f"waves[{index}] {wave.name!r}"
        if (wave.share is None) == (wave.count is None):
            raise ValueError(f"{where}: give either share or count")
        if wave.count is not None and wave.count < 1:
            raise ValueError(f"{where}: count {wave.count}, at least 1 is needed")
        if wave.share is not None and not 0.0 < wave.share <= 1.0:
            raise ValueError(f"{where}: share {wave.share} is not in 0..1")
        if not 0.0 <= wave.soak_s < math.inf:
            raise ValueError(f"{where}: soak_s {wave.soak_s} is no time")
        if wave.max_drop is not None and not 0.0 < wave.max_drop < 1.0:
            raise ValueError(f"{where}: max_drop {wave.max_drop} is not in 0..1")
        _check_sampling(wave.sampling, where)
        if wave.share is not None and not wave.labels:
            if wave.share <= reached:
                raise ValueError(
                    f"{where}: share {wave.share} takes nobody, the wave before took {reached}; "
                    "shares count from the start"
                )
            reached = wave.share
    if waves[-1].share != 1.0 or waves[-1].labels:
        raise ValueError(f"waves: the last, {waves[-1].name!r}, must have share 1.0 and no labels")


def _check_sampling(sampling: Sampling | None, where: str) -> None:
    if sampling is None:
        return
    for name, share in (("audit_rate", sampling.audit_rate), ("shadow_share", sampling.shadow_share)):
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"{where}: {name} {share} is not in 0..1")


def place_of(salt: str, device: str) -> float:
    """Where a device stands, in 0..1: evenly spread, the same for ever."""
    digest = hashlib.sha256(b"wave\0" + salt.encode() + b"\0" + device.encode()).digest()
    # 53 bits: what a float holds exactly.
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def select_cuts(waves: Sequence[Wave], fleet: Iterable[Device], salt: str) -> tuple[Cut, ...]:
    """A cut per wave. Counts are of devices that are online now; shares are of all, rounded up.

    Raises:
        ValueError: when the waves contradict themselves.
    """
    check_waves(waves)
    places = sorted((place_of(salt, device.name), device) for device in fleet) if waves else []
    return tuple(_cut_of(wave, [(at, one) for at, one in places if has(one, wave.labels)]) for wave in waves)


def _cut_of(wave: Wave, places: Sequence[tuple[float, Device]]) -> Cut:
    if wave.count is not None:
        awake = [place for place, device in places if device.is_online]
        # Too few: all of them that there are, and whoever comes.
        return Cut(awake[wave.count - 1] if wave.count <= len(awake) else 1.0, wave.labels)
    assert wave.share is not None
    if wave.share == 1.0 or not places:
        return Cut(wave.share, wave.labels)
    return Cut(places[math.ceil(wave.share * len(places)) - 1][0], wave.labels)


def wave_of(cuts: Sequence[Cut], device: Device, salt: str) -> int:
    """The index of the first wave that takes a device; the last one takes everybody."""
    place = place_of(salt, device.name)
    takers = (i for i, cut in enumerate(cuts) if place <= cut.up_to and has(device, cut.labels))
    return next(takers, len(cuts) - 1)


def has(device: Device, labels: Mapping[str, str]) -> bool:
    """Whether a device has all of these labels."""
    return all(device.labels.get(key) == value for key, value in labels.items())


def may_overlap(group: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether a device could belong to both groups: not if they want different values of one label."""
    return all(other.get(key, value) == value for key, value in group.items())
