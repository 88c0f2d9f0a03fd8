"""Starts a federation and follows its runs: processes on this machine, runs on a server."""

QUEUE = "EDGELAM_QUEUE"  # environment of a ServerApp: folder of the queue of this server's runs
