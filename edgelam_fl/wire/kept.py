"""What hosts and hub agree on about snapshots that are left at the hub. Knows no gRPC; the service is declared in edgelam.proto."""

from __future__ import annotations

KEPT_SERVICE, LEAVE = "Kept", "Leave"
