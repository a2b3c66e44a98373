"""How a command ends whose output nobody takes. For the programs of both halves."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Final

EXIT_PIPE: Final = 141
"""Whoever read our output has gone, as a shell says it of a program that SIGPIPE ended."""
EXIT_OUTPUT: Final = 1
EXIT_INTERRUPTED: Final = 130


def run_command(program: str, command: Callable[[], int]) -> int:
    """Run a command and write its output to the end; its exit code.

    What `command` raises on purpose it has to deal with itself; of an `OSError` one line is said here.
    """
    try:
        code = command()
        # Here, where a full disk can still be said.
        sys.stdout.flush()
    except BrokenPipeError:
        _let_go_of_output()
        return EXIT_PIPE
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        sys.stderr.write(f"{program}: {where}{error.strerror or error}\n")
        _let_go_of_output()
        return EXIT_OUTPUT
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return code


def _let_go_of_output() -> None:
    """What could not be written is not tried again at the end: that would be said by the interpreter."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
