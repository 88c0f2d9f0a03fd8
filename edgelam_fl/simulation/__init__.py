"""Plays all nodes of a federation in one process: real stage hosts in one memory, with queues as links."""
