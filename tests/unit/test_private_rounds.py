"""Rounds with differential privacy, over nodes that answer by hand: what is clipped, noised, counted, spent and said."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import erfc, sqrt

import numpy as np
import pytest

from edgelam_fl.errors import ConfigError, RunFailed
from edgelam_fl.model import adapter as adapters
from edgelam_fl.model.adapter import Adapter
from edgelam_fl.privacy.accounting import Releases, epsilon_of
from server.checkpoint import load_newest
from server.privacy import LEDGER
from server.private_sums import PrivateSums
from server.private_terms import terms_of
from server.state import FederationState
from strategies.api import Contribution
from tests.by_hand import ByHand, FederationByHand
from tests.support import run_config
from tests.unit.conftest import MakeFederation

PRIVATE = ("split.hosts=0", "privacy.mode=central", "federation.rounds=1", "privacy.noise=1.0", "privacy.epsilon=30")
DORA = ("lora.use_dora=true", "lora.modules_to_save=norm")
POISSON = ("strategy.selection=poisson",)


def moved(run: FederationByHand, result: Adapter) -> np.ndarray:
    """Returns how far every number of the adapter went, as one vector."""
    return np.concatenate([(result[name] - run.start[name]).ravel() for name in sorted(result)]).astype(np.float64)


def private(federation: MakeFederation, devices: str, *overrides: str, seed: int = 1) -> FederationByHand:
    return federation(devices, "", *PRIVATE, *overrides, generator=np.random.default_rng(seed))


def fails(node: ByHand) -> None:
    node.fails = lambda plan: "no memory" if plan.steps else ""


@pytest.mark.parametrize("kind", [(), DORA], ids=["LoRA", "DoRA and norms"])
def test_an_update_ten_times_the_bound_moves_the_aggregate_by_the_bound(
    federation: MakeFederation, kind: Sequence[str]
) -> None:
    """Against the same round without the device, with the same noise: the two differ by the clipped update alone."""
    results = []
    for planted in (False, True):
        run = private(federation, "abc", "privacy.clip=0.5", *kind)
        size = sqrt(sum(array.size for array in run.start.values()))
        for node in run.nodes.values():
            node.by = 10 * 0.5 / size
        if not planted:
            fails(run.nodes["c"])
        results.append(moved(run, run.run()))
    assert np.linalg.norm(results[1] - results[0]) == pytest.approx(0.5 / 3, rel=1e-3)


def test_an_update_that_is_not_clipped_would_be_noticed(federation: MakeFederation) -> None:
    """The same planted update without privacy moves the mean by ten times as much."""
    run = federation("abc", "", "split.hosts=0", "federation.rounds=1", "federation.update_factor=0")
    run.nodes["b"].by = 10 * 0.5 / sqrt(sum(array.size for array in run.start.values()))
    run.nodes["a"].by = run.nodes["c"].by = 0.0
    assert np.linalg.norm(moved(run, run.run())) > 9 * 0.5 / 3


def test_the_noise_on_the_aggregate_has_the_sigma_that_is_accounted_for(federation: MakeFederation) -> None:
    """One device of four, none of which moves anything: all that is released is noise, over a constant denominator."""
    run = private(federation, "abcd", "privacy.clip=2.0", "privacy.noise=1.5")
    for node in run.nodes.values():
        node.by = 0.0
    draws = moved(run, run.run()) / (1.5 * 2.0 / 4)
    assert draws.size >= 10_000
    assert abs(draws.mean()) < 4 / sqrt(draws.size)
    assert abs(np.mean(draws**2) - 1) < 4 * sqrt(2 / draws.size) < 2 * 0.05
    assert np.mean(np.abs(draws) > 2) == pytest.approx(erfc(sqrt(2)), abs=0.01)


def test_neither_labels_nor_who_came_weigh(federation: MakeFederation) -> None:
    results = []
    for moves_it in "ab":  # b has almost six times as many labels
        run = private(federation, "abc")
        for name, node in run.nodes.items():
            node.by = 1e-4 if name == moves_it else 0.0
        fails(run.nodes["c"])
        results.append(moved(run, run.run()))
    np.testing.assert_allclose(results[0], results[1], atol=1e-7)
    run = private(federation, "abc")
    for node in run.nodes.values():
        node.by = 0.0
    np.testing.assert_allclose(results[0] - moved(run, run.run()), 1e-4 / 3, atol=1e-6)


@pytest.mark.parametrize(
    ("rule", "resting"),
    [("fedavg", [""]), ("fedprox", [""]), ("fedadam", [""]), ("ffa", ["_A.", "_A."]), ("rolora", ["_A.", "_B."])],
)
def test_rules_of_the_mean_get_one_private_contribution(
    federation: MakeFederation, rule: str, resting: Sequence[str]
) -> None:
    run = private(federation, "ab", f"strategy.aggregation={rule}")
    state = FederationState(adapter=run.start)
    for rests in resting:
        before, state = state, run.rounds.round_after(state)
        for name, array in state.adapter.items():
            assert np.array_equal(before.adapter[name], array) == bool(rests and rests in name), name


def test_an_update_is_judged_by_its_bound_alone(federation: MakeFederation) -> None:
    run = private(federation, "abcd")
    run.nodes["d"].by = 1000.0
    run.run()
    assert run.events("contribution_left_out") == []
    assert run.events("privacy_spent")[0]["clipped"] == 1.0


def test_a_round_that_draws_nobody_releases_noise_alone(federation: MakeFederation) -> None:
    run = private(federation, "ab", *POISSON, "strategy.options.poisson.rate=0.000001", "privacy.noise=2.0")
    draws = moved(run, run.run()) / (2.0 / (2 * 1e-6))
    assert abs(np.mean(draws**2) - 1) < 4 * sqrt(2 / draws.size)
    assert run.events("plan")[0]["routes"] == []
    (done, evaluated) = run.events("round_done")
    assert (done["devices"], len(evaluated["devices"])) == ([], 2)


def test_a_round_that_draws_nobody_without_privacy_leaves_the_adapter(federation: MakeFederation) -> None:
    run = federation("ab", "e", *POISSON, "strategy.options.poisson.rate=0.000001")
    state = run.state()
    assert state.round == 2
    assert all(np.array_equal(array, run.start[name]) for name, array in state.adapter.items())


def test_all_take_part_at_a_rate_of_one(federation: MakeFederation) -> None:
    run = private(federation, "abc", *POISSON, "strategy.options.poisson.rate=1")
    run.run()
    assert run.events("plan")[0]["selected"] == ["a", "b", "c"]
    assert run.events("privacy_promised")[0]["denominator"] == 3


def test_nobody_can_tell_from_the_seed_who_was_drawn(federation: MakeFederation) -> None:
    """Twenty rounds of two coins come out alike by chance once in a million million."""
    drawn = []
    for _ in range(2):
        run = private(federation, "ab", *POISSON, "strategy.options.poisson.rate=0.5", "privacy.noise=5.0")
        profiles = [node.profile for node in run.nodes.values()]
        drawn.append([tuple(run.rounds.schedule.select(1, profiles).names) for _ in range(20)])
    assert drawn[0] != drawn[1]


def test_a_large_round_is_summed_up_on_arrival_and_clipped_one_by_one() -> None:
    """200 devices: the sums are as large as one update, and the mean is that of the clipped updates."""
    generator = np.random.default_rng(5)
    start = {"a": generator.normal(size=(3, 4)).astype(np.float32), "b": generator.normal(size=6).astype(np.float32)}
    sums = PrivateSums(start, frozenset(), False, 1.0, 0.0, 160.0, generator)
    expected = np.zeros(18)
    for number in range(200):
        scale = 10 ** generator.uniform(-2, 1)
        update = {
            name: (scale * generator.normal(size=array.shape)).astype(np.float32) for name, array in start.items()
        }
        whole = np.concatenate([array.ravel() for array in update.values()])
        expected += whole * min(1.0, 1 / float(np.linalg.norm(whole))) / 160
        sent = {name: start[name] + array for name, array in update.items()}
        # With copies, a device's update comes in parts: from the device and from its hosts.
        for part in ({"a": sent["a"]}, {"b": sent["b"]}):
            sums.add([("site", Contribution(f"d{number}", 1.0 + number, part))])
    (mean,) = sums.contributions(())
    assert (mean.weight, sums.released.came) == (1.0, 200)
    assert 0 < sums.released.whole < 200
    got = np.concatenate([(mean.tensors[name] - start[name]).ravel() for name in start])
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_nothing_of_a_broken_site_and_no_half_update_counts() -> None:
    start = {"a": np.zeros(2, np.float32), "b": np.zeros(2, np.float32)}
    sums = PrivateSums(start, frozenset(["site e"]), True, 9.0, 0.0, 2.0, np.random.default_rng(1))
    one = np.ones(2, np.float32)
    sums.add([("e", Contribution("d1", 1.0, {"a": one, "b": one}))])
    sums.add([("f", Contribution("d2", 1.0, {"a": one, "b": one, "not planned": one}))])
    sums.add([("e", Contribution("d3", 1.0, {"a": one}))])
    sums.add([("e", Contribution("site e", 40.0, {"c": one}))])
    sites, devices = sums.contributions(["f"])
    assert (sites.tensors.keys(), sites.weight) == ({"c"}, 1.0)
    assert devices.tensors.keys() == {"a", "b"}
    np.testing.assert_allclose(devices.tensors["a"], 0.5)
    assert sums.left_out == {"d3": "its update has 1 of 2 tensors"}


@pytest.mark.parametrize(("train", "releases"), [("['front', 'hosts', 'back']", 4), ("['hosts']", 3)])
def test_a_host_that_devices_share_adds_its_own_noise(federation: MakeFederation, train: str, releases: int) -> None:
    """Its adapter passes through; each of its steps counts as a release about the same devices."""
    run = federation(
        "ab", "e", "privacy.mode=central", "privacy.noise=5.0", "federation.rounds=1", "federation.local_steps=3",
        "privacy.clip=0.5", f"lora.train={train}", generator=np.random.default_rng(1),
    )  # fmt: skip
    result = run.run()
    for name, array in result.items():
        layer = int(name.split(".layers.")[1].split(".")[0])
        if 2 <= layer < 4:
            np.testing.assert_allclose(array - run.start[name], 2.0, atol=1e-5)
    (promised,), (spent,) = run.events("privacy_promised"), run.events("privacy_spent")
    assert promised["releases_per_round"] == releases
    assert spent["epsilon"] == epsilon_of(Releases(5.0, 1, releases), 1e-5)
    told = run.nodes["e"].plans[0].privacy
    assert (told.step_clip, told.step_noise, told.step_devices) == (0.5, 2.5, 2.0)
    assert not run.nodes["e"].plans[-1].HasField("privacy"), "the evaluation trains nothing"


def test_hosts_that_devices_share_need_enough_devices_for_coins(federation: MakeFederation) -> None:
    """A host adds no noise in a round of nobody: that must be less likely than a hundredth of delta."""
    shared = ("privacy.mode=central", *POISSON, "strategy.options.poisson.rate=0.5", "privacy.noise=20.0")
    with pytest.raises(ConfigError, match=r"draws none of 1 devices in some round with a probability of 1,"):
        federation("ab", "e", *shared).run()
    config = run_config("tiny", *shared, "federation.rounds=10")
    terms = terms_of(config, 0.5, 40)
    assert terms.epsilon_after(10) == epsilon_of(Releases(20.0, 10, 11, 0.5), 0.99e-5)
    with pytest.raises(ConfigError, match="draws none of 22 devices"):
        terms_of(config, 0.5, 23)
    assert terms_of(run_config("tiny", *shared, "split.hosts=0"), 0.5, 2).delta_of_noise == 1e-5


def test_devices_that_leave_take_the_promise_with_them(federation: MakeFederation) -> None:
    """A host whose device is alone, or whose devices are too few for coins, may add no noise in some round: it is not to take place."""
    run = federation("ab", "e", "privacy.mode=central", "privacy.noise=20.0", "federation.rounds=2")
    run.nodes["b"].leaves = lambda plan: plan.round == 1
    with pytest.raises(
        RunFailed, match=r"1 of the 2 devices .* the promise does not hold: .* whose absence its host would see"
    ):
        run.run()
    assert {plan.round for plan in run.nodes["a"].plans} == {1}
    alone = private(
        federation, "ab", "federation.rounds=2"
    )  # without such hosts, noise comes from the server in any case
    alone.nodes["b"].leaves = lambda plan: plan.round == 1
    alone.run()
    assert len(alone.events("privacy_spent")) == 2


def test_an_update_that_comes_twice_counts_once() -> None:
    start = {"a": np.zeros(2, np.float32), "b": np.zeros(2, np.float32)}
    sums = PrivateSums(start, frozenset(), False, 9.0, 0.0, 1.0, np.random.default_rng(1))
    one = np.ones(2, np.float32)
    for site in "eef":
        sums.add([(site, Contribution("d", 1.0, {"a": one})), (site, Contribution("d", 1.0, {"b": one}))])
    (mean,) = sums.contributions(())
    np.testing.assert_allclose(mean.tensors["a"], 1.0)
    assert (sums.released.came, sums.left_out) == (1, {})


def test_devices_that_clip_and_add_noise_themselves(federation: MakeFederation) -> None:
    """The server adds nothing; a device's data may change its update by twice the bound."""
    run = private(federation, "ab", "privacy.mode=device", "privacy.noise=4.0")
    for node in run.nodes.values():
        node.by = 1e-3
    np.testing.assert_allclose(moved(run, run.run()), 1e-3, atol=1e-6)
    told = run.nodes["a"].plans[0].privacy
    assert (told.update_clip, told.update_noise) == (1.0, 4.0)
    (spent,) = run.events("privacy_spent")
    assert spent["epsilon"] == epsilon_of(Releases(2.0, 1), 1e-5)
    assert spent["clipped"] == 0.0


