"""What a rollout takes from the hub's configuration and its state directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cloud_hub.core.rollout.judge import JudgeRules
from cloud_hub.errors import RolloutError

if TYPE_CHECKING:
    from cloud_hub.config import Config
    from cloud_hub.rollouts.start import IsSigned
    from cloud_hub.store.database import Database

TUF = "tuf"
"""The directory of signed metadata in the state directory."""


def rules_for(config: Config) -> JudgeRules:
    """The judge's rules; a wave's own `max_drop` goes before."""
    section = config.rollouts
    return JudgeRules(alpha=section.alpha, beta=section.beta, tolerated=section.tolerated)


def is_signed_in(state_dir: Path) -> IsSigned:
    """Whether the metadata in a state directory sign the parts of a release; nothing without any."""

    def is_signed(model: str, graph: str, weights: str) -> bool:
        if not (state_dir / TUF).is_dir():
            return False
        from cloud_hub.releases.repository import SignedRepository

        return SignedRepository(state_dir / TUF).is_signed(model, graph, weights)

    return is_signed


def sizes_in(state_dir: Path, database: Database) -> Callable[[int], int]:
    """How many bytes a release takes on a board's disk; raises `HubError` where it is not there."""

    def size_of(release: int) -> int:
        from cloud_hub.registry import release_directory
        from cloud_hub.store.releases import get_release

        row = database.run(lambda c: get_release(c, release))
        directory = release_directory(state_dir, row["bundle"].hex())
        try:
            size_bytes = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
        except OSError as error:
            raise RolloutError(f"release {release}: {directory}: {error.strerror}") from error
        if not size_bytes:
            raise RolloutError(f"release {release}: no files in {directory}")
        return size_bytes

    return size_of
