"""Twelve faults that people really meet, seeded one by one: `edgelam doctor` names each one with its fix."""

from __future__ import annotations

import importlib.metadata
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from edgelam_fl.addresses import free_port
from edgelam_fl.doctor import checks as doctor
from edgelam_fl.doctor.checks import Finding
from edgelam_fl.machine import memory_free_bytes
from tests.support import hang_up_on_all

GIB = 1 << 30
Seed = Callable[[Path, ExitStack], Finding]


@contextmanager
def listener() -> Iterator[int]:
    """A program that hangs up on everybody."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        threading.Thread(target=hang_up_on_all, args=(server,), daemon=True).start()
        yield server.getsockname()[1]


@contextmanager
def superlink_of(version: str) -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"edgelam-fl": "0.2.0", "flwr": version}).encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def memory_below_a_slice(tmp: Path, _: ExitStack) -> Finding:
    group = tmp / "docker" / "node"
    group.mkdir(parents=True)
    for name, text in (("memory.max", GIB // 2), ("memory.current", GIB // 4), ("memory.stat", "inactive_file 0")):
        (group / name).write_text(f"{text}\n")
    return doctor.check_memory(memory_free_bytes(tmp, "/docker/node"), needed=GIB)


def cache_not_writable(tmp: Path, _: ExitStack) -> Finding:
    (tmp / "file").write_text("")  # a folder cannot be made in it, for root neither
    return doctor.check_cache_writable(tmp / "file" / "cache")


FAULTS: dict[str, tuple[Seed, str, str]] = {
    "a 32-bit system": (
        lambda *_: doctor.check_userland(32, "aarch64"), "32 bits on aarch64; 64 are needed", "64-bit"),
    "a package that is not there": (
        lambda *_: doctor.check_packages(["edgelam-no-such-part>=2"])[0], "is not installed",
        "pip install 'edgelam-no-such-part>=2'"),
    "a name that does not resolve": (
        lambda *_: doctor.check_server("no-such-host.invalid", 8000)[0], "does not resolve", "/etc/hosts"),
    "the address to listen on": (
        lambda *_: doctor.check_server("0.0.0.0", 8000)[0], "0.0.0.0 is where a server listens", "--server ADDRESS:PORT"),
    "no server": (
        lambda *_: doctor.check_server("127.0.0.1", free_port())[1], "nothing answers", "edgelam server --listen"),
    "a server that is not Flower's": (
        lambda _, stack: doctor.check_server("127.0.0.1", stack.enter_context(listener()))[1],
        "is no Flower SuperLink", "edgelam server --listen HOST:PORT"),
    "another version of Flower": (
        lambda _, stack: doctor.check_server("127.0.0.1", stack.enter_context(superlink_of("0.9")))[1],
        f"a SuperLink of Flower 0.9, here is {importlib.metadata.version('flwr')}", "pip install flwr==0.9 here"),
    "a port that is taken": (
        lambda _, stack: doctor.check_port(stack.enter_context(listener())), "in use by another program", "ss -ltnp"),
    "a data plane behind a firewall": (
        lambda *_: doctor.check_hub("127.0.0.1", free_port()), "the server's data plane", "--data-plane HOST:PORT"),
    "a container's limit below the slice": (memory_below_a_slice, "0.2 GiB free; ", "raise the container's limit"),
    "a cache that cannot be written": (cache_not_writable, "cannot be written: Not a directory", "EDGELAM_CACHE"),
    "a kernel that was not built for this board": (
        lambda *_: doctor.check_base("nf4", lambda _: "its kernel does not run (no kernel image is available)"),
        "no kernel image", "reinstall bitsandbytes for this processor"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_with_what_mends_it(fault: str, tmp_path: Path) -> None:
    seed, named, mended = FAULTS[fault]
    with ExitStack() as stack:
        finding = seed(tmp_path, stack)
    assert finding.state == "problem", finding
    assert named in finding.found
    assert mended in finding.fix


def test_there_are_twelve_and_without_them_the_new_checks_are_content(tmp_path: Path) -> None:
    assert len(FAULTS) == 12
    with listener() as port:
        assert doctor.check_hub("127.0.0.1", port).state == "ok"
    assert doctor.check_userland(64, "aarch64").state == "ok"
    assert doctor.check_cache_writable(tmp_path / "cache").state == "ok"
