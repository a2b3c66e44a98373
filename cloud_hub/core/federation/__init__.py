"""Client updates: which ones count, and what becomes of the training base. No I/O, no clock, no chance.

`screening` decides which updates are votes, `standing` what repeated faults lead to, `aggregation` and
`robust` turn the votes into one step, `server` scales that step, `strategies` puts the two together for one
round.
"""
