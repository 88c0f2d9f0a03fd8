"""Faults are seeded one by one; each must be found, with a fix beside it."""

from __future__ import annotations

import importlib.metadata
import io
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import typer
from rich.console import Console

from edgelam_fl.addresses import free_port
from edgelam_fl.cli.nodes import doctor as doctor_command
from edgelam_fl.doctor import checks as doctor
from edgelam_fl.doctor.checks import Finding
from edgelam_fl.machine import disk_free_bytes, memory_free_bytes
from edgelam_fl.model.base_names import BASES
from tests.support import hang_up_on_all

GIB = 1 << 30


def problem(finding: Finding) -> Finding:
    assert finding.state == "problem", finding
    assert finding.fix
    return finding


@pytest.fixture
def superlink() -> Iterator[tuple[str, dict[str, str]]]:
    """What answers like a server of this project; what it says can be set."""
    about = {"edgelam-fl": "0.2.0", "flwr": importlib.metadata.version("flwr")}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(about).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port, about  # type: ignore[misc]
    server.shutdown()
    server.server_close()


# ---------------------------------------------------------------- what is installed


def test_proxies_are_named_and_gone_around() -> None:
    assert doctor.check_proxies("server.lan", environment={"no_proxy": "x"}) == []
    (finding,) = doctor.check_proxies("server.lan", environment={"https_proxy": "http://me:secret@proxy:1"})
    assert (finding.state, finding.found) == (
        "note",
        "https_proxy set; connections to this machine and server.lan go around it",
    )
    assert "secret" not in finding.fix


def test_an_old_python_is_a_problem_and_a_newer_one_a_note() -> None:
    assert doctor.check_python((3, 11)).state == doctor.check_python((3, 13)).state == "ok"
    assert "uv venv --python 3.13" in problem(doctor.check_python((3, 10))).fix
    assert doctor.check_python((3, 14)).state == "note"


def test_a_missing_package_and_one_out_of_range() -> None:
    def version_of(name: str) -> str:
        if name == "flwr":
            raise importlib.metadata.PackageNotFoundError(name)
        return {"torch": "2.8.0+cpu", "rich": "14.1"}[name]

    requires = ["flwr==1.41.0", "torch<2.14,>=2.9.1", "rich>=14", 'pytest>=9; extra == "dev"']
    missing, old = doctor.check_packages(requires, version_of)
    assert (problem(missing).check, missing.found) == ("package flwr", "is not installed")
    assert "pip install 'flwr==1.41.0'" in missing.fix
    assert problem(old).found == "2.8.0+cpu, needed <2.14,>=2.9.1"
    (fine,) = doctor.check_packages(["rich>=14", "torch>=2.8"], version_of)
    assert fine == Finding("packages", "ok", "all 2 within edgelam-fl's ranges")


def test_the_package_itself_is_not_installed() -> None:
    (finding,) = doctor.check_packages(package="no-such-package")
    assert "make setup" in problem(finding).fix


def test_flowers_command_that_is_not_on_the_path(tmp_path: Path) -> None:
    (finding,) = doctor.check_tools(str(tmp_path))
    assert problem(finding).found == "not found: flwr"
    assert doctor.check_tools()[0].state == "ok"


# ---------------------------------------------------------------- names and ports


def test_a_host_name_that_does_not_resolve() -> None:
    finding = problem(doctor.check_own_name("no-such-host.invalid"))
    assert "127.0.1.1 no-such-host.invalid" in finding.fix
    assert doctor.check_own_name("localhost").state == "ok"


def test_a_server_whose_name_does_not_resolve() -> None:
    (finding,) = doctor.check_server("no-such-host.invalid", 8000)
    assert problem(finding).found == "no-such-host.invalid does not resolve"
    assert "/etc/hosts" in finding.fix


def test_no_server_at_the_port() -> None:
    port = free_port()
    name, server = doctor.check_server("127.0.0.1", port)
    assert name.state == "ok"
    assert problem(server).found == f"nothing answers at 127.0.0.1:{port}"
    assert f"edgelam server --listen 127.0.0.1:{port}`" in server.fix


