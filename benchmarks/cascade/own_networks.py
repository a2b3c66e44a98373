"""Two classifiers as users would write them in torch; nothing in them knows of exits, and nothing trains here."""

from __future__ import annotations

from typing import Any


def depthwise_network() -> Any:
    """A torch module for 28x28 images and ten classes: depthwise-separable blocks with residual sums, 148 k parameters."""
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


def residual_network() -> Any:
    """A torch module for 28x28 images and ten classes: ResNet-20 at twice its width, 1.1 M parameters.

    He et al. 2016, arXiv 1512.03385, section 4.2, with projections where the width changes.
    """
    from torch import nn

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
                nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
                nn.BatchNorm2d(outputs),
            )
            same = inputs == outputs and stride == 1
            self.shortcut = (
                nn.Identity()
                if same
                else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
            )
            self.act = nn.ReLU()

        def forward(self, x: Any) -> Any:
            return self.act(self.body(x) + self.shortcut(x))

    def three(inputs: int, outputs: int, stride: int) -> tuple[nn.Module, ...]:
        return (Block(inputs, outputs, stride), Block(outputs, outputs, 1), Block(outputs, outputs, 1))

    return nn.Sequential(
        nn.Conv2d(1, 32, 3, 1, 1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        *three(32, 32, 1),
        *three(32, 64, 2),
        *three(64, 128, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )
