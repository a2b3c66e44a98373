"""From what every rung says to plans and certificates: chains, tests, choices. No I/O."""