def test_another_program_at_the_servers_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        threading.Thread(target=hang_up_on_all, args=(other,), daemon=True).start()
        finding = doctor.check_server("127.0.0.1", other.getsockname()[1])[1]
    assert "is no Flower SuperLink" in problem(finding).found


def test_a_web_server_that_is_no_superlink(superlink: tuple[int, dict[str, str]]) -> None:
    port, about = superlink
    del about["flwr"]
    assert "is no Flower SuperLink" in problem(doctor.check_server("127.0.0.1", port)[1]).found


def test_a_superlink_of_this_version_and_of_another(superlink: tuple[int, dict[str, str]]) -> None:
    port, about = superlink
    ours = about["flwr"]
    assert doctor.check_server("127.0.0.1", port)[1] == Finding(
        "server", "ok", f"a SuperLink of Flower {ours} at 127.0.0.1:{port}"
    )
    about["flwr"] = "0.9"
    finding = problem(doctor.check_server("127.0.0.1", port)[1])
    assert finding.found == f"a SuperLink of Flower 0.9, here is {ours}"
    assert "pip install flwr==0.9 here" in finding.fix


def test_a_port_in_use(superlink: tuple[int, dict[str, str]]) -> None:
    assert doctor.check_port(free_port()).state == "ok"
    with socket.create_server(("127.0.0.1", 0)) as other:
        threading.Thread(target=hang_up_on_all, args=(other,), daemon=True).start()
        port = other.getsockname()[1]
        finding = problem(doctor.check_port(port))
    assert finding.found == f"{port} is in use by another program"
    assert f"--listen 127.0.0.1:{port + 1}" in finding.fix
    assert doctor.check_port(superlink[0]).state == "note", "a SuperLink that runs already is no fault"


# ---------------------------------------------------------------- memory, disk


