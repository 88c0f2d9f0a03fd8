"""The commands as a user types them: bad input gets one clear message and its exit code, Ctrl-C leaves nothing behind."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

import edgelam_fl
from benchmarks.silence import Recorder
from edgelam_fl.addresses import free_port, split_address
from edgelam_fl.config import parse_run_file, read_run_file
from edgelam_fl.doctor.checks import check_server, superlink_version
from edgelam_fl.federation.child import Child, end_all, log_tail
from edgelam_fl.federation.node_process import NodeProcesses
from edgelam_fl.federation.operator import Operator, operator_folder
from edgelam_fl.federation.superlink import start_superlink
from edgelam_fl.model.source import ModelSource
from edgelam_fl.serving.generate import answer
from edgelam_fl.serving.results import open_result
from edgelam_fl.telemetry.events import NodeJoined, RoundDone, of_kind, read_events
from tests.integration.conftest import Edgelam
from tests.results import write_result
from tests.support import WAIT_S

EDGELAM = str(Path(sys.executable).with_name("edgelam"))


def process(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command as a user's shell does."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "400"}
    return subprocess.run(
        [EDGELAM, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=WAIT_S, check=False
    )


def run_file(folder: Path, text: str = "") -> str:
    file = folder / "mine.toml"
    file.write_text(text, encoding="utf-8")
    return str(file)


def pairs_file(folder: Path, name: str = "data.jsonl") -> str:
    file = folder / name
    file.write_text("".join(json.dumps({"question": f"q{n}", "answer": f"answer {n}"}) + "\n" for n in range(8)))
    return str(file)


@pytest.mark.parametrize(
    ("run_toml", "options", "status", "says"),
    [
        (
            "[federation]\nround = 2",
            [],
            2,
            ["unknown key federation.round", "did you mean 'federation.rounds'?", "mine.toml"],
        ),
        ("[federation]\nrounds = 0", [], 2, ["federation.rounds = 0", "greater than or equal to 1"]),
        ("", ["--set", "split.front=40"], 2, ["split.front + split.back = 40 + 2", "30 layers", "at most 29"]),
        (
            "",
            ["--set", "model.name=no/such-model"],
            2,
            ["model 'no/such-model' is not built in", "smollm2-135m", "hub"],
        ),
        ("", ["--set", "model.name=./nowhere.gguf"], 2, ["./nowhere.gguf", "no folder or .gguf file has this path"]),
        (
            "",
            ["--set", "lora.targets=q_porj"],
            2,
            ["no module of smollm2-135m is called 'q_porj'", "did you mean 'q_proj'?"],
        ),
        ("", ["--set", "lora.targets=lm_head"], 2, ["'lm_head' is a tied tensor", "Allowed: down_proj"]),
        (
            "",
            ["--set", "strategy.aggregation=fedavgg"],
            2,
            ["strategy.aggregation = 'fedavgg'", "did you mean 'fedavg'?"],
        ),
        ("", ["--set", "rounds=2"], 2, ["--set 'rounds=2' must look like section.key=value"]),
        (
            "",
            ["--server", "127.0.0.1:1"],
            3,
            ["no server answers at 127.0.0.1:1", "edgelam server", "add --data FILE for each device"],
        ),
        ("", ["--server", "192.0.2.1:8000"], 2, ["beyond this machine", "plain text", "--insecure"]),
        ("", ["--server", "nonsense"], 2, ["--server = 'nonsense' must be HOST:PORT"]),
        ("", ["--local", "2"], 2, ["--local 2 needs --data once per device"]),
        ("", ["--local", "1", "--data", "x", "--detach"], 2, ["--detach needs a server that stays", "edgelam server"]),
        ("", ["--eval-data", "x"], 2, ["--eval-data x needs --data", "edgelam client --data FILE --eval-data FILE"]),
        ("", ["--detach", "--server", "127.0.0.1:1"], 3, ["no server answers at 127.0.0.1:1"]),
        (
            "",
            ["--local", "1", "--data", "x", "--set", "strategy.selection=subprocess:Popen"],
            2,
            ["'subprocess:Popen' is not imported", "edgelam server --strategies PACKAGE"],
        ),
        (  # the server's operator decides
            "",
            ["--server", "127.0.0.1:1", "--set", "strategy.selection=no_such_package:Mine"],
            3,
            ["no server answers at 127.0.0.1:1"],
        ),
    ],
)
def test_run_refuses(
    edgelam: Edgelam, tmp_path: Path, run_toml: str, options: list[str], status: int, says: list[str]
) -> None:
    done = edgelam("run", run_file(tmp_path, run_toml), *options)
    assert done.returncode == status, done.stderr
    assert done.stderr.startswith("edgelam: "), done.stderr
    assert len(done.stderr.splitlines()) == 1, "one message"
    for words in says:
        assert words in done.stderr


def test_run_refuses_a_folder_that_exists(edgelam: Edgelam, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "events.jsonl").write_text("")
    done = edgelam("run", run_file(tmp_path), "--out", "old")
    assert done.returncode == 2
    assert "old exists; choose another with --out" in done.stderr


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "holds no examples"),
        (b'{"question": "\xff"}\n', "is not UTF-8 (it holds the byte 0xff)"),
        (b"hello\n", "line 1 is not JSON"),
        (b"[1]\n", "must be an object"),
        (None, "no data file at"),
    ],
)
def test_client_refuses_its_data(edgelam: Edgelam, tmp_path: Path, content: bytes | None, says: str) -> None:
    file = tmp_path / "data.jsonl"
    if content is not None:
        file.write_bytes(content)
    done = edgelam("client", "--server", "127.0.0.1:1", "--insecure", "--data", str(file))
    assert done.returncode == 2, done.stderr
    assert says in done.stderr


@pytest.mark.parametrize(
    ("options", "status", "says"),
    [
        (["--server", "127.0.0.1:1", "--insecure", "--no-wait"], 3, "no server answers at 127.0.0.1:1"),
        (["--server", "127.0.0.1:1"], 3, "this machine has no keys"),
        (["--server", "198.51.100.7:8000"], 3, "this machine has no keys"),
        ([], 3, "`edgelam invite NAME` prints the command"),
        (["--server", "127.0.0.1:1", "--insecure", "--name", "a b"], 2, "--name 'a b' may hold letters"),
        (["--server", "127.0.0.1:1", "--insecure", "--tag", "a b"], 2, "--tag 'a b' may hold letters"),
        (
            ["--server", "127.0.0.1:1", "--insecure", "--trust", "measured:2"],
            2,
            "--trust 'measured:2' must be 'hosts' or 'none'",
        ),
        (["--server", "127.0.0.1:1", "--insecure", "--trust", "none"], 2, "has no data"),
        (["--join", "edgelam1/10.0.0.1:8000/device/ann"], 2, "is no join text"),
    ],
)
def test_client_refuses(edgelam: Edgelam, tmp_path: Path, options: list[str], status: int, says: str) -> None:
    done = edgelam("client", *options)
    assert done.returncode == status, done.stderr
    assert says in done.stderr


def test_server_refuses_a_port_in_use(edgelam: Edgelam) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = edgelam("server", "--listen", f"127.0.0.1:{port}")
    assert done.returncode == 3
    assert f"port {port} on 127.0.0.1 cannot be opened" in done.stderr
    assert "--listen" in done.stderr


def test_server_refuses_strategies_that_are_no_package(edgelam: Edgelam) -> None:
    done = edgelam("server", "--strategies", "./mine.py")
    assert done.returncode == 2
    assert "--strategies './mine.py' must name a package or a module" in done.stderr


def test_help_lists_every_command(edgelam: Edgelam) -> None:
    done = edgelam("--help")
    assert done.returncode == 0
    for command in (
        "init",
        "demo",
        "doctor",
        "top",
        "runs",
        "log",
        "stop",
        "plan",
        "run",
        "server",
        "client",
        "invite",
        "nodes",
        "revoke",
        "bench",
        "report",
        "export",
        "push",
        "chat",
    ):
        assert f" {command} " in done.stdout
    assert "--version" in done.stdout


def test_help_answers_at_once_since_it_loads_nothing_heavy() -> None:
    """How long it takes depends on what it imports: of this project the commands alone, and no large package."""
    program = """if True:
        import atexit, sys
        atexit.register(lambda: print(*sys.modules, file=sys.stderr))
        sys.argv = ["edgelam", "--help"]
        from edgelam_fl.cli.main import main
        main()
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stderr.split())
    heavy = {"flwr", "google", "grpc", "numpy", "peft", "psutil", "pydantic", "torch", "transformers"}
    assert not heavy & loaded
    own = {name for name in loaded if name.startswith("edgelam_fl.")}
    light = {"errors", "names", "addresses", "files", "machine", "federation", "federation.environment"}
    assert {name for name in own if not name.startswith("edgelam_fl.cli")} == {f"edgelam_fl.{name}" for name in light}


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--version"], 0, f"edgelam-fl {edgelam_fl.__version__}"),
        (["run", "none.toml"], 2, "edgelam: no run file at none.toml"),
        (["client"], 3, "edgelam: this machine has no keys"),
    ],
)
def test_a_process_ends_with_its_exit_code(tmp_path: Path, arguments: list[str], status: int, says: str) -> None:
    """4 and 130 are those of the failed and the interrupted run below."""
    done = process(*arguments, cwd=tmp_path)
    assert done.returncode == status, done.stderr
    assert (done.stderr if status else done.stdout).startswith(says)
    assert len((done.stderr if status else done.stdout).splitlines()) == 1, "one message"


