"""What is said and decided by numbers that were measured before: --explain, split.trust, split.fronts = "auto:LEAK"."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from edgelam_fl.cli.run_file import explained
from edgelam_fl.config import RunConfig
from edgelam_fl.errors import ConfigError, DoesNotFit, EnvironmentProblem, PeerLost
from edgelam_fl.federation.join import join, trust_words
from edgelam_fl.federation.node_process import NodeProcesses
from edgelam_fl.federation.standing import NodeOptions
from edgelam_fl.model.source import ModelSource
from edgelam_fl.node import daemon
from edgelam_fl.node.examples import DeviceExamples
from edgelam_fl.node.service import StageHost
from edgelam_fl.plan.fronts import check_memory_for_fronts, check_trust, host_readings, why_too_small
from edgelam_fl.plan.layout import make_layout
from edgelam_fl.plan.making import RoundFacts, make_plans
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.privacy import known
from edgelam_fl.privacy.known import SHIPPED, KnownLeakage, known_leakage, shipped, store
from edgelam_fl.privacy.limits import HostReading, why_refused
from edgelam_fl.telemetry.events import Event, TextReadableHere, of_kind
from edgelam_fl.wire import PROTOCOL_VERSION
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.link import Link
from server.checks import check_config
from server.schedule import unfit
from tests.support import WAIT_S, run_config
from tests.unit.conftest import MakeFederation
from tools.known_leakage import RESULTS, collected

READ = {0: 1.0, 1: 0.9, 2: 0.8, 4: 0.3}


def measured(source: ModelSource, read: dict[int, float] = READ, labels: dict[int, float] | None = None) -> None:
    store(KnownLeakage(source.name, source.leakage_key, read, labels or {}, 0.01))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "cache_folder", lambda: tmp_path / "cache")


# ---------------------------------------------------------------- the numbers


def test_the_numbers_in_the_package_are_the_benchmarks() -> None:
    digests = {each.model: each.digest for each in shipped()}
    assert collected(RESULTS, lambda name: digests.get(name, "")) == list(shipped()), "python -m tools.known_leakage"
    assert "smollm2-135m" in digests
    assert all(json.loads(SHIPPED.read_text(encoding="utf-8")))


def test_first_guesses_of_the_best_attack_count_and_other_models_are_told_apart(tmp_path: Path) -> None:
    def result(name: str, figures: dict[str, float]) -> None:
        rows = [{"name": figure, "value": value} for figure, value in figures.items()]
        (tmp_path / name).write_text(json.dumps({"figures": rows}), encoding="utf-8")

    chance = "always the commonest public token"
    states = {
        "cut 2: one": 20.0,
        "cut 2: two, first guess": 78.4,
        "cut 2: two, first 5": 89.0,
        "cut 0: one": 100.0,
        chance: 1.2,
    }
    result("leakage.json", states | {"minilm-l6, cut 2: one": 60.0, f"minilm-l6, {chance}": 2.0, "cut of nothing": 1.0})
    result("leakage_labels.json", {"back 0: solved": 99.0})
    first, second = collected(tmp_path, lambda name: name.upper())
    assert first == KnownLeakage("smollm2-135m", "SMOLLM2-135M", {0: 1.0, 2: 0.784}, {0: 0.99}, 0.012)
    assert second == KnownLeakage("minilm-l6", "MINILM-L6", {2: 0.6}, {}, 0.02)


def test_between_measured_numbers_of_layers_the_fewer_count() -> None:
    found = KnownLeakage("m", "d", READ, {0: 0.99, 2: 0.5}, 0.01)
    assert [found.share_read(front) for front in (0, 1, 2, 3, 4, 99)] == [1.0, 0.9, 0.8, 0.8, 0.3, 0.3]
    assert [found.share_of_labels(back) for back in (0, 1, 2, 9)] == [0.99, 0.99, 0.5, 0.5]
    assert [found.front_for(limit) for limit in (0.9, 0.85, 0.8, 0.5, 0.3, 0.2)] == [1, 2, 2, 4, 4, None]
    dips = KnownLeakage("m", "d", {2: 0.3, 4: 0.5, 8: 0.2}, {}, 0.01)
    assert (dips.share_read(1), dips.front_for(0.4)) == (1.0, 8), (
        "more layers never count as worse than they were measured"
    )


def test_a_measurement_of_this_machine_counts_for_these_files_alone(tiny: ModelSource) -> None:
    assert known_leakage(tiny.name, tiny.leakage_key) is None
    measured(tiny)
    found = known_leakage(tiny.name, tiny.leakage_key)
    assert found is not None
    assert found.read == READ
    assert known_leakage("smollm2-135m", tiny.leakage_key) == found, "the files say which model it is, not a name"
    assert known_leakage("smollm2-135m", "0" * 64) is None
    by_name = known_leakage("smollm2-135m")
    assert by_name is not None
    assert by_name.digest == shipped()[0].digest


# ---------------------------------------------------------------- said


def said(*overrides: str, model: str = "smollm2-135m") -> str:
    text = explained(run_config(model, *overrides))
    return " ".join(text[text.index("# What hosts can read") :].replace("# ", "").split())


def test_explain_says_what_hosts_can_read() -> None:
    share = f"{100 * shipped()[0].read[2]:.0f} %"
    assert (
        f"A host can read about {share} of the tokens of a device's text (smollm2-135m, 2 layers in front)." in said()
    )
    assert "WARNING" not in said()
    assert "without the defences at the cut" not in said()
    assert "without the defences at the cut" in said("privacy.cut_clip=2.0")
    text = said("split.front=0")
    assert "about 100 % of the tokens" in text
    assert "WARNING: front = 0 sends the embeddings" in text
    assert "WARNING: back = 0" in said("split.back=0")
    both = said("split.fronts={'a'=8}")
    assert "2 layers in front" in both
    assert "8 layers in front" in both
    assert "the last host gets the labels themselves" in said("split.labels=last-stage", "split.back=0")
    alone = said("split.hosts=0", "split.front=0")
    assert "adapters, losses and counts leave a device" in alone
    assert "WARNING" not in alone


def test_what_was_not_measured_is_said_with_the_command_that_measures(tiny: ModelSource) -> None:
    assert f"not measured for {tiny.name}; `edgelam leakage RUN.toml` measures it" in said(model=tiny.name)
    assert "not measured for nowhere/to-be-found" in said(model="nowhere/to-be-found")
    measured(tiny)
    assert "about 80 % of the tokens" in said(model=tiny.name)


# ---------------------------------------------------------------- split.trust


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["split.trust=none"], "'none' refuses this run: it allows no host.*Allowed: split.hosts = 0"),
        (
            ["split.trust=measured:0.5"],
            "with 2 layers in front hosts can read about 80 % of the tokens, and it allows 50 %. Allowed: at least 4 layers in front",
        ),
        (["split.trust=measured:0.5", "split.front=4", "split.back=1", "split.fronts={'a'=1}"], "with 1 layer in front"),
        (["split.trust=measured:0.5", "split.front=4", "split.back=1", "split.backs={'a'=0}"], "with no layers at the back .* 100 % of the labels"),
        (["split.trust=measured:0.2", "split.front=4", "split.back=1"], "30 % of the tokens, and it allows 20 %. Allowed: split.hosts = 0"),
        (
            ["split.trust=measured:0.5", "split.front=4", "split.back=0", "split.labels=last-stage"],
            "sends the labels to the last host. Allowed: split.labels = 'device'",
        ),
    ],
)  # fmt: skip
def test_a_run_that_leaks_more_than_its_owner_allows_is_refused(
    tiny: ModelSource, overrides: list[str], words: str
) -> None:
    measured(tiny)
    config = run_config(tiny.name, *overrides)
    with pytest.raises(ConfigError, match=words):
        check_config(config)
    with pytest.raises(ConfigError, match=words):
        explained(config)


@pytest.mark.parametrize(
    "overrides",
    [
        ["split.trust=hosts", "split.front=0"],
        ["split.trust=none", "split.hosts=0"],
        ["split.trust=measured:0.1", "split.hosts=0"],
        ["split.trust=measured:0.8"],
        ["split.trust=measured:0.3", "split.front=4", "split.back=1"],
    ],
)
def test_a_run_within_what_its_owner_allows(tiny: ModelSource, overrides: list[str]) -> None:
    measured(tiny)
    check_config(run_config(tiny.name, *overrides))


def test_a_model_that_was_not_measured_is_refused_with_the_way_out(tiny: ModelSource) -> None:
    with pytest.raises(ConfigError, match=r"not measured for .*; `edgelam leakage RUN.toml` measures it"):
        check_config(run_config(tiny.name, "split.trust=measured:0.9"))


@pytest.mark.parametrize(
    "value", ["measured", "measured:0", "measured:1", "measured:nan", "measured:x", "auto:0.5", ""]
)
def test_a_trust_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"split.trust = .* must be 'hosts' or 'none', or 'measured:X'"):
        run_config("x", f"split.trust='{value}'")


def test_labels_count_where_they_were_measured() -> None:
    found = KnownLeakage("m", "d", READ, {0: 0.99, 1: 0.7, 2: 0.2}, 0.01)
    assert "about 70 % of the labels" in why_refused("measured:0.5", HostReading("m", 4, 1, found))
    assert why_refused("measured:0.5", HostReading("m", 4, 2, found)) == ""
    assert "99 % of them as measured" in HostReading("m", 4, 0, found).words()


# ---------------------------------------------------------------- what the owner of a device allows


def a_device(name: str, trust: str) -> pb.Profile:
    return pb.Profile(name=name, role=pb.DEVICE, trust=trust)


def test_a_device_whose_owner_allows_less_is_no_candidate(tiny: ModelSource) -> None:
    config = run_config(tiny.name, "split.fronts={'deep'=4}", "split.back=1")

    def why(name: str, trust: str, config: RunConfig = config) -> str:
        return unfit(config, a_device(name, trust), tiny.leakage_key)

    assert why("a", "measured:0.5") == "", "not measured here: the device decides"
    assert "its owner's --trust none refuses the run: it allows no host" in why("a", "none")
    measured(tiny)
    assert "--trust measured:0.5 refuses the run: with 2 layers in front hosts can read about 80 %" in why(
        "a", "measured:0.5"
    )
    assert why("deep", "measured:0.5") == why("a", "measured:0.9") == why("a", "") == why("a", "hosts") == ""
    assert why("a", "none", run_config(tiny.name, "split.hosts=0")) == ""


def a_plan(source: ModelSource, *overrides: str) -> pb.SubmitRequest:
    """A device's part over one host, which never comes."""
    spec = RunSpec(run_config(source.name, *overrides), source)
    profiles = {"e": pb.Profile(name="e", role=pb.EDGE), "a": a_device("a", "")}
    layout = make_layout(spec, [profiles["a"]], [profiles["e"]] * spec.config.split.least_hosts)
    plans = make_plans(spec, RoundFacts("run", 1, 1, 0, 1), profiles, layout, {}, {"a": b"secret"})
    return pb.SubmitRequest(plan=plans["a"])


