"""Strategies: rules for selection, bandwidth and aggregation, one file each. They take plain data and return plain data."""
