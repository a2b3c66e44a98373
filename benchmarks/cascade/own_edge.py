"""A classifier as a user would bring it: trained by a loop of their own, exported by torch."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from benchmarks.cascade.own_networks import depthwise_network, residual_network
from cloud_hub.builder.networks.training_state import TrainingState
from cloud_hub.builder.steps import Steps

if TYPE_CHECKING:
    import torch

    from cloud_hub.builder.steps import Checkpoint

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]

THREADS: Final = 2
_BATCH: Final = 128


@dataclass(frozen=True, slots=True)
class OwnEdge:
    """A network and how long it learns; so many of its first epochs see images of half the side, which is cheaper."""

    name: str
    build: Callable[[], Any]
    epochs: int
    half_side_epochs: int
    peak_rate: float


DEPTHWISE: Final = OwnEdge("own_edge", depthwise_network, epochs=6, half_side_epochs=0, peak_rate=4e-3)
RESIDUAL: Final = OwnEdge("heavy_edge", residual_network, epochs=6, half_side_epochs=3, peak_rate=2e-3)


def trained_file(own: OwnEdge, x: Floats, y: Labels, steps: Steps, console: Console) -> bytes:
    """The exported file of normalised images `(n, 1, 28, 28)`, trained once and kept."""
    kept = steps.arrays(
        own.name,
        [own.epochs, own.half_side_epochs, own.peak_rate, len(x)],
        lambda checkpoint: {"file": np.frombuffer(_export(_train(own, x, y, checkpoint, console)), np.uint8)},
    )
    return kept["file"].tobytes()


def _train(own: OwnEdge, x: Floats, y: Labels, checkpoint: Checkpoint, console: Console) -> torch.nn.Module:
    """Adam with a one-cycle rate; images are mirrored at random."""
    import torch

    torch.manual_seed(1)
    torch.set_num_threads(THREADS)
    module = own.build().to(memory_format=torch.channels_last)
    optimiser = torch.optim.Adam(module.parameters(), own.peak_rate)
    batches = len(x) // _BATCH
    rates = torch.optim.lr_scheduler.OneCycleLR(optimiser, own.peak_rate, total_steps=own.epochs * batches)
    state = TrainingState(module, optimiser, rates, np.random.default_rng(1))
    done = state.resume(checkpoint)
    module.train()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(f"training {own.name}", total=own.epochs * batches, completed=done * batches)
        for epoch in range(done, own.epochs):
            order = state.rng.permutation(len(x))[: batches * _BATCH]
            for chosen in order.reshape(batches, _BATCH):
                _step(state, x[chosen], y[chosen], half_side=epoch < own.half_side_epochs)
                progress.advance(task)
            state.keep(checkpoint, epochs=epoch + 1)
    return module.eval()


def _step(state: TrainingState, x: Floats, y: Labels, *, half_side: bool) -> None:
    import torch
    from torch.nn.functional import avg_pool2d, cross_entropy

    mirrored = np.where(state.rng.random((len(x), 1, 1, 1)) < 0.5, x[..., ::-1], x)
    images = torch.from_numpy(np.ascontiguousarray(mirrored)).to(memory_format=torch.channels_last)
    loss = cross_entropy(state.module(avg_pool2d(images, 2) if half_side else images), torch.from_numpy(y))
    state.optimiser.zero_grad()
    loss.backward()
    state.optimiser.step()
    state.rates.step()


def _export(module: torch.nn.Module) -> bytes:
    """By torch's older exporter, with the names it picks."""
    import torch

    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.to(memory_format=torch.contiguous_format),
            (torch.zeros(1, 1, 28, 28),),
            file,
            dynamo=False,
            dynamic_axes={"input.1": {0: "batch"}},
            input_names=["input.1"],
        )
    return file.getvalue()
