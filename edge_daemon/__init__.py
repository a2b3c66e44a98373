"""The device: sensors in over MQTT, answers out at once, uncertain cases to the hub."""

__version__ = "0.1.0"
