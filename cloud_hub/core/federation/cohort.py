"""Who is asked in a round. No I/O; chance is an argument.

A device may be asked when it runs a bundle of the training base's graph and is not in quarantine. A share of
the places goes to devices that sleep, the rest to those that are online; places that one side cannot fill go
to the other. On each side a random half is drawn (more, where half would be less than twice the places), and
of these the ones asked longest ago are taken. So nobody is starved, asleep or awake: who has not been asked
for longer than the others is in the cohort as soon as it is drawn, every other round. The draw keeps the same
devices from meeting in the same cohort again and again.

This is not uniform sampling, and `privacy` claims no more for it than it bears.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from cloud_hub.core.federation.standing import Standing, is_quarantined

DRAWN_PER_PLACE: Final = 2
NEVER: Final = -1


@dataclass(frozen=True, slots=True)
class Eligible:
    """A device as the hub knows it. `last_round` is the last one it was asked in, or `NEVER`."""

    device: str
    online: bool
    graph_matches: bool
    standing: Standing
    last_round: int = NEVER


def select_cohort(
    devices: Iterable[Eligible],
    size: int,
    rng: np.random.Generator,
    *,
    round_number: int,
    sleeper_share: float = 0.2,
) -> tuple[str, ...]:
    """The names of at most `size` devices to ask, sorted; fewer when fewer may be asked.

    The order of `devices` does not matter. `sleeper_share` (0..1) of the places is meant for devices that are
    not online: a part of a place is decided by chance.

    Raises:
        ValueError: when `size` or `sleeper_share` is out of range, or a device is given twice.
    """
    if size < 1 or not 0.0 <= sleeper_share <= 1.0:
        raise ValueError(f"a cohort of {size} with a share of {sleeper_share} for sleepers")
    may_be_asked = select_eligible(devices, round_number=round_number)
    awake = [device for device in may_be_asked if device.online]
    asleep = [device for device in may_be_asked if not device.online]
    meant = math.floor(sleeper_share * size + rng.random())
    for_sleepers = min(len(asleep), max(meant, size - len(awake)))
    chosen = _draw(asleep, for_sleepers, rng) + _draw(awake, size - for_sleepers, rng)
    return tuple(sorted(device.device for device in chosen))


def select_eligible(devices: Iterable[Eligible], *, round_number: int) -> list[Eligible]:
    """Those that may be asked, by name.

    Raises:
        ValueError: when a device is given twice.
    """
    known = sorted(devices, key=lambda device: device.device)
    if len({device.device for device in known}) != len(known):
        raise ValueError("a device is given twice")
    return [
        device
        for device in known
        if device.graph_matches and not is_quarantined(device.standing, round_number=round_number)
    ]


def _draw(devices: Sequence[Eligible], places: int, rng: np.random.Generator) -> list[Eligible]:
    """In random order at first, so that who was asked in the same round is taken by chance."""
    drawn = rng.permutation(len(devices))[: max(len(devices) // 2, DRAWN_PER_PLACE * places)]
    return sorted((devices[i] for i in drawn), key=lambda device: device.last_round)[:places]
