"""Runs in virtual time: what strategies see, what round_done says, and the same rounds under other bandwidth strategies."""

from __future__ import annotations

import math

import pytest

from edgelam_fl.config import WirelessSection
from edgelam_fl.errors import ConfigError
from edgelam_fl.model.adapter import initial_adapter
from edgelam_fl.model.source import ModelSource
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.telemetry.events import Event
from edgelam_fl.telemetry.records import as_json
from edgelam_fl.telemetry.summary import build_summary
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wireless.cell import RadioCell
from server.replies import Reply
from server.virtual.clock import VirtualTime
from server.virtual.loads import Loads
from server.virtual.replay import replay
from strategies.api import RoundOutcome
from strategies.registry import Capabilities, LoadedStrategy
from tests.by_hand import FederationByHand
from tests.recorded import as_events
from tests.support import run_config
from tests.unit.conftest import MakeFederation

BAND = "wireless.bandwidth_hz=1e6"
LOWRANK = ["wire.gradients=lowrank", "lora.train=back"]


def device(name: str = "a", examples: int = 9, held_out: int = 0) -> pb.Profile:
    return pb.Profile(name=name, role=pb.DEVICE, examples=examples, held_out=held_out)


# ---------------------------------------------------------------- loads


def layer_weights(source: ModelSource) -> int:
    return sum(rows * columns for name, (rows, columns) in source.linear_modules().items() if ".layers.3." in name)


@pytest.mark.parametrize(
    ("overrides", "forward", "backward"),
    [
        (["split.front=2", "split.back=1"], 3, 3),
        (["split.front=2", "split.back=1", "lora.train=back"], 3, 1),
        (["split.front=2", "split.back=1", "lora.train=hosts"], 3, 1),
        (["split.back=3", "split.front=1", "lora.train=back", "lora.targets=layers.5.self_attn.q_proj"], 4, 1),
        ([*LOWRANK, "split.back=3", "split.front=1", "lora.targets=layers.5.self_attn.q_proj"], 4, 3),
        (["split.hosts=0"], 6, 6),
        (["split.hosts=0", 'lora.targets=["layers.4.self_attn.q_proj", "layers.5.self_attn.q_proj"]'], 6, 2),
    ],
)
def test_operations_of_a_token(tiny: ModelSource, overrides: list[str], forward: int, backward: int) -> None:
    """Two per weight and direction; backward down to the lowest adapter that learns."""
    loads = Loads(RunSpec(run_config("any", *overrides), tiny))
    head = tiny.config["vocab_size"] * tiny.hidden_size
    assert loads.operations_per_token("a") == 2 * (forward + backward) * layer_weights(tiny) + 4 * head


def test_a_load_before_the_first_round(tiny: ModelSource) -> None:
    config = run_config("any", "federation.local_steps=5", "lora.ranks={'a'=2}", "split.front=1", "split.back=0")
    load = Loads(RunSpec(config, tiny)).estimate(device(held_out=3))
    adapter_bytes = sum(
        array.nbytes
        for name, array in initial_adapter(tiny, config.lora.targets, 2, 1).items()
        if ".layers.0." in name
    )  # fmt: skip
    state_bytes = config.task.max_tokens * tiny.hidden_size * 4
    learned = 5 * config.federation.batch_size
    assert load.adapter_bytes_down == adapter_bytes
    assert load.data_bytes_down == (2 * learned + 3) * state_bytes
    assert load.bytes_up == adapter_bytes + load.data_bytes_down
    assert load.operations == learned * config.task.max_tokens * Loads(RunSpec(config, tiny)).operations_per_token("a")


def test_a_load_with_low_rank_gradients(tiny: ModelSource) -> None:
    """Up: hidden states, and the values' gradient; down: hidden states with the values beside them, and no gradient."""
    config = run_config("any", *LOWRANK, "lora.rank=4")
    loads = Loads(RunSpec(config, tiny))
    load, state_bytes = loads.estimate(device(held_out=3)), config.task.max_tokens * tiny.hidden_size * 4
    learned, share = config.federation.local_steps * config.federation.batch_size, 4 / tiny.hidden_size
    assert load.bytes_up - load.adapter_bytes_down == ((1 + share) * learned + 3) * state_bytes
    assert load.data_bytes_down == (1 + share) * (learned + 3) * state_bytes