def test_an_adaptive_bound_follows_the_updates(federation: MakeFederation) -> None:
    run = private(
        federation, "abcd", "privacy.clip_quantile=0.5", "privacy.clip=100.0", "federation.rounds=4",
        "privacy.epsilon=1000",
    )  # fmt: skip
    for node in run.nodes.values():
        node.by = 1e-3
    run.run()
    clips = [event["clip"] for event in run.events("privacy_spent")]
    assert clips[0] == 100.0
    assert clips[-1] < clips[0]


# ---------------------------------------------------------------- the budget


def test_a_run_finds_the_noise_for_its_budget_and_says_what_it_spends(
    federation: MakeFederation, capsys: pytest.CaptureFixture[str]
) -> None:
    run = private(federation, "ab", "privacy.noise=0.0", "privacy.epsilon=5.0", "federation.rounds=3")
    run.run()
    (promised,) = run.events("privacy_promised")
    assert f"noise {promised['noise']:.4g} x the bound 1" in capsys.readouterr().out
    spent = run.events("privacy_spent")
    expected = [epsilon_of(Releases(promised["noise"], rounds), 1e-5) for rounds in (1, 2, 3)]
    assert [event["epsilon"] for event in spent] == expected
    assert 4.99 < expected[-1] <= 5.0
    assert run.events("budget_spent") == []


