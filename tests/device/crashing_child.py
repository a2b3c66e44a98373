"""The program of a trial, whose runtime reads where nothing is as it opens a stage: `JOB_DIR NICE`."""

import ctypes
import sys

from edge_cascade.backends import onnx
from edge_daemon.releases import trial_child


def open_stage(*_):
    ctypes.string_at(8)


if __name__ == "__main__":
    onnx.OnnxStage.__init__ = open_stage
    sys.exit(trial_child.main(sys.argv[1:]))