def test_a_load_is_what_the_last_round_moved_and_scales_the_others_estimates(tiny: ModelSource) -> None:
    config = run_config("any", BAND, "federation.epochs=1")
    virtual = VirtualTime(RunSpec(config, tiny))
    small, large = device("a", examples=8), device("b", examples=80)
    sent = [pb.KindBytes(direction="sent", kind="ACT", payload_bytes=1000, framing_bytes=10)]
    received = [pb.KindBytes(direction="received", kind="ACT", payload_bytes=70)]
    report = pb.JobReport(bytes=[*sent, *received], tokens_trained=300)
    virtual.over(1, {"a": 1.0}, [], {"a": 50}, {"a": Reply(report)})
    expected = virtual.expected([small, large])
    a = expected["a"]
    operations = 300 * Loads(RunSpec(config, tiny)).operations_per_token("a")
    assert (a.bytes_up, a.adapter_bytes_down, a.data_bytes_down, a.operations) == (1000, 50, 70, operations)
    estimates = [Loads(RunSpec(config, tiny)).estimate(profile) for profile in (small, large)]
    assert expected["b"].bytes_up == pytest.approx(1000 * estimates[1].bytes_up / estimates[0].bytes_up)
    assert (expected["b"].operations, expected["b"].data_bytes_down) == pytest.approx((operations * 10, 70 * 10))


# ---------------------------------------------------------------- runs


def test_rounds_have_a_delay_a_payload_and_an_energy(federation: MakeFederation) -> None:
    run = federation("ab", "e", BAND, "strategy.bandwidth=equalise")
    run.nodes["b"].moves_bytes = 400_000
    run.run()
    first, second, evaluation = run.events("round_done")
    assert "virtual" not in evaluation, "the clock stands still where nothing is learned"
    own = RadioCell(WirelessSection(bandwidth_hz=1e6), seed=1)
    for number, done in ((1, first), (2, second)):
        virtual, recorded = done["virtual"], {record["name"]: record for record in done["devices"]}
        assert sum(of["share"] for of in virtual["devices"].values()) == pytest.approx(1)
        for name, of in virtual["devices"].items():
            record = recorded[name]
            assert of["bytes_up"] == record["bytes_up"] + record["adapter_bytes_up"] > 0
            assert of["bytes"] == of["bytes_up"] + record["bytes_down"] + record["adapter_bytes_down"]
            rate_bps = 1e6 * of["share"] * math.log2(1 + own.snr(name, number) / of["share"])
            assert of["rate_bps"] == pytest.approx(rate_bps)
            assert of["seconds"] == pytest.approx(of["download_s"] + of["compute_s"] + 8 * of["bytes_up"] / rate_bps)
            assert of["joules"] == pytest.approx(of["compute_joules"] + 10**2.3 / 1e3 * of["upload_s"])
        assert virtual["seconds"] == max(of["seconds"] for of in virtual["devices"].values())
        assert virtual["dropped"] == []
    a, b = (second["virtual"]["devices"][name]["upload_s"] for name in "ab")
    assert a == pytest.approx(b, rel=0.2), "both are through at once, as far as the first round told"
    totals = build_summary(as_events([first, second, evaluation])).virtual
    assert as_json(totals) == {k: first["virtual"][k] + second["virtual"][k] for k in ("seconds", "bytes", "joules")}