def test_too_little_memory() -> None:
    assert doctor.check_memory(free=2 * GIB, needed=2 * GIB).state == "ok"
    finding = problem(doctor.check_memory(free=GIB // 2, needed=2 * GIB))
    assert finding.found == "0.5 GiB free; a node of the demo's model takes 2.0 GiB"
    assert "model.base = 'int8'" in finding.fix


def test_too_little_disk(tmp_path: Path) -> None:
    finding = problem(doctor.check_disk("cache", tmp_path, free=GIB // 2, needed=GIB))
    assert finding.found == f"0.5 GiB free in {tmp_path}; 1.0 GiB are needed"
    assert "EDGELAM_CACHE" in finding.fix
    assert doctor.check_disk("cache", tmp_path, free=GIB, needed=GIB).state == "ok"


def test_disk_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert disk_free_bytes(tmp_path / "a" / "b") == pytest.approx(disk_free_bytes(tmp_path), rel=0.1)


def _group(folder: Path, limit: str, used: int, cached: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\nfile {cached}\ninactive_file {cached}\nactive_file 0\n")


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    _group(tmp_path, str(1000), 700, 200)
    assert memory_free_bytes(tmp_path, "/") == 1000 - 700 + 200
    _group(tmp_path, "max", 700, 200)
    assert memory_free_bytes(tmp_path, "/") > GIB // 8, "the machine's"
    _group(tmp_path / "system" / "unit", str(500), 600, 0)
    assert memory_free_bytes(tmp_path, "/system/unit") == 0
    _group(tmp_path / "system", str(400), 100, 0)
    _group(tmp_path / "system" / "unit", "max", 100, 0)
    assert memory_free_bytes(tmp_path, "/system/unit") == 400 - 100, "a group above limits too"


def test_the_limit_of_an_older_kernels_container_counts(tmp_path: Path) -> None:
    group = tmp_path / "memory" / "docker" / "one"
    group.mkdir(parents=True)
    (group / "memory.limit_in_bytes").write_text("1000\n")
    (group / "memory.usage_in_bytes").write_text("700\n")
    (group / "memory.stat").write_text("cache 1\ntotal_inactive_file 150\ntotal_active_file 50\ninactive_file 9\n")
    assert memory_free_bytes(tmp_path, "/docker/one") == 1000 - 700 + 200
    (group / "memory.limit_in_bytes").write_text(f"{2**63 - 4096}\n")
    assert memory_free_bytes(tmp_path, "/docker/one") > GIB // 8, "the machine's"


# ---------------------------------------------------------------- computing


@pytest.mark.parametrize("base", ["fp32", "bf16", "int8"])
def test_each_bases_kernel_runs_here(base: str) -> None:
    assert doctor.check_base(base) == Finding(f"base {base}", "ok", "its kernels run")


def test_a_kernel_that_fails() -> None:
    finding = problem(doctor.check_base("bf16", lambda base: f"{base}: illegal instruction"))
    assert finding.found == "bf16: illegal instruction"
    assert "another model.base" in finding.fix


def test_without_bitsandbytes_nf4_is_a_note() -> None:
    finding = doctor.check_base("nf4", find_module=lambda name: None)
    assert (finding.state, "pip install bitsandbytes" in finding.fix) == ("note", True)


def test_a_chip_whose_kernels_run_is_fine_and_the_cpu_alone_is_too() -> None:
    (finding,) = doctor.check_chips([doctor.Chip("cuda:0", "a GPU", dict.fromkeys(BASES, ""))], has_nvidia=True)
    assert (finding.state, finding.found) == ("ok", "a GPU; the kernels of fp32, bf16, int8, nf4 run")
    assert doctor.check_chips([], has_nvidia=False) == [Finding("chips", "ok", "the CPU alone")]


def test_what_a_chip_lacks_is_named_with_what_to_do() -> None:
    """A wheel without kernels for a board is imported without complaint, and fails here."""
    lacks_nf4 = dict.fromkeys(BASES, "") | {"nf4": "its kernel does not run (named symbol not found)"}
    (finding,) = doctor.check_chips([doctor.Chip("cuda:0", "Orin", lacks_nf4)], has_nvidia=True)
    assert (finding.state, "named symbol not found" in finding.found) == ("note", True)
    assert "bitsandbytes" in finding.fix
    (finding,) = doctor.check_chips([doctor.Chip("cuda:0", "Orin", dict.fromkeys(BASES, "no kernel"))], has_nvidia=True)
    assert (finding.state, "--device cpu" in finding.fix) == ("problem", True)


def test_a_gpu_that_this_torch_was_not_built_for() -> None:
    (finding,) = doctor.check_chips([], has_nvidia=True, torch_version="2.13.0+cpu")
    assert (finding.state, "PyTorch 2.13.0+cpu cannot use it" in finding.found) == ("note", True)


def test_a_model_that_is_not_here(tiny_folder: Path) -> None:
    assert "a folder or a .gguf file" in problem(doctor.check_model("no/such-model")).fix
    assert doctor.check_model(str(tiny_folder)).found.startswith(f"{tiny_folder}: 6 layers")


# ---------------------------------------------------------------- showing


def test_the_fix_stands_beside_the_failure() -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    for finding in (Finding("a", "ok", "fine"), Finding("b", "problem", "list [1] is wrong", "mend it")):
        console.print(doctor.finding_row(finding))
    lines = [" ".join(line.split()) for line in console.export_text().splitlines()]
    assert lines == ["ok a fine", "problem b list [1] is wrong", "-> mend it"]


def test_each_finding_is_shown_before_the_next_check_begins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = []

    def two_checks(*_: object) -> Iterator[Finding]:
        yield Finding("memory", "ok", "enough")
        shown.append(capsys.readouterr().out)
        yield Finding("disk", "ok", "enough, too")

    monkeypatch.setattr(doctor, "examine", two_checks)
    with pytest.raises(typer.Exit):
        doctor_command()
    assert shown[0].split() == ["ok", "memory", "enough"]
    assert capsys.readouterr().out.split("\n")[-2] == "all checks passed"


def test_what_may_take_seconds_is_named_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    said = list[str]()
    for name in ("check_base", "check_chips", "check_port", "check_tools"):
        monkeypatch.setattr(doctor, name, lambda *_: [said.append("done")])
    list(doctor.examine(None, None, "", said.append))
    kernels = said.index(f"trying the kernels of base {BASES[0]}")
    assert said[kernels + 1] == "done"
    assert said[-2:] == ["trying accelerators", "done"]
