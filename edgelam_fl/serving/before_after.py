"""Answers questions with a run's base model and with its result, for the run's page. Knows no page."""

from __future__ import annotations

from collections.abc import Iterable

from edgelam_fl.errors import ConfigError
from edgelam_fl.model.source import find_model
from edgelam_fl.serving.chat import check_can_talk
from edgelam_fl.serving.results import Result
from edgelam_fl.telemetry.report.answers import Answer

ANSWER_TOKENS = 64


def check_can_answer(result: Result, questions: Iterable[str]) -> None:
    """Raises ConfigError or ModelError for a run that answers no questions here, and for an empty question."""
    check_can_talk(result.config, None)
    if not all(question.strip() for question in questions):
        raise ConfigError("--ask is empty; it takes a question, as in --ask 'What does abs return?'")
    result.check_base(find_model(result.config.model.name))


def answers_of(result: Result, questions: Iterable[str]) -> list[Answer]:
    """Returns greedy answers of at most `ANSWER_TOKENS` tokens, before and after the run."""
    from edgelam_fl.serving.generate import answer

    asked = list(dict.fromkeys(questions))
    before = [answer(result.config, None, question, ANSWER_TOKENS) for question in asked]
    after = [answer(result.config, result.adapter, question, ANSWER_TOKENS) for question in asked]
    return [Answer(question=q, before=b, after=a) for q, b, a in zip(asked, before, after, strict=True)]
