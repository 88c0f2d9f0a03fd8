"""Measures what a node can do. Looks nothing up by the name of a processor or board."""
