"""Events: one JSON object a line, appended as things happen. Knows nothing about what the fields mean.

Every line has `time` (Unix seconds) and `event`. Who writes which, and their fields (names end in their unit):

the ServerApp, into RUN/events.jsonl
    run_started     run, config (the run file, resolved), versions {package: version}
    node_joined     node, role ("device" | "edge"), address, examples, held_out, memory_available_bytes, cpu_threads,
                    tags [words],
                    base_seconds {"base/compute": seconds of a layer, forward and backward} (model.base = "auto" only);
                    with split.cuts = "auto", as far as it could be measured: layer_times [{tokens, seconds {"base/compute": ...}}],
                    link_up_bps, link_down_bps, round_trip_s (to the server's hub), idle_bytes (resident memory of its stage
                    host before it held anything)
    node_refused    node, reason
    link_measured   node, link_up_bps, link_down_bps, round_trip_s: anew, since a round's steps took another time than foreseen
    plan            round, attempt, selected [names], why {node: text} (of each device that is here), shares {node: share of 1},
                    routes [{device, front, back_first, num_layers, hops [{node, first, last}]}],
                    sites [{site, hosts [{node, first, last}], devices [names]}] (a host's layers here are all that it
                    holds; a route's hop may be a part of them), nodes {name: {base, compute, rank}},
                    personal (whether the aggregation lets devices go on with tensors of their own),
                    demands {name: {payload_bytes, compute_s, snr}} (with [wireless] only: what the bandwidth strategy saw)
    placement       before its plan, with split.cuts = "auto": round, changed (whether layers moved), reason (text), step_s (predicted,
                    of the slowest site), window (micro-batches in flight that memory allows), tokens (a row, that times were
                    predicted with), measured [texts] (of the round before: nodes that were far off, pairs that only the relay joins,
                    steps so far off that links were measured anew),
                    sites [{step_s, limit (text: what a step waits for), memory_limit (text; "": no host would hold more),
                    left_out [hosts without which it is faster], hosts [...], devices [...]}]
                    hosts, devices: {node, first, last, base ("base/compute"; "" of devices), memory_bytes (of the process, at
                    its peak), compute_s, up_bytes, down_bytes (of a step)}; a host holds layers [first, last), a device the others
    round_done      round, seconds, attempt, devices [...], hosts [...], checkpoint (path in RUN),
                    aggregation_error (||s B A + C - M|| / ||M||, M = sum_k p_k s_k B_k A_k of what the sources k trained
                    in the round, B A the new adapter's product, C what the carry factors gained, over all trained
                    modules; null where M is zero, without steps, and where more than 32 nodes took part and
                    their replies were summed up as they arrived),
                    aggregation (what the rule tells besides: of flora and fedex carry_bytes, carry_rank (the largest of
                    a module) and carry_error (share of the carry factors' norm that was cut off in this round); else {}),
                    virtual (with [wireless] only, and with steps: the round in virtual time)
                    (an eval-only job after the last round is round = rounds + 1, with steps = 0)
                    devices: {name, examples, labels, loss (mean a label over the round's steps; null without steps),
                    perplexity (of the adapter the round started from, held-out), metrics (of the same: {"accuracy":
                    share of 1}, {} where the task has no other), tokens, train_seconds, eval_seconds,
                    compute_seconds, bytes_up, bytes_down, bytes_relayed (of links that it dialled through the hub), adapter_bytes_up,
                    adapter_bytes_down, peak_rss_bytes,
                    step_losses [mean loss a label, a step], left_out [{step, reason}], moments ("warm" | "cold"),
                    digest_before, digest_after}
                    hosts: {name, layers [first, last], bytes_up, bytes_down, bytes_relayed, adapter_bytes_up, adapter_bytes_down,
                    compute_seconds, peak_rss_bytes, moments, digest_before, digest_after}
                    (digests: SHA-256 of the adapter that the node holds, as the round's plan demands it of the node
                    and as the node reports it after the round's training)
                    (a device that is a host too is in both; the adapter that it received is told in devices only)
                    virtual: {seconds (of the slowest), bytes, joules (of all devices), devices {name: {seconds = download_s +
                    compute_s + upload_s, bytes = bytes_up + bytes_down (adapters and tensors, without frames' headers),
                    joules, compute_joules, share (of the band), rate_bps (of the upload), snr (over the whole band)}},
                    dropped [names] (chosen, and made to fail by wireless.dropout: with a share, in no plan's nodes)}
                    bytes_by_kind {"ACT": n, ...} counted at the devices, both directions
    timeline        round, nodes {name: [[kind, role, start_s, seconds, step, micro_batch, peer], ...]}: who did what in
                    the round's training, before its round_done; kind "forward" | "backward" | "step" | "send", role
                    "device" | "host", start_s since training opened at that node, peer the device that a host worked
                    for or the node sent to
    node_lost       round, node, reason
    site_lost       round, site, missing [hosts]: nothing of this site is aggregated in this attempt
    route_ready     (of a conversation only): the caller's plan is in RUN/route
    run_done        seconds, summary (path in RUN)
    run_failed      reason, kept (text: what is left in RUN)

a stage host, into its own state folder's events.jsonl
    job_started     job, role, layers [[first, last], ...], seconds (loading)
    slice_coming    model, bytes, of (of the missing tensors; every few seconds while they come from the server's hub)
    slice_received  model, base, tensors, slice_bytes, bytes (that came now), seconds
    evaluated       job, loss_sum, labels, seconds
    step            job, step, loss (mean a label), labels, seconds, bytes_sent, bytes_received
    step_closed     job, step, counted [names], left_out [{node, reason}]
    link_lost       job, link, reason
    window          job, granted, asked, memory_free_bytes (a host has memory for fewer micro-batches a device)
    job_done        job, state, error
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class EventLog:
    """Appends events to one file; safe to call from any thread.

    most_bytes: a file that has grown so long is set aside as PATH.old, in place of an older one; 0: it grows.
    """

    def __init__(self, path: Path, most_bytes: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self._most_bytes = path, most_bytes
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._lock = threading.Lock()

    def __call__(self, event: str, **fields: Any) -> None:
        line = json.dumps({"time": round(time.time(), 3), "event": event, **fields}, ensure_ascii=False)
        with self._lock:
            if self._file.closed:
                return
            if self._most_bytes and self._file.tell() >= self._most_bytes:
                self._begin_anew()
            self._file.write(line + "\n")

    def _begin_anew(self) -> None:
        self._file.close()
        self.path.replace(self.path.with_name(f"{self.path.name}.old"))
        self._file = self.path.open("a", encoding="utf-8", buffering=1)

    def close(self) -> None:
        with self._lock:
            self._file.close()


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a file, oldest first. A half-written last line (a run in progress, a crash) is left out."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


class EventTail:
    """Follows a file that another process is writing: each `poll` returns the events added since the last one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0

    def poll(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            if self.path.stat().st_size < self._offset:
                self._offset = 0  # its writer has begun anew
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [json.loads(line) for line in whole.splitlines()]
