"""What the daemon hands to the child process that trains, and what comes back: one directory of files.

    job.msgpack              `Job`
    step.onnx                the bundle's train step
    base.safetensors         the training base, private heads on top
    inputs.npy               `x` of `Drawn`
    examples.safetensors     its other fields
    residual.safetensors     what delivered updates have left out, where there is any
    log                      what the child says on stderr
    result.msgpack           `Result`: only once all is done

The inputs are by far the largest, and only NumPy's own format is written without holding all other threads
up. A job belongs to one start of the daemon: directories that an earlier one left are removed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_cascade.bundle import Bundle
from edge_cascade.deltas import encoding_of
from edge_cascade.durable import write_durably
from edge_cascade.errors import ProtocolError
from edge_cascade.manifest import Preprocess
from edge_cascade.messages import RoundTerms
from edge_cascade.weights import FloatArray
from edge_daemon.core.examples import Drawn
from edge_daemon.training.arrays import dump_arrays, load_any_arrays, load_arrays

MAX_JOB_FILE_BYTES: Final = 2**30
MAX_RESULT_BYTES: Final = 256 * 2**20

JOB_FILE: Final = "job.msgpack"
STEP_FILE: Final = "step.onnx"
BASE_FILE: Final = "base.safetensors"
INPUTS_FILE: Final = "inputs.npy"
EXAMPLES_FILE: Final = "examples.safetensors"
RESIDUAL_FILE: Final = "residual.safetensors"
LOG_FILE: Final = "log"
RESULT_FILE: Final = "result.msgpack"


class Job(msgspec.Struct, frozen=True):
    """What is to be done, besides the arrays. `seed`: of the order of the examples, drawn anew each time.

    `max_memory_bytes` bounds what the child may allocate, `max_seconds` its processor time.
    """

    terms: RoundTerms
    preprocess: Preprocess
    input_shape: tuple[int, ...]
    classes: int
    head_parameters: tuple[str, ...]
    seed: int
    noise_seed: bytes
    max_memory_bytes: int
    max_seconds: int


class Result(msgspec.Struct, frozen=True):
    """What a training gave. `residual` and `heads` are safetensors, None where there are none.

    `refused`: what the system did not let the child lower.
    """

    delta: bytes
    num_examples: int
    first_loss: float
    last_loss: float
    seconds: float
    residual: bytes | None
    heads: bytes | None
    refused: tuple[str, ...]


def job_of(
    bundle: Bundle,
    terms: RoundTerms,
    *,
    seed: int,
    noise_seed: bytes,
    max_memory_bytes: int,
    max_seconds: int,
) -> Job:
    """The job of a round for a bundle that has a train step."""
    assert bundle.train_step is not None
    return Job(
        terms,
        bundle.graph.preprocess,
        bundle.train_step.input_shape,
        bundle.train_step.classes,
        bundle.graph.head_parameters,
        seed,
        noise_seed,
        max_memory_bytes,
        max_seconds,
    )


def write_job(
    directory: Path,
    job: Job,
    *,
    step: bytes,
    base: Mapping[str, FloatArray],
    examples: Drawn,
    residual: bytes | None,
) -> None:
    """Fill an empty directory.

    Raises:
        OSError: when the disk does not take it.
    """
    files = {
        JOB_FILE: msgspec.msgpack.encode(job),
        STEP_FILE: step,
        BASE_FILE: dump_arrays(base),
        EXAMPLES_FILE: dump_arrays(
            {
                "labels": examples.labels,
                "origins": examples.origins,
                "probabilities": examples.probabilities,
                "confidence": examples.confidence,
            }
        ),
    }
    if residual is not None:
        files[RESIDUAL_FILE] = residual
    for name, content in files.items():
        (directory / name).write_bytes(content)
    with (directory / INPUTS_FILE).open("wb") as file:
        np.save(file, examples.x, allow_pickle=False)


def read_job(directory: Path) -> Job:
    """The job in a directory.

    Raises:
        ProtocolError: for a file that is none.
        OSError: when it cannot be read.
    """
    try:
        return msgspec.msgpack.decode(_read(directory / JOB_FILE), type=Job)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"{JOB_FILE}: {error}") from error


def read_step(directory: Path) -> bytes:
    """The train step's file. See `read_job`."""
    return _read(directory / STEP_FILE)


