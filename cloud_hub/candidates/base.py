"""The model of a configuration with its bundle, as candidates need it."""

from __future__ import annotations

from cloud_hub.candidates.outcome import Base
from cloud_hub.config import Config, ModelSection
from cloud_hub.errors import ConfigError, ModelError
from cloud_hub.models import HubModel, load_model
from edge_cascade.bundle import Bundle, load_bundle
from edge_cascade.errors import CascadeError
from edge_cascade.shipped import find_bundle


def load_base(config: Config, name: str) -> Base:
    """The model called `name`, with its full model ready to run.

    Raises:
        ConfigError: naming the models that the configuration has.
        ModelError: for a bundle or a full model that cannot be used, or a bundle without a train step.
    """
    known = []
    for section in config.models:
        bundle = _bundle_of(section)
        if bundle.graph.model == name:
            return base_of(load_model(section.bundle, section.full))
        known.append(bundle.graph.model)
    raise ConfigError(f"models: none is called {name!r}; there are: {', '.join(known) or 'none'}")


def base_of(model: HubModel) -> Base:
    """A model that was loaded from files.

    Raises:
        ModelError: for one that was not, or whose bundle boards cannot learn from.
    """
    bundle = model.bundle
    if bundle is None or bundle.train_step is None:
        raise ModelError(f"the bundle of {model.name!r} has no train step: build it again with this version")
    return Base(model, bundle)


def _bundle_of(section: ModelSection) -> Bundle:
    try:
        return load_bundle(find_bundle(section.bundle))
    except CascadeError as error:
        raise ModelError(f"model {section.bundle!r}: {error}") from error