def test_a_budget_that_is_spent_ends_the_run_with_its_result(federation: MakeFederation) -> None:
    run = private(federation, "ab", "privacy.noise=2.0", "privacy.epsilon=4.0", "federation.rounds=9")
    state = run.state()
    spent = run.events("privacy_spent")
    assert 0 < state.round < 9
    assert epsilon_of(Releases(2.0, state.round), 1e-5) <= 4.0 < epsilon_of(Releases(2.0, state.round + 1), 1e-5)
    (early,) = run.events("budget_spent")
    assert (early["round"], early["planned"]) == (state.round, 9)
    assert early["epsilon"] == spent[-1]["epsilon"]
    assert run.events("privacy_promised")[0]["rounds"] == state.round
    last = run.events("round_done")[-1]
    assert (last["round"], last["steps"], len(last["devices"])) == (state.round + 1, 0, 2), "the result is evaluated"
    assert (run.folder.path / "adapter" / "adapter_model.safetensors").is_file()
    assert load_newest(run.folder.path)[0].state.round == state.round


def test_a_resumed_run_keeps_its_promise(federation: MakeFederation) -> None:
    """With the same noise it goes on to the last bit; its terms, its bound and what is spent stay, also what was paid since."""
    settings = ("privacy.clip_quantile=0.5", "privacy.noise=5.0", "federation.rounds=4")
    whole = private(federation, "abc", *settings)
    expected = whole.state()
    generator = np.random.default_rng(1)
    first = federation("abc", "", *PRIVATE, *settings, generator=generator)
    first.rounds.round_after(FederationState())
    second = federation("abc", "", *PRIVATE, *settings, generator=generator)
    second.go_on(first)
    result = second.state()
    assert adapters.digest(result.adapter) == adapters.digest(expected.adapter)
    spent, of_whole = ([(e["epsilon"], e["clip"]) for e in run.events("privacy_spent")] for run in (first, whole))
    assert spent == of_whole
    assert len(first.events("privacy_promised")) == 1


