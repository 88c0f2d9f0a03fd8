"""A headless Chromium, driven through its DevTools protocol over a pipe: no driver, no port, no package.

The pipe is what `--remote-debugging-pipe` opens: the browser reads commands from its descriptor 3 and writes replies and
events to 4, JSON ended by a NUL byte each.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--remote-debugging-pipe",
)  # fmt: skip
DEADLINE_S = 60.0


def find_chromium() -> str | None:
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Tab:
    """One page, with everything that its console and its network saw."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from, self._unread, self._last = to_browser, from_browser, b"", 0
        self.events: list[dict[str, Any]] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session: str = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._call(method, session=self._session, **parameters)

    def look(self, *, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        """The window's size, and whether the reader prefers "light" or "dark"."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def open(self, file: Path) -> None:
        """Returns when the page is loaded and has drawn twice."""
        assert not self.call("Page.navigate", url=file.as_uri()).get("errorText"), f"{file} cannot be opened"
        end = time.monotonic() + DEADLINE_S
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._read(end)
        self.ask("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))")

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        reply = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in reply, reply["exceptionDetails"]
        return reply["result"].get("value")

    def complaints(self) -> list[dict[str, Any]]:
        """Errors and warnings of the console, and what the page's policy refused."""
        return [event for event in self.events if _complains(event)]

    def requests(self) -> list[str]:
        """Every address that the page asked for, itself included; data: addresses need no network."""
        asked = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [address for address in asked if not address.startswith("data:")]

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]))

    def _call(self, method: str, session: str = "", **parameters: Any) -> dict[str, Any]:
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        os.write(self._to, json.dumps({**message, "sessionId": session} if session else message).encode() + b"\0")
        end = time.monotonic() + DEADLINE_S
        while True:
            reply = self._read(end)
            if reply.get("id") == self._last:
                assert "error" not in reply, f"{method}: {reply['error']}"
                return reply["result"]

    def _read(self, end: float) -> dict[str, Any]:
        """The next message; events are kept."""
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._from], [], [], max(0.0, end - time.monotonic()))
            more = os.read(self._from, 1 << 20) if ready else b""
            assert more, "Chromium is silent" if not ready else "Chromium has ended"
            self._unread += more
        line, self._unread = self._unread.split(b"\0", 1)
        message: dict[str, Any] = json.loads(line)
        if "method" in message:
            self.events.append(message)
        return message


def _complains(event: dict[str, Any]) -> bool:
    parameters = event.get("params", {})
    match event["method"]:
        case "Runtime.exceptionThrown":
            return True
        case "Runtime.consoleAPICalled":
            return parameters["type"] in ("error", "warning", "assert")
        case "Log.entryAdded":
            return parameters["entry"]["level"] in ("error", "warning")
    return False


@contextmanager
def chromium(program: str, profile: Path) -> Iterator[Tab]:
    """A fresh browser with one tab; it ends with the block."""
    read_commands, write_commands = os.pipe()
    read_replies, write_replies = os.pipe()
    for descriptor in (write_commands, read_replies):
        os.set_inheritable(descriptor, False)
    # The shell puts the two ends where the browser looks for them (by path, as `3<&12` is none of every shell's).
    shell = f'exec "$@" 3</dev/fd/{read_commands} 4>/dev/fd/{write_replies}'
    command = ["sh", "-c", shell, "sh", program, *FLAGS, f"--user-data-dir={profile}"]
    with (profile.parent / "chromium.log").open("wb") as log:
        process = subprocess.Popen(
            command, pass_fds=(read_commands, write_replies), stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    os.close(read_commands)
    os.close(write_replies)
    try:
        yield Tab(write_commands, read_replies)
    finally:
        os.close(write_commands)  # the browser ends when its pipe does
        os.close(read_replies)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
