"""Faults in real processes: a federation with TLS is killed, frozen, cut off and filled up, and judged by its runs' events.

`python -m benchmarks.chaos`. Knows commands, processes, sockets and events; knows nothing of what nodes compute.
"""
