"""Measures what a node can do; nothing is looked up by a processor's or a board's name."""
