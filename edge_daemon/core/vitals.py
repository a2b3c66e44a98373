"""Whether a board may train now. No I/O; see `training.readings` for who reads the board."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Vitals:
    """What a board says of itself; None where it does not say.

    `celsius`: its hottest sensor. `other_load`: the share of all cores that other processes use, 0 to 1.
    `queued`: samples that wait for their answer.
    """

    celsius: float | None
    other_load: float | None
    free_bytes: int | None
    on_battery: bool | None
    queued: int


@dataclass(frozen=True, slots=True)
class VitalsLimits:
    """Beyond these nothing is trained."""

    max_celsius: float
    max_load: float
    min_free_bytes: int
    on_battery: bool
    max_queued: int


def decide_may_train(vitals: Vitals, limits: VitalsLimits) -> str | None:
    """None if it may, else why not, in words. What the board does not say is no obstacle."""
    if vitals.queued > limits.max_queued:
        return f"{vitals.queued} samples wait for their answer, at most {limits.max_queued} may"
    # Written so that NaN is an obstacle as well.
    if vitals.celsius is not None and not vitals.celsius <= limits.max_celsius:
        return f"{vitals.celsius:.0f} degrees, at most {limits.max_celsius:.0f} are allowed"
    if vitals.other_load is not None and not vitals.other_load <= limits.max_load:
        return f"others use {vitals.other_load:.0%} of the cores, at most {limits.max_load:.0%} are allowed"
    if vitals.free_bytes is not None and vitals.free_bytes < limits.min_free_bytes:
        free, needed = vitals.free_bytes // 2**20, limits.min_free_bytes // 2**20
        return f"{free} MiB of memory are free, at least {needed} are needed"
    if vitals.on_battery and not limits.on_battery:
        return "on battery"
    return None
