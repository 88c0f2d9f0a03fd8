"""Has the model answer some of a device's held-out questions, and measures the answers. Texts stay here: sums leave.

Knows tasks, tokens and metrics; knows no links. Neighbour: `node.play`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol, TypeVar, cast

from edgelam_fl.tasks.base import Example, Task
from edgelam_fl.tasks.causal_lm import question
from edgelam_fl.tasks.metrics import Metric, sums_of
from edgelam_fl.wire import edgelam_pb2 as pb

T = TypeVar("T")
Answer = Callable[
    [Sequence[list[int]], int, Collection[int]], list[list[int]]
]  # prompts, most tokens, stop ids -> answers


class WritesTexts(Protocol):
    """A task whose answers are texts."""

    @property
    def tokenizer(self) -> Any: ...
    @property
    def stop_ids(self) -> Collection[int]: ...


def measured_answers(
    task: Task, examples: Sequence[Example], settings: pb.TaskSettings, metrics: Mapping[str, Metric], answer: Answer
) -> dict[str, float]:
    """Returns the sums of the metrics over the answers to some of the examples, under the names of a report.

    `settings.metrics_examples` of them at most, evenly spread over all: the same in every round. answer: the model.
    """
    writes = cast("WritesTexts", task)
    asked = [found for found in map(question, evenly(examples, settings.metrics_examples)) if found is not None]
    answers = answer([prompt for prompt, _ in asked], settings.metrics_tokens, writes.stop_ids)

    def text(ids: Sequence[int]) -> str:
        return str(
            writes.tokenizer.decode([i for i in ids if i not in writes.stop_ids], skip_special_tokens=True)
        ).strip()

    pairs = [(text(said), text(truth)) for said, (_, truth) in zip(answers, asked, strict=True)]
    return sums_of(pairs, metrics)


def evenly(examples: Sequence[T], most: int) -> list[T]:
    """Returns at most `most` of some examples, at equal distances."""
    count = min(most, len(examples))
    return [examples[number * len(examples) // count] for number in range(count)]