def test_strategies_see_virtual_time_alone(federation: MakeFederation) -> None:
    run = federation("ab", "e", BAND, "strategy.selection=best_channel", "federation.devices_per_round=1")
    outcomes: list[RoundOutcome] = []
    schedule = run.rounds.schedule
    schedule.selection = LoadedStrategy(schedule.selection.rule, Capabilities(observe=outcomes.append))
    run.run()
    own = RadioCell(WirelessSection(bandwidth_hz=1e6), seed=1)
    *trained, _ = zip(run.events("plan"), run.events("round_done"), strict=True)
    assert len(trained) == 2
    for number, (plan, done) in enumerate(trained, 1):
        assert plan["selected"] == [max("ab", key={name: own.snr(name, number) for name in "ab"}.__getitem__)]
        assert plan["demands"][plan["selected"][0]]["snr"] == own.snr(plan["selected"][0], number)
        (seen,) = outcomes[number - 1].devices
        of = done["virtual"]["devices"][seen.name]
        assert (outcomes[number - 1].seconds, seen.last_seconds) == (done["virtual"]["seconds"], of["seconds"])
        assert (seen.rate_bps, seen.snr, seen.limit_bps) == (of["rate_bps"], of["snr"], None)


def test_who_drops_out_has_a_share_and_no_plan(federation: MakeFederation) -> None:
    run = federation("abc", "e", BAND, "wireless.dropout=0.5", "federation.rounds=6", "strategy.selection=oort")
    run.run()
    *rounds, evaluation = run.events("round_done")
    plans = run.events("plan")
    own = RadioCell(WirelessSection(bandwidth_hz=1e6, dropout=0.5), seed=1)
    for done, plan in zip(rounds, plans, strict=False):
        dropped = done["virtual"]["dropped"]
        assert dropped == own.dropouts("abc", done["round"], 1, 1)
        assert set(plan["nodes"]) == {"a", "b", "c", "e"} - set(dropped)
        assert (
            set(done["virtual"]["devices"]) == {record["name"] for record in done["devices"]} == {*"abc"} - {*dropped}
        )
        assert plan["shares"] == dict.fromkeys("abc", 1 / 3)
    assert 0 < sum(len(done["virtual"]["dropped"]) for done in rounds) < 2 * len(rounds)
    assert len(evaluation["devices"]) == 3
    assert run.events("node_lost") == [], "it is no fault of theirs"


def test_without_a_cell_nothing_is_virtual(federation: MakeFederation) -> None:
    run = federation("ab", "e", "wireless.dropout=0.9")
    run.run()
    plans, rounds = run.events("plan"), run.events("round_done")
    assert len(rounds) == len(plans)
    assert not any("virtual" in done for done in rounds)
    assert len(plans) == run.config.federation.rounds + 1
    assert all(set(plan["selected"]) < set(plan["nodes"]) and "demands" not in plan for plan in plans)


# ---------------------------------------------------------------- the same rounds again


def all_events(run: FederationByHand) -> list[Event]:
    lines = (line for kind in ("plan", "round_done") for line in run.events(kind))
    return as_events(sorted(lines, key=lambda line: line["round"]))


def test_replaying_a_runs_own_shares_gives_its_rounds(federation: MakeFederation) -> None:
    run = federation("abc", "e", BAND, "strategy.bandwidth=equalise", "wireless.dropout=0.3", "federation.rounds=3")
    for size, name in enumerate("abc", 1):
        run.nodes[name].moves_bytes = 100_000 * size
    run.run()
    events = all_events(run)
    recorded = [done["virtual"] for done in run.events("round_done") if "virtual" in done]
    assert as_json(replay(events, run.config, "equalise")) == recorded
    uniform = as_json(replay(events, run.config, "uniform"))
    for mine, other in zip(uniform, recorded, strict=True):
        assert mine["bytes"] == other["bytes"]
        assert mine["dropped"] == other["dropped"]
        for of in mine["devices"].values():
            assert (of["share"], of["rate_bps"]) == pytest.approx((1 / 3, 1e6 / 3 * math.log2(1 + 3 * of["snr"])))
    assert uniform[-1]["seconds"] > recorded[-1]["seconds"], "once the loads are known"


def test_a_replay_with_a_strategy_that_there_is_not() -> None:
    with pytest.raises(ConfigError, match=r"strategy.bandwidth = 'equalize' is not known; did you mean 'equalise'"):
        replay([], run_config("any", BAND), "equalize")