def test_report_refuses_what_is_no_run(edgelam: Edgelam, tmp_path: Path) -> None:
    done = edgelam("report", str(tmp_path))
    assert done.returncode == 2
    assert "has no events.jsonl" in done.stderr


# ---------------------------------------------------------------- a run file


def test_init_writes_a_file_that_explain_prints_and_run_reads(
    edgelam: Edgelam, tmp_path: Path, tiny_folder: Path
) -> None:
    data = tmp_path / "mine.jsonl"
    data.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "c", "output": "d"}\n')
    done = edgelam("init", "mine.toml", "--data", str(data), "--model", str(tiny_folder))
    assert done.returncode == 0, done.stderr
    assert "data.fields: prompt = 'instruction', answer = 'output'" in done.stdout
    assert "edgelam run mine.toml --explain" in done.stdout
    done = edgelam("run", "mine.toml", "--explain", "--set", "lora.rank=4")
    assert done.returncode == 0, done.stderr
    assert re.search(r"rank = 4 +# changed, default 8; 1 to 1024", done.stdout)
    explained = parse_run_file(done.stdout, source="--explain")
    assert explained == read_run_file(tmp_path / "mine.toml", ["lora.rank=4"])
    assert (explained.data.fields.prompt, explained.model.name) == ("instruction", str(tiny_folder))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mine.jsonl", "mine.toml"], "nothing was started"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["init"], "run.toml exists; give another name (nothing is ever overwritten)"),
        (["init", "new.toml", "--data", "none.jsonl"], "no data file at none.jsonl"),
        (["init", "new.toml", "--data", "run.toml"], "run.toml is not JSON: line 1"),
        (["init", "new.toml", "--model", "smollm2"], "did you mean 'smollm2-135m'?"),
        (["init", "none/new.toml"], "none/new.toml cannot be written"),
        (["run", "none.toml", "--explain"], "`edgelam init none.toml` writes one"),
        (["run", "run.toml", "--explain", "--set", "lora.rank=0"], "lora.rank = 0 must be greater than or equal to 1"),
    ],
)
def test_init_and_explain_refuse(edgelam: Edgelam, tmp_path: Path, arguments: list[str], says: str) -> None:
    (tmp_path / "run.toml").write_text("[lora]\nrank = 4\n")
    done = edgelam(*arguments)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1, "one message"
    assert [file.name for file in tmp_path.iterdir()] == ["run.toml"]


