"""What a program says when nobody takes its output: one line, and the exit code of a shell."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
from edge_cascade.commands import run_command

def command():
    print("an answer")
    return 7

sys.exit(run_command("program", command))
"""
COMMAND = [sys.executable, "-c", PROGRAM]


def test_what_is_read_to_its_end_ends_with_the_commands_own_code():
    ended = subprocess.run(COMMAND, capture_output=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (7, b"an answer\n", b"")


def test_a_reader_that_has_gone_is_no_fault():
    with subprocess.Popen(COMMAND, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as gone:
        gone.stdout.close()
        said = gone.stderr.read()
    assert (gone.returncode, said) == (141, b"")


def test_a_full_disk_is_one_line():
    with Path("/dev/full").open("wb") as full:
        ended = subprocess.run(COMMAND, stdout=full, stderr=subprocess.PIPE, check=False)
    assert (ended.returncode, ended.stderr) == (1, b"program: No space left on device\n")