def node(trust: str, events: list[Event], tmp_path: Path) -> StageHost:
    def dial(*_: object) -> Link:
        raise PeerLost("nobody is there")

    return StageHost("a", dial, events.append, examples=DeviceExamples(tmp_path / "a.jsonl"), trust=trust)


def test_a_device_refuses_a_plan_that_leaks_more_than_its_owner_allows(tiny: ModelSource, tmp_path: Path) -> None:
    request = a_plan(tiny)

    def reason(trust: str) -> str:
        return node(trust, [], tmp_path).submit(request).reason

    assert f"not measured for {tiny.name}; `edgelam leakage RUN.toml`" in reason("measured:0.5")
    measured(tiny)
    assert reason("measured:0.5") == (
        "--trust measured:0.5 of node a refuses the plan: with 2 layers in front hosts can read about 80 % of the tokens, and "
        "it allows 50 %"
    )
    assert "it allows no host" in reason("none")
    assert node("none", [], tmp_path).profile(pb.ProfileRequest(protocol_version=PROTOCOL_VERSION)).trust == "none"
    alone = a_plan(tiny, "split.hosts=0")
    stays = node("none", [], tmp_path)
    assert stays.submit(alone).accepted, "nobody else computes on its text"
    stays.stop()


def test_what_the_owner_says_reaches_the_stage_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From `edgelam client --trust` over the node's processes to the stage host, without starting any."""
    nodes: list[NodeProcesses] = []
    commands: dict[str, list[str]] = {}
    made: dict[str, Any] = {}

    def stop(*_: object, **options: Any) -> None:
        made.update(options)
        raise EnvironmentProblem("far enough")

    def node_of(*arguments: Any, **options: Any) -> None:
        nodes.append(NodeProcesses(*arguments, **options))
        stop()

    data = tmp_path / "a.jsonl"
    data.write_text('{"question": "q", "answer": "a"}\n' * 2, encoding="utf-8")
    monkeypatch.setattr("edgelam_fl.federation.join.NodeProcesses", node_of)
    monkeypatch.setattr(
        "edgelam_fl.federation.node_process.Child", lambda name, command, *_: commands.update({name: command})
    )
    monkeypatch.setattr("edgelam_fl.node.service.StageHost", stop)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("edgelam_fl.federation.join.await_server", lambda *_, **__: None)
    options = NodeOptions("127.0.0.1:1", data, trust="measured:0.3")
    with pytest.raises(EnvironmentProblem, match="far enough"):
        join(Console(file=io.StringIO()), options, join_text="", name="a", state=tmp_path, insecure=True, wait=False)
    nodes[0].start()
    (command,) = [command for name, command in commands.items() if "stage host" in name]
    monkeypatch.setattr("sys.argv", command[2:])
    assert daemon.main() == EnvironmentProblem.exit_code
    assert made["trust"] == "measured:0.3"