# ---------------------------------------------------------------- this machine


def test_doctor_finds_what_is_wrong_and_says_what_mends_it(edgelam: Edgelam, tmp_path: Path) -> None:
    done = edgelam("doctor", "--server", "127.0.0.1:1", "--model", "no/such", "--json")
    assert done.returncode == 3, done.stderr
    findings = {each["check"]: each for each in json.loads(done.stdout)}
    wrong = {check: each for check, each in findings.items() if each["state"] == "problem"}
    assert {"server", "hub", "model"} <= wrong.keys()
    assert "edgelam server --listen 127.0.0.1:1" in wrong["server"]["fix"]
    assert all(each["fix"] for each in wrong.values())
    for check in ("Python", "packages", "base fp32", "base bf16", "base int8", "memory", "disk, cache", "own name"):
        assert check in findings


def test_doctor_refuses_an_address(edgelam: Edgelam, tmp_path: Path) -> None:
    done = edgelam("doctor", "--server", "nonsense")
    assert done.returncode == 2
    assert "--server = 'nonsense' must be HOST:PORT" in done.stderr


# ---------------------------------------------------------------- a finished run


def test_export_says_how_to_load_what_it_wrote(edgelam: Edgelam, tmp_path: Path, tiny: ModelSource) -> None:
    write_result(tmp_path / "run", tiny)
    done = edgelam("export", "run", "--to", "peft")
    assert done.returncode == 0, done.stderr
    assert 'PeftModel.from_pretrained(base, "run/peft")' in done.stdout
    assert "wrote run/peft; elsewhere:" in done.stdout
    assert (tmp_path / "run" / "peft" / "adapter_model.safetensors").is_file()


