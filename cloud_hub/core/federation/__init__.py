"""Rounds of federated averaging, as rules: values in, values out. No I/O, no clock; chance is an argument.

Who and when: `cohort` selects the devices that are asked, `rounds` takes one round from its offer to its end
(`round_events` are what it hears and asks for), `series` makes one candidate of several rounds.

What counts: `screening` decides which updates (`update`) are votes, `standing` what repeated faults lead to,
`aggregation` and `robust` turn the votes into one step, `server` scales that step, `strategies` puts the two
together for one round.

What it comes to: `guard` judges a round, and a candidate, on the holdout; `privacy` says what noisy updates
give away.
"""
