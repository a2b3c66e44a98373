"""The releases that can be sent through a virtual fleet."""

from __future__ import annotations

from typing import Final, Literal, get_args

Kind = Literal["good", "bad", "crash", "slow", "drifted"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
