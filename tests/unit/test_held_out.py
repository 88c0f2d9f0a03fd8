"""What is held out: the share, what stays together, and what is always learned."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from edgelam_fl.tasks.data import Chat, Pair, device_pairs
from edgelam_fl.tasks.held_out import sample, set_aside
from edgelam_fl.wire import edgelam_pb2 as pb


def answers(pairs: list[Pair]) -> set[str]:
    return {answer for _, answer in pairs}


def distinct(count: int) -> list[Pair]:
    return [(f"question {n}", f"text {n}") for n in range(count)]


def labelled(chance: random.Random) -> list[Pair]:
    """Examples with few different answers, most of them perhaps with one, and with questions that come again."""
    weights = [chance.gammavariate(0.5, 1) + 1e-9 for _ in range(chance.randrange(2, 12))]
    names = [f"class {number}" for number in range(len(weights))]
    count, questions = chance.randrange(20, 300), chance.choice([30, 100, 10**6])
    return [(f"question {chance.randrange(questions)}", chance.choices(names, weights)[0]) for _ in range(count)]


def test_on_200_label_distributions_the_share_is_met_no_pair_is_on_both_sides_and_every_class_is_learned() -> None:
    chance = random.Random(18)
    for _ in range(200):
        pairs, share, classes = labelled(chance), chance.choice([0.05, 0.1, 0.2, 0.25]), chance.random() < 0.5
        training, held_out = set_aside(pairs, share, classes=classes)
        assert abs(len(held_out) - share * len(pairs)) <= 1
        assert Counter(training + held_out) == Counter(pairs)
        assert not set(training) & set(held_out)
        assert answers(training) == answers(pairs)


@pytest.mark.parametrize("share", [0.001, 0.1, 0.25, 0.999])
def test_different_texts_are_held_out_by_their_hash(share: float) -> None:
    """The rule of all releases so far, which answers alone decided: known perplexities stay what they were."""
    import hashlib

    pairs = distinct(90)
    by_hash = sorted(pairs, key=lambda pair: hashlib.sha256(pair[1].encode()).hexdigest())
    expected = by_hash[: min(89, max(1, round(share * 90)))]
    assert set(set_aside(pairs, share)[1]) == set(expected)
    same_question: list[Pair] = [("Describe it.", answer) for _, answer in pairs]
    assert answers(set_aside(same_question, share)[1]) == answers(expected)


def test_the_order_of_the_file_decides_nothing() -> None:
    pairs = labelled(random.Random(3))
    shuffled = random.Random(4).sample(pairs, len(pairs))
    for one, other in zip(set_aside(pairs, 0.1), set_aside(shuffled, 0.1), strict=True):
        assert sorted(map(str, one)) == sorted(map(str, other))


def test_texts_that_come_again_stay_on_one_side() -> None:
    pairs: list[Pair] = [(f"question {n}.{copy}", f"text {n}") for n in range(20) for copy in range(3)]
    training, held_out = set_aside(pairs, 0.3)
    assert not answers(training) & answers(held_out)
    assert Counter(answer for _, answer in held_out).most_common()[-1] == (held_out[-1][1], 3)
    assert len(held_out) == 18


def test_questions_that_come_again_stay_on_one_side() -> None:
    pairs: list[Pair] = [(f"question {n % 30}", f"class {n % 3}" if n < 30 else f"class {n % 2}") for n in range(60)]
    training, held_out = set_aside(pairs, 0.2, classes=True)
    assert len(held_out) == 12
    assert not {text for text, _ in training} & {text for text, _ in held_out}


def test_a_frequent_text_does_not_take_the_whole_held_out_side() -> None:
    pairs: list[Pair] = [*distinct(60), *((f"other {n}", "I do not know.") for n in range(40))]
    training, held_out = set_aside(pairs, 0.1)
    assert len(held_out) == 10
    assert not answers(training) & answers(held_out)


def test_the_last_examples_of_a_rare_answer_are_learned() -> None:
    pairs: list[Pair] = [(f"question {n}", "no" if n == 7 else "yes") for n in range(100)]
    training, held_out = set_aside(pairs, 0.9)
    assert len(held_out) == 90
    assert answers(training) == {"yes", "no"}


def test_groups_are_combined_to_meet_the_share() -> None:
    """Going by hashes alone, three of the first group would leave no room for one of five."""
    pairs: list[Pair] = [pair for n, size in enumerate([3] + [5] * 9) for pair in [(f"q{n}", f"text {n}")] * size]
    for share in (0.1, 0.2, 0.3):
        assert abs(len(set_aside(pairs, share)[1]) - share * len(pairs)) <= 1


@pytest.mark.parametrize(
    ("pairs", "share", "classes", "held_out"),
    [
        (distinct(1), 0.5, False, 0),
        (distinct(2), 0.1, False, 1),
        (distinct(2), 0.999, False, 1),
        (distinct(2), 0.1, True, 0),  # each is the only one of its class
        (distinct(40), 0.0, False, 0),
        (distinct(1) * 9, 0.3, False, 0),  # all equal
        (distinct(2) * 10, 0.1, False, 0),  # two groups of ten, and two examples are asked for
        (distinct(2) * 10, 0.4, False, 10),
        ([("a", "x"), ("a", "y"), ("a", "x"), ("a", "y")], 0.25, False, 2),
    ],
)
def test_little_data(pairs: list[Pair], share: float, classes: bool, held_out: int) -> None:
    training, measured = set_aside(pairs, share, classes=classes)
    assert len(measured) == held_out
    assert Counter(training + measured) == Counter(pairs)


def test_chats_go_by_their_messages() -> None:
    def chat(question: str, answer: str) -> Pair:
        return Chat(({"role": "user", "content": question}, {"role": "assistant", "content": answer})), answer

    def call(number: int) -> Pair:
        calls = [{"function": {"name": "look_up", "arguments": {"number": number}}}]
        return Chat(
            ({"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": "", "tool_calls": calls})
        ), ""

    training, held_out = set_aside([chat(f"{n % 20}?", f"text {n}") for n in range(40)], 0.25)
    assert len(held_out) == 10
    prompts = [
        {str(prompt.messages[0]) for prompt, _ in side if isinstance(prompt, Chat)} for side in (training, held_out)
    ]
    assert not prompts[0] & prompts[1]
    assert len(set_aside([call(n) for n in range(20)], 0.2)[1]) == 4  # not one answer "" for all


def test_yes_and_no_are_learned_and_measured(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    rows = [{"question": f"Is {n} even?", "answer": "no" if n % 2 else "yes"} for n in range(100)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = pb.TaskSettings(
        kind="causal-lm",
        template="chat",
        loss_on="answer",
        held_out=0.1,
        prompt_field="question",
        answer_field="answer",
    )
    training, held_out, *_ = device_pairs(file, settings)
    assert (len(training), len(held_out)) == (90, 10)
    assert answers(training) == answers(held_out) == {"yes", "no"}


def test_the_same_examples_are_sampled_whatever_their_order_and_however_many_are_added() -> None:
    pairs = [(f"q{n}", f"a{n}") for n in range(50)]
    few, more = sample(pairs, 5), sample(pairs, 20)
    assert (len(few), len(more)) == (5, 20)
    assert set(few) < set(more)
    assert set(sample(pairs[::-1], 5)) == set(few)
    assert few == [pair for pair in pairs if pair in few]
    assert sample(pairs, 0) == sample(pairs, 50) == sample(pairs, 60) == pairs
