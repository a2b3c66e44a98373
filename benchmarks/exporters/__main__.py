"""Which models of public packages `cloud-hub build --edge` takes as their exporters write them.

    python -m benchmarks.exporters [--only NAME,...] [--no-build] [--json FILE]

Every torch network is written by both of torch's exporters, with a batch of one and with a free one; weights are
random, what is tried is the graph. scikit-learn's models are fitted to noise and written by skl2onnx. Of each
model the first file that is taken goes through a whole certified build too. Needs what does not come with ours:

    pip install onnxscript skl2onnx scikit-learn && pip install --no-deps pytorchcv

(pytorchcv asks for torchvision, which would replace the torch that the `build` extra pins, and is not needed.)
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from rich.console import Console

from benchmarks.exporters.architectures import OWN, ZOO, Architecture, made
from benchmarks.exporters.exports import (
    TORCH_EXPORTERS,
    Batch,
    Estimator,
    Exporter,
    answers_of,
    estimators,
    export_estimator,
    export_torch,
    noise_for_estimators,
    softmax,
)
from benchmarks.exporters.tried import BuiltEdge, Original, Tried, build_edge, try_file
from benchmarks.harness import machine_line, parse_options, print_table, write_json

_SAMPLES: Final = 5


@dataclass(frozen=True, slots=True)
class Row:
    """One model: what became of each of its files, and of the build with the first that was taken."""

    name: str
    parameters: int | None
    files: tuple[Tried, ...]
    built: BuiltEdge | None


def main() -> None:
    """Try, build, print."""
    options = _parse()
    models = [each for each in _models() if not options.only or each.name in options.only]
    console = Console(stderr=True)
    print(machine_line())
    rows = []
    for model in models:
        console.rule(model.name)
        with tempfile.TemporaryDirectory() as folder:
            rows.append(_try(model, Path(folder), console if options.build else None))
    print_table(
        "Models as their exporters write them, through --edge",
        ("", "parameters", "files", "taken", "places", "exits at", "off by", "built", "compute", "upload"),
        [_cells(row) for row in rows],
    )
    refused = [file for row in rows for file in row.files if file.refused]
    for file in refused:
        print(f"{file.name}, {file.exporter}, {file.batch}: {file.refused}")
    for row in rows:
        if row.built is not None and row.built.refused:
            print(f"{row.name}, build: {row.built.refused}")
    write_json(options.json, {"models": msgspec.to_builtins(rows)})


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", type=lambda text: text.split(","), help="names, as the table has them")
    parser.add_argument(
        "--no-build", dest="build", action="store_false", help="take files in, but build no bundle"
    )
    options = parse_options(parser)
    missing = [
        name for name in ("torch", "onnxscript", "pytorchcv", "sklearn", "skl2onnx") if not find_spec(name)
    ]
    if missing:
        parser.error(f"{', '.join(missing)} is not installed: see above")
    return options


def _models() -> list[Architecture | Estimator]:
    return [*ZOO, *OWN, *estimators()]


def _try(model: Architecture | Estimator, folder: Path, console: Console | None) -> Row:
    """Every file of one model; the build only where there is somebody to tell of it."""
    if isinstance(model, Architecture):
        parameters, files = _torch_files(model, folder)
        shape = model.shape
    else:
        parameters, files = None, _estimator_file(model, folder)
        shape = noise_for_estimators(model.classes)[0].shape[1:]
    taken = [path for path, tried in files.items() if not tried.refused]
    built = build_edge(taken[0], shape, folder, console) if taken and console is not None else None
    return Row(model.name, parameters, tuple(files.values()), built)


def _torch_files(architecture: Architecture, folder: Path) -> tuple[int, dict[Path, Tried]]:
    model = made(architecture)
    x = np.random.default_rng(0).standard_normal((_SAMPLES, *architecture.shape)).astype(np.float32)
    original = Original(x, answers_of(model, x))
    files = {}
    for exporter in TORCH_EXPORTERS:
        for batch in Batch:
            path = folder / f"{exporter}-{batch.name.lower()}.onnx"
            try:
                export_torch(model, architecture.shape, path, exporter, batch)
            except RuntimeError as error:
                reason = f"torch does not export it: {str(error).strip().splitlines()[0]}"
                files[path] = Tried(architecture.name, exporter, batch, refused=reason)
            else:
                files[path] = try_file(architecture.name, exporter, batch, path, original)
    return sum(each.numel() for each in model.parameters()), files


def _estimator_file(estimator: Estimator, folder: Path) -> dict[Path, Tried]:
    path = export_estimator(estimator, folder / "estimator.onnx")
    x, y = noise_for_estimators(estimator.classes)
    knows_probabilities = hasattr(estimator.model, "predict_proba")
    said = estimator.model.predict_proba(x) if knows_probabilities else np.eye(estimator.classes)[y]
    original = Original(x, np.asarray(said, np.float32), softmax)
    return {path: try_file(estimator.name, Exporter.SKL2ONNX, Batch.FREE, path, original)}


def _cells(row: Row) -> Sequence[str]:
    taken = [file for file in row.files if not file.refused]
    cells = [
        row.name,
        "-" if row.parameters is None else f"{row.parameters:,}",
        str(len(row.files)),
        str(len(taken)),
    ]
    if not taken:
        return [*cells, "-", "-", "-", "-", "-", "-"]
    places = sorted({file.places for file in taken})
    cells += [
        " to ".join(map(str, sorted({places[0], places[-1]}))),
        " / ".join(f"{100 * share:.0f} %" for share in taken[0].exits) or "none",
        f"{max(file.off_by for file in taken):.0e}",
    ]
    if row.built is None or row.built.refused:
        return [*cells, "-" if row.built is None else "refused", "-", "-"]
    return [*cells, row.built.plan, f"{row.built.mult_adds:.2f}", f"{100 * row.built.upload_share:.1f} %"]


if __name__ == "__main__":
    main()
