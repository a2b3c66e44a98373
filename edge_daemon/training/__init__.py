"""Rounds of federated averaging on the board: offers followed, bases fetched, training in a child process."""
