"""The progress inside a round: what nodes say of their parts becomes one event for whoever follows the run.

Knows neither how the nodes say it (at the hub, or in a file on this machine) nor plans.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from edgelam_fl.files import write_atomically
from edgelam_fl.telemetry.events.log import as_line, parse_event
from edgelam_fl.telemetry.events.progress import (
    ANSWERING,
    DOINGS,
    FETCHING,
    MEASURING,
    REPORTING,
    SERVING,
    TRAINING,
    NodeProgress,
    RoundProgress,
)
from edgelam_fl.telemetry.records import as_json, read_record

PROGRESS_FILE = "progress.json"
"""In a run's folder: the newest `RoundProgress`. In a node's state folder: where the node itself is in its part."""
TELL_EVERY_S = 2.0
_LOOK_EVERY_S = 1.0
_STANDS_OUT = 1.25  # times the time that the first of the others has left
_STANDS_OUT_S = 3.0


# ---------------------------------------------------------------- from nodes to one event


@dataclass(slots=True)
class _Device:
    """A device's training, as it was seen first and last. Work is in steps, with the part of a step that is done."""

    began_s: float
    began_work: float
    began_tokens: int
    changed_s: float
    work: float
    tokens: int
    tokens_s: float  # when these tokens were seen first
    steps: int

    def note(self, seen: NodeProgress, now_s: float) -> None:
        work = _work(seen)
        if work > self.work:
            self.changed_s, self.work = now_s, work
        if seen.tokens > self.tokens:
            self.tokens_s, self.tokens = now_s, seen.tokens

    def left_s(self, now_s: float) -> float | None:
        """Returns the seconds until it has trained; None while nothing is known of its speed."""
        left = self.steps - self.work
        if left <= 0:
            return 0.0
        if self.work <= self.began_work or self.changed_s <= self.began_s:
            return None
        pace_s = (self.changed_s - self.began_s) / (self.work - self.began_work)
        return max(0.0, left * pace_s - (now_s - self.changed_s))

    def tokens_per_s(self) -> float | None:
        if self.tokens <= self.began_tokens or self.tokens_s <= self.began_s:
            return None
        return (self.tokens - self.began_tokens) / (self.tokens_s - self.began_s)


@dataclass
class Meter:
    """The progress of one attempt at a round, from what its nodes said. Times are by any one clock, in seconds."""

    round: int
    attempt: int
    began_s: float
    nodes: dict[str, NodeProgress] = field(default_factory=dict)
    _devices: dict[str, _Device] = field(default_factory=dict)

    def note(self, name: str, seen: NodeProgress, now_s: float) -> None:
        """Notes where a node is by now."""
        self.nodes[name] = seen
        if seen.doing != TRAINING:
            return
        device = self._devices.get(name)
        if device is None:
            work, tokens = _work(seen), seen.tokens
            self._devices[name] = _Device(now_s, work, tokens, now_s, work, tokens, now_s, seen.steps)
        else:
            device.note(seen, now_s)

    def progress(self, now_s: float) -> RoundProgress | None:
        """Returns where the attempt stands; None before any node has said anything."""
        if not self.nodes:
            return None
        doing = min(
            (node.doing for node in self.nodes.values() if node.doing != SERVING), key=_place, default=REPORTING
        )
        busy = {name: node for name, node in self.nodes.items() if node.doing == doing}
        devices = [node for node in self.nodes.values() if node.doing != SERVING and node.steps]
        steps = max((node.steps for node in devices), default=0)
        losses = [node.loss for node in devices if node.loss is not None]
        rates = [rate for one in self._devices.values() if (rate := one.tokens_per_s()) is not None]
        left = {name: self._left_s(name, now_s) for name, node in busy.items() if doing == TRAINING}
        known = {name: seconds for name, seconds in left.items() if seconds is not None}
        return RoundProgress(
            round=self.round, attempt=self.attempt, seconds=round(max(0.0, now_s - self.began_s), 1), doing=doing,
            step=min((node.step for node in devices if node.step < node.steps), default=steps), steps=steps,
            done=round(_done(doing, busy), 4),
            loss=round(sum(losses) / len(losses), 4) if losses else None,
            tokens_per_s=round(sum(rates), 1) if rates else None,
            left_s=round(max(known.values()), 1) if known and len(known) == len(left) else None,
            slowest=_slowest(known) if doing == TRAINING else _only(busy, self.nodes), nodes=dict(self.nodes),
        )  # fmt: skip

    def _left_s(self, name: str, now_s: float) -> float | None:
        device = self._devices.get(name)
        return device.left_s(now_s) if device is not None else None


def _place(doing: str) -> int:
    return DOINGS.index(doing)


def _work(seen: NodeProgress) -> float:
    return seen.step + (min(1.0, seen.unit / seen.units) if seen.units else 0.0)


def _done(doing: str, busy: Mapping[str, NodeProgress]) -> float:
    """Returns the share of what these nodes do that is done, in [0, 1]."""
    if doing == FETCHING:
        parts = [(node.bytes, node.of_bytes) for node in busy.values()]
    elif doing in (MEASURING, ANSWERING):
        parts = [(node.unit, node.units) for node in busy.values()]
    elif doing == TRAINING:
        parts = [(_work(node), node.steps) for node in busy.values()]  # type: ignore[misc]
    else:
        return 0.0
    whole = sum(of for _, of in parts)
    return min(1.0, sum(part for part, _ in parts) / whole) if whole else 0.0


