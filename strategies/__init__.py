"""Strategies: selection, bandwidth and aggregation, one file each; plain data in, plain data out."""
