"""What stages cost on one machine: a JSON document that one program writes and others read.

A board measures itself (`edge-daemon profile`); the builder reads the file and predicts what a network that
the board has never seen will cost there, from what it costs on the build machine.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec

from edge_cascade.durable import write_durably
from edge_cascade.errors import CascadeError
from edge_cascade.policy import Precision

VERSION: Final = 1
MAX_PROFILE_BYTES: Final = 4 * 2**20

Pace = Literal["tight", "paced"]
"""`tight`: calls follow at once. `paced`: they come apart, as samples do, and find cold caches."""

Text = Annotated[str, msgspec.Meta(max_length=256)]
Microseconds = Annotated[float, msgspec.Meta(gt=0)]
Count = Annotated[int, msgspec.Meta(ge=0)]


class ProfileError(CascadeError):
    """A profile that cannot be read or written; the message is one line."""


class Machine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where it was measured. None: the machine does not say.

    `features` are the processor's instructions that int8 gains by; `cores` those that the process may use;
    `governor` and `max_mhz` belong to the first core; `load_1min` is what else ran; `packages` are the
    versions of the runtimes installed.
    """

    architecture: Text
    cpu: Text
    features: tuple[Text, ...]
    cores: Count
    memory_bytes: Count | None
    board: Text | None
    governor: Text | None
    max_mhz: float | None
    load_1min: float | None
    os: Text
    python: Text
    packages: dict[Text, Text]


class StageCost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one sample takes in one stage at one precision: median and 99th percentile of `samples` calls."""

    model: Text
    bundle_id: Text
    stage: Count
    precision: Precision
    runtime: Text
    pace: Pace
    mult_adds: Count
    p50_us: Microseconds
    p99_us: Microseconds
    samples: Annotated[int, msgspec.Meta(ge=1)]


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that was measured in one go, at `measured_at` (UTC, ISO 8601); `gap_ms` is between paced calls."""

    version: int
    measured_at: Text
    machine: Machine
    gap_ms: Annotated[float, msgspec.Meta(gt=0)]
    stages: Annotated[tuple[StageCost, ...], msgspec.Meta(max_length=4096)]


class _Versioned(msgspec.Struct):
    """What must be read before the rest can be understood."""

    version: int


def speed_ratio(
    here: Sequence[StageCost], there: Sequence[StageCost], *, pace: Pace = "tight"
) -> dict[Precision, float]:
    """How many times as long a stage takes there, by precision: the geometric mean over the shared stages.

    Shared is what both measured: same bundle, stage, precision and runtime. A precision without any is
    absent.
    """
    known = {_key(cost): cost.p50_us for cost in here}
    logarithms: dict[Precision, list[float]] = defaultdict(list)
    for cost in there:
        if cost.pace == pace and _key(cost) in known:
            logarithms[cost.precision].append(math.log(cost.p50_us / known[_key(cost)]))
    return {precision: math.exp(math.fsum(logs) / len(logs)) for precision, logs in logarithms.items()}


def encode_profile(profile: Profile) -> bytes:
    """The document as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(profile), indent=2) + b"\n"


def decode_profile(content: bytes, where: str = "profile") -> Profile:
    """The document that `encode_profile` wrote.

    Raises:
        ProfileError: naming `where` and what is wrong.
    """
    if len(content) > MAX_PROFILE_BYTES:
        raise ProfileError(f"{where}: more than {MAX_PROFILE_BYTES} bytes; this is no profile")
    try:
        version = msgspec.json.decode(content, type=_Versioned).version
        if version != VERSION:
            raise ProfileError(
                f"{where}: profile version {version}, this program reads {VERSION}; measure again"
            )
        profile = msgspec.json.decode(content, type=Profile)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProfileError(f"{where}: no profile of `edge-daemon profile`: {error}") from error
    twice = [key for key, count in Counter(map(_key, profile.stages)).items() if count > 1]
    if twice:
        raise ProfileError(f"{where}: stage {twice[0][1]} in {twice[0][2]} of one bundle is there twice")
    return profile


def read_profile(path: Path) -> Profile:
    """The profile in a file.

    Raises:
        ProfileError: naming the file and what is wrong.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_PROFILE_BYTES + 1)
    except OSError as error:
        raise ProfileError(f"{path}: {error.strerror}; write one with `edge-daemon profile`") from error
    return decode_profile(content, str(path))


def write_profile(path: Path, profile: Profile) -> None:
    """Replace a file by the profile.

    Raises:
        ProfileError: naming the file and why it was not written.
    """
    try:
        write_durably(path, encode_profile(profile))
    except OSError as error:
        raise ProfileError(f"{path}: {error.strerror}") from error


def _key(cost: StageCost) -> tuple[str, int, Precision, str, Pace]:
    return (cost.bundle_id, cost.stage, cost.precision, cost.runtime, cost.pace)
