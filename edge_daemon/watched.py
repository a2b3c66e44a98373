"""What is read of the daemon's optional parts when somebody asks for its metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edge_daemon.metrics import Metrics
    from edge_daemon.personal import Personal
    from edge_daemon.releases.swapper import Swapper
    from edge_daemon.releases.wiring import BoardReleases
    from edge_daemon.shadow import Shadow
    from edge_daemon.training.follower import Follower


def watch_parts(
    metrics: Metrics,
    *,
    follower: Follower | None,
    swapper: Swapper | None,
    releases: BoardReleases | None,
    shadow: Shadow | None,
    personal: Personal | None,
) -> None:
    """Have the metrics read what there is; a part that this board does without has none."""
    if follower is not None:
        metrics.watch(
            "rounds_damaged_files", "Files of rounds found damaged and moved aside.", follower.damaged_files
        )
    if swapper is not None:
        metrics.watch("swaps_committed", "Bundles swapped in since the start.", lambda: swapper.committed)
        metrics.watch("swaps_reverted", "Swaps that ended without it.", lambda: swapper.reverted)
    if releases is not None:
        metrics.watch(
            "releases_denied",
            "1 while the hub does not let this board fetch, else 0.",
            lambda: int(bool(releases.problem)),
            is_total=False,
        )
    if shadow is not None:
        metrics.watch("shadow_pairs", "Samples that a second bundle answered.", lambda: shadow.pairs)
        metrics.watch("shadow_differing", "Of these, otherwise.", lambda: shadow.differing)
        metrics.watch("shadow_dropped", "Drawn for it, and not got to.", lambda: shadow.dropped)
    if personal is not None:
        metrics.watch("personal_wins", "Scenes that private heads won.", lambda: personal.wins)
        metrics.watch("personal_losses", "Scenes that private heads lost.", lambda: personal.losses)
        metrics.watch("personal_dropped", "Truths not compared.", lambda: personal.dropped)
        metrics.watch(
            "personal_serving",
            "Models answered with private heads.",
            lambda: personal.serving,
            is_total=False,
        )