def test_chat_answers_one_question_or_one_after_the_other(edgelam: Edgelam, tmp_path: Path, tiny: ModelSource) -> None:
    """Once with the adapter, once without."""
    folder = write_result(tmp_path / "run", tiny)
    config = open_result(folder).config
    tuned, base = (answer(config, adapter, "Hello", 8) for adapter in (folder / "adapter", None))
    assert tuned != base
    done = edgelam("chat", "run", "--prompt", "Hello", "--max-tokens", "8", "--base")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == base
    done = edgelam("chat", "run", "--max-tokens", "8", typed="Hello\n\n/quit\nHello\n")
    assert (done.returncode, done.stdout.strip()) == (0, tuned)
    assert "/quit or Ctrl-D ends the conversation" in done.stderr
    assert "kernels" not in done.stderr, "what a library says of itself is no answer"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["export", "run"], "missing option '--to'"),
        (["export", "run", "--to", "onnx"], "--to 'onnx' must be 'peft'"),
        (["export", "run", "--to", "gguf"], "has no merges, without which llama.cpp reads no vocabulary"),
        (["export", "classifier", "--to", "gguf"], "a GGUF file answers with text, not with a class"),
        (["push", "run", "a/b/c"], "'a/b/c' is no name of a repository, which is OWNER/NAME"),
        (["export", "run", "--to", "peft", "--out", "run"], "run exists; choose another with --out"),
        (["chat", "run", "--prompt", " "], "--prompt is empty"),
        (["chat", "run", "--max-tokens", "0"], "0 is not in the range x>=1"),
        (["chat", "classifier", "--prompt", "a"], "task.kind = 'classification'"),
        (["chat", "nowhere"], "nowhere is not a run's folder"),
        (["export", "empty", "--to", "peft"], "empty is not a run's folder: it has no config.toml"),
        (["export", "unfinished", "--to", "merged"], "unfinished has no adapter"),
    ],
)
def test_commands_on_a_run_refuse(
    edgelam: Edgelam, tmp_path: Path, tiny: ModelSource, arguments: list[str], says: str
) -> None:
    write_result(tmp_path / "run", tiny)
    (tmp_path / "empty").mkdir()
    write_result(tmp_path / "classifier", tiny, "task.kind=classification", 'task.classes=["a", "b"]')
    (write_result(tmp_path / "unfinished", tiny) / "adapter/adapter_config.json").unlink()
    done = edgelam(*arguments)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr


# ---------------------------------------------------------------- with a server


@pytest.fixture(scope="module")
def operator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    port, state = free_port(), tmp_path_factory.mktemp("server")
    child = start_superlink("127.0.0.1", port, state)
    yield Operator(f"127.0.0.1:{port}", operator_folder(state))
    end_all([child])


@pytest.fixture(scope="module")
def superlink(operator: Operator) -> str:
    return operator.server


