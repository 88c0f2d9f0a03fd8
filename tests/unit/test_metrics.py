"""Measures of answers: what they say of two texts, where functions of one's own come from, and how greedy answers are made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from edgelam_fl.bench.matrix import read_matrix
from edgelam_fl.bounds import DEFAULT_BOUNDS, Bounds, bounds_of_modules, check_modules
from edgelam_fl.config import TaskSection
from edgelam_fl.errors import ConfigError, Mismatch
from edgelam_fl.model.source import ModelSource
from edgelam_fl.node.answers import evenly, measured_answers
from edgelam_fl.node.examples import DeviceExamples
from edgelam_fl.node.service import StageHost
from edgelam_fl.plan.making import task_settings
from edgelam_fl.split.answers import greedy_answers
from edgelam_fl.tasks.base import Example, Task, Unit
from edgelam_fl.tasks.causal_lm import CausalLm, question
from edgelam_fl.tasks.kinds import check_task
from edgelam_fl.tasks.masking import IGNORED
from edgelam_fl.tasks.metrics import exact_match, load_metrics, means_of, rouge_l, sums_of
from edgelam_fl.telemetry.summary import mean_metrics
from edgelam_fl.wire import PROTOCOL_VERSION
from edgelam_fl.wire import edgelam_pb2 as pb
from tests.support import byte_tokenizer, run_config

OWN = """
def starts_alike(answer, truth):
    return answer[:1] == truth[:1]

def negative(answer, truth):
    return -1

def broken(answer, truth):
    raise KeyError(truth)
