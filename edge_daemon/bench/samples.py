"""Which bundle and which samples a measurement uses, from what was typed."""

from __future__ import annotations

import zipfile
import zlib
from itertools import islice
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_cascade.bundle import Bundle
from edge_cascade.shipped import shipped_models
from edge_daemon.errors import EXIT_USAGE, EdgeError, SimulationError

MAX_SAMPLES: Final = 2000
SHIPPED_SAMPLES: Final = 500
DATA_KEYS: Final = ("x_test", "x")
"""What samples are called; the first that is there is taken, as `cloud-hub evaluate` does."""


class DataError(EdgeError):
    """Samples that do not fit the bundle: names the file, what is wrong and what is expected."""

    exit_code = EXIT_USAGE


class Samples(msgspec.Struct, frozen=True):
    """`x` is `(n, *input_shape) float32` as it comes from a sensor; `source` says where it is from."""

    x: NDArray[np.float32]
    source: str


def load_samples(path: Path, bundle: Bundle) -> Samples:
    """The first samples of an .npz file's `x_test`, or of its `x`.

    Raises:
        DataError: naming the file and what is wrong with it.
    """
    name, x = _read_array(path)
    wanted = bundle.graph.input_shape
    if x.ndim != len(wanted) + 1 or x.shape[1:] != wanted or not len(x):
        shape = ", ".join(("n", *map(str, wanted)))
        raise DataError(f"{path}: {name} has the shape {x.shape}, {bundle.graph.model!r} takes ({shape})")
    if x.dtype.kind not in "fiub":
        raise DataError(f"{path}: {name} is {x.dtype}, expected numbers")
    with np.errstate(over="ignore"):
        used = x[:MAX_SAMPLES].astype(np.float32)
    if not np.isfinite(used).all():
        raise DataError(f"{path}: {name} holds NaN or infinity as float32; remove those samples")
    return Samples(used, f"the first {len(used)} of {len(x)} samples of {path.name}")


def _read_array(path: Path) -> tuple[str, NDArray[np.generic]]:
    try:
        # Opened here, because np.load leaves a file open that it does not understand.
        with path.open("rb") as raw:
            return _array_in(np.load(raw, allow_pickle=False), path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        # numpy's own words recommend loading pickles.
        raise DataError(
            f"{path}: no .npz file of plain arrays; write it with np.savez(..., x=...)"
        ) from error


def _array_in(
    loaded: NDArray[np.generic] | np.lib.npyio.NpzFile, path: Path
) -> tuple[str, NDArray[np.generic]]:
    if isinstance(loaded, np.ndarray):
        raise DataError(f"{path}: a single array; write it with np.savez(..., x=...)")
    name = next((key for key in DATA_KEYS if key in loaded), None)
    if name is None:
        found = ", ".join(sorted(loaded)) or "nothing"
        raise DataError(
            f"{path}: no array 'x' or 'x_test', only: {found}; write it with np.savez(..., x=...)"
        )
    return name, loaded[name]


def default_samples(name: str, bundle: Bundle) -> Samples:
    """What a shipped model's virtual sensor sends; for any other bundle its golden inputs."""
    from edge_daemon.simulate.sensors import open_source

    if name in shipped_models():
        try:
            drawn = islice(open_source(name, seed=1, drift=0.0), SHIPPED_SAMPLES)
            x = np.stack([sample for sample, _ in drawn])
        except SimulationError:
            pass
        else:
            return Samples(x, f"{len(x)} samples of the virtual sensor")
    x = bundle.golden_inputs
    return Samples(x, f"the bundle's {len(x)} golden inputs; --data FILE.npz gives samples of your own")
