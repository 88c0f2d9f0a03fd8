"""Trains over a route: devices and hosts exchange activations and gradients, step by step."""
