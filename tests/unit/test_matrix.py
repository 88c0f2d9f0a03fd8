"""A matrix file: its cells, and one clear message for each way in which it can be wrong."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from edgelam_fl.bench import command, runner
from edgelam_fl.bench.datasets import Data, check_fits, load, write_cell
from edgelam_fl.bench.matrix import Bench, Tune, read_matrix
from edgelam_fl.bench.plot import over_epsilon
from edgelam_fl.bench.reference import ONE_DEVICE, one_device
from edgelam_fl.bench.tables import at_budget, compared, cost_to, differences, figures, markdown, quality
from edgelam_fl.bench.tuning import held_back, tries, tuned
from edgelam_fl.config import RunConfig
from edgelam_fl.errors import ConfigError, EnvironmentProblem, RunFailed
from edgelam_fl.simulation.attacks import noise, sign_flip
from edgelam_fl.simulation.nodes_file import read_federation
from edgelam_fl.tasks.partition import deal
from edgelam_fl.telemetry.events import Event, NodeLost
from tests.recorded import as_events

MATRICES = Path(__file__).parents[2] / "benchmarks" / "matrices"
GOOD = '[axes]\naggregation = ["fedavg", "ffa"]\nseed = [1, 2]\n[base.model]\nname = "minilm-l6"\n'


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "m.toml"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[axes]\nagregation = ['fedavg']", "unknown axis axes.agregation in .*: did you mean 'aggregation'"),
        ("[axis]\nseed = [1]", r"unknown section \[axis\] in .*: did you mean 'axes'"),
        ("[bench]\ndevices = 0", "bench.devices = 0 must be greater than or equal to 1"),
        ("[bench]\ndevice = 3", "unknown key bench.device in .*: did you mean 'devices'"),
        ("[axes]\nseed = []", r"axes.seed = \[\] must hold at least one value, each once"),
        ("[axes]\npartition = 'dirichlet'", "axes.partition = 'dirichlet' in .* must be 'iid', 'dirichlet:ALPHA'"),
        ("[axes]\npartition = 'dirichlet:-1'", "axes.partition = 'dirichlet:-1'"),
        ("[axes]\npartition = 'iid:2'", "axes.partition = 'iid:2'"),
        ("[axes]\npartition = 'size:big'", "axes.partition = 'size:big'"),
        ("[axes]\nattack = 'signflip:2'", "axes.attack = 'signflip:2' in .* is not known; did you mean 'sign-flip'"),
        ("[axes]\nattack = 'noise'", "axes.attack = 'noise' in .* must say how many of the 20 devices"),
        ("[axes]\nattack = 'noise:20'", "1 to 19"),
        ("[axes]\nepsilon = ['no']", r"axes.epsilon = \['no'\] must hold numbers above 0, or 'none' for a run without"),
        ("[axes]\nepsilon = [8, 0]", r"axes.epsilon = \[8, 0\] must hold numbers above 0"),
        (
            "[base.privacy]\nclip = 0.5",
            r"\[base.privacy\] in .* has no effect on a run without an epsilon: give axes.epsilon",
        ),
        (
            "[axes]\nepsilon = 8\n[base.privacy]\nepsilon = 4",
            "base.privacy.epsilon in .* is an axis: write it as axes.ep",
        ),
        (
            "[axes]\naggregation = 'fedadam eta'",
            "axes.aggregation = 'fedadam eta' in .*: 'eta' must be an option of the",
        ),
        ("[axes]\naggregation = 'fedadam eta=a'", "'eta=a' must be an option of the strategy or a key of the run file"),
        ("[axes]\naggregation = 'fedavg optimizer.l=1'", "unknown key optimizer.l in .*: did you mean 'optimizer.lr'"),
        ("[base.lora]\nrank = 4", "base.lora.rank in .* is an axis: write it as axes.rank"),
        ("[base.federation]\nround = 2", "unknown key federation.round in .*: did you mean 'federation.rounds'"),
        ("[base]\nmodel = 'x'", r"\[base\] in .* holds sections of a run file"),
        ("axes = ", "is not TOML"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_matrix(written(tmp_path, text))


def test_an_unknown_strategy_is_said_with_the_nearest_before_anything_starts(tmp_path: Path) -> None:
    matrix = read_matrix(written(tmp_path, "[axes]\naggregation = ['fedavg', 'flexlorra']"))
    with pytest.raises(ConfigError, match=r"strategy.aggregation = 'flexlorra' is not known; did you mean 'flexlora'"):
        runner.check_cells(matrix, ())


def test_a_value_of_an_axis_may_bring_settings_of_its_own(tmp_path: Path) -> None:
    values = '["fedadam", "fedadam eta=0.1 optimizer.lr=0.002"]'
    text = f"[axes]\naggregation = {values}\n[base.optimizer]\nlr = 0.5\n[base.strategy]\noptions = {{ fedadam = {{ tau = 0.2 }} }}"
    matrix = read_matrix(written(tmp_path, text))
    plain, tuned = matrix.cells()
    assert tuned.name == "fedadam-eta-0.1-optimizer.lr-0.002_all_uniform_iid_8_none_1"
    configs = [matrix.config(cell, ()) for cell in (tuned, plain)]
    assert [config.optimizer.lr for config in configs] == [0.002, 0.5]
    assert [dict(config.strategy.options["fedadam"]) for config in configs] == [{"tau": 0.2, "eta": 0.1}, {"tau": 0.2}]
    assert {config.strategy.aggregation for config in configs} == {"fedadam"}


TUNE = "[tune]\nkeys = { 'optimizer.lr' = [0.1, 0.2], 'optimizer.betas' = [[0.8, 0.9]] }\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + TUNE + "seed = 2\n", r"tune.seed = 2 in .* must not be one of axes.seed"),
        (GOOD + "[tune]\nkeys = { lr = [0.1] }\n", r"tune.keys.lr = \[0.1\] in .* must be a key of the run file"),
        (GOOD + TUNE + "[bench]\nbaseline = 'uniform'\n", "bench.baseline = 'uniform' is on none of them"),
    ],
)
def test_what_cannot_be_tuned_is_said(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_matrix(written(tmp_path, text))


def test_each_strategy_gets_what_was_best_for_it_on_a_seed_of_its_own(tmp_path: Path) -> None:
    matrix = read_matrix(written(tmp_path, GOOD + TUNE))
    of_tries = tries(matrix)
    assert [cell.values["seed"] for cell in of_tries.cells()] == [0] * 4
    configs = [of_tries.config(cell, ()) for cell in of_tries.cells()]
    assert {(c.strategy.aggregation, c.optimizer.lr, c.optimizer.betas) for c in configs} == {
        (name, lr, (0.8, 0.9)) for name in ("fedavg", "ffa") for lr in (0.1, 0.2)
    }
    scores = dict(zip([cell.name for cell in of_tries.cells()], (0.5, 0.6, 0.7, 0.2), strict=True))
    lines = {name: {"state": "done", "accuracy": score, "perplexity": None} for name, score in scores.items()}
    chosen = tuned(matrix, lines)
    best = ("fedavg optimizer.lr=0.2 optimizer.betas=[0.8,0.9]", "ffa optimizer.lr=0.1 optimizer.betas=[0.8,0.9]")
    assert (chosen.axes.aggregation, chosen.bench.baseline, chosen.axes.seed) == (best, best[0], (1, 2))
    assert len({cell.name for cell in chosen.cells()}) == 4
    assert "chosen for it on seed 0, measured with 20% of the training examples" in markdown(chosen, {})
    for name in list(lines)[:2]:
        lines[name]["state"] = "failed"
    with pytest.raises(RunFailed, match="no settings could be chosen for fedavg: every try failed"):
        tuned(matrix, lines)


@pytest.mark.parametrize("private", [False, True])
def test_tries_that_no_epsilon_counts_are_said(tmp_path: Path, private: bool) -> None:
    epsilon = "[axes]\nepsilon = [8]\n" if private else "[axes]\n"
    told = markdown(read_matrix(written(tmp_path, GOOD.replace("[axes]\n", epsilon) + TUNE)), {})
    assert ("No epsilon counts these tries" in told) == private


def test_the_tries_never_see_the_test_set() -> None:
    data = Data([(f"text {number}", "a") for number in range(10)], [("test", "a")], ("a", "b"))
    tried = held_back(data, Tune(share=0.3))
    assert (tried.test, tried.training) == (data.training[:3], data.training[3:])


def test_a_missing_extra_says_how_to_install_it() -> None:
    with pytest.raises(EnvironmentProblem, match=r"pip install 'edgelam-fl\[bench\]'"):
        runner.check_extra(find_module=lambda name: None)


def test_another_matrix_in_the_same_folder_is_refused_and_a_longer_axis_is_not(tmp_path: Path) -> None:
    out = tmp_path / "out"
    runner.Results(out, read_matrix(written(tmp_path, GOOD))).add({"name": "x", "state": "done"})
    longer = read_matrix(written(tmp_path, GOOD.replace("[1, 2]", "[1, 2, 3]")))
    assert runner.Results(out, longer).lines() == {"x": {"name": "x", "state": "done"}}
    with pytest.raises(ConfigError, match="cells of another matrix"):
        runner.Results(out, read_matrix(written(tmp_path, GOOD + "[bench]\ndevices = 7")))


@pytest.mark.parametrize("name", ["strategies", "selection", "robustness", "privacy", "channel"])
def test_the_committed_results_go_on_behind_their_finished_cells(name: str, tmp_path: Path) -> None:
    """More seeds or strategies in a committed matrix must not run its finished cells again."""
    matrix = read_matrix(MATRICES / f"{'default' if name == 'strategies' else name}.toml")
    shutil.copytree(MATRICES.parent / "results" / name, tmp_path / name)
    lines = runner.Results(tmp_path / name, matrix).lines()
    done = {line["name"] for line in lines.values() if line["state"] == "done"}
    assert done & {cell.name for cell in matrix.cells()} == done != set()


def test_a_line_that_was_cut_off_is_no_cell(tmp_path: Path) -> None:
    results = runner.Results(tmp_path, read_matrix(written(tmp_path, GOOD)))
    results.add({"name": "x", "state": "failed"})
    results.add({"name": "x", "state": "done"})
    with results.path.open("a") as file:
        file.write('{"name": "y", "sta')
    assert results.lines() == {"x": {"name": "x", "state": "done"}}


def test_allocators_share_a_training_where_time_is_virtual(tmp_path: Path) -> None:
    axes = "[axes]\nselection = ['all', 'random']\nbandwidth = ['uniform', 'equalise', 'lyapunov']\n"
    matrix = read_matrix(written(tmp_path, axes))
    assert [len(cells) for cells in matrix.trainings(matrix.cells())] == [1] * 6
    matrix = read_matrix(written(tmp_path, axes + "[base.wireless]\nbandwidth_hz = 1e5"))
    trainings = matrix.trainings(matrix.cells())
    assert [[cell.values["bandwidth"] for cell in cells] for cells in trainings] == [
        ["uniform", "equalise", "lyapunov"]
    ] * 2
    assert [{cell.values["selection"] for cell in cells} for cells in trainings] == [{"all"}, {"random"}]


@pytest.mark.parametrize("file", sorted(MATRICES.glob("*.toml")), ids=lambda file: file.stem)
def test_the_committed_matrices_can_be_read(file: Path) -> None:
    matrix = read_matrix(file)
    cells = matrix.cells()
    assert len({cell.name for cell in cells}) == len(cells)
    assert len(cells) == np.prod([len(getattr(matrix.axes, axis)) for axis in type(matrix.axes).model_fields])


def test_an_epsilon_turns_privacy_on_and_none_turns_it_off(tmp_path: Path) -> None:
    base = '[base.privacy]\nclip = 0.5\nmode = "device"\n'
    matrix = read_matrix(written(tmp_path, f"[axes]\nepsilon = ['none', 8, 0.5]\n{base}"))
    names = ["fedavg_all_uniform_iid_8_none_1", "fedavg_all_uniform_iid_8_none_epsilon-8_1"]
    assert [cell.name for cell in matrix.cells()] == [*names, "fedavg_all_uniform_iid_8_none_epsilon-0.5_1"]
    none, eight, half = (matrix.config(cell, ()).privacy for cell in matrix.cells())
    assert none == RunConfig().privacy
    assert [(one.mode, one.epsilon, one.clip) for one in (eight, half)] == [("device", 8.0, 0.5), ("device", 0.5, 0.5)]
    without_mode = read_matrix(written(tmp_path, "[axes]\nepsilon = 2\n"))
    assert without_mode.config(without_mode.cells()[0], ()).privacy.mode == "central"


# ---------------------------------------------------------------- data


@pytest.mark.parametrize("partition", ["iid", "dirichlet:0.1", "size:1.0"])
def test_every_example_goes_to_one_device(partition: str) -> None:
    answers = [f"class {number % 10}" for number in range(4000)]
    dealt = deal(answers, 10, partition, seed=3)
    assert sorted(row for part in dealt for row in part) == list(range(4000))
    assert dealt == deal(answers, 10, partition, seed=3)
    assert dealt != deal(answers, 10, partition, seed=4)


def test_a_skew_by_label_and_one_by_size_are_skewed() -> None:
    answers = [f"class {number % 10}" for number in range(4000)]
    by_label = [Counter(answers[row] for row in part) for part in deal(answers, 10, "dirichlet:0.1", 1)]
    assert np.mean([max(counts.values()) / counts.total() for counts in by_label]) > 0.4
    sizes = [len(part) for part in deal(answers, 10, "size:1.0", 1)]
    assert max(sizes) > 4 * min(sizes)
    assert {len(part) for part in deal(answers, 10, "iid", 1)} == {400}


def test_too_few_examples_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"30 training examples are too few for 20 devices \(bench.devices\)"):
        deal(["a"] * 30, 20, "iid", 1)


def test_devices_share_out_the_test_set_and_the_first_ones_attack(tmp_path: Path) -> None:
    matrix = read_matrix(written(tmp_path, "[bench]\ndevices = 3\n[axes]\nattack = 'noise:2'"))
    bench = Bench(dataset="../data/wordnet_sample.jsonl", examples=500, devices=3)
    data = load(bench, MATRICES)
    assert (len(data.training), len(data.test)) == (400, 100)
    write_cell(tmp_path, data, matrix.bench, matrix.cells()[0], hosts=1)
    nodes = read_federation(tmp_path)
    assert [(node.name, node.attack) for node in nodes] == [
        ("edge-1", ""), ("device-001", "noise"), ("device-002", "noise"), ("device-003", ""),
    ]  # fmt: skip
    measured = [(tmp_path / node.held_out).read_text("utf-8").splitlines() for node in nodes[1:]]
    assert list(map(len, measured)) == [34, 33, 33]
    assert len({line for lines in measured for line in lines}) == len(data.test)


def test_attacks_turn_the_update_round_or_drown_it() -> None:
    start, trained = {"m": np.zeros(2000, np.float32)}, {"m": np.full(2000, 0.5, np.float32)}
    assert np.allclose(sign_flip(start, trained, "")["m"], -0.5)
    sent = noise(start, trained, "seed")["m"]
    assert sent.dtype == np.float32
    assert np.std(sent) == pytest.approx(10 * 0.5, rel=0.1)
    assert np.array_equal(sent, noise(start, trained, "seed")["m"])
    assert not np.array_equal(sent, noise(start, trained, "other")["m"])


def test_a_cell_without_all_its_devices_is_no_result() -> None:
    joined = as_events({"event": "node_joined", "node": name, "role": "device"} for name in ("a", "b"))
    lost = NodeLost(round=2, node="b", reason="no reply within 120 s")
    runner.check_complete(joined, 2, honest=True)
    runner.check_complete([*joined, lost], 2, honest=False)
    with pytest.raises(RunFailed, match="2 of 3 devices answered: this machine may be too busy; run the command again"):
        runner.check_complete([*joined, joined[0]], 3, honest=True)
    with pytest.raises(RunFailed, match=r"b was lost in round 2 \(no reply within 120 s\)"):
        runner.check_complete([*joined, lost], 2, honest=True)


# ---------------------------------------------------------------- results


def line(aggregation: str, seed: int, accuracy: float) -> dict[str, object]:
    cell = {
        "aggregation": aggregation, "selection": "all", "bandwidth": "uniform", "partition": "iid", "rank": 8,
        "attack": "none", "seed": seed,
    }  # fmt: skip
    curve = [{"round": number, "accuracy": accuracy * number, "bytes": 100 * number} for number in (0, 1)]
    return {
        "name": f"{aggregation}_all_uniform_iid_8_none_{seed}", "cell": cell, "state": "done", "accuracy": accuracy,
        "perplexity": None, "bytes": 100, "aggregation_error": None, "seconds": 1.0, "curve": curve,
    }  # fmt: skip


def test_differences_are_taken_seed_by_seed(tmp_path: Path) -> None:
    matrix = read_matrix(written(tmp_path, GOOD))
    found = [line("fedavg", 1, 0.5), line("fedavg", 2, 0.7), line("ffa", 1, 0.6), line("ffa", 2, 0.81)]
    lines = {str(each["name"]): each for each in found}
    assert differences(matrix, lines)[("ffa",)] == pytest.approx([0.6 - 0.5, 0.81 - 0.7])
    text = markdown(matrix, lines)
    assert f"| ffa | 2 | {100 * (0.6 + 0.81) / 2:.2f} |" in text  # the seeds differ by 20 points, the pairs by one
    assert "Real differences to fedavg, by the corrected test at 5 %: ffa (+10.50 points)." in text


def test_a_difference_is_real_by_a_paired_test_that_is_corrected_for_all_comparisons() -> None:
    """p of t = 6.0622 and of 0.5774 with 2 degrees of freedom, computed by hand: 1 - t / sqrt(t^2 + 2)."""
    clear, faint, single = compared({("a",): [1.0, 1.5, 2.0], ("b",): [-0.5, 0.5, 0.5], ("c",): [9.0]}).values()
    t_clear, t_faint = 1.5 / (0.5 / 3**0.5), (0.5 / 3) / (3**-0.5 / 3**0.5)
    p_clear, p_faint = (1 - t / (t * t + 2) ** 0.5 for t in (t_clear, t_faint))
    assert (clear.p, faint.p) == (pytest.approx(2 * p_clear), pytest.approx(p_faint))
    assert (clear.low, clear.high) == (
        pytest.approx(1.5 - 4.302653 * 0.5 / 3**0.5),
        pytest.approx(1.5 + 1.242068, 1e-4),
    )
    assert [one.differs for one in (clear, faint, single)] == [False, False, False]  # uncorrected, the first would be
    assert p_clear < 0.05 < 2 * p_clear
    equal, zero = compared({("a",): [0.5, 0.5], ("b",): [0.0, 0.0]}).values()
    assert (equal.differs, zero.differs) == (True, False)


def test_a_reference_is_measured_with_the_first_three_seeds_and_told_with_their_number(tmp_path: Path) -> None:
    matrix = read_matrix(written(tmp_path, GOOD.replace("[1, 2]", "[4, 5, 6, 7]").replace('"ffa"', '"ffa", "flora"')))
    assert [cell.values["seed"] for cell in one_device(matrix).cells()] == [4, 5, 6]
    lines = {
        f"{ONE_DEVICE}{seed}": {"state": "reference", "what": "one", "accuracy": accuracy}
        for seed, accuracy in ((4, 0.5), (5, 0.6), (6, 0.7))
    }
    assert "| one | 3 | 60.00 | 10.00 |" in markdown(matrix, lines)
    numbers = {one["name"]: one["value"] for one in figures(matrix, lines)}
    assert (numbers["one: quality"], numbers["one: seeds"]) == (60.0, 3)


def test_what_privacy_costs_is_told_and_drawn(tmp_path: Path) -> None:
    text = GOOD.replace("[axes]\n", "[axes]\nepsilon = ['none', 8, 2]\n")
    matrix = read_matrix(written(tmp_path, text))
    cost = {"none": 0.0, 8.0: 0.1, 2.0: 0.3}
    lines = {}
    for number, cell in enumerate(matrix.cells()):
        accuracy = 0.8 - cost[cell.values["epsilon"]] - 0.0001 * number
        lines[cell.name] = line("fedavg", 1, accuracy) | {"name": cell.name, "cell": dict(cell.values)}
    told = markdown(matrix, lines)
    assert "| aggregation | epsilon | less no privacy | 95 % interval | p |" in told
    assert "| fedavg | 8 | -10.0" in told
    assert "Real differences to no privacy, by" in told
    drawn = over_epsilon(matrix, lines)
    assert drawn.count("<circle") == 6
    assert all(word in drawn for word in (">no privacy<", ">8<", ">2<", ">fedavg<", ">ffa<", ">accuracy, %<"))
    numbers = {one["name"]: one["value"] for one in figures(matrix, lines)}
    assert numbers["fedavg none: quality"] == pytest.approx(80.0 - 0.5 * 0.06, abs=0.05)
    assert numbers["ffa 2, less no privacy: mean"] == pytest.approx(-30.0, abs=0.05)
    assert numbers["ffa 2, less no privacy: low"] <= numbers["ffa 2, less no privacy: mean"]
    assert {"ffa 8, less fedavg: p", "fedavg none: seeds"} < set(numbers)
    assert over_epsilon(read_matrix(written(tmp_path, GOOD)), lines) == ""
    assert over_epsilon(matrix, {}) == ""


def test_a_selection_may_be_what_the_others_are_compared_with(tmp_path: Path) -> None:
    text = "[bench]\nbaseline = 'random'\n[axes]\nselection = ['random', 'all']\nbandwidth = ['uniform', 'equalise']\n"
    matrix = read_matrix(written(tmp_path, text))
    cells = [line("fedavg", 1, accuracy) for accuracy in (0.5, 0.6, 0.7, 0.8)]
    for each, cell in zip(cells, matrix.cells(), strict=True):
        each |= {"name": cell.name, "cell": cell.values}
    lines = {str(each["name"]): each for each in cells}
    apart = differences(matrix, lines)
    assert apart == {
        ("all", "uniform"): [pytest.approx(0.7 - 0.5)], ("all", "equalise"): [pytest.approx(0.8 - 0.6)],
    }  # fmt: skip


def test_a_class_that_the_test_set_alone_would_hold_is_learned(tmp_path: Path) -> None:
    rows = [
        f'{{"text": "t{n}", "label": "{"rare" if n % 20 == 0 else "usual"} {n if n % 20 == 0 else ""}"}}'
        for n in range(200)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(rows), encoding="utf-8")
    data = load(Bench(dataset="data.jsonl", test=0.3), tmp_path)
    assert {answer for _, answer in data.training} == set(data.classes)
    assert len(data.training) + len(data.test) == 200
    assert 50 <= len(data.test) <= 60


def test_examples_that_were_cut_or_left_out_are_said_above_the_table(tmp_path: Path) -> None:
    joined = [
        {
            "event": "node_joined",
            "node": f"d{n}",
            "role": "device",
            "examples": 90,
            "held_out": 5,
            "cut": n,
            "skipped": 5,
        }
        for n in range(2)
    ]
    data = runner.outcome([*as_events(joined), *measured([{"perplexity": 2.0, "held_out_labels": 3}])])["data"]
    assert data == {"examples": 190, "cut": 1, "left_out": 10}
    matrix = read_matrix(written(tmp_path, GOOD))
    told = markdown(matrix, {name: {**line("fedavg", 1, 0.5), "data": data} for name in ("a",)})
    assert "Of 200 examples 1 were cut and 10 left out at task.max_tokens" in told
    assert "were cut" not in markdown(matrix, {"a": line("fedavg", 1, 0.5)})


def test_protocols_read_the_curve() -> None:
    cell = line("fedavg", 1, 0.5)
    assert at_budget(cell, "bytes", 99) == 0.0
    assert at_budget(cell, "bytes", 100) == 0.5
    assert cost_to(cell, "bytes", 0.5) == 100
    assert cost_to(cell, "bytes", 0.6) is None


def test_the_quality_of_several_devices_is_of_sums(tmp_path: Path) -> None:
    """Exp(sum / sum) and hits / examples, as a measurement over all their labels in one place gives."""
    causal = [(1.0, 200), (3.0, 29), (0.5, 28)]
    curve = runner.outcome(measured({"perplexity": math.exp(mean), "held_out_labels": n} for mean, n in causal))[
        "curve"
    ]
    assert curve[0]["perplexity"] == pytest.approx(math.exp(sum(m * n for m, n in causal) / 257), rel=1e-12)
    hits = [(14, 29), (28, 28)]
    of_classes = measured({"metrics": {"accuracy": h / n}, "held_out_labels": n, "perplexity": 2.0} for h, n in hits)
    assert runner.outcome(of_classes)["accuracy"] == pytest.approx(42 / 57, rel=1e-12)
    assert runner.outcome(measured([{}]))["curve"] == []
    diverged = measured([{"perplexity": None, "held_out_labels": 3}, {"perplexity": 2.0, "held_out_labels": 3}])
    with pytest.raises(
        RunFailed, match="its held-out perplexity after round 0 is beyond all numbers: training diverged"
    ):
        runner.outcome(diverged)


@pytest.mark.parametrize(
    ("measure", "ratio", "shown", "is_better"), [("sum rate", 14.5, 14.5, True), ("NMSE", 0.05, -13.0103, False)]
)
def test_radio_tasks_are_compared_by_their_own_measure(
    tmp_path: Path, measure: str, ratio: float, shown: float, is_better: bool
) -> None:
    found = [
        runner.outcome(measured([{"metrics": {measure: each}, "points": [["", 10, each, 4]]}]))
        for each in (ratio, 1.1 * ratio)
    ]
    assert found[0][measure] == pytest.approx(shown, rel=1e-5)
    assert (quality(found[1]) > quality(found[0])) is is_better
    lines = [{**line("fedavg", seed, 0.5), "accuracy": None, **one} for seed, one in enumerate(found, 1)]
    cells = {str(one["name"]): one for one in lines}
    matrix = read_matrix(written(tmp_path, GOOD))
    assert f"| {measure}, " in markdown(matrix, cells)


def test_samples_of_sectors_are_dealt_as_arrays_and_a_skew_deals_kinds(tmp_path: Path) -> None:
    bench = Bench(dataset="sectors", examples=90, test=0.2, devices=3)
    data = load(bench, tmp_path)
    assert (len(data.training), len(data.test), data.classes) == (72, 18, ())
    write_cell(tmp_path, data, bench, read_matrix(written(tmp_path, GOOD)).cells()[0], hosts=0)
    held = [np.load(tmp_path / f"device-00{number}.npz")["channels"] for number in (1, 2, 3)]
    assert sorted(len(channels) for channels in held) == [24, 24, 24]
    assert {channels.shape[1:] for channels in held} == {(8, 8)}
    test = [np.load(tmp_path / f"device-00{number}.test.npz")["channels"] for number in (1, 2, 3)]
    assert len({one.tobytes() for part in (*held, *test) for one in part}) == 90, "each sample is in one place"
    assert {kind for _, kind in data.training} == {"wide", "narrow", "uneven"}
    check_fits("sectors", data, "beamforming")
    for kind, learns in (("channel-prediction", "the arrays up, speed_kmh"), ("causal-lm", "texts")):
        with pytest.raises(ConfigError, match=f"'sectors' holds the arrays channels, and .* learns from {learns}"):
            check_fits("sectors", data, kind)


def measured(devices: Iterable[dict[str, object]]) -> list[Event]:
    """Returns one round whose devices measured."""
    found = [{"name": f"d{number}", **device} for number, device in enumerate(devices)]
    return as_events([{"event": "round_done", "round": 1, "devices": found}])


def test_every_kind_of_line_is_told() -> None:
    """A reference has no virtual time: where its training came through as the first of all, telling so must not end the matrix."""
    done = {"state": "done", "perplexity": None, "accuracy": 0.5, "bytes": 2e6, "virtual_seconds": 3.0, "seconds": 4.0}
    reference = {key: value for key, value in done.items() if key in command.REFERENCE_KEYS}
    assert command.summary_line({"name": "a", **done}) == "a: accuracy 0.5000, 2.0 MB, 3 virtual s, 4 s"
    assert command.summary_line({"name": "b", "state": "reference", **reference}) == "b: accuracy 0.5000, 2.0 MB, 4 s"
    assert command.summary_line({"name": "c", "state": "failed", "reason": "busy"}) == "c failed: busy"


@pytest.mark.parametrize(
    ("of_flower", "own"), [("IidPartitioner", "iid"), ("DirichletPartitioner:0.5", "dirichlet:0.5")]
)
def test_names_of_flwr_datasets_deal_as_the_own_ones(of_flower: str, own: str) -> None:
    answers = [f"class {number % 3}" for number in range(90)]
    assert deal(answers, 3, of_flower, seed=4) == deal(answers, 3, own, seed=4)
    with pytest.raises(ConfigError, match="'IidPartitioner' and 'DirichletPartitioner:ALPHA' are the first two"):
        deal(answers, 3, "ShardPartitioner", seed=4)
