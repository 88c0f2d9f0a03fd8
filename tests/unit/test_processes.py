from __future__ import annotations

import errno
import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from edgelam_fl.addresses import answers, check_plain_text, check_port_free, free_port, split_address
from edgelam_fl.config import RunConfig
from edgelam_fl.errors import ConfigError, EnvironmentProblem, RunFailed
from edgelam_fl.federation.child import Child, Restarts, end_all, log_tail, pause, shorten
from edgelam_fl.federation.local import LocalFederation, shares_of_cores
from edgelam_fl.federation.node_process import NodeProcesses
from edgelam_fl.federation.operator import Operator
from edgelam_fl.federation.server_probe import is_healthy
from edgelam_fl.files import RoomyStream
from edgelam_fl.telemetry.progress import NodesProgress
from tests.disk_faults import fill_at


@pytest.mark.parametrize(
    ("address", "expected"),
    [("127.0.0.1:8000", ("127.0.0.1", 8000)), ("host:0", ("host", 0)), ("[::1]:65535", ("::1", 65535))],
)
def test_addresses(address: str, expected: tuple[str, int]) -> None:
    assert split_address(address, "--server") == expected


@pytest.mark.parametrize(
    ("cores", "edges", "devices", "expected"),
    [
        (2, 0, 1, (2, 2)),  # nothing is split: the one device has all cores
        (8, 0, 2, (8, 4)),
        (2, 1, 3, (2, 1)),
        (16, 1, 3, (16, 4)),
        (16, 2, 3, (8, 4)),
    ],
)
def test_the_nodes_of_a_local_run_share_the_cores(
    cores: int, edges: int, devices: int, expected: tuple[int, int]
) -> None:
    assert shares_of_cores(cores, edges, devices) == expected


@pytest.mark.parametrize(
    "address", ["", "host", ":8000", "host:", "host:http", "host:-1", "host:65536", "8000", "host:²"]
)
def test_an_address_of_another_form(address: str) -> None:
    with pytest.raises(ConfigError) as caught:
        split_address(address, "--server")
    assert str(caught.value) == f"--server = {address!r} must be HOST:PORT, as in 127.0.0.1:8000"


@pytest.mark.parametrize("address", ["::1:8000", "fe80::1:8000", "[::1:8000", "::1]:8000"])
def test_an_ipv6_address_without_brackets(address: str) -> None:
    with pytest.raises(ConfigError, match=r"; an IPv6 address is written in brackets, as in \[::1\]:8000$"):
        split_address(address, "--server")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "::1"])
def test_loopback_needs_no_consent(host: str) -> None:
    check_plain_text(host, "--listen", insecure=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "example.org", "::", "127.example.org"])