def test_a_resumed_run_counts_what_was_paid_since_its_checkpoint(federation: MakeFederation) -> None:
    run, again = (private(federation, "ab", "privacy.noise=5.0", "federation.rounds=3") for _ in range(2))
    run.rounds.round_after(FederationState())
    assert run.rounds.privacy is not None
    run.rounds.privacy.ledger.spend_a_round()  # for round 2, in whose middle the server is killed
    again.go_on(run)
    again.state()
    assert run.events("privacy_spent")[-1]["epsilon"] == epsilon_of(Releases(5.0, 4), 1e-5)
    (run.folder.path / LEDGER).unlink()
    with pytest.raises(ConfigError, match=r"counts 0 rounds, and its checkpoint 4"):
        again.go_on(run)


def test_an_attempt_that_fails_is_paid_for(federation: MakeFederation) -> None:
    run = private(federation, "ab", "federation.min_nodes=2", "privacy.noise=5.0")
    run.nodes["b"].fails = lambda plan: "no memory" if plan.steps and plan.attempt == 1 else ""
    run.run()
    spent = run.events("privacy_spent")
    assert [(event["round"], event["attempt"]) for event in spent] == [(1, 1), (1, 2)]
    assert spent[1]["epsilon"] == epsilon_of(Releases(5.0, 2), 1e-5)
    assert json.loads((run.folder.path / LEDGER).read_text())["rounds"] == 2


