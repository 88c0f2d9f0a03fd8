"""One machine that takes part: its stage host, the slices that it keeps between rounds, and its profile."""