def test_plain_text_beyond_this_machine_needs_consent(host: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_plain_text(host, "--listen", insecure=False)
    assert str(caught.value).startswith(
        f"--listen = {host} is beyond this machine, and without the operator's keys everything is sent as plain text: "
    )
    assert str(caught.value).endswith("with --insecure")
    check_plain_text(host, "--listen", insecure=True)


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(EnvironmentProblem) as caught:
            check_port_free("127.0.0.1", port, "--port")
        assert str(caught.value) == (
            f"port {port} on 127.0.0.1 cannot be opened (Address already in use); "
            "end what uses it or choose another with --port"
        )
        assert answers("127.0.0.1", port)
    check_port_free("127.0.0.1", port, "--port")
    assert not answers("127.0.0.1", port)


def test_free_ports_are_free_and_never_given_to_outgoing_connections() -> None:
    first = free_port(count=3)
    for port in range(first, first + 3):
        check_port_free("127.0.0.1", port, "--port")
        assert port < 32768


@pytest.mark.parametrize("host", ["no.such.host.invalid", "203.0.113.1"])
def test_an_address_that_is_not_this_machines(host: str) -> None:
    with pytest.raises(EnvironmentProblem, match=f"on {host} cannot be opened"):
        check_port_free(host, 0, "--listen")


def test_a_server_that_accepts_connections_and_stands_still_is_not_healthy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as still:
        assert answers("127.0.0.1", still.getsockname()[1])
        assert not is_healthy("127.0.0.1", still.getsockname()[1], tls=False, timeout_s=0.01)
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        asked = threading.Thread(target=server.handle_request)
        asked.start()
        assert is_healthy("127.0.0.1", server.server_port, tls=False, timeout_s=30.0)
        asked.join()
    assert not is_healthy("127.0.0.1", server.server_port, tls=True), "nobody listens there"


# ---------------------------------------------------------------- children


def python(code: str, log: Path, name: str = "child") -> Child:
    return Child(name, [sys.executable, "-c", code], log)


def until(happened: object, seconds: float = 8.0) -> None:
    end = time.monotonic() + seconds
    while not happened():  # type: ignore[operator]
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def test_a_child_that_ended_tells_its_status_and_the_end_of_its_log(tmp_path: Path) -> None:
    log = tmp_path / "new" / "child.log"
    child = python("import sys; print('one\\ntwo\\n\\nthree', flush=True); sys.exit('four')", log)
    until(child.ended)
    assert child.ended() == "child ended with status 1: two | three | four"


def test_a_pause_ends_with_a_child(tmp_path: Path) -> None:
    children = [
        python("import time; time.sleep(600)", tmp_path / "a"),
        python("import sys; sys.exit(3)", tmp_path / "b"),
    ]
    try:
        pause(3600.0, children)
        assert [bool(child.ended()) for child in children] == [False, True]
        pause(0.0, children[:1])
    finally:
        end_all(children)


def test_a_running_child_ends_when_asked(tmp_path: Path) -> None:
    child = python("import time; time.sleep(60)", tmp_path / "log")
    assert child.ended() == ""
    end_all([child])
    assert child.ended() == f"child ended with status -{signal.SIGTERM.value}: no output"


def test_a_child_that_does_not_listen_is_killed_with_its_own_children(tmp_path: Path) -> None:
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); print(p.pid, flush=True); time.sleep(60)"
    )
    child = python(code, tmp_path / "log")
    until(lambda: (tmp_path / "log").read_text().strip())
    grandchild = int((tmp_path / "log").read_text())
    child.ask_to_end()
    child.make_end(grace_s=0.2)
    assert f"status -{signal.SIGKILL.value}" in child.ended()
    until(lambda: not is_running(grandchild))


