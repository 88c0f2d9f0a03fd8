"""Aggregation rules: many adapters become one."""
