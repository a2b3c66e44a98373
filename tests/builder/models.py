"""A small image task with closed-form networks: what a user brings to `cloud-hub build`, made without torch.

An image is its class's pattern under noise of its own strength, so some are easy and some are not. The full
model compares all pixels with the patterns. The board's network sees them through random convolutions, its
heads fitted by least squares, so it is weaker, and its first exit weaker still.
"""

import atexit
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
from onnx import helper
from rich.console import Console

from cloud_hub.__main__ import main
from cloud_hub.builder.assemble import Declaration
from cloud_hub.builder.build import build
from cloud_hub.builder.graphs.onnx_graph import run_for
from cloud_hub.builder.graphs.staged import features_name
from cloud_hub.builder.naive import Calibration, build_naive_bundle
from cloud_hub.builder.networks.export import export_full, export_staged
from cloud_hub.builder.networks.network import (
    AveragePool,
    Conv,
    Dense,
    Flatten,
    Network,
    Relu,
    Stage,
    initial_parameters,
)
from cloud_hub.builder.request import make_request
from edge_cascade.manifest import Preprocess, Wire
from edge_cascade.preprocess import normalise
from tests.builder.onnx_models import model_of, tensor

CLASSES = 4
SIDE = 8
MEAN, STD = 128.0, 64.0
"""What the full model learned with: `(x - 128) / 64`."""
LEARNED = ("--mean", "128", "--std", "64")
QUICK = (*LEARNED, "--epsilon", "0.02", "--plans", "int8")

_PATTERN = 26.0
_NOISE = 24.0


@dataclass(frozen=True)
class Images:
    """Grey levels 0 to 255 `(n, channels, 8, 8) uint8` and their classes `(n,)`."""

    x: np.ndarray
    y: np.ndarray


@dataclass(frozen=True)
class Brought:
    """A user's files, and a model directory whose network may be rebased onto the full model."""

    full: Path
    data: Path
    base: Path

    def build(self, out, *options):
        """`cloud-hub build` with the base's network; options that are given again outrank these."""
        usual = ["--full", self.full, "--data", self.data, "--rebase", self.base, "--out", out]
        return run_hub("build", *usual, *options)