def at(operator: Operator) -> list[str]:
    return ["--server", operator.server, "--operator", str(operator.folder)]


def _client(folder: Path, server: str, name: str, *options: str) -> Child:
    command = [
        EDGELAM,
        "client",
        "--insecure",
        "--server",
        server,
        "--name",
        name,
        "--state",
        str(folder / name),
        "--threads",
        "1",
    ]
    return Child(name, [*command, *options], folder / f"{name}.log")


@dataclass
class NewerNode(NodeProcesses):
    """A node whose processes speak another version of the protocol."""

    def _start_child(self, kind: str, command: Sequence[str], log: str) -> None:
        python, option, *module = command
        super()._start_child(kind, [python, option, "tests.integration.newer_version", *module], log)


def _await_registration(name: str, node: Child, folder: Path) -> None:
    """Waits until the node can take part: its stage host listens, and its SuperNode has its number."""
    endpoint, log = folder / name / "endpoint.json", folder / name / "supernode.log"
    end = time.monotonic() + WAIT_S
    while not (endpoint.exists() and log.exists() and "SuperNode ID: " in log.read_text(encoding="utf-8")):
        assert not node.ended(), node.ended()
        assert time.monotonic() < end, log_tail(log)
        time.sleep(0.2)


@pytest.mark.processes
def test_doctor_knows_a_superlink(superlink: str) -> None:
    host, port = split_address(superlink, "--server")
    assert superlink_version(host, port) == importlib.metadata.version("flwr")
    assert check_server(host, port)[-1].state == "ok"


