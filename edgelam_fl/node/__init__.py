"""One machine that takes part: the stage host's daemon, what it keeps between rounds, and what it can do."""
