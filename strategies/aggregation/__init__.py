"""Aggregation rules: they make one adapter of many."""
