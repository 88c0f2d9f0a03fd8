"""Lines of events.jsonl as a ServerApp writes them, for tests of what is made from events. The numbers come from a seed."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from typing import Any

from edgelam_fl.telemetry.events import Event, RoundTimeline, as_line, of_kind, parse_event
from edgelam_fl.telemetry.timeline import shares_in

DEVICES = ("device-1", "device-2", "device-3")
ROUNDS, STEPS = 4, 10


def as_events(lines: Iterable[Mapping[str, Any]]) -> list[Event]:
    """Reads lines as `read_events` reads those of a file."""
    return [parse_event(line) for line in lines]


def of_privacy() -> list[dict[str, Any]]:
    """Returns the events of a run's differential privacy: three of four rounds, after which the budget is spent."""
    promised = {
        "event": "privacy_promised", "mode": "central", "epsilon": 4.0, "delta": 1e-5, "noise": 2.0, "clip": 1.0, "rounds": 3,
        "releases_per_round": 1, "sampling": 1.0, "denominator": 2.0, "accountant": "pld", "unit": "one device",
        "adversary": "strangers", "messages": "updates", "not_covered": "losses",
    }  # fmt: skip
    spent = {"event": "privacy_spent", "attempt": 1, "delta": 1e-5, "noise": 2.0, "clip": 1.0}
    return [
        promised,
        {**spent, "round": 1, "epsilon": 2.5, "clipped": 0.5},
        {**spent, "round": 2, "epsilon": 3.5, "clipped": None, "gradients_clipped": 0.4},
        {**spent, "round": 3, "epsilon": 3.9, "clipped": 1.0},
        {"event": "budget_spent", "round": 3, "planned": 4, "epsilon": 3.9, "budget": 4.0},
    ]


def a_run(*, evil: str = "", lost: bool = False) -> list[dict[str, Any]]:
    """Returns a run in the style of the demo; `evil` is put wherever text can come from outside."""
    draw = random.Random(7)
    config = {
        "model": {"name": f"smollm2-135m{evil}", "base": "fp32"},
        "lora": {"rank": 8, "targets": ["q_proj", evil]},
    }
    names = [f"{name}{evil}" for name in DEVICES]
    routes = [
        {"device": name, "front": 2, "back_first": 28, "num_layers": 30}
        | {"hops": [{"node": f"edge-1{evil}", "first": 2, "last": 28}]}
        for name in names
    ]
    events: list[dict[str, Any]] = [
        {
            "event": "run_started",
            "run": f"demo{evil}",
            "config": config,
            "versions": {"edgelam-fl": "0.1.0", "flwr": "1.41.0"},
        },
        *({"event": "node_joined", "node": name, "role": "device", "examples": 512, "held_out": 57} for name in names),
        {"event": "node_joined", "node": f"edge-1{evil}", "role": "edge", "examples": 0, "held_out": 0},
        {"event": "node_refused", "node": f"old-pi{evil}", "reason": f"speaks protocol 0, this run speaks 1{evil}"},
    ]
    for number in range(1, ROUNDS + 2):
        active = names[:2] if lost and number > 2 else names
        if lost and number == 3:
            events.append({"event": "node_lost", "round": 3, "node": names[2], "reason": f"silent for 120 s{evil}"})
        events.append({"event": "plan", "round": number, "attempt": 1, "selected": active, "routes": routes})
        devices = [a_device(name, number, draw, evil) for name in active]
        host = {"name": f"edge-1{evil}", "layers": [2, 28], "bytes_up": 9_100_000, "bytes_down": 9_000_000}
        kinds = (
            {"ACT": 14_100_000, "GRAD": 13_900_000, "TABLE": 900, "STEP_CLOSE": 1_500}
            if number <= ROUNDS
            else {"ACT": 3_000_000}
        )
        events.append(
            {
                "event": "round_done",
                "round": number,
                "attempt": 1,
                "steps": STEPS if number <= ROUNDS else 0,
                "seconds": 24.0 + number,
                "devices": devices,
                "bytes_by_kind": kinds,
            }
            | {"hosts": [host | {"peak_rss_bytes": 712_000_000 + number}]}
        )
    events.append({"event": "run_done", "seconds": 131.5, "summary": "summary.json"})
    return [{"time": 1_750_000_000.0 + 12 * i, **event} for i, event in enumerate(events)]


def a_device(name: str, number: int, draw: random.Random, evil: str) -> dict[str, Any]:
    trains = number <= ROUNDS
    start = (number - 1) * STEPS
    losses = [1.2 + 3.2 * math.exp(-(start + s) / 12) + draw.gauss(0, 0.12) for s in range(STEPS if trains else 0)]
    return {
        "name": name,
        "examples": 512,
        "loss": sum(losses) / len(losses) if losses else None,
        "perplexity": 15 + 70 * math.exp(-(number - 1) / 1.1) + draw.random() * 6,
        "tokens": 31_234 if trains else 0,
        "train_seconds": 15.5 + draw.random() if trains else 0.0,
        "eval_seconds": 3.25,
        "bytes_up": 4_700_123 if trains else 500_000,
        "bytes_down": 4_600_321 if trains else 480_000,
        "adapter_bytes_up": 245_760 if trains else 0,
        "adapter_bytes_down": 245_760,
        "peak_rss_bytes": 598_000_000 + number,
        "step_losses": losses,
        "left_out": [{"step": 4, "reason": f"later than 120 s{evil}"}]
        if number == 2 and name.startswith("device-2")
        else [],
    }


def shares_of(timeline: dict[str, Any]) -> dict[str, Any]:
    """Returns the event that a server writes of a timeline."""
    (event,) = of_kind(as_events([timeline]), RoundTimeline)
    return as_line(shares_in(event))


