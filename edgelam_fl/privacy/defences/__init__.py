"""Lowers what a host can read at the cut: a limit and noise on what a device sends, and a reader to train a front against."""
