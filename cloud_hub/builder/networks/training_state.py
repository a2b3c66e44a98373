"""All that an interrupted training run needs to go on as if nothing had happened."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cloud_hub.builder.steps import Checkpoint

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class TrainingState:
    """The moving parts of a run; `keep` and `resume` turn them into a checkpoint and back."""

    module: torch.nn.Module
    optimiser: torch.optim.Optimizer
    rates: Any
    rng: np.random.Generator

    def keep(self, checkpoint: Checkpoint, *, epochs: int) -> None:
        """Write the state after so many finished epochs."""
        arrays = {f"module/{name}": tensor.numpy() for name, tensor in self.module.state_dict().items()}
        for index, moments in self.optimiser.state_dict()["state"].items():
            arrays |= {f"optimiser/{index}/{name}": tensor.numpy() for name, tensor in moments.items()}
        rates = {name: value for name, value in self.rates.state_dict().items() if _is_plain(value)}
        groups = self.optimiser.state_dict()["param_groups"]
        state = {
            "epochs": epochs,
            "rates": rates,
            "groups": groups,
            "rng": self.rng.bit_generator.state,
        }
        checkpoint.save(arrays, state)

    def resume(self, checkpoint: Checkpoint) -> int:
        """Take the kept state over; returns how many epochs are done, 0 where nothing is kept."""
        import torch

        kept = checkpoint.load()
        if kept is None:
            return 0
        arrays, state = kept
        module: dict[str, torch.Tensor] = {}
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for key, array in arrays.items():
            tensor = torch.from_numpy(np.array(array))
            part, _, name = key.partition("/")
            if part == "module":
                module[name] = tensor
            else:
                index, _, short = name.partition("/")
                moments.setdefault(int(index), {})[short] = tensor
        self.module.load_state_dict(module)
        self.optimiser.load_state_dict({"state": moments, "param_groups": state["groups"]})
        self.rates.load_state_dict(state["rates"])
        self.rng.bit_generator.state = state["rng"]
        return int(state["epochs"])


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(item) for item in value.values())
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return isinstance(value, str | int | float | bool | None)