@pytest.mark.parametrize(
    ("trust", "words"),
    [
        ("", "hosts can read most"),
        ("none", "no host gets anything"),
        ("measured:0.3", "more than 30 % of its text are refused"),
    ],
)
def test_a_device_that_starts_says_what_its_owner_allows(trust: str, words: str) -> None:
    assert words in trust_words(trust)


def test_a_device_says_what_hosts_can_read_before_it_plays(tiny: ModelSource, tmp_path: Path) -> None:
    measured(tiny)
    events: list[Event] = []
    here = node("measured:0.8", events, tmp_path)
    for attempt in (1, 2):
        request = a_plan(tiny)
        request.plan.attempt = attempt
        assert here.submit(request).accepted
        here.wait(pb.WaitRequest(job=f"run/1/{attempt}/a", timeout_s=WAIT_S))
    (said,) = of_kind(events, TextReadableHere)
    assert (said.text, said.job) == (0.8, "run/1/1/a"), "once, as the second part is alike"
    assert said.words.startswith("a host can read about 80 % of the tokens")


def test_a_run_says_once_what_its_hosts_can_read(tiny: ModelSource, federation: MakeFederation, tmp_path: Path) -> None:
    measured(tiny)
    run = federation("ab", "e", "split.fronts={'a'=1}")
    run.run()
    (said,) = run.events("text_readable")
    assert (said["round"], said["front"], said["text"]) == (1, 1, 0.9), "the device with the fewest layers counts"
    run.folder.finish()
    assert (
        "As measured before, a host can read about 90 % of the tokens" in (run.folder.path / "report.html").read_text()
    )
    alone = federation("ab", "", "split.hosts=0")
    alone.run()
    assert alone.events("text_readable") == []


