"""Starts a federation and follows its runs: processes on this machine, runs on a server."""
