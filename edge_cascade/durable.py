"""Writing what must survive a power cut, and the named places where tests cut the power.

The one way to replace a file: write beside it, fsync, rename, fsync the directory. Without the last step the
rename itself may be lost; python-tuf and most others leave it out.

`EDGE_CRASH_AT=<name>` or `<name>:<n>` makes the process kill itself with SIGKILL at the n-th passage of that
crash point. It exists so that recovery is tested with real processes; it is read once, at import.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

_crash_name, _, _crash_count = os.environ.get("EDGE_CRASH_AT", "").partition(":")
_passages_left = int(_crash_count) if _crash_count.isdecimal() else 1


def crash_point(name: str) -> None:
    """Die here, as in a power cut, if `EDGE_CRASH_AT` names this point; else do nothing."""
    global _passages_left  # noqa: PLW0603 - one process has one environment
    if name != _crash_name:
        return
    _passages_left -= 1
    if _passages_left <= 0:
        os.kill(os.getpid(), signal.SIGKILL)


def write_durably(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Replace `path` by `content`; after a power cut there is the old file or the new one, whole.

    Raises:
        OSError: as it came (disk full, read-only); the old file is then still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        crash_point("durable.before-rename")
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    crash_point("durable.after-rename")
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make renames and removals in `directory` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