def patterns(channels=1):
    """The classes' patterns `(classes, channels, 8, 8)`, smooth, of mean square 1."""
    coarse = np.random.default_rng(7).standard_normal((CLASSES, channels, SIDE // 2, SIDE // 2))
    fine = coarse.repeat(2, axis=2).repeat(2, axis=3)
    return fine / np.sqrt((fine**2).mean(axis=(1, 2, 3), keepdims=True))


def images(count, seed, *, channels=1):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, CLASSES, count)
    strength = _NOISE * (0.4 + rng.gamma(2.0, 0.6, count))[:, None, None, None]
    noise = strength * rng.standard_normal((count, channels, SIDE, SIDE))
    x = MEAN + _PATTERN * patterns(channels)[y] + noise
    return Images(np.clip(np.rint(x), 0, 255).astype(np.uint8), y)


def full_model(channels=1):
    """A file as an exporter writes it: the nearest pattern by all pixels, a softmax at its end."""
    known = (_PATTERN / STD) * patterns(channels).reshape(CLASSES, -1)
    weights, bias = 6.0 * known, -3.0 * (known**2).sum(axis=1)
    return model_of(
        [
            helper.make_node("Flatten", ["images"], ["flat"], name="flatten"),
            helper.make_node("Gemm", ["flat", "w", "b"], ["scores"], name="classifier", transB=1),
            helper.make_node("Softmax", ["scores"], ["probabilities"], name="softmax", axis=1),
        ],
        [("images", ["batch", channels, SIDE, SIDE])],
        [("probabilities", ["batch", CLASSES])],
        [tensor("w", weights.astype(np.float32)), tensor("b", bias.astype(np.float32))],
    )


def edge_network(channels=1):
    """Three stages, each with an exit of its own."""
    head = (Flatten(), Dense(CLASSES))
    return Network(
        (channels, SIDE, SIDE),
        CLASSES,
        (
            Stage((Conv(3, 3, 2, batch_norm=False), Relu()), (AveragePool(2), *head)),
            Stage((Conv(12, 3, batch_norm=False), Relu()), head),
            Stage((Conv(24, 5, batch_norm=False), Relu()), head),
        ),
    )


def fitted(network, x, y):
    """Random parameters, with every head fitted to normalised samples by least squares."""
    head = (Flatten(), Dense(network.classes))
    # One stage more, so that the last stage's features are an output too; its parameters go unused.
    longer = Network(network.input_shape, network.classes, (*network.stages, Stage((Relu(),), head)))
    made = initial_parameters(longer, np.random.default_rng(1))
    names = [features_name(stage) for stage in range(len(network.stages))]
    for index, features in enumerate(run_for(export_staged(longer, made).model, x, names)):
        cells = features
        if network.heads[index][0].layer == AveragePool(2):
            cells = features.reshape(*features.shape[:2], 2, 2, 2, 2).mean(axis=(3, 5))
        given = np.hstack([cells.reshape(len(x), -1), np.ones((len(x), 1))])
        ridge = 1e-2 * len(x) * np.eye(given.shape[1])
        solved = np.linalg.solve(given.T @ given + ridge, given.T @ (8.0 * np.eye(network.classes)[y] - 2.0))
        made[f"exit{index}.dense0.weight"] = solved[:-1].T.astype(np.float32)
        made[f"exit{index}.dense0.bias"] = solved[-1].astype(np.float32)
    return {name: array for name, array in made.items() if f"{len(network.stages)}." not in name[:7]}


def declaration_of(shape, preprocess):
    return Declaration(
        model="base",
        labels=tuple(map(str, range(CLASSES))),
        input_shape=shape,
        preprocess=preprocess,
        wire=Wire("uint8", 1.0),
    )


def build_base(out, *, channels=1, channels_last=False):
    """A naive bundle of the board's network in `out/bundle`, for a full model that knows nothing."""
    layout = "channels_last" if channels_last else "channels_first"
    preprocess = Preprocess((MEAN,), (STD,), layout)
    taught = images(1500, 1, channels=channels)
    x = _laid_out(taught.x, channels_last).astype(np.float32)
    network = edge_network(channels)
    idle = Network(network.input_shape, CLASSES, (Stage((Relu(),), (Flatten(), Dense(CLASSES))),))
    build_naive_bundle(
        export_staged(network, fitted(network, normalise(x, preprocess), taught.y)),
        declaration_of(x.shape[1:], preprocess),
        full=export_full(idle, initial_parameters(idle, np.random.default_rng(0))),
        representative=x[:256],
        calibration=Calibration(x[:200], taught.y[:200]),
        out=out,
    )


def arrays_of(*, channels=1, channels_last=False):
    """What a user's data.npz holds: 100 samples to train, 1,000 to calibrate and 300 to test."""
    parts = {"train": (100, 2), "calibration": (1000, 3), "test": (300, 4)}
    arrays = {}
    for name, (count, seed) in parts.items():
        part = images(count, seed, channels=channels)
        arrays |= {f"x_{name}": _laid_out(part.x, channels_last), f"y_{name}": part.y}
    return arrays


def _laid_out(x, channels_last):
    return np.moveaxis(x, 1, -1) if channels_last else x


@cache
def brought(*, channels=1, channels_last=False):
    """The user's files, made once. Not to be changed."""
    directory = _kept_directory()
    onnx.save(full_model(channels), directory / "full.onnx")
    np.savez(directory / "data.npz", **arrays_of(channels=channels, channels_last=channels_last))
    build_base(directory / "base", channels=channels, channels_last=channels_last)
    return Brought(directory / "full.onnx", directory / "data.npz", directory / "base")


@cache
def built():
    """The directory of a finished build of three plans, made once. Not to be changed."""
    ours, out = brought(), _kept_directory() / "digit-like"
    with without_plots():
        build(
            make_request(
                {
                    "full": str(ours.full),
                    "data": str(ours.data),
                    "rebase": str(ours.base),
                    "out": str(out),
                    "model": "digit-like",
                    "mean": (MEAN,),
                    "std": (STD,),
                    "epsilon": 0.02,
                }
            ),
            Console(quiet=True),
        )
    return out


def _kept_directory():
    directory = TemporaryDirectory()
    atexit.register(directory.cleanup)
    return Path(directory.name)


def run_hub(*arguments):
    """`cloud-hub` with these arguments, its cards without plots, which take longer than all the rest."""
    with without_plots():
        return main([str(argument) for argument in arguments])


@contextmanager
def without_plots():
    name = "cloud_hub.builder.reports.card_plots"
    before = sys.modules.get(name)
    sys.modules[name] = None
    try:
        yield
    finally:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before


def snapshot(out):
    """Every file below a directory with its bytes."""
    return {
        str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()
    }