# ---------------------------------------------------------------- split.fronts = "auto:LEAK"


def test_auto_fronts_are_as_deep_as_the_limit_needs(tiny: ModelSource) -> None:
    measured(tiny)
    spec = check_config(run_config(tiny.name, "split.fronts=auto:0.5", "split.back=1"))
    assert spec.config.split.front == 4
    assert [found.front for found in host_readings(spec.config, tiny.leakage_key)] == [4]
    check_trust(
        spec.config.model_copy(update={"split": spec.config.split.model_copy(update={"trust": "measured:0.5"})}),
        tiny.leakage_key,
    )
    with pytest.raises(ConfigError, match=r"4 \+ 2 is outside the model"):
        check_config(run_config(tiny.name, "split.fronts=auto:0.5"))
    with pytest.raises(ConfigError, match=r"more than 20 % .* the least is 30 %, with 4 layers"):
        check_config(run_config(tiny.name, "split.fronts=auto:0.2"))
    with pytest.raises(ConfigError, match=r"split.fronts = 'auto:0.5' needs split.hosts of at least 1"):
        check_config(run_config(tiny.name, "split.fronts=auto:0.5", "split.hosts=0"))


def test_auto_fronts_need_a_measured_model(tiny: ModelSource) -> None:
    with pytest.raises(ConfigError, match=r"'auto:0.5': what hosts read is not measured for .*edgelam leakage"):
        check_config(run_config(tiny.name, "split.fronts=auto:0.5"))


def test_a_device_without_the_memory_is_named_with_the_layers_that_fit(tiny: ModelSource) -> None:
    def spec(fronts: str) -> RunSpec:
        config: RunConfig = run_config(tiny.name, "split.front=4", "split.back=1", f"split.fronts={fronts}")
        return RunSpec(config, tiny)

    def device(free_bytes: int) -> pb.Profile:
        return pb.Profile(name="a", role=pb.DEVICE, memory_available_bytes=free_bytes)

    tried = {free: why_too_small(spec("auto:0.5"), device(free)) for free in range(30 << 20, 60 << 20, 1 << 18)}
    rooms = {words.split(" (")[0] for words in tried.values() if words}
    fewer = {f"has memory for {room} in front" for room in ("no layers", "1 layer", "2 layers", "3 layers")}
    assert rooms == {"has no memory even for the embedding and its last layers", *fewer}
    assert "" in tried.values()
    small = device(next(free for free, words in tried.items() if "1 layer in front" in words))
    with pytest.raises(
        DoesNotFit, match=r"device a has memory for 1 layer in front \(\d+ MB free\), and .*'auto:0.5' needs 4"
    ):
        check_memory_for_fronts(spec("auto:0.5"), [device(1 << 30), small])
    check_memory_for_fronts(spec("{'a'=4}"), [small])  # by hand: as before
