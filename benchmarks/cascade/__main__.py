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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from rich.console import Console

from benchmarks.cascade.draws import Kept, Trial, print_draws, run_draws
from benchmarks.cascade.full_models import full_model
from benchmarks.cascade.own_edge import trained_file
from benchmarks.cascade.sets import FASHION, SETS, Arrays, MeasuredSet
from benchmarks.cascade.times import Times, measure_times
from benchmarks.harness import machine_line, parse_options, print_table, write_json
from cloud_hub.builder.build import build
from cloud_hub.builder.calibration.outcomes import Outcomes
from cloud_hub.builder.collect import StageRuns, full_labels, received, stages_of_bundle
from cloud_hub.builder.reports.card import Card
from cloud_hub.builder.request import BuildRequest, make_request
from cloud_hub.builder.steps import Checkpoint
from edge_cascade.bundle import load_bundle
from edge_cascade.policy import Plan
from edge_cascade.preprocess import normalise

FULL_EPOCHS: Final = {"fashion": 10, "cwru": 15, "cwru-load": 15}
SIZES: Final = {"fashion": "large", "cwru": "medium", "cwru-load": "medium"}
EPOCHS: Final = {"fashion": 15, "cwru": 25, "cwru-load": 25}
OWN_EDGE: Final = "fashion-own"
DRAW_SAMPLES: Final = 4_000


@dataclass(frozen=True, slots=True)
class Measured:
    """One bundle on its test data, and what it took to make it."""

    name: str
    card: Card
    times: Times
    build_s: float


def main() -> None:
    """Build, measure, print."""
    options = _parse()
    console = Console(stderr=True)
    print(machine_line())
    with tempfile.TemporaryDirectory() as temporary:
        cache = options.cache or Path(temporary)
        cache.mkdir(parents=True, exist_ok=True)
        measured = [_measure(name, options.data, cache, console) for name in options.only]
        _print(measured)
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
    names = [*SETS, OWN_EDGE]
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
    source = SETS["fashion" if name == OWN_EDGE else name]
    arrays = source.load(data / source.file)
    console.rule(name)
    request = _request(name, source, arrays, cache)
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
    return Measured(name, card, measure_times(bundle, bundle.plan(), x), build_s)


def _key_of(request: BuildRequest) -> str:
    return hashlib.sha256(msgspec.json.encode(request)).hexdigest()[:16]


def _request(name: str, source: MeasuredSet, arrays: Arrays, cache: Path) -> BuildRequest:
    key = "fashion" if name == OWN_EDGE else name
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
    if name == OWN_EDGE:
        x = (arrays["x_train"].astype(np.float32)[:, np.newaxis] - source.mean) / source.std
        own = cache / "own_edge.onnx"
        own.write_bytes(
            trained_file(
                x.astype(np.float32),
                arrays["y_train"].astype(np.int64),
                Checkpoint(cache / "own_edge.safetensors"),
                epochs=6,
                threads=2,
            )
        )
        values["edge"] = str(own)
    else:
        values |= {"size": SIZES[key], "epochs": EPOCHS[key]}
    return make_request(values)


def _draws(cache: Path, draws: int) -> tuple[Kept, ...]:
    """Calibration sets from the 20,000 images that trained nothing, under the bundle's own default plan."""
    arrays = np.load(cache / "fashion.npz", allow_pickle=False)
    bundle = load_bundle(cache / "fashion" / "bundle")
    plan: Plan = bundle.plan()
    x = np.concatenate([arrays["x_calibration"], arrays["x_test"]]).astype(np.float32)
    y = np.concatenate([arrays["y_calibration"], arrays["y_test"]]).astype(np.int64)
    samples = x.reshape(-1, *bundle.graph.input_shape)
    given = received(samples, bundle.graph.preprocess, bundle.graph.wire)
    board = normalise(samples, bundle.graph.preprocess)
    heads = StageRuns(stages_of_bundle(bundle), board).climb(plan.rungs)
    pool = Outcomes(heads, full_labels((cache / "fashion" / "full.onnx").read_bytes(), given), y)
    trial = Trial(DRAW_SAMPLES, epsilon=0.005, delta=0.05)
    plain = tuple(msgspec.structs.replace(rung, must_agree=False) for rung in plan.rungs)
    kept = run_draws(plain, pool, trial, draws=draws, processes=2)
    print_draws(f"{FASHION.name}: {draws} calibration sets of {DRAW_SAMPLES:,} from {len(y):,}", kept, trial)
    return kept


def _print(measured: Sequence[Measured]) -> None:
    print_table(
        "Accuracy on test data, percent",
        (
            "",
            "parameters",
            "exits alone",
            "board alone",
            "cascade",
            "cloud only",
            "difference",
            "upload",
            "naive",
            "naive upload",
        ),
        [_accuracy_row(each) for each in measured],
    )
    print_table(
        "Bytes up a sample: MQTT (TCP/IP beside it)",
        ("", "cascade", "all deflated", "saved", "one message each", "saved", "all raw", "saved"),
        [_bytes_row(each) for each in measured],
    )
    print_table(
        "Work and time",
        (
            "",
            "multiply-adds, share",
            "ladder us",
            "whole fp32 us",
            "whole int8 us",
            "ladder / fp32",
            "built in s",
        ),
        [
            (
                each.name,
                f"{each.card.evaluation.mult_adds / each.card.evaluation.network_mult_adds:.2f}",
                f"{each.times.ladder_us:.0f}",
                f"{each.times.whole_us:.0f}",
                f"{each.times.whole_int8_us:.0f}",
                f"{each.times.ladder_us / each.times.whole_us:.2f}",
                f"{each.build_s:.0f}",
            )
            for each in measured
        ],
    )


def _accuracy_row(each: Measured) -> tuple[str, ...]:
    seen, naive = each.card.evaluation, each.card.naive
    return (
        each.name,
        each.card.made_by.get("parameters", "-"),
        " / ".join(f"{100 * rung.accuracy:.1f}" for rung in seen.rungs),
        f"{100 * seen.edge_accuracy:.2f}",
        f"{100 * seen.cascade_accuracy:.2f}",
        f"{100 * seen.full_accuracy:.2f}",
        f"{100 * (seen.cascade_accuracy - seen.full_accuracy):+.2f}",
        f"{100 * seen.upload_share:.1f}",
        "-" if naive is None else f"{100 * naive.accuracy:.2f}",
        "-" if naive is None else f"{100 * naive.upload_share:.1f}",
    )


def _bytes_row(each: Measured) -> tuple[str, ...]:
    uplink, samples = each.card.evaluation.uplink, each.card.evaluation.samples
    row = [each.name, f"{uplink.cascade.up / samples:.1f} ({uplink.cascade.tcp['5'].up / samples:.1f})"]
    for other in (uplink.all_deflated, uplink.one_by_one, uplink.all_raw):
        row += [
            f"{other.up / samples:.1f} ({other.tcp['5'].up / samples:.1f})",
            f"{100 * (1 - uplink.cascade.up / other.up):.1f} % ({100 * (1 - uplink.cascade.tcp['5'].up / other.tcp['5'].up):.1f} %)",
        ]
    return tuple(row)


if __name__ == "__main__":
    main()
