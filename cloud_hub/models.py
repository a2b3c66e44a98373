"""The models that this hub can answer for: a bundle for what it says of the inputs, a full model to run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cloud_hub.config import ModelSection
from cloud_hub.core.admission import Shape
from cloud_hub.errors import ConfigError, ModelError
from edge_cascade.bundle import Bundle, load_bundle
from edge_cascade.errors import CascadeError
from edge_cascade.manifest import Preprocess
from edge_cascade.shipped import find_bundle

FULL_MODEL_NAME: Final = "full.onnx"

Run = Callable[[NDArray[np.float32]], NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model that can be answered for. `run` takes normalised `(n, *input_shape)` and gives logits."""

    name: str
    labels: tuple[str, ...]
    input_shape: tuple[int, ...]
    preprocess: Preprocess
    full_model: bytes
    """SHA-256 of the full model's file."""
    run: Run
    bundle: Bundle | None = field(default=None, repr=False, compare=False)
    """What boards were installed with, where it was loaded from files."""
    directory: Path | None = field(default=None, repr=False, compare=False)
    """Where that bundle lies."""

    @property
    def shape(self) -> Shape:
        """What admission needs."""
        return Shape(self.input_shape, len(self.labels))

    def label_index(self, label: int | str) -> int:
        """The index of a label given by name or index.

        Raises:
            ModelError: naming the labels there are.
        """
        if isinstance(label, str) and label in self.labels:
            return self.labels.index(label)
        if isinstance(label, int) and 0 <= label < len(self.labels):
            return label
        some = ", ".join(self.labels[:20]) + (", ..." if len(self.labels) > 20 else "")
        raise ModelError(f"model {self.name!r} has no label {label!r}; its labels are: {some}")


def find_model(sections: Iterable[ModelSection], name: str) -> tuple[ModelSection, Bundle]:
    """Where a configuration names the model called `name`, and its bundle.

    Raises:
        ConfigError: naming the models that there are.
        ModelError: for a bundle on the way there that cannot be read.
    """
    known: list[str] = []
    for section in sections:
        try:
            bundle = load_bundle(find_bundle(section.bundle))
        except CascadeError as error:
            raise ModelError(f"model {section.bundle!r}: {error}") from error
        if bundle.graph.model == name:
            return section, bundle
        known.append(bundle.graph.model)
    raise ConfigError(f"models: none is called {name!r}; there are: {', '.join(known) or 'none'}")


def load_model(bundle: str, full: str | None) -> HubModel:
    """Load a model by its bundle (a shipped name or a path) and its full model (default: beside the bundle).

    Raises:
        ModelError: naming the file and what is wrong with it.
    """
    # Only a hub that runs models pays for the runtime's memory.
    from edge_cascade.backends.onnx import open_whole_model

    try:
        directory = find_bundle(bundle)
        loaded = load_bundle(directory)
        graph = loaded.graph
        path = Path(full) if full is not None else directory.parent / FULL_MODEL_NAME
        content = path.read_bytes()
        digest = hashlib.sha256(content)
        if digest.hexdigest() != graph.full_model_sha256:
            raise ModelError(
                f"{path}: its SHA-256 is not the one that the bundle of {graph.model!r} names; "
                "give the full model that this bundle was built with"
            )
        run = open_whole_model(content)
    except CascadeError as error:
        raise ModelError(f"model {bundle!r}: {error}") from error
    except OSError as error:
        raise ModelError(f"model {bundle!r}: {error.filename}: {error.strerror}") from error
    return HubModel(
        graph.model,
        graph.labels,
        graph.input_shape,
        graph.preprocess,
        digest.digest(),
        run,
        loaded,
        directory,
    )


def shapes_of(models: Mapping[str, HubModel]) -> dict[str, Shape]:
    """What admission needs of every model."""
    return {name: model.shape for name, model in models.items()}