def test_failed_attempts_that_take_the_whole_budget_leave_no_result(federation: MakeFederation) -> None:
    run = private(federation, "ab", "federation.min_nodes=2", "privacy.noise=0.0", "privacy.epsilon=4.0")
    fails(run.nodes["b"])
    with pytest.raises(RunFailed, match="budget is spent, and no attempt at round 1 succeeded"):
        run.run()


def test_a_run_goes_on_with_the_ledger_of_its_folder(federation: MakeFederation) -> None:
    first = private(federation, "ab", "privacy.noise=2.0", "privacy.epsilon=4.0")
    first.run()
    again = private(federation, "ab", "privacy.noise=2.0", "privacy.epsilon=4.0")
    (again.folder.path / LEDGER).write_text((first.folder.path / LEDGER).read_text())
    again.run()
    assert again.events("privacy_spent")[0]["epsilon"] == epsilon_of(Releases(2.0, 2), 1e-5)


@pytest.mark.parametrize("text", ['{"rounds": 1', "[]", '{"rounds": -3}', '{"rounds": "1"}'])
def test_a_damaged_ledger_is_no_empty_one(federation: MakeFederation, text: str) -> None:
    run = private(federation, "ab")
    (run.folder.path / LEDGER).write_text(text)
    with pytest.raises(ConfigError, match=r"privacy\.json in this run's folder is damaged"):
        run.run()


