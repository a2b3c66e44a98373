"""The model of a configuration with its bundle, as candidates need it."""

from __future__ import annotations

from cloud_hub.candidates.outcome import Base
from cloud_hub.config import Config
from cloud_hub.errors import ModelError
from cloud_hub.models import HubModel, find_model, load_model


def load_base(config: Config, name: str) -> Base:
    """The model called `name`, with its full model ready to run.

    Raises:
        ConfigError: naming the models that the configuration has.
        ModelError: for a bundle or a full model that cannot be used, or a bundle without a train step.
    """
    section, _ = find_model(config.models, name)
    return base_of(load_model(section.bundle, section.full))


def base_of(model: HubModel) -> Base:
    """A model that was loaded from files.

    Raises:
        ModelError: for one that was not, or whose bundle boards cannot learn from.
    """
    bundle = model.bundle
    if bundle is None or bundle.train_step is None:
        raise ModelError(f"the bundle of {model.name!r} has no train step: build it again with this version")
    return Base(model, bundle)
