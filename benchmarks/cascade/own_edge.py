"""A small classifier as a user would bring it: written in torch, trained by its own loop, exported by torch.

Depthwise-separable blocks with residual sums; nothing in it knows of exits.
"""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloud_hub.builder.steps import Checkpoint

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]


def build_module() -> Any:
    """A torch module of about 100 k parameters for 28x28 images and ten classes."""
    from torch import nn

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False),
                nn.BatchNorm2d(inputs),
                nn.Conv2d(inputs, outputs, 1, bias=False),
                nn.BatchNorm2d(outputs),
            )
            self.same = inputs == outputs and stride == 1
            self.act = nn.ReLU()

        def forward(self, x: Any) -> Any:
            out = self.body(x)
            return self.act(out + x if self.same else out)

    return nn.Sequential(
        nn.Conv2d(1, 32, 3, 1, 1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        Block(32, 64, 2),
        Block(64, 64, 1),
        Block(64, 128, 2),
        Block(128, 128, 1),
        Block(128, 192, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(192, 10),
    )


def train_module(x: Floats, y: Labels, *, epochs: int, threads: int) -> Any:
    """Adam with a one-cycle rate on normalised images; mirrored at random."""
    import torch
    from torch.nn.functional import cross_entropy

    torch.manual_seed(1)
    torch.set_num_threads(threads)
    module = build_module()
    steps = epochs * (len(x) // 128)
    optimiser = torch.optim.Adam(module.parameters(), 4e-3)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps)
    rng = np.random.default_rng(1)
    module.train()
    for _ in range(epochs):
        order = rng.permutation(len(x))
        for start in range(0, len(x) - 127, 128):
            chosen = order[start : start + 128]
            batch = np.where(rng.random((128, 1, 1, 1)) < 0.5, x[chosen][..., ::-1], x[chosen])
            loss = cross_entropy(
                module(torch.from_numpy(np.ascontiguousarray(batch))), torch.from_numpy(y[chosen])
            )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            rates.step()
    return module.eval()


def export(module: Any) -> bytes:
    """By torch's older exporter, with the names it picks."""
    import torch

    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module, (torch.zeros(1, 1, 28, 28),), file, dynamo=False, dynamic_axes={"input.1": {0: "batch"}},
            input_names=["input.1"],
        )  # fmt: skip
    return file.getvalue()


def trained_file(x: Floats, y: Labels, checkpoint: Checkpoint, *, epochs: int, threads: int) -> bytes:
    """The exported file, trained once and kept."""
    kept = checkpoint.load()
    if kept is not None:
        return kept[0]["file"].tobytes()
    content = export(train_module(x, y, epochs=epochs, threads=threads))
    checkpoint.save({"file": np.frombuffer(content, np.uint8)}, {})
    return content