@pytest.mark.processes
def test_a_detached_run_goes_on_and_can_be_stopped_as_was_said(
    tmp_path: Path, operator: Operator, tiny_folder: Path
) -> None:
    """No node has joined, so that it waits for one until it is stopped."""
    sets = ["--set", f"model.name={tiny_folder}", "--set", "federation.join_deadline_s=600"]
    done = process("run", run_file(tmp_path), *at(operator), "--out", "run", "--detach", *sets, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, _, state, log, stop, flowers = done.stdout.splitlines()
    run_id = re.match(rf"Flower run (\d+); folder {tmp_path}/run, on the server's machine$", first)
    assert run_id, first
    assert f" log {run_id[1]}" in flowers
    events, end = tmp_path / "run" / "events.jsonl", time.monotonic() + WAIT_S
    while not events.exists() and time.monotonic() < end:
        time.sleep(0.2)
    assert events.exists(), "the run goes on without the command"

    def typed(line: str) -> str:
        """What a line of how to go on prints, typed elsewhere."""
        command = line.partition(":")[2].strip().replace("edgelam", EDGELAM, 1)
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        return subprocess.run(
            command, shell=True, cwd=tmp_path / "elsewhere", capture_output=True, text=True, timeout=WAIT_S, check=True
        ).stdout

    assert "running" in typed(state)
    assert "the run is running" in typed(log)
    assert typed(stop).endswith("run: stopped\n")
    assert "stopped" in typed(state)
    ask = f"{flowers.partition(':')[2].split(' log ')[0]} list --run-id {run_id[1]} --format json"
    assert json.loads(typed(f"ask: {ask}"))["runs"][0]["status"] == "finished:stopped"


@pytest.mark.processes
def test_nodes_that_cannot_take_part_fail_the_run_with_their_reasons(
    tmp_path: Path, superlink: str, operator: Operator, tiny_folder: Path
) -> None:
    """A data file that lacks the run's field, and a node of another protocol version."""
    rows = "".join(json.dumps({"question": f"PRIVATE {n}?", "answer": f"PRIVATE {n}."}) + "\n" for n in range(4))
    (tmp_path / "PRIVATE.jsonl").write_text(rows)
    wrong_field = _client(tmp_path, superlink, "wrong-field", "--data", str(tmp_path / "PRIVATE.jsonl"))
    more = Path(pairs_file(tmp_path, "more.jsonl"))
    newer = NewerNode("newer", superlink, tmp_path / "newer", data=more, threads=1, forked=True)
    try:
        newer.start()
        for name, host in (("wrong-field", wrong_field), ("newer", newer.children["stage host"])):
            _await_registration(name, host, tmp_path)
        overrides = [
            f"model.name={tiny_folder}",
            "split.hosts=0",
            "data.fields.answer=reply",
            "federation.join_deadline_s=900",  # nobody waits for it
            "federation.expect_nodes=3",
        ]
        sets = [word for override in overrides for word in ("--set", override)]
        done = process("run", run_file(tmp_path), *at(operator), *sets, cwd=tmp_path)
    finally:
        end_all([wrong_field, *newer.children.values()])
    assert done.returncode == 4, done.stderr
    said = "wrong-field: its data cannot be used: missing-field at line 1; see stage-host.log on wrong-field"
    assert said in done.stderr
    assert "lacks the field 'reply'" in next(tmp_path.rglob("stage-host.log")).read_text()
    left = [file for file in (tmp_path / "runs").rglob("*") if file.is_file()]
    assert {"events.jsonl", "report.html"} <= {file.name for file in left}
    assert "PRIVATE" not in done.stdout + done.stderr + "".join(file.read_text(errors="replace") for file in left)
    assert "protocol version 99" in done.stderr
    assert "no device is left that can take part" in done.stderr
    assert "an adapter of " in done.stdout, "what the run file comes to"
    assert "no round was finished" in done.stderr


@pytest.mark.processes
def test_a_run_on_a_terminal_shows_what_it_does_and_an_interrupt_ends_all_children(
    tmp_path: Path, tiny_folder: Path
) -> None:
    sets = [f"model.name={tiny_folder}", "federation.rounds=50", "federation.local_steps=2", "federation.batch_size=2"]
    sets += ["task.metrics=rouge_l", "task.metrics_tokens=2", "task.metrics_examples=2"]
    pairs_file(tmp_path, "ann.jsonl")
    command = [EDGELAM, "run", "--data", "a*.jsonl", "--eval-data", pairs_file(tmp_path, "measured.jsonl")]
    command += ["--out", str(tmp_path / "run")]
    command += [word for each in sets for word in ("--set", each)]
    command = ["env", "--default-signal=INT", *command]  # a job in the background ignores it
    recorder = Recorder(command, terminal=True, cwd=tmp_path)
    began = time.monotonic()
    while not (tmp_path / "run" / "adapter").exists() and time.monotonic() < began + WAIT_S and recorder.take():
        pass
    early, took_s = recorder.process.poll(), time.monotonic() - began
    children = psutil.Process(recorder.process.pid).children(recursive=True)
    recorder.process.send_signal(signal.SIGINT)
    record = recorder.record(WAIT_S)
    status, said = record.status, record.text
    logs = "\n".join(f"{log}: {log_tail(log, 12)}" for log in sorted((tmp_path / "run").rglob("*.log")))
    assert status == 130, said
    assert "Kept: the adapter after the last finished round" in said, f"{took_s:.0f} s, early: {early}\n{said}\n{logs}"
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    for phase in ("starting Flower's SuperLink", "handing the run to Flower", "waiting for nodes", "round 1 of 50"):
        assert phase in said
    for before in ("no run file is given", "ann: ann.jsonl (JSON lines", "trained: ", "The first example as"):
        assert before in said
    assert sorted(node.name for node in (tmp_path / "run" / "nodes").iterdir()) == ["ann", "edge-1"]
    assert read_run_file(tmp_path / "run" / "config.toml").federation.rounds == 50, "it can be used again"
    assert record.longest_silence()[0] < 60, "far beyond what a slow machine takes; the benchmark has the real bar"
    events = list(read_events(tmp_path / "run" / "events.jsonl"))
    (joined,) = (node for node in of_kind(events, NodeJoined) if node.role == "device")
    assert (joined.examples, joined.held_out) == (8, 8), "--eval-data"
    assert next(of_kind(events, RoundDone)).devices[0].metrics.keys() == {"rouge_l"}
    assert len(children) >= 5  # SuperLink, and a stage host and a SuperNode, twice
    _, alive = psutil.wait_procs(children, timeout=WAIT_S)
    assert not alive, [child.cmdline() for child in alive]
