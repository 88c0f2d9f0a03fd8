"""What nodes, hub and ServerApp agree on about attendance: who plays a part, and what the players are told meanwhile.

The hub's side is `hub.attendance`, a node's is `wire.grpc.attending`, the ServerApp's is `server.attendance`. Knows no gRPC;
the services are declared in edgelam.proto.
"""

from __future__ import annotations

ATTENDANCE_SERVICE, ATTEND = "Attendance", "Attend"
LEAD_SERVICE, LOOK = "Lead", "Look"
LEAD_FOLDER = "lead"  # in the hub's state folder: where a ServerApp finds the socket
BEAT_EVERY_S = 1.0
RUNNING, DONE, FAILED = STATES = ("running", "done", "failed")  # of a part, as in a JobReport
