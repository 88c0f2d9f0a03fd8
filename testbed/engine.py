"""Calls Docker and Compose by their command lines: checks the engine, builds, starts, asks, ends. Knows no federation."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from edgelam_fl.errors import EnvironmentProblem, RunFailed

ROOT = Path(__file__).parents[1]
# A local base image comes before one that has to be downloaded; the last one is the Dockerfile's own default.
_BASES = ("python:3.11-slim-bookworm", "python:3.11-slim")
_ASK_S, _START_S = 60.0, 600.0
# Version 2 of cgroups, else version 1; without either the values are unknown. Docker's "OOMKilled" covers only the first process.
_PEAK = "cat /sys/fs/cgroup/memory.peak 2>/dev/null || cat /sys/fs/cgroup/memory/memory.max_usage_in_bytes"
_KILLS = "cat /sys/fs/cgroup/memory.events 2>/dev/null || cat /sys/fs/cgroup/memory/memory.oom_control"
_CPU = "cat /sys/fs/cgroup/cpu.stat 2>/dev/null || cat /sys/fs/cgroup/cpuacct/cpuacct.usage"
_STAT = "cat /sys/fs/cgroup/memory.stat 2>/dev/null || cat /sys/fs/cgroup/memory/memory.stat"


def engine_problem() -> str:
    """Returns why containers cannot be started here; an empty string if they can."""
    if not shutil.which("docker"):
        return "the command `docker` is not on PATH: install Docker Engine"
    try:
        done = subprocess.run(["docker", "info"], capture_output=True, text=True, timeout=_ASK_S, check=False)
    except subprocess.TimeoutExpired:
        return f"`docker info` did not answer within {_ASK_S:.0f} s"
    if done.returncode:
        return f"`docker info` failed: {' '.join(done.stderr.split())[-200:] or 'no output'}"
    return "" if _compose_commands() else "there is neither `docker compose` nor `docker-compose`: install one of them"


def check_engine() -> None:
    problem = engine_problem()
    if problem:
        raise EnvironmentProblem(f"a testbed needs a Docker engine and Compose, and {problem}")


def _compose_commands() -> list[list[str]]:
    candidates = (["docker", "compose"], ["docker-compose"])
    return [command for command in candidates if shutil.which(command[0]) and _works([*command, "version"])]


def _works(command: Sequence[str]) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def build(image: str, base: str = "") -> None:
    """Builds the image and prints the steps. Raises RunFailed with the end of the build's output."""
    base = base or next((base for base in _BASES if _works(["docker", "image", "inspect", base])), "")
    arguments = ["--build-arg", f"BASE_IMAGE={base}"] if base else []
    command = ["docker", "build", "-f", "docker/Dockerfile", *arguments, "-t", image, "."]
    said: list[str] = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line.rstrip())
            if line.startswith(("Step ", "#")) and " : " in line:
                print(f"    {line.rstrip()[:110]}", flush=True)
    if process.returncode:
        raise RunFailed(f"`{' '.join(command)}` failed: " + " | ".join(said[-5:])[-800:])