def _slowest(left_s: Mapping[str, float]) -> str:
    """Returns the node that has much more left to do than the first of the others; "" if none has."""
    if len(left_s) < 2:
        return ""
    name = max(left_s, key=lambda name: left_s[name])
    first = min(left_s.values())
    stands_out = left_s[name] > _STANDS_OUT * first and left_s[name] - first > _STANDS_OUT_S
    return name if stands_out else ""


def _only(busy: Mapping[str, NodeProgress], nodes: Mapping[str, NodeProgress]) -> str:
    """Returns the one node that the others wait for; "" if there are several."""
    return next(iter(busy)) if len(busy) == 1 < len(nodes) else ""


# ---------------------------------------------------------------- files


def write_progress(folder: Path, progress: RoundProgress) -> None:
    """Puts the newest progress into a run's folder, for whoever follows the run. A full disk is no reason to end a run."""
    with suppress(OSError):
        line = {"time": round(time.time(), 3), **as_line(progress)}
        write_atomically(folder / PROGRESS_FILE, json.dumps(line) + "\n")


def clear_progress(folder: Path) -> None:
    """Removes the progress from a run's or a node's folder: nobody plays."""
    with suppress(OSError):
        (folder / PROGRESS_FILE).unlink(missing_ok=True)


def write_node_progress(state: Path, job: str, progress: NodeProgress) -> None:
    """Puts into a node's state folder where the node is in its part of a job, RUN/ROUND/ATTEMPT/NODE."""
    with suppress(OSError):
        write_atomically(state / PROGRESS_FILE, json.dumps({"job": job, **as_json(progress)}) + "\n")


class ChangedFile:
    """A small file that another process replaces: each `poll` returns its JSON object if that is a new one."""

    def __init__(self, path: Path) -> None:
        self._path, self._seen = path, (0, 0)

    def poll(self) -> dict[str, object] | None:
        """Returns the object; None if it is the one of the last call, if there is none, or if it is damaged."""
        with suppress(OSError, ValueError, RecursionError):
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                seen = (status.st_ino, status.st_mtime_ns)
                if seen == self._seen:
                    return None
                self._seen, found = seen, json.loads(file.read())
            return found if isinstance(found, dict) else None
        return None


def read_progress(folder: Path) -> dict[str, object] | None:
    """Returns the newest progress in a run's folder as its JSON object; None while nobody plays."""
    return ChangedFile(folder / PROGRESS_FILE).poll()


def progress_of(found: object) -> RoundProgress | None:
    """Makes the progress of a JSON object, as `read_progress` returns it; None if it is none."""
    with suppress(TypeError, AttributeError, ValueError):
        event = parse_event(found) if isinstance(found, Mapping) else None
        return event if isinstance(event, RoundProgress) else None
    return None


class ProgressTail:
    """The newest progress of a run, from the run's folder."""

    def __init__(self, folder: Path) -> None:
        self._file = ChangedFile(folder / PROGRESS_FILE)

    def poll(self) -> RoundProgress | None:
        """Returns the progress if it is a new one."""
        return progress_of(self._file.poll())


class NodeTail:
    """The progress of one node of this machine, from its state folder."""

    def __init__(self, state: Path) -> None:
        self._file = ChangedFile(state / PROGRESS_FILE)

    def poll(self) -> tuple[int, NodeProgress] | None:
        """Returns the number of the round and where the node is in it; None if that is as at the last call, or nothing is told."""
        found = self._file.poll()
        key = _round_and_attempt(found.get("job")) if found is not None else None
        return (key[0], read_node_progress(found)) if found is not None and key is not None else None


class NodesProgress:
    """The progress of a job whose nodes are processes of this machine, from their state folders."""

    def __init__(self, states: Mapping[str, Path]) -> None:
        """`states`: the nodes' state folders, by name."""
        self._files = {name: ChangedFile(state / PROGRESS_FILE) for name, state in states.items()}
        self._meter: Meter | None = None
        self._next_s = -math.inf

    def look(self, now_s: float) -> RoundProgress | None:
        """Returns where the newest attempt stands; None if it is too early to look again, or no node has said anything new."""
        if now_s < self._next_s:
            return None
        self._next_s, is_new = now_s + _LOOK_EVERY_S, False
        for name, file in self._files.items():
            found = file.poll()
            key = _round_and_attempt(found.get("job")) if found is not None else None
            if found is None or key is None:
                continue
            if self._meter is None or key > (self._meter.round, self._meter.attempt):
                self._meter = Meter(*key, began_s=now_s)
            if key == (self._meter.round, self._meter.attempt):
                self._meter.note(name, read_node_progress(found), now_s)
                is_new = True
        return self._meter.progress(now_s) if self._meter is not None and is_new else None


def _round_and_attempt(job: object) -> tuple[int, int] | None:
    parts = str(job).split("/")[-3:]
    with suppress(ValueError, IndexError):
        return int(parts[0]), int(parts[1])
    return None


def read_node_progress(values: Mapping[str, object]) -> NodeProgress:
    """Makes a node's progress of its JSON object, without what cannot be."""
    return credible(read_record(NodeProgress, values))


def credible(seen: NodeProgress) -> NodeProgress:
    """Returns what a node says of itself, without numbers that are none."""
    loss = seen.loss if seen.loss is not None and math.isfinite(seen.loss) else None
    doing = seen.doing if seen.doing in DOINGS else DOINGS[0]
    return seen if (loss, doing) == (seen.loss, seen.doing) else replace(seen, loss=loss, doing=doing)
