"""Measures what leaks, and accounts for what is promised: attacks, differential privacy."""
