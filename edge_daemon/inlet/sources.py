"""Which source a topic belongs to, and which sensor it names. No I/O.

A pattern is an MQTT topic filter in which one level may be `{sensor}`; that level is the sensor's name.
Without it the whole topic is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

SENSOR_LEVEL: Final = "{sensor}"
MAX_SENSOR_LENGTH: Final = 128


def filter_of(pattern: str) -> str:
    """The MQTT topic filter to subscribe to."""
    return pattern.replace(SENSOR_LEVEL, "+")


@dataclass(frozen=True, slots=True)
class TopicPattern:
    """A compiled pattern."""

    levels: tuple[str, ...]

    @classmethod
    def parse(cls, pattern: str) -> TopicPattern:
        """Compile a pattern that the configuration's check has passed."""
        return cls(tuple(pattern.split("/")))

    def sensor_of(self, topic: str) -> str | None:
        """The sensor's name if `topic` matches, else None."""
        levels = topic.split("/")
        sensor = topic
        for index, wanted in enumerate(self.levels):
            if wanted == "#":
                return sensor
            if index >= len(levels):
                return None
            if wanted == SENSOR_LEVEL:
                sensor = levels[index]
            elif wanted not in {"+", levels[index]}:
                return None
        return sensor if len(levels) == len(self.levels) else None
