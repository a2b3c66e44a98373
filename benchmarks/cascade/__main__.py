"""The cascade on public data: accuracy, uploads, bytes, work and time, and how often its promise is broken.

    python -m benchmarks.cascade --data DIR [--cache DIR] [--only NAME,...] [--draws N] [--json FILE]

`DIR` holds `fashion_mnist.npz` and `cwru_12kde.npz` (see `sets`). Full models are trained on the training
part alone; everything else is `cloud_hub.builder.build`. Thresholds see calibration data only; all figures
are of test data. With `--cache` trained networks are kept, so that a second run measures only.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from rich.console import Console

from benchmarks.cascade.draws import Kept, Trial, print_draws, run_draws
from benchmarks.cascade.full_models import full_model
from benchmarks.cascade.own_edge import DEPTHWISE, RESIDUAL, OwnEdge, trained_file
from benchmarks.cascade.pool import pool_of
from benchmarks.cascade.sets import FASHION, SETS, Arrays, MeasuredSet
from benchmarks.cascade.tables import Measured, print_measured
from benchmarks.cascade.times import measure_times
from benchmarks.harness import machine_line, parse_options, write_json
from cloud_hub.builder.build import build
from cloud_hub.builder.reports.card import Card
from cloud_hub.builder.request import BuildRequest, make_request
from cloud_hub.builder.steps import Checkpoint, Steps
from edge_cascade.bundle import load_bundle

FULL_EPOCHS: Final = {"fashion": 10, "cwru": 15, "cwru-load": 15}
SIZES: Final = {"fashion": "large", "cwru": "medium", "cwru-load": "medium"}
EPOCHS: Final = {"fashion": 15, "cwru": 25, "cwru-load": 25}
OWN_EDGES: Final[dict[str, OwnEdge]] = {"fashion-own": DEPTHWISE, "fashion-heavy": RESIDUAL}
"""Brought through `--edge`, on Fashion-MNIST and beside its full model."""

DRAW_SAMPLES: Final = 4_000


def main() -> None:
    """Build, measure, print."""
    options = _parse()
    console = Console(stderr=True)
    print(machine_line())
    with tempfile.TemporaryDirectory() as temporary:
        cache = options.cache or Path(temporary)
        cache.mkdir(parents=True, exist_ok=True)
        measured = [_measure(name, options.data, cache, console) for name in options.only]
        print_measured(measured)
        draws = _draws(cache, options.draws) if "fashion" in options.only and options.draws else ()
    write_json(
        options.json,
        {
            "bundles": [
                {
                    "name": each.name,
                    "card": msgspec.to_builtins(each.card),
                    "times": msgspec.to_builtins(each.times),
                    "build_s": each.build_s,
                }
                for each in measured
            ],
            "draws": msgspec.to_builtins(draws),
        },
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*SETS, *OWN_EDGES]
    default = os.environ.get("EDGE_DATA_DIR")
    parser.add_argument("--data", type=Path, default=default, required=default is None, metavar="DIR")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep trained networks and bundles here")
    parser.add_argument(
        "--only",
        type=lambda text: text.split(","),
        default=names,
        help=f"of {','.join(names)} (default: all)",
    )
    parser.add_argument("--draws", type=int, default=400, help="calibration sets to draw (default: 400)")
    options = parse_options(parser)
    unknown = set(options.only) - set(names)
    if unknown:
        parser.error(f"--only: {min(unknown)!r} is none of {', '.join(names)}")
    return options


def _measure(name: str, data: Path, cache: Path, console: Console) -> Measured:
    source = SETS["fashion" if name in OWN_EDGES else name]
    arrays = source.load(data / source.file)
    console.rule(name)
    request = _request(name, source, arrays, cache, console)
    report = Path(request.out) / "report.json"
    took = Checkpoint(cache / f"{name}-{_key_of(request)}.seconds")
    kept = took.load()
    if kept is None or not report.is_file():
        started = time.monotonic()
        build(request, console)
        took.save({}, {"build_s": time.monotonic() - started})
    build_s = float((took.load() or ({}, {"build_s": 0.0}))[1]["build_s"])
    card = msgspec.json.decode(report.read_bytes(), type=Card)
    bundle = load_bundle(Path(request.out) / "bundle")
    x = arrays["x_test"].astype(np.float32).reshape(-1, *bundle.graph.input_shape)
    return Measured(name, card, measure_times(bundle, x), build_s)


def _key_of(request: BuildRequest) -> str:
    return hashlib.sha256(msgspec.json.encode(request)).hexdigest()[:16]


def _request(name: str, source: MeasuredSet, arrays: Arrays, cache: Path, console: Console) -> BuildRequest:
    key = "fashion" if name in OWN_EDGES else name
    file, full = cache / f"{key}.npz", cache / f"{key}.onnx"
    if not file.exists():
        np.savez(file, **arrays)
    full.write_bytes(full_model(source, arrays, cache, epochs=FULL_EPOCHS[key]))
    values: dict[str, Any] = {
        "full": str(full),
        "data": str(file),
        "out": str(cache / name),
        "mean": (source.mean,),
        "std": (source.std,),
        "encoding": source.wire,
        "wire_scale": source.wire_scale,
    }
    if name in OWN_EDGES:
        own = OWN_EDGES[name]
        x = (arrays["x_train"].astype(np.float32)[:, np.newaxis] - source.mean) / source.std
        edge = cache / f"{own.name}.onnx"
        y = arrays["y_train"].astype(np.int64)
        edge.write_bytes(trained_file(own, x.astype(np.float32), y, Steps(cache), console))
        values["edge"] = str(edge)
    else:
        values |= {"size": SIZES[key], "epochs": EPOCHS[key]}
    return make_request(values)


def _draws(cache: Path, draws: int) -> tuple[Kept, ...]:
    """Calibration sets from the 20,000 images that trained nothing, on the bundle's own network."""
    arrays = np.load(cache / "fashion.npz", allow_pickle=False)
    bundle = load_bundle(cache / "fashion" / "bundle")
    x = np.concatenate([arrays["x_calibration"], arrays["x_test"]]).astype(np.float32)
    y = np.concatenate([arrays["y_calibration"], arrays["y_test"]]).astype(np.int64)
    full = (cache / "fashion" / "full.onnx").read_bytes()
    pool = pool_of(bundle, full, x.reshape(-1, *bundle.graph.input_shape), y)
    trial = Trial(DRAW_SAMPLES, epsilon=0.005, delta=0.05)
    kept = run_draws(pool, trial, draws=draws, processes=2)
    print_draws(f"{FASHION.name}, from {len(y):,}", kept, trial)
    return kept


if __name__ == "__main__":
    main()