"""


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        ("the cat sat on the mat", "the cat sat on the mat", 1.0),
        ("police killed the gunman", "police kill the gunman", 3 / 4),  # the example of Lin, 2004
        ("the gunman kill police", "police kill the gunman", 2 / 4),
        ("a b c d", "a c", 2 * (2 / 4) * 1 / (2 / 4 + 1)),
        ("Zwölf Äpfel!", "zwölf äpfel", 1.0),
        ("", "something", 0.0),
        ("...", "...", 0.0),
    ],
)
def test_rouge_l(answer: str, truth: str, expected: float) -> None:
    assert rouge_l(answer, truth) == pytest.approx(expected)


def test_exact_match() -> None:
    assert [exact_match(*pair) for pair in ((" a b\n", "a b"), ("a  b", "a b"), ("A", "a"))] == [1, 0, 0]


def test_sums_become_means_over_answers() -> None:
    sums = sums_of([("a", "a"), ("b", "a"), ("a c", "a")], load_metrics(["exact_match", "rouge_l"], DEFAULT_BOUNDS))
    assert means_of(sums) == pytest.approx({"exact_match": 1 / 3, "rouge_l": (1 + 0 + 2 / 3) / 3})
    assert means_of({"correct": 2.0}) == means_of(sums_of([], {"exact_match": exact_match})) == {}
    assert mean_metrics([{"rouge_l": 0.5}, {"rouge_l": 1.0, "accuracy": 0.1}, {"rouge_l": None}]) == {"rouge_l": 0.75}


def test_a_metric_of_ones_own_comes_from_a_module_that_the_nodes_operator_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_measures.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(
        Mismatch, match=r"'own_measures:starts_alike' is not imported here.*--metrics own_measures` does"
    ):
        load_metrics(["own_measures:starts_alike"], Bounds())
    with pytest.raises(Mismatch, match="is not imported here"):
        load_metrics(["os:getenv"], bounds_of_modules(["own_measures"]))
    for allowed in ("own_measures", str(tmp_path)):
        found = load_metrics(["own_measures:starts_alike", "exact_match"], bounds_of_modules([allowed]))
        assert means_of(sums_of([("ab", "ac"), ("b", "a")], found)) == {
            "own_measures:starts_alike": 0.5,
            "exact_match": 0,
        }
    allowed_here = bounds_of_modules(["own_measures", "no_such_module"])
    with pytest.raises(Mismatch, match="has no such function here"):
        load_metrics(["own_measures:nothing"], allowed_here)
    with pytest.raises(Mismatch, match="cannot be imported here"):
        load_metrics(["no_such_module:f"], allowed_here)
    for name, words in (
        ("negative", "returned -1.0; allowed: numbers of at least 0"),
        ("broken", "failed on an answer: KeyError"),
    ):
        (metric,) = load_metrics([f"own_measures:{name}"], allowed_here).values()
        with pytest.raises(ConfigError, match=words) as caught:
            metric("a", "PRIVATE")
        assert "PRIVATE" not in caught.value.for_others()


def test_a_device_whose_operator_allows_no_such_module_is_refused_by_name_before_the_run(
    tiny: ModelSource, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text("".join(f'{{"question": "q{n}", "answer": "a"}}\n' for n in range(4)))
    task = task_settings(run_config(tiny.name, "task.metrics=own_measures:starts_alike"))
    asked = pb.ProfileRequest(protocol_version=PROTOCOL_VERSION, task=task)
    device = StageHost("a", no_link, lambda event: None, examples=DeviceExamples(tmp_path / "a.jsonl"))
    found = device.profile(asked)
    assert "edgelam client --metrics own_measures" in found.problem
    assert found.code == Mismatch.code
    assert not StageHost("e", no_link, lambda event: None).profile(asked).problem, "a host measures nothing"


def no_link(*_: object) -> Any:
    raise AssertionError("a profile needs no link")


def test_an_option_must_name_a_module() -> None:
    check_modules("--metrics", ["mine", "my.own"])
    with pytest.raises(
        ConfigError, match="--metrics 'a/b' must name a package or a module, as in --metrics my_metrics"
    ):
        check_modules("--metrics", ["a/b"])


def test_a_classification_has_no_texts_as_answers() -> None:
    with pytest.raises(ConfigError, match="answers with a class, whose accuracy is measured anyway"):
        check_task(TaskSection(kind="classification", classes=("a", "b"), metrics=("rouge_l",)))


def test_simulations_do_not_answer(tmp_path: Path) -> None:
    file = tmp_path / "m.toml"
    file.write_text("[base.task]\nmetrics = ['rouge_l']\n")
    with pytest.raises(ConfigError, match="simulated nodes keep"):
        read_matrix(file)


# ---------------------------------------------------------------- greedy answers


def test_the_question_of_an_example_is_what_comes_before_its_last_answer() -> None:
    no = IGNORED
    assert question(Example([1, 2, 3, 4], [no, no, 3, 4], 2)) == ([1, 2], [3, 4])
    assert question(Example([1, 2, 3, 4, 5, 6], [no, 2, no, no, 5, no], 2)) == ([1, 2, 3, 4], [5])
    assert question(Example([1, 2], [1, 2], 1)) is None


def test_answers_end_at_a_stop_token_at_the_limit_and_at_the_longest_text() -> None:
    """By a model that counts: the next token is the number of tokens so far."""
    asked: list[list[int]] = []

    def ask(units: Sequence[Unit], task: Task) -> None:
        asked.append([length for unit in units for length in unit.row_lengths])
        for unit in units:
            rows = task.loss_rows(unit.labels)
            assert rows is not None
            logits = torch.nn.functional.one_hot(torch.tensor(unit.row_lengths), 50).float()
            task.loss(logits, unit.labels, rows)

    def cut(texts: Sequence[Example]) -> list[list[Example]]:
        return [[text] for text in texts[:1]] + ([list(texts[1:])] if texts[1:] else [])

    prompts = [[9] * 2, [9] * 4, [9] * 6, [9] * 10]
    found = greedy_answers(prompts, most=3, longest=8, stop_ids={5}, cut=cut, ask=ask)
    assert found == [[2, 3, 4], [4], [6, 7], []]
    assert asked == [[2, 4, 6], [3, 5, 7], [4]]


def test_questions_are_spread_evenly_over_the_examples() -> None:
    examples = [Example([number], [number], 1) for number in range(10)]
    assert [example.ids[0] for example in evenly(examples, 4)] == [0, 2, 5, 7]
    assert evenly(examples[:2], 5) == examples[:2]


def test_what_is_measured_are_texts_without_special_tokens(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    task = CausalLm(tmp_path, TaskSection(template="plain"))
    examples = task.examples([("q", "Yes!"), ("r", "No.")]).examples
    seen: list[str] = []

    def answer(prompts: Sequence[list[int]], most: int, stop_ids: object) -> list[list[int]]:
        seen.extend(tokenizer.decode(prompt) for prompt in prompts)
        return [tokenizer("Yes!")["input_ids"] for _ in prompts]

    settings = pb.TaskSettings(metrics_examples=5, metrics_tokens=9)
    sums = measured_answers(task, examples, settings, {"exact_match": exact_match}, answer)
    assert seen == ["q\n", "r\n"]
    assert sums == {"answers": 2, "answers/exact_match": 1}
