"""Bandwidth rules: they share the capacity out to the devices of a round."""
