"""Which of a board's numbers its health is judged by. No I/O.

The board puts them first into its reports, which hold so many numbers only; of a report the hub keeps these
for longer than the others.
"""

from __future__ import annotations

from typing import Final

HEALTH_KEYS: Final = (
    "edge_running_s",
    "edge_crashes",
    "edge_rss_bytes",
    "edge_celsius_milli",
    "edge_failed",
    "edge_latency_",
    "edge_samples",
)
"""How their names begin."""
