"""A release's way through the fleet. No I/O, no clock, no chance.

`waves` says who belongs to which step, `rollout` is the state machine that takes the steps, `judge` compares
two bundles on the same inputs, `health` compares boards with their own past and with boards left alone.
"""
