"""Measures whether links keep to their shares: three devices' links to one host, paced to 1 : 2 : 4 of 20 Mbit/s each way.

Each device is a process with two links to the host's process, as on a route over one host, and both links are loaded both
ways. Bytes are those that the receiving end counts: payload, frame headers and gRPC's headers, without those of HTTP/2 and
TCP. --smoke: a few seconds, no bars.
"""

from __future__ import annotations

import multiprocessing
import queue
import threading
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.common import Figure, main
from edgelam_fl.federation.template import warm_template
from edgelam_fl.wire import PROTOCOL_VERSION
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.counters import ByteCounters
from edgelam_fl.wire.grpc.dial import dial
from edgelam_fl.wire.grpc.serve import DataPlaneServer
from edgelam_fl.wire.link import Frame, Link
from edgelam_fl.wire.pace import Pace
from edgelam_fl.wire.terms import MakeTerms, link_terms

CAPACITY_BPS = 20e6
SHARES = {"device-1": 1, "device-2": 2, "device-3": 4}
BAR_PERCENT = 5.0
SHAPE = (2, 128, 576)  # a frame: two rows of SmolLM2-135M's hidden states
READY_S, SILENT_S = 60.0, 10.0
START_S = 120.0  # three processes import torch

Samples = list[tuple[float, int]]  # (time in seconds, bytes received until then)


def measure(smoke: bool) -> tuple[dict[str, Any], list[Figure]]:
    seconds, window_s = (3.0, 1.0) if smoke else (22.0, 10.0)
    received = _run(seconds)
    figures = []
    for name, samples in sorted(received.items()):
        share_bps = _share_bps(name.split()[0])
        rates = _window_rates_bps(samples, window_s)
        mean_bps = 8 * (samples[-1][1] - samples[0][1]) / (samples[-1][0] - samples[0][0])
        apart = max(abs(rate / share_bps - 1) for rate in rates) * 100
        bar = None if smoke else f"at most {BAR_PERCENT:g} %"
        holds = None if smoke else apart <= BAR_PERCENT
        figures += [
            Figure(f"{name}, share", round(share_bps / 1e6, 4), "Mbit/s"),
            Figure(f"{name}, over {seconds:g} s", round(mean_bps / 1e6, 4), "Mbit/s"),
            Figure(f"{name}, farthest {window_s:g} s window from the share", round(apart, 2), "%", bar, holds),
        ]
    settings = {"capacity_bps": CAPACITY_BPS, "shares": SHARES, "seconds": seconds, "window_s": window_s}
    return settings, figures


def _share_bps(device: str) -> float:
    return CAPACITY_BPS * SHARES[device] / sum(SHARES.values())


def _window_rates_bps(samples: Samples, window_s: float) -> list[float]:
    """Returns the mean rate, in bits per second, of the window that begins at each sample."""
    rates = []
    for begin, (start_s, start_bytes) in enumerate(samples):
        end = next((sample for sample in samples[begin:] if sample[0] - start_s >= window_s), None)
        if end is not None:
            rates.append(8 * (end[1] - start_bytes) / (end[0] - start_s))
    return rates


# ---------------------------------------------------------------- processes


def _run(seconds: float) -> dict[str, Samples]:
    """Loads all links; returns each end's samples: "device-1 up" at the host, "device-1 down" at the device."""
    context = multiprocessing.get_context("forkserver")  # gRPC's threads do not survive a fork of this process
    warm_template()
    address, results, ready = context.Queue(), context.Queue(), context.Barrier(1 + len(SHARES))
    processes = [context.Process(target=_host, args=(address, results, ready, seconds))]
    processes[0].start()
    try:
        where = address.get(timeout=START_S)
        for name in SHARES:
            processes.append(context.Process(target=_device, args=(name, where, results, ready, seconds)))
            processes[-1].start()
        return dict(results.get(timeout=START_S + seconds) for _ in range(2 * len(SHARES)))
    except queue.Empty as error:
        raise SystemExit(f"a process ended early: exit codes {[p.exitcode for p in processes]}") from error
    finally:
        for process in processes:
            process.kill()
            process.join()


def _host(address: Any, results: Any, ready: Any, seconds: float) -> None:
    counters = {name: ByteCounters() for name in SHARES}
    paces = {name: Pace(_share_bps(name) / 8) for name in SHARES}
    loads: list[_Load] = []

    def admit(hello: pb.Hello, link: Link) -> pb.Ready:
        load = _Load(pb.GRAD if hello.link == pb.ENTRY else pb.ACT, link)
        loads.append(load)
        ready = pb.Ready(version=PROTOCOL_VERSION, window=1, activation_codec="raw", gradient_codec="raw", job_token=1)
        link.open(_make_terms(paces[hello.node], load)(hello.node, counters[hello.node], ready))
        return ready

    server = DataPlaneServer("127.0.0.1", 0, admit)
    address.put(f"127.0.0.1:{server.port}")
    ready.wait(START_S)
    for load in loads:
        load.start()
    for name, samples in _sample(counters, seconds).items():
        results.put((f"{name} up", samples))
    threading.Event().wait()  # keeps the links loaded until every device has its samples; then this process is killed


def _device(name: str, address: str, results: Any, ready: Any, seconds: float) -> None:
    counters, pace = ByteCounters(), Pace(_share_bps(name) / 8)
    loads = []
    for side, kind in ((pb.ENTRY, pb.ACT), (pb.EXIT, pb.GRAD)):
        hello = pb.Hello(version=PROTOCOL_VERSION, job="pacing", node=name, link=side, window=1, codecs=["raw"])
        load = _Load(kind)
        name_of_link = pb.LinkRole.Name(side).lower()
        load.link = dial("host", address, name_of_link, hello, counters, _make_terms(pace, load), READY_S)
        loads.append(load)
    ready.wait(START_S)
    for load in loads:
        load.start()
    results.put((f"{name} down", _sample({name: counters}, seconds)[name]))
    threading.Event().wait()


@dataclass
class _Load:
    """Keeps two frames in a link's queue: queues a new frame for each that has been sent."""

    kind: int
    link: Link | None = None

    def start(self) -> None:
        self.send()
        self.send()

    def send(self, *_: object) -> None:
        assert self.link is not None
        self.link.send(pb.Header(kind=self.kind, phase=pb.TRAIN), torch.zeros(SHAPE))  # type: ignore[arg-type]


def _make_terms(pace: Pace, load: _Load) -> MakeTerms:
    return partial(
        link_terms, pace=pace, most_bytes=4 * SHAPE[0] * SHAPE[1] * SHAPE[2], silent_s=SILENT_S,
        on_frame=_ignore, on_lost=_ignore, on_sent=load.send,
    )  # fmt: skip


def _sample(counters: dict[str, ByteCounters], seconds: float) -> dict[str, Samples]:
    samples: dict[str, Samples] = {name: [] for name in counters}
    time.sleep(1.0)  # until both ends have begun
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for name, counter in counters.items():
            samples[name].append((time.monotonic(), counter.total("received")))
        time.sleep(0.02)
    return samples


def _ignore(link: Link, heard: Frame | str) -> None:
    """Does nothing: a lost link shows in the figures."""


if __name__ == "__main__":
    main("pacing", measure)
