"""Nothing that a device sends, on either plane, holds its text, its tokens or its labels; the same search finds a planted leak."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from edgelam_fl.config import TaskSection
from edgelam_fl.model.source import ModelSource
from edgelam_fl.tasks.causal_lm import CausalLm
from edgelam_fl.tasks.data import Pair, read_pairs
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.counters import ByteCounters
from edgelam_fl.wire.grpc.dial import dial
from edgelam_fl.wire.grpc.serve import DataPlaneServer
from edgelam_fl.wire.link import Link
from tests.integration.federation import Federation, Run
from tests.integration.proxy import Connection, CountingProxy
from tests.integration.tap import ENCODINGS, TOKENS, Secrets, leaks
from tests.links import hello, make_terms, ready, terms

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def examples(tiny: ModelSource, few_pairs: dict[str, Path]) -> list[tuple[str, Pair, list[int], list[int]]]:
    """(owner, pair, ids, labels) of everything that the devices hold, training and held-out alike."""
    task = CausalLm(tiny.folder, TaskSection())
    found = []
    for name, file in few_pairs.items():
        for pair in read_pairs(file, "question", "answer"):
            (example,) = task.examples([pair]).examples
            found.append((name, pair, example.ids, example.labels))
    return found


@pytest.fixture(scope="module")
def secrets(examples: list, tiny: ModelSource) -> Secrets:
    made = Secrets()
    for name, (prompt, answer), ids, labels in examples:
        made.add_text(prompt, f"{name}'s prompt")
        made.add_text(answer, f"{name}'s answer")
        made.add_numbers(ids, f"{name}'s ids of {prompt!r}")
        made.add_numbers(labels, f"{name}'s labels of {prompt!r}")
    return made


def test_nothing_of_the_data_leaves_a_device(averaged: Run, federation: Federation, secrets: Secrets) -> None:
    assert federation.control_plane is not None
    links = [link for links in averaged.links.values() for link in links]
    assert sum(len(link.up) for link in links) > 1_000_000, "the tap must have heard a training"
    assert leaks(secrets, links) == set()
    control = list(federation.control_plane.connections)
    assert sum(len(connection.up) for connection in control) > 100_000, "adapters must have passed here"
    assert leaks(secrets, control) == set()


def test_nothing_on_the_wire_can_be_read(averaged: Run, federation: Federation, secrets: Secrets) -> None:
    """Of what is in both planes' connections, the same search finds names, adapters and tokens in the clear only under TLS."""
    assert federation.data_plane is not None
    assert federation.control_plane is not None
    readable = Secrets()
    for name in federation.nodes:
        readable.add(name.encode(), "a node's name")
    for tensor, values in load_file(averaged.path / "adapter/adapter_model.safetensors").items():
        readable.add(values.numpy().tobytes()[:64], f"the adapter's {tensor}")
    inside = [*federation.data_plane.connections, *federation.control_plane.connections]
    assert {"a node's name"} < {what for connection in inside for what in everything_in(readable, connection)}
    assert sum(len(connection.up) for wire in federation.wires for connection in wire.connections) > 1_000_000
    for wire in federation.wires:
        for connection in wire.connections:
            assert everything_in(readable, connection) == set()
            assert everything_in(secrets, connection) == set()
            assert b"HTTP/" not in connection.up, "neither HTTP/1.1 nor the preface of HTTP/2"
    planted = Connection(up=bytearray(b"\x17\x03\x03 device-1"))
    assert everything_in(readable, planted) == {"a node's name"}


def everything_in(secrets: Secrets, connection: Connection) -> set[str]:
    """What of the secrets stands in a connection's bytes as they are, in either direction."""
    return secrets.found_in(bytes(connection.up)) | secrets.found_in(bytes(connection.down))


def test_embeddings_do_not_leave_either(averaged: Run, tiny: ModelSource) -> None:
    """A row of the embedding table is a token in other clothes: with front > 0 none may pass."""
    table = load_file(tiny.folder / "model.safetensors")["model.embed_tokens.weight"]
    rows = Secrets()
    for token, row in enumerate(table):
        rows.add(row.numpy().tobytes(), f"the embedding of token {token}")
    assert leaks(rows, [link for links in averaged.links.values() for link in links]) == set()
    assert rows.found_in(b"..." + table[7].numpy().tobytes()) == {"the embedding of token 7"}


def test_planted_leaks_are_found(secrets: Secrets, examples: list) -> None:
    """Real links through the same proxy and the same search, once for each form of a leak."""
    name, (prompt, answer), ids, labels = examples[17]
    window = ids[20 : 20 + TOKENS]
    learned = [label for label in labels if label >= 0][:TOKENS]
    planted = {encoding: (encode(window), "ids") for encoding, encode in ENCODINGS.items()}
    planted["labels"] = (ENCODINGS["<i8"](learned), "")
    planted["answer"] = (answer[5:20].encode(), "answer")
    planted["prompt"] = (prompt[:14].encode(), "prompt")
    for form, (leak, what) in planted.items():
        found = _sent_through_the_proxy(leak, secrets)
        assert any(name in line and what in line for line in found), f"a leak as {form} went unnoticed"
    assert _sent_through_the_proxy(b"nothing of anyone's, only as long", secrets) == set()


def _sent_through_the_proxy(leak: bytes, secrets: Secrets) -> set[str]:
    """An activation frame whose tensor hides `leak` between other bytes, at an odd offset."""
    arrived = threading.Event()

    def admit(hello: pb.Hello, link: Link) -> pb.Ready:
        link.open(terms(on_frame=lambda _link, frame: arrived.set(), answer=ready(1)))
        return ready(1)

    hidden = torch.rand(8, 1024).view(torch.uint8).flatten()
    hidden[12_345 : 12_345 + len(leak)] = torch.frombuffer(bytearray(leak), dtype=torch.uint8)
    host = DataPlaneServer("127.0.0.1", 0, admit)
    proxy = CountingProxy(f"127.0.0.1:{host.port}")
    try:
        link = dial(
            "edge-1", proxy.address, "entry edge-1", hello("planted/1/1"), ByteCounters(), make_terms(silent_s=10), 20
        )
        link.send(pb.Header(kind=pb.ACT, phase=pb.TRAIN), hidden.view(torch.float32).view(8, 1024))
        assert arrived.wait(20)
        link.close()
    finally:
        host.stop()
        proxy.close()
    return leaks(secrets, proxy.connections)
