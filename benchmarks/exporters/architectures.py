"""Public architectures as torch modules, with random weights: nothing is exported here, nothing downloaded."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

Shape = tuple[int, ...]

CLASSES: Final = 10
IMAGE: Final = (3, 32, 32)
_ZOO: Final = "pytorchcv.models"


@dataclass(frozen=True, slots=True)
class Architecture:
    """A network to try. `build` makes the module, which takes `(batch, *shape)`; it needs `package`."""

    name: str
    shape: Shape
    build: Callable[[], Any]
    package: str = "torch"


def _from_zoo(module: str, name: str) -> Any:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zoo = importlib.import_module(f"{_ZOO}.{module}")
        model = getattr(zoo, name)(**({} if "cifar" in name else {"num_classes": CLASSES}))
    for part in (model.features, model.output):
        if hasattr(part, "final_pool"):  # made for images of 224 by 224
            part.final_pool = torch.nn.AdaptiveAvgPool2d(1)
    return model


def zoo_architecture(module: str, name: str) -> Architecture:
    """A network of the package pytorchcv for 32x32 images; those made for larger ones get another last pooling."""
    return Architecture(name, IMAGE, partial(_from_zoo, module, name), package=f"{_ZOO}.{module}")


ZOO: Final = tuple(
    zoo_architecture(module, name)
    for module, name in (
        ("nin_cifar", "nin_cifar10"),
        ("resnet_cifar", "resnet20_cifar10"),
        ("preresnet_cifar", "preresnet20_cifar10"),
        ("seresnet_cifar", "seresnet20_cifar10"),
        ("densenet_cifar", "densenet40_k12_cifar10"),
        ("wrn_cifar", "wrn16_10_cifar10"),
        ("mobilenet", "mobilenet_wd4"),
        ("mobilenetv2", "mobilenetv2_wd4"),
        ("mobilenetv3", "mobilenetv3_small_w3d4"),
        ("shufflenet", "shufflenet_g3_wd4"),
        ("shufflenetv2", "shufflenetv2_wd2"),
        ("squeezenet", "squeezenet_v1_1"),
        ("ghostnet", "ghostnet"),
        ("regnet", "regnetx002"),
        ("regnet", "regnety002"),
        ("efficientnet", "efficientnet_b0"),
        ("efficientnet", "efficientnet_b0b"),
        ("mnasnet", "mnasnet_small"),
    )
)


def made(architecture: Architecture) -> Any:
    """The module ready for inference, seeded, its normalisation away from rest as training leaves it."""
    import torch

    torch.manual_seed(0)
    model = architecture.build()
    for name, tensor in model.state_dict().items():
        if "running_var" in name:
            torch.nn.init.uniform_(tensor, 0.5, 1.5)
        elif "running_mean" in name:
            torch.nn.init.normal_(tensor, 0.0, 0.3)
    return model.eval()


# --- what people write themselves


def convolutions() -> Any:
    """A 1-D network with batch normalisation, pooling and dropout."""
    from torch import nn

    layers: list[nn.Module] = []
    given = 3
    for channels in (8, 16):
        layers += [
            nn.Conv1d(given, channels, 5, padding=2),
            nn.BatchNorm1d(channels),
            nn.ReLU(),
            nn.MaxPool1d(2),
        ]
        given = channels
    tail = [
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(16 * 8, 12),
        nn.BatchNorm1d(12),
        nn.ReLU(),
        nn.Linear(12, 4),
    ]
    return nn.Sequential(*layers, *tail)


def dense() -> Any:
    """Two hidden layers."""
    from torch import nn

    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


def transformer() -> Any:
    """Patches, a class token, two encoder layers (Dosovitskiy et al. 2021, arXiv 2010.11929)."""
    import torch
    from torch import nn

    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 16, 4, 4)
            self.token = nn.Parameter(torch.zeros(1, 1, 16))
            layers = [
                nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True) for _ in range(2)
            ]
            self.encoder = nn.Sequential(*layers)
            self.head = nn.Linear(16, 4)

        def forward(self, x: Any) -> Any:
            x = self.patches(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
            return self.head(self.encoder(x)[:, 0])

    return Transformer()


def recurrent(kind: str) -> Any:
    """Two layers of `LSTM` or `GRU`, the answer from the last step."""
    from torch import nn

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = getattr(nn, kind)(5, 8, num_layers=2, batch_first=True)
            self.head = nn.Linear(8, 4)

        def forward(self, x: Any) -> Any:
            return self.head(self.layers(x)[0][:, -1])

    return Recurrent()


CONVOLUTIONS: Final = Architecture("1-D CNN", (3, 32), convolutions)
TRANSFORMER: Final = Architecture("vision transformer", (3, 16, 16), transformer)
RECURRENT: Final = tuple(Architecture(kind, (9, 5), partial(recurrent, kind)) for kind in ("LSTM", "GRU"))
OWN: Final = (CONVOLUTIONS, Architecture("MLP", (16,), dense), TRANSFORMER, *RECURRENT)
