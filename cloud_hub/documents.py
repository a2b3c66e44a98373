"""What all documents of the hub have in common, shown in a terminal or sent over REST. No I/O."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

Number = Annotated[int, Meta(ge=0, lt=2**53)]
"""Exact in JavaScript too (RFC 8259, section 6)."""
Hex = Annotated[str, Meta(pattern="^[0-9a-f]*$")]


class Document(msgspec.Struct, frozen=True, kw_only=True):
    """Base of everything that is shown or sent."""


class Heard(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of everything that is received."""