def timeline_of(
    number: int, *, device_names: tuple[str, ...] = DEVICES, host_names: tuple[str, ...] = ("edge-1",)
) -> dict[str, Any]:
    """Returns a round's timeline: the devices take turns at the hosts, two micro-batches per step."""
    draw = random.Random(number)
    nodes: dict[str, list[list[Any]]] = {name: [] for name in (*device_names, *host_names)}
    now = 0.05
    for step in range(STEPS):
        for kind, slow in (("forward", 1.0), ("backward", 2.0)):
            for micro_batch in range(2):
                for name in device_names:
                    at = now
                    work = [(name, "device", "", 0.04)] + [(host, "host", name, 0.12) for host in host_names]
                    for node, role, peer, seconds in work if kind == "forward" else reversed(work):
                        takes = round(slow * seconds * draw.uniform(0.8, 1.2), 4)
                        nodes[node].append([kind, role, round(at, 4), takes, step, micro_batch, peer])
                        at += takes
                        target = host_names[0] if node == name else name
                        nodes[node].append(["send", role, round(at, 4), 0.018, step, micro_batch, target])
                        at += 0.02
                    now = max(now + 0.13 * slow, at - 0.2)
        for node, own in nodes.items():
            own.append(
                [
                    "step",
                    "host" if node in host_names and node not in device_names else "device",
                    round(now, 4),
                    0.03,
                    step,
                    0,
                    "",
                ]
            )
        now += 0.05
    return {"event": "timeline", "round": number, "nodes": nodes}


def a_classification() -> list[dict[str, Any]]:
    """Returns a run without incidents: two sites, five devices with different ends, two devices that host, one edge server."""
    names, draw = ("ann", "bob", "cat", "pi-kitchen-north", "pi-office"), random.Random(3)
    layers = {"ann": (1, 10), "bob": (2, 11), "cat": (4, 10), "pi-kitchen-north": (2, 10), "pi-office": (2, 10)}
    sites = (("pi-office",), ("edge-1", "pi-kitchen-north"))
    routes = []
    for i, name in enumerate(names):
        (front, back), hosts = layers[name], sites[i % 2]
        cuts = [front, *([6] if len(hosts) == 2 else []), back]
        hops = [{"node": host, "first": cuts[n], "last": cuts[n + 1]} for n, host in enumerate(hosts)]
        routes.append({"device": name, "front": front, "back_first": back, "num_layers": 12, "hops": hops})
    config = {"model": {"name": "minilm-l12"}, "task": {"kind": "classification", "classes": ["noun", "verb"]}}
    events: list[dict[str, Any]] = [
        {"event": "run_started", "run": "glosses", "versions": {"edgelam-fl": "0.1.0"}}
        | {"config": config | {"federation": {"rounds": 3}, "split": {"sites": 2, "host_on": "any"}}},
        *({"event": "node_joined", "node": name, "role": "device", "examples": 900, "held_out": 100} for name in names),
        {"event": "node_joined", "node": "edge-1", "role": "edge", "examples": 0, "held_out": 0},
    ]
    slices = {"pi-office": [1, 10], "edge-1": [2, 6], "pi-kitchen-north": [6, 11]}
    for number in range(1, 5):
        events.append({"event": "plan", "round": number, "attempt": 1, "selected": list(names), "routes": routes})
        devices = [a_device(name, number if number <= 3 else ROUNDS + 1, draw, "") for name in names]
        for device in devices:
            device["perplexity"] = None
            device["metrics"] = {"accuracy": round(0.9 - 0.6 * math.exp(1 - number) + 0.02 * draw.random(), 4)}
        slice_hosts = [
            {
                "name": name,
                "layers": held,
                "bytes_up": 5_000_000 + number,
                "bytes_down": 5_100_000,
                "compute_seconds": 9.5,
            }
            | {"peak_rss_bytes": 650_000_000}
            for name, held in slices.items()
        ]
        if number <= 3:
            timeline = timeline_of(number, device_names=names, host_names=("edge-1", "pi-kitchen-north", "pi-office"))
            events += [timeline, shares_of(timeline)]
        steps, kinds = (STEPS, {"ACT": 9_000_000, "GRAD": 8_000_000}) if number <= 3 else (0, {"ACT": 2_000_000})
        done = {"event": "round_done", "round": number, "attempt": 1, "steps": steps, "seconds": 20.0 + number}
        events.append(done | {"devices": devices, "hosts": slice_hosts, "bytes_by_kind": kinds})
    events.append({"event": "run_done", "seconds": 95.25, "summary": "summary.json"})
    return [{"time": 1_750_000_000.0 + 6 * i, **event} for i, event in enumerate(events)]


def a_failed_run() -> list[dict[str, Any]]:
    """Returns a run in which one round is closed and the host is lost in the second."""
    events = a_run()[:9]
    last = events[-1]["time"]
    return [
        *events,
        {"time": last + 30, "event": "node_lost", "round": 2, "node": "edge-1", "reason": "silent for 120 s"},
        {"time": last + 31, "event": "run_failed", "reason": "no host is left for layers 2-27"}
        | {"kept": "the adapter after round 1 is kept in runs/demo/adapter"},
    ]


def a_run_failed_at_once() -> list[dict[str, Any]]:
    """Returns a run that failed before a plan was made."""
    events = a_run()[:3]
    reason = "2 of 3 devices joined within 120 s (federation.min_nodes = 3)"
    return [
        *events,
        {"time": events[-1]["time"] + 120, "event": "run_failed", "reason": reason, "kept": "no round was finished"},
    ]
