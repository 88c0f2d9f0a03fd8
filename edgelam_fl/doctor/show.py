"""Draws a node's profile as a table for people. Knows no checks and measures nothing."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from edgelam_fl.node.profile.data import Profile


def profile_table(profile: Profile) -> Table:
    """Draws what was measured; leaves out what was not."""
    table = Table(title=f"profile of {escape(profile.name)}", title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("what", overflow="fold")
    table.add_column("measured", justify="right")
    table.add_row("memory free", f"{profile.memory_free_bytes / 2**30:.2f} GiB")
    if profile.chip:
        table.add_row("computes on", escape(profile.chip))
    table.add_row("CPU threads", str(profile.cpu_threads))
    table.add_row("disk free", f"{profile.disk_free_bytes / 2**30:.2f} GiB")
    if profile.disk_write_bytes_per_s:
        table.add_row("disk written", f"{profile.disk_write_bytes_per_s / 1e6:.1f} MB/s")
    if profile.link:
        table.add_row("link to the server, up", f"{profile.link.up_bps / 1e6:.2f} Mbit/s")
        table.add_row("link to the server, down", f"{profile.link.down_bps / 1e6:.2f} Mbit/s")
        table.add_row("link to the server, round trip", f"{profile.link.round_trip_s * 1e3:.1f} ms")
    for tokens, pairs in sorted(profile.layer_seconds.items()):
        for pair, seconds in pairs.items():
            table.add_row(f"layer, {tokens} tokens, {pair}", f"{seconds * 1e3:.2f} ms")
    return table
