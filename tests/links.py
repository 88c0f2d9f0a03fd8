"""Links for tests: the terms that both ends go by unless a test says otherwise, and a queue of what an end hears."""

from __future__ import annotations

import queue
from functools import partial
from typing import Any

from edgelam_fl.wire import PROTOCOL_VERSION
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.counters import ByteCounters
from edgelam_fl.wire.link import Frame
from edgelam_fl.wire.memory import MemoryLink, memory_pair
from edgelam_fl.wire.terms import LinkTerms, MakeTerms, link_terms

MOST_BYTES = 64 << 20
Heard = queue.Queue[Frame | str]


def hello(job: str = "test/1/1", node: str = "device-1", **fields: Any) -> pb.Hello:
    standard: dict[str, Any] = {"version": PROTOCOL_VERSION, "job": job, "node": node, "window": 1, "codecs": ["raw"]}
    return pb.Hello(**standard | fields)


def ready(job_token: int = 7, codec: str = "raw", window: int = 1) -> pb.Ready:
    return pb.Ready(
        version=PROTOCOL_VERSION, window=window, activation_codec=codec, gradient_codec=codec, job_token=job_token
    )


def make_terms(heard: Heard | None = None, **fields: Any) -> MakeTerms:
    """Returns what makes an end's terms of READY. `heard` gets its frames, and at last the reason of its end."""
    ears = {"on_frame": lambda link, frame: None, "on_lost": lambda link, reason: None}
    if heard is not None:
        ears = {"on_frame": lambda link, frame: heard.put(frame), "on_lost": lambda link, reason: heard.put(reason)}
    return partial(link_terms, **{"most_bytes": MOST_BYTES, **ears, **fields})


def terms(
    name: str = "entry x", answer: pb.Ready | None = None, counters: ByteCounters | None = None, **fields: Any
) -> LinkTerms:
    """Returns an end's terms. `answer`: the host's READY; None: one of a job without a token."""
    return make_terms(**fields)(name, counters or ByteCounters(), answer or ready(job_token=0))


def open_pair(left: LinkTerms, right: LinkTerms) -> tuple[MemoryLink, MemoryLink]:
    """Returns both ends of a link in memory that have shaken hands."""
    ends = memory_pair(left.name, left.counters, right.counters)
    for link, own in zip(ends, (left, right), strict=True):
        link.open(own)
    return ends
