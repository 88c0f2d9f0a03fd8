"""Bandwidth rules: shares of the capacity, per device."""
