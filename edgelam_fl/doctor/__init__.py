"""Checks this machine and suggests fixes."""