def test_who_is_trusted_is_said_also_if_devices_host(federation: MakeFederation) -> None:
    said = []
    for overrides in ((), ("split.host_on=any",)):
        run = federation("ab", "e", "privacy.mode=central", "privacy.noise=20.0", "federation.rounds=1", *overrides)
        run.run()
        said.append(run.events("privacy_promised")[0]["adversary"])
    assert ["devices that host for others" in words for words in said] == [False, True]


def test_what_trackers_pass_on_and_who_took_part_are_not_covered(federation: MakeFederation) -> None:
    """Poisson selection counts on nobody knowing who took part, and events name them."""
    plain, drawn = (
        private(federation, "ab", *overrides)
        for overrides in ((), (*POISSON, "strategy.options.poisson.rate=0.5", "run.report_to=tensorboard"))
    )
    said = []
    for run in (plain, drawn):
        run.rounds.round_after(FederationState(adapter=run.start))
        said.append(run.events("privacy_promised")[0]["not_covered"])
    assert said[0] in said[1]
    assert said[1].startswith("who takes part, ")
    assert said[1].endswith("run.report_to passes it on to tensorboard")


def test_a_spent_budget_is_not_spent_again(federation: MakeFederation) -> None:
    first = private(federation, "ab", "privacy.noise=0.0", "privacy.epsilon=4.0")
    first.run()
    again = private(federation, "ab", "privacy.noise=0.0", "privacy.epsilon=4.0")
    (again.folder.path / LEDGER).write_text((first.folder.path / LEDGER).read_text())
    with pytest.raises(
        ConfigError, match=r"the privacy budget is spent: 1 rounds took an epsilon of 4 of privacy\.epsilon"
    ):
        again.run()


def test_a_ledger_of_other_terms_is_refused(federation: MakeFederation) -> None:
    run = private(federation, "ab")
    (run.folder.path / LEDGER).write_text('{"mode": "central", "noise": 7.0, "rounds": 1}\n')
    with pytest.raises(ConfigError, match=r"was kept for other terms .*noise 7\.0"):
        run.run()


# ---------------------------------------------------------------- who came


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["privacy.delta=0.5"], r"privacy\.delta = 0\.5 must be below 1 / the number of devices, 1 / 2 = 0\.5"),
        (
            ["federation.devices_per_round=3"],
            r"federation\.devices_per_round = 3, and there are 2\. Allowed: at most 2",
        ),
        (["federation.expect_nodes=3"], r"federation\.expect_nodes = 3 devices, and only 2 came"),
    ],
)
def test_a_run_for_which_too_few_devices_came_is_refused(
    federation: MakeFederation, overrides: Sequence[str], words: str
) -> None:
    run = private(federation, "ab", *overrides)
    with pytest.raises((ConfigError, RunFailed), match=words):
        run.run()
    assert run.events("plan") == []


# ---------------------------------------------------------------- without


@pytest.mark.parametrize("edges", ["", "e"])
def test_without_privacy_nothing_is_otherwise(federation: MakeFederation, edges: str) -> None:
    """The other keys of the section change no plan, no message and no bit of the result."""
    hosts = f"split.hosts={len(edges)}"
    runs = [
        federation("ab", edges, hosts, *more)
        for more in ([], ["privacy.epsilon=1", "privacy.clip=1e-3", "privacy.noise=9", "privacy.clip_quantile=0.5"])
    ]
    results = [adapters.digest(run.run()) for run in runs]
    assert results[0] == results[1]
    for name, node in runs[0].nodes.items():
        other = runs[1].nodes[name]
        plans, received = (
            [[_without_tokens(plan) for plan in each.plans] for each in (node, other)],
            [[adapters.digest(got) for got in each.received] for each in (node, other)],
        )
        assert plans[0] == plans[1]
        assert received[0] == received[1]
    for run in runs:
        assert run.events("privacy_promised") == run.events("privacy_spent") == []
        assert not (run.folder.path / LEDGER).exists()


def _without_tokens(plan: object) -> bytes:
    for route in [*plan.routes, *plan.serves]:  # type: ignore[attr-defined]
        route.token = b""
    return bytes(plan.SerializeToString(deterministic=True))  # type: ignore[attr-defined]
