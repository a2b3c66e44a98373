"""What is signed of a release, by which role and under which name. No I/O; the metadata are TUF's.

Roles (The Update Framework, specification 1.0): `root` and `targets` are signed offline by a threshold of
keys; `snapshot` and `timestamp` online; `targets` delegates `weights/*/*` to the online role `ONLINE_ROLE`.

A target is the manifest of a part: its SHA-256 is the digest of the part, and it holds the digest of every
other file, so signing it signs them all. A graph part is signed by `targets` alone. A weights part is signed
by either; one of the online role must keep to the bounds of its graph part (`manifest.Bounds`).
"""

from __future__ import annotations

from typing import Final

import msgspec

from edge_cascade.manifest import Norms

ONLINE_ROLE: Final = "weights"
ONLINE_PATHS: Final = ("weights/*/*",)
POLICY_TARGET: Final = "policy.json"
CUSTOM: Final = "custom"
"""The field of a target that holds `PartNote` as JSON; TUF signs and keeps it."""

METADATA_PATH: Final = "metadata"
"""Under the fleet's URL: `metadata/<version>.<role>.json` and `metadata/timestamp.json`."""
BLOBS_PATH: Final = "blobs"
"""`blobs/<sha256>`: any file of a signed part, whole or by Range."""
DELTAS_PATH: Final = "deltas"
"""`deltas/<model>/<weights part held>/<weights part wanted>`: a shorter way to `weights.safetensors`."""


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the offline role asks of boards beside signatures: by model, the lowest release they may take.

    A board that goes back by itself to what ran before is not bound by it.
    """

    security_floor: dict[str, int] = {}


class PartNote(msgspec.Struct, frozen=True, omit_defaults=True):
    """Signed along with a part: the number of its release, and for weights the digest of their graph.

    `norms` are for a graph whose manifest states none: bounds around the weights that were signed with it.
    """

    release: int
    graph: str = ""
    norms: Norms | None = None


def note_fields(note: PartNote) -> dict[str, object]:
    """The note as a target's `custom`. Canonical JSON has no fractions, so norms are JSON in a text."""
    fields: dict[str, object] = msgspec.to_builtins(note)
    if note.norms is not None:
        fields["norms"] = msgspec.json.encode(note.norms).decode()
    return fields


def read_note(fields: object) -> PartNote:
    """The note in a target's `custom`.

    Raises:
        msgspec.ValidationError: when it is none.
    """
    signed = msgspec.convert(fields, type=_Signed)
    norms = None
    if signed.norms:
        try:
            norms = msgspec.json.decode(signed.norms, type=Norms)
        except msgspec.DecodeError as error:
            raise msgspec.ValidationError(f"norms: {error}") from error
    return PartNote(signed.release, signed.graph, norms)


class _Signed(msgspec.Struct, frozen=True):
    release: int
    graph: str = ""
    norms: str = ""


def graph_target(model: str, sha256: str) -> str:
    """The name of a graph part's manifest."""
    return f"graphs/{model}/{sha256}.json"


def weights_target(model: str, sha256: str) -> str:
    """The name of a weights part's manifest."""
    return f"weights/{model}/{sha256}.json"
