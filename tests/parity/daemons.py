"""Stage hosts in processes of their own, which take plans as a `StageHost` in this process does."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from edgelam_fl.federation.child import Child, end_all, log_tail
from edgelam_fl.federation.template import NODE_ENVIRONMENT
from edgelam_fl.trust.authority import Authority, issue
from edgelam_fl.trust.identity import DEVICE, HOST, save_identity
from edgelam_fl.wire import PROTOCOL_VERSION
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.control import ControlClient

START_DEADLINE_S = 300.0


class Daemon:
    """A stage host in a process of its own; takes plans as a `StageHost` does."""

    def __init__(
        self, name: str, state: Path, data: Path | None = None, identity: Path | None = None, threads: int = 1
    ) -> None:
        command = [sys.executable, "-m", "edgelam_fl.node.daemon", "--name", name, "--state", str(state)]
        command += ["--threads", str(threads), *(["--data", str(data)] if data else [])]
        command += ["--identity", str(identity)] if identity else []
        self._state = state
        self._again = partial(Daemon, name, state, data, identity, threads)
        self.child = Child(name, command, state / "stage-host.log", NODE_ENVIRONMENT, forked=True)
        self._client: ControlClient | None = None

    def _call(self, method: str, request: object, timeout_s: float) -> object:
        if self._client is None:
            self._client = ControlClient(self._state, START_DEADLINE_S)
        try:
            return self._client.call(method, request, timeout_s)
        except Exception as error:
            error.add_note(f"{self.child.name}: {self.child.ended() or log_tail(self.child.log, 20)}")
            raise

    def submit(self, request: pb.SubmitRequest) -> pb.SubmitReply:
        return self._call("Submit", request, 60.0)  # type: ignore[return-value]

    def wait(self, request: pb.WaitRequest) -> pb.JobReport:
        return self._call("Wait", request, request.timeout_s + 10)  # type: ignore[return-value]

    def profile(self) -> pb.Profile:
        return self._call("GetProfile", pb.ProfileRequest(protocol_version=PROTOCOL_VERSION), 60.0)  # type: ignore[return-value]

    def address(self) -> str:
        return self.profile().address

    def again(self) -> Daemon:
        """Starts it again with its state, once its process has ended."""
        (self._state / "endpoint.json").unlink(missing_ok=True)
        return self._again()

    def close(self) -> None:
        if self._client is not None:
            self._client.close()


@contextmanager
def running(
    hosts: Sequence[str], files: Sequence[Path], folder: Path, authority: Authority | None = None
) -> Iterator[dict[str, Daemon]]:
    """Starts hosts of these names and a device per file; yields them by name. authority: signs their keys; None: plain text."""

    def identity(name: str, role: str) -> Path | None:
        if authority is None:
            return None
        save_identity(issue(authority, name, role), folder / f"{name}-keys")
        return folder / f"{name}-keys"

    started = {name: Daemon(name, folder / name, None, identity(name, HOST)) for name in hosts}
    for number, file in enumerate(files, 1):
        name = f"device-{number}"
        started[name] = Daemon(name, folder / name, file, identity(name, DEVICE))
    try:
        yield started
    finally:
        for daemon in started.values():
            daemon.close()
        end_all([daemon.child for daemon in started.values()])