def read_base(directory: Path) -> dict[str, FloatArray]:
    """What training starts from. See `read_job`."""
    return load_arrays(_read(directory / BASE_FILE))


def read_residual(directory: Path) -> dict[str, FloatArray]:
    """What was left out; empty where there is nothing. See `read_job`."""
    path = directory / RESIDUAL_FILE
    return load_arrays(_read(path)) if path.exists() else {}


def read_examples(directory: Path, *, classes: int) -> Drawn:
    """The examples, their shapes checked against each other. See `read_job`."""
    arrays = load_any_arrays(_read(directory / EXAMPLES_FILE))
    x = _read_inputs(directory / INPUTS_FILE)
    types = {
        "labels": np.int64,
        "origins": np.uint8,
        "probabilities": np.float32,
        "confidence": np.float32,
    }
    if {name: array.dtype for name, array in arrays.items()} != {k: np.dtype(t) for k, t in types.items()}:
        raise ProtocolError(f"{EXAMPLES_FILE}: holds other arrays than those of examples")
    count = len(arrays["labels"]) if arrays["labels"].ndim == 1 else -1
    shapes = {name: arrays[name].shape for name in ("origins", "probabilities", "confidence")}
    if shapes != {"origins": (count,), "probabilities": (count, classes), "confidence": (count,)}:
        raise ProtocolError(f"{EXAMPLES_FILE}: its arrays are not about the same examples: {shapes}")
    if x.dtype != np.float32 or x.shape[:1] != (count,) or not np.isfinite(x).all():
        raise ProtocolError(f"{INPUTS_FILE}: {x.dtype} {x.shape} is not {count} finite samples")
    return Drawn(
        x=x.astype(np.float32, copy=False),
        labels=arrays["labels"].astype(np.int64, copy=False),
        origins=arrays["origins"].astype(np.uint8, copy=False),
        probabilities=arrays["probabilities"].astype(np.float32, copy=False),
        confidence=arrays["confidence"].astype(np.float32, copy=False),
    )


def write_result(directory: Path, result: Result) -> None:
    """The last thing that a child does: there is a result, whole, or there is none.

    Raises:
        OSError: when the disk does not take it.
    """
    write_durably(directory / RESULT_FILE, msgspec.msgpack.encode(result), mode=0o600)


def read_result(directory: Path, terms: RoundTerms) -> Result:
    """What the child has left.

    Raises:
        ProtocolError: when it is no result of these terms.
        OSError: when it cannot be read.
    """
    path = directory / RESULT_FILE
    if path.stat().st_size > MAX_RESULT_BYTES:
        raise ProtocolError(f"{RESULT_FILE}: more than {MAX_RESULT_BYTES} bytes")
    try:
        result = msgspec.msgpack.decode(path.read_bytes(), type=Result)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"{RESULT_FILE}: {error}") from error
    if encoding_of(result.delta) != terms.encoding or not 0 < result.num_examples <= terms.max_examples:
        raise ProtocolError(f"{RESULT_FILE}: is not a result of round {terms.round_id!r}")
    return result


def _read_inputs(path: Path) -> NDArray[np.generic]:
    _check_size(path)
    try:
        with path.open("rb") as file:
            x: NDArray[np.generic] = np.lib.format.read_array(file, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ProtocolError(f"{path.name}: {error}") from error
    return x


def _read(path: Path) -> bytes:
    _check_size(path)
    return path.read_bytes()


def _check_size(path: Path) -> None:
    if path.stat().st_size > MAX_JOB_FILE_BYTES:
        raise ProtocolError(f"{path.name}: more than {MAX_JOB_FILE_BYTES} bytes")
