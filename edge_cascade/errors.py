"""The errors that both halves share.

CascadeError
├── ProtocolError      bytes from the other side that are no valid message
│   └── TooLargeError  a size above its bound, found before anything was allocated for it
├── BundleError        a bundle that is damaged, incomplete or contradicts itself
│   └── HostileFileError  a model file that asks for something no honest file needs
├── BackendError       a runtime that refused a stage or failed while running it
├── TrainingError      examples or a schedule that nothing can be learned from
│   └── DivergedError  a training that has left weights worse than it began with
└── SettingsError      a configuration file or variable that cannot be meant: one line
"""

from __future__ import annotations

from typing import Final

_LONGEST: Final = 300


class CascadeError(Exception):
    """Base of every error that `edge_cascade` raises on purpose."""


class ProtocolError(CascadeError):
    """Bytes that are no valid message of this protocol."""


class TooLargeError(ProtocolError):
    """A size above its bound, refused before parsing or while inflating."""


class BundleError(CascadeError):
    """A bundle that is damaged, incomplete or contradicts itself."""


class HostileFileError(BundleError):
    """A model file that asks for something no honest file needs."""


class BackendError(CascadeError):
    """A runtime that refused a stage or failed while running it."""


class TrainingError(CascadeError):
    """Examples or a schedule that nothing can be learned from."""


class DivergedError(TrainingError):
    """A training that has left weights worse than those it began with."""


class SettingsError(CascadeError):
    """A configuration file or variable that cannot be meant; the message is one line."""


def first_line(error: BaseException) -> str:
    """The first line of another library's error, at most 300 characters; its type if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:_LONGEST] if lines else type(error).__name__