class Project:
    """The containers of one Compose file, under a project name of their own."""

    def __init__(self, name: str, file: Path) -> None:
        self.name = name
        self._command = [*_compose_commands()[0], "-p", name, "-f", str(file)]
        # Container ids by service, kept because Compose takes half a second of a core to look one up.
        self._ids: dict[str, str] = {}
        self._variables: dict[str, str] = {}

    def up(self, *services: str, **variables: str) -> None:
        """Starts the services' containers, by default all; returns once they run. One that depends on a healthy one starts after it.

        variables: what the Compose file refers to.
        """
        self._variables |= variables
        self._compose("up", "-d", *services, timeout_s=_START_S)

    def down(self) -> None:
        self._ids.clear()
        self._compose("down", "--volumes", "--remove-orphans", "--timeout", "5", timeout_s=_START_S)

    def logs(self) -> str:
        return self._compose("logs", "--no-color", "--tail", "200", timeout_s=_ASK_S).stdout

    def follow(self, service: str, command: Sequence[str]) -> int:
        """Runs a command in a service's container, with this process's output. Returns the exit status."""
        exec_in = ["docker", "exec", self.container(service), *command]
        return subprocess.run(exec_in, check=False).returncode

    def ask(self, service: str, command: str, user: str = "") -> str:
        """Returns what a shell command in a service's container prints; an empty string if it fails or takes over a minute."""
        as_user = ["--user", user] if user else []
        exec_in = ["docker", "exec", *as_user, self.container(service), "sh", "-c", command]
        try:
            done = subprocess.run(exec_in, capture_output=True, text=True, timeout=_ASK_S, check=False)
        except subprocess.TimeoutExpired:
            return ""
        return done.stdout if done.returncode == 0 else ""

    def put(self, service: str, text: str, path: str) -> None:
        """Writes a file in a service's container."""
        command = ["docker", "exec", "-i", self.container(service), "sh", "-c", 'cat > "$0"', path]
        _checked(command, _ASK_S, text)

    def copy_out(self, service: str, folder: str, to: Path) -> None:
        """Copies the content of a folder in a service's container; does nothing if the folder does not exist."""
        if not self.ask(service, f"test -d {shlex.quote(folder)} && echo yes"):
            return
        to.mkdir(parents=True, exist_ok=True)
        _checked(["docker", "cp", f"{self.container(service)}:{folder}/.", str(to)], _START_S)

    def container(self, service: str) -> str:
        if service not in self._ids:
            found = self._compose("ps", "-q", service, timeout_s=_ASK_S).stdout.split()
            if not found:
                raise RunFailed(
                    f"{service} of the testbed {self.name} has no container: it has ended or was never started"
                )
            self._ids[service] = found[0]
        return self._ids[service]

    def limit_cpus(self, service: str, period: int, quota: int) -> None:
        """Changes a running container's CPU limit. Microseconds, as `compose.cpu_limit` returns them."""
        limits = ["--cpu-period", str(period), "--cpu-quota", str(quota)]
        _checked(["docker", "update", *limits, self.container(service)], _ASK_S)

    def cpu_seconds(self, service: str) -> float | None:
        """Returns the CPU seconds of the container's processes so far; None if the kernel does not report them."""
        words = self.ask(service, _CPU).split()
        if "usage_usec" in words:
            return int(words[words.index("usage_usec") + 1]) / 1e6
        return int(words[0]) / 1e9 if words and words[0].isdigit() else None

    def peak_memory_bytes(self, service: str) -> int | None:
        """Returns the control group's peak, None if unknown. Pages of files count, so a peak at the limit is no alarm."""
        said = self.ask(service, _PEAK).split()
        return int(said[0]) if said else None

    def memory_kills(self, service: str) -> int | None:
        """Returns how many of the container's processes the kernel killed for lack of memory; None if unknown."""
        lines = [line.split() for line in self.ask(service, _KILLS).splitlines()]
        return next((int(words[1]) for words in lines if words[:1] == ["oom_kill"]), None)

    def own_memory_bytes(self, service: str) -> int | None:
        """Returns the processes' memory without pages of files, None if unknown: the kernel cannot reclaim it without swap."""
        lines = [line.split() for line in self.ask(service, _STAT).splitlines()]
        return next((int(words[1]) for words in lines if words[:1] in (["anon"], ["total_rss"])), None)

    def _compose(self, *arguments: str, timeout_s: float) -> subprocess.CompletedProcess[str]:
        return _checked([*self._command, *arguments], timeout_s, variables=self._variables)


def inspect(container: str) -> dict[str, object]:
    return json.loads(_checked(["docker", "inspect", container], _ASK_S).stdout)[0]


def _checked(
    command: Sequence[str], timeout_s: float, text: str = "", variables: Mapping[str, str] = MappingProxyType({})
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, check=False, input=text, env=environment
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise RunFailed(f"`{' '.join(command)}` did not end within {timeout_s:.0f} s") from error
    if done.returncode:
        raise RunFailed(f"`{' '.join(command)}` failed: {' '.join(done.stderr.split())[-600:] or 'no output'}")
    return done
