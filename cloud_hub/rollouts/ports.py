"""What a rollout asks of the rest of the hub: what was measured of its boards. No I/O."""

from __future__ import annotations

from typing import Protocol

from cloud_hub.core.rollout.findings import Health
from cloud_hub.core.rollout.judge import Pairs
from cloud_hub.core.rollout.state import RolloutState


class Evidence(Protocol):
    """What speaks for and against a release. Asked on one thread, again and again; may take its time.

    `cases_after` and `scenes_after` are the ids of the last case and of the last shadow report that were
    there before the rollout began.
    """

    def pairs(self, rollout: RolloutState, *, cases_after: int, scenes_after: int) -> tuple[Pairs, Pairs]:
        """All pairs of both bundles so far, each input once: what boards shadowed, and audits.

        Raises:
            HubError: when they cannot be had now; it is asked again.
        """

    def health(self, rollout: RolloutState, now_s: float) -> Health:
        """How the boards that swapped do, compared with their past and with boards left alone.

        Raises:
            HubError: when it cannot be had now; it is asked again.
        """
