"""Pure state machines of the device: no I/O, no clock, no randomness of their own."""
