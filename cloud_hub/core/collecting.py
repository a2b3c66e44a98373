"""Which releases nobody needs any more. No I/O, no clock.

A release is kept while anything points at it: a board that should run it or says that it does, a rollout that
is not closed (its release, and everything that it may take boards back to). Beyond that the newest that were
live are kept, for a person may want to go back, and the newest drafts, for a person may want to try them; and
what a draft that stays was made of, for boards that run it to be sent the difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cloud_hub.core.rollout.events import ReleaseState

DAY_S = 86400.0

_WAS_LIVE = frozenset({ReleaseState.LIVE, ReleaseState.SUPERSEDED})
_AT_WORK = frozenset({ReleaseState.LIVE, ReleaseState.CANARY})
_TO_COME = frozenset({ReleaseState.DRAFT, ReleaseState.CANARY})


@dataclass(frozen=True, slots=True)
class Held:
    """A release whose files are there; `bundle` is its id, `parent` that of the bundle it was made of."""

    id: int
    model: str
    bundle: str
    state: ReleaseState
    created_s: float
    parent: str = ""


@dataclass(frozen=True, slots=True)
class Uses:
    """What points at releases: by number, and by bundle where a board said so."""

    releases: frozenset[int] = frozenset()
    bundles: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class CollectRules:
    """How many of each model are kept that nothing points at, and how long anything is.

    `keep_live` counts those that were live, the one that is among them.
    """

    keep_live: int = 3
    keep_drafts: int = 5
    min_age_s: float = 7 * DAY_S

    def __post_init__(self) -> None:
        if self.keep_live < 1 or self.keep_drafts < 0 or self.min_age_s < 0.0:
            raise ValueError("collect: keep_live must be at least 1, keep_drafts and the age at least 0")


def select_collectable(held: Iterable[Held], uses: Uses, rules: CollectRules, *, now_s: float) -> list[Held]:
    """The releases whose files may go, the oldest first."""
    by_model: dict[str, list[Held]] = {}
    for release in sorted(held, key=lambda each: each.id, reverse=True):
        by_model.setdefault(release.model, []).append(release)
    return sorted(
        (release for releases in by_model.values() for release in _unused(releases, uses, rules, now_s)),
        key=lambda each: each.id,
    )


def _unused(newest_first: Sequence[Held], uses: Uses, rules: CollectRules, now_s: float) -> list[Held]:
    may_go = {each.id for each in _of_model(newest_first, rules)}
    found: list[Held] = []
    parents: set[str] = set()
    # A parent is older than what was made of it.
    for release in newest_first:
        if (
            release.id in may_go
            and release.id not in uses.releases
            and release.bundle not in uses.bundles | parents
            and now_s - release.created_s >= rules.min_age_s
        ):
            found.append(release)
        elif release.state in _TO_COME:
            parents.add(release.parent)
    return found


def _of_model(newest_first: Sequence[Held], rules: CollectRules) -> list[Held]:
    was_live = [each for each in newest_first if each.state in _WAS_LIVE]
    drafts = [each for each in newest_first if each.state is ReleaseState.DRAFT]
    kept = {each.id for each in (*was_live[: rules.keep_live], *drafts[: rules.keep_drafts])}
    return [each for each in newest_first if each.id not in kept and each.state not in _AT_WORK]