def test_what_a_child_leaves_behind_ends_with_it_and_nothing_is_signalled_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers of processes come back: 32,768 of them, threads included, are through in minutes."""
    sleeper = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    child = python(f"import subprocess, sys; print({sleeper}.pid)", tmp_path / "log")
    until(child.ended)
    grandchild = int((tmp_path / "log").read_text())
    until(lambda: not is_running(grandchild))
    monkeypatch.setattr(
        "edgelam_fl.federation.child.os.killpg", lambda *_: pytest.fail("it is another process's number")
    )
    end_all([child])


def test_a_run_here_ends_with_its_superlink(tmp_path: Path) -> None:
    superlink = python("import sys; sys.exit('no space left on device')", tmp_path / "log", "SuperLink")
    until(superlink.ended)
    here = LocalFederation(
        config=RunConfig(),
        folder=tmp_path,
        operator=Operator("127.0.0.1:1", tmp_path),
        superlink=superlink,
        edges=[],
        devices=[],
        progress=NodesProgress({}),
    )
    with pytest.raises(
        RunFailed, match=r"SuperLink ended with status 1: no space left on device.* No round was finished"
    ):
        here.watch()


@pytest.mark.parametrize(
    ("edges", "devices", "words"),
    [(1, 3, "1 edge server and 3 devices as 9 processes"), (0, 1, "0 edge servers and 1 device as 3 processes")],
)
def test_what_was_started_is_counted(tmp_path: Path, edges: int, devices: int, words: str) -> None:
    superlink = python("pass", tmp_path / "log", "SuperLink")
    here = LocalFederation(
        config=RunConfig(), folder=tmp_path, operator=Operator("127.0.0.1:1", tmp_path), superlink=superlink,
        edges=[NodeProcesses("edge", "127.0.0.1:1", tmp_path)] * edges,
        devices=[NodeProcesses("device", "127.0.0.1:1", tmp_path)] * devices, progress=NodesProgress({}),
    )  # fmt: skip
    assert str(here) == f"a SuperLink, {words}"
    end_all([superlink])


def test_ends_of_a_nodes_two_processes_are_not_added_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ending = ""

    class Ending:
        """A process that has ended if it is of the kind `ending`."""

        def __init__(self, name: str, *_: object) -> None:
            self.name, self.log = name, tmp_path / "log"

        def ended(self) -> str:
            return f"{self.name} ended" if self.name.endswith(ending) else ""

    monkeypatch.setattr("edgelam_fl.federation.node_process.Child", Ending)
    node = NodeProcesses("a", "127.0.0.1:1", tmp_path)
    node.start()
    for ending in ["stage host", "SuperNode"] * 3:
        assert node.watch() == f"a's {ending} ended; it was started again"
    with pytest.raises(RunFailed, match="a's SuperNode ended"):
        node.watch()


def test_a_process_that_keeps_ending_is_given_up() -> None:
    restarts = Restarts(most=2, within_s=3600.0)
    restarts.note("it ended")
    restarts.note("it ended")
    with pytest.raises(RunFailed, match=r"^it ended \(restart 3 within 3600 s\)$"):
        restarts.note("it ended")
    rare = Restarts(most=1, within_s=0.0)
    for _ in range(3):
        rare.note("older ones do not count")


def test_log_tail(tmp_path: Path) -> None:
    assert log_tail(tmp_path / "none") == "it left no log"
    (tmp_path / "log").write_bytes(b"a\nb\xff\n\x1b[92mc\x1b[0m\nd\n")
    assert log_tail(tmp_path / "log") == "b\ufffd | c | d"


def test_a_full_disk_costs_the_log_that_is_shortened_and_nothing_else(tmp_path: Path) -> None:
    log = tmp_path / "superlink.log"
    writes = 0
    while True:
        log.write_text("a line\n" * 300)
        if not fill_at(writes + 1, lambda: shorten(log, most_bytes=1000, kept_bytes=25)):
            break
        writes += 1
    assert writes


def test_a_log_that_has_grown_long_is_shortened_under_its_writer(tmp_path: Path) -> None:
    log, lines = tmp_path / "log", [f"line {n:04}\n" for n in range(101)]  # of 10 bytes
    code = (
        "import sys; print(*(f'line {n:04}' for n in range(100)), sep='\\n', flush=True); input(); print('line 0100')"
    )
    with log.open("ab") as output:
        writer = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=output)
    until(lambda: log.stat().st_size == 1000)
    shorten(log, most_bytes=1000, kept_bytes=25)
    assert log.read_text() == "".join(lines[:100]), "at the limit it stays"
    with log.open("a") as more:
        more.write("a last line\n")
    shorten(log, most_bytes=1000, kept_bytes=25)
    assert log.read_text() == lines[99] + "a last line\n", "whole lines of the last 25 bytes"
    writer.communicate(b"\n")
    assert log.read_text() == lines[99] + "a last line\n" + lines[100]


def test_a_log_is_shortened_before_a_child_appends_to_it(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("x" * (4 << 20) + "\nold\n")
    child = python("print('new')", tmp_path / "log")
    until(child.ended)
    assert (tmp_path / "log").read_text() == "old\nnew\n"


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_a_child_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from edgelam_fl.federation.child import Child;"
        "c = Child('c', [sys.executable, '-c', 'import time; time.sleep(60)'], Path(sys.argv[1]));"
        "print(c.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "log")], stdout=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert is_running(child)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    until(lambda: not is_running(child))


def test_a_process_that_ignores_the_end_of_its_parent_ends_all_the_same() -> None:
    code = (
        "import signal, sys, time; from edgelam_fl.machine import end_with_parent;"
        "signal.signal(signal.SIGTERM, lambda *_: print('asked', flush=True)); end_with_parent(grace_s=0.01, poll_s=0.01);"
        "print('here', flush=True); [time.sleep(1) for _ in range(600)]"
    )
    starter = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {code!r}]); time.sleep(600)"
    parent = subprocess.Popen(
        [sys.executable, "-c", starter], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )
    assert parent.stdout is not None
    with parent.stdout as said:
        assert said.readline() == "here\n"
        parent.kill()
        parent.wait()
        assert said.read() == "asked\n", "the pipe ends with the last process that has it"


def is_running(pid: int) -> bool:
    """Whether the process lives; one that ended and waits for its parent does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    if sys.platform != "linux":
        return True
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize(("error", "passes"), [(errno.ENOSPC, False), (errno.EDQUOT, False), (errno.EPIPE, True)])
def test_output_on_a_full_disk_is_dropped_and_a_broken_pipe_is_not(error: int, passes: bool) -> None:
    class Failing(io.StringIO):
        def flush(self) -> None:
            raise OSError(error, os.strerror(error))

    stream = Failing()
    roomy = RoomyStream(lambda: stream)
    with pytest.raises(OSError, match=os.strerror(error)) if passes else nullcontext():
        roomy.write("a node has joined\n")
        roomy.flush()
    assert stream.getvalue() == "a node has joined\n"
