"""Says how a file of data is best read: which keys of a run file it needs. Guesses by names that are common in data sets.

Reads by the reader that runs use. Knows no models, but whether one classifies and whether it has a chat template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgelam_fl.errors import DataError
from edgelam_fl.names import printable
from edgelam_fl.tasks.files import PASSAGE, read_records
from edgelam_fl.tasks.shapes import CHATS, PREFERENCE, is_blank, is_chat, shown
from edgelam_fl.telemetry.human import human_count

_PROMPTS = ("question", "prompt", "instruction", "input", "query", "problem", "text", "sentence", "user", "context")
_ANSWERS = ("answer", "response", "completion", "output", "reply", "solution", "label", "target", "assistant", "class")
_ASKED = ("question", "prompt", "instruction", "query")  # may have something beside them that they are about
_BESIDE = ("input", "context", "passage")
_SECOND = {
    "premise": "hypothesis",
    "sentence1": "sentence2",
    "question1": "question2",
    "text1": "text2",
}  # of two texts with a class
_IDS = ("", "id", "idx", "index", "uid", "uuid", "guid")
_CLASSES = ("label", "labels", "target", "class", "category")
_TOPICS = ("topic", "intent", "sentiment", "emotion", "genre", "rating", "stars", "polarity")  # if they have few values
_ABOUT = (
    "source",
    "lang",
    "language",
    "split",
    "domain",
    "url",
    "file",
    "license",
    "date",
    "meta",
)  # never a class by itself
_MOST_CLASSES, _LONGEST_CLASS = 50, 40
_OF_EACH_ANSWER = 4  # so many examples per different answer are worth a hint
_OF_EACH_CLASS = 5  # so many examples per different value make short values classes

CLASSIFICATION = "classification"
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Suggestion:
    """Keys by section as a run file has them, and a line for each choice that says what it is made of."""

    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)

    @property
    def classifies(self) -> bool:
        return self.sections.get("task", {}).get("kind") == CLASSIFICATION


def suggest(
    files: Sequence[Path], classifies: bool | None, has_chat_template: bool = True, task: str = ""
) -> Suggestion:
    """Chooses the keys for the files of one run's devices, which are read alike.

    classifies: whether the model answers with classes; None: no model was chosen. task: the kind of task that was asked for; empty:
    the data decide. Raises DataError for a file that is broken or that no keys fit.
    """
    rows = list[Values]()
    for file in files:
        records = read_records(file)
        for place, values in records:
            if {"chosen", "rejected"} <= values.keys():
                raise DataError(f"{file}, {place}{PREFERENCE}", "preference", place)
        rows += [values for _, values in records]
    more = f" (and {len(files) - 1} more)" if len(files) > 1 else ""
    path = f"{files[0]}{more}"
    names = list(dict.fromkeys(name for row in rows for name in row))
    chats = next((name for name in [*CHATS, *names] if _are_chats(rows, name)), "")
    texts = [name for name in names if _are_texts(rows, name)]
    completions = any(
        is_chat(row.get(name)) for name in names if name.lower() in (*_PROMPTS, *_ANSWERS) for row in rows
    )
    if not has_chat_template and (chats or completions):
        raise DataError(f"{path} holds chats, and this model has no chat template; give another --model", "chat")
    if chats and (chats in CHATS or not _known(names, _ANSWERS)):
        found = _for_chats(path, chats, names)
    elif completions:
        found = _for_completions(path, names)
    elif names == [PASSAGE] or (
        "text" in texts and not _known(names, _ANSWERS) and not _class_field(rows, names, task)
    ):
        found = _for_passages(path)
    else:
        found = _for_answers(path, rows, names, texts, classifies, task)
    if (classifies or task == CLASSIFICATION) and not found.classifies:
        who = "the model answers with classes" if classifies else f"--task {task} learns classes"
        raise DataError(
            f"{who}, and {path} holds none: it needs a text and one of at most {_MOST_CLASSES} short answers", "columns"
        )
    return found


def _are_chats(rows: Sequence[Values], name: str) -> bool:
    """Whether a field holds a chat in every example; one with a common name, in most of them."""
    common = name in CHATS
    chats = sum(is_chat(row.get(name)) or (common and isinstance(row.get(name), str)) for row in rows)
    return chats == len(rows) or (common and 2 * chats >= len(rows) > 0)


def _are_texts(rows: Sequence[Values], name: str) -> bool:
    """Whether a field holds a text that is not empty in every example; one with a common name, in most of them.

    A question that is missing once is a fault of that example, which its reader names, and no reason to ask by another field.
    """
    texts = sum(isinstance(row.get(name), str) and bool(row[name].strip()) for row in rows)
    return texts == len(rows) or (name.lower() in (*_PROMPTS, *_ANSWERS) and 2 * texts >= len(rows))


def _for_chats(path: str, name: str, names: Sequence[str]) -> Suggestion:
    said = [f"task.template = 'chat': {path} holds chats in {name!r}"]
    if name in CHATS and "question" not in names:
        return Suggestion({}, said)
    return Suggestion(
        {"data": {"fields": {"prompt": name}}}, [*said, f"data.fields: prompt = {name!r}, the whole chats"]
    )


def _for_completions(path: str, names: Sequence[str]) -> Suggestion:
    prompt, answer = choose_fields(path, list(names))
    said = [f"task.template = 'chat': {path} holds messages", f"data.fields: prompt = {prompt!r}, answer = {answer!r}"]
    return Suggestion({"data": {"fields": {"prompt": prompt, "answer": answer}}}, said)


def _for_passages(path: str) -> Suggestion:
    return Suggestion(
        {"task": {"template": "plain", "loss_on": "all"}},
        [f"task.template = 'plain', task.loss_on = 'all': {path} holds passages, which are learned whole"],
    )


def _for_answers(
    path: str, rows: Sequence[Values], names: Sequence[str], texts: Sequence[str], classifies: bool | None, task: str
) -> Suggestion:
    numbered = [name for name in names if name.lower() in (*_CLASSES, *_TOPICS)]
    labels = [name for name in numbered if all(isinstance(row.get(name), int) for row in rows)]
    beside = "" if _known(names, _ANSWERS) else _class_field(rows, names, task)
    fit = [name for name in names if name in texts or name in labels]
    labels += [beside] if beside in fit and beside not in labels else []
    unfit = next((name for name in names if name not in fit and _is_answer(name)), "")
    if unfit and not _known(fit, _ANSWERS):
        raise DataError(
            f"{path}: {unfit!r} seems to hold the answers, and it holds {_first(rows, unfit)}, not a text in every example; write "
            f"answers as texts (classes may be whole numbers), or name other fields as data.fields in a run file",
            "columns",
        )
    prompt, answer = choose_fields(path, fit, labels)
    classes = _classes(rows, answer)
    if answer in labels and answer not in texts and classifies is False:
        raise DataError(
            f"{path}: {answer!r} holds numbers, which are classes, and this model answers with text; give a model that classifies, "
            f"such as --model minilm-l6, or write the classes' names into the data",
            "columns",
        )
    pairs = [_SECOND.get(prompt.lower(), ""), *(_BESIDE if prompt.lower() in _ASKED else ())]
    beside = next((name for name in pairs if name not in (prompt, answer) and _may_be_texts(rows, name)), "")
    asked: str | list[str] = [prompt, beside] if beside else prompt
    sections: dict[str, dict[str, Any]] = {"data": {"fields": {"prompt": asked, "answer": answer}}}
    joined = ", which become one prompt" if isinstance(asked, list) else ""
    said = [f"data.fields: prompt = {asked!r}{joined}, answer = {answer!r}"]
    if classes and _are_classes(classes, rows, prompt, answer, classifies, task):
        sections["task"] = {"kind": CLASSIFICATION, "classes": classes}
        other = "" if task or classifies else "; --task causal-lm learns them as texts"
        said.append(
            f"task.kind = {CLASSIFICATION!r}, task.classes: {len(classes)} classes of {answer!r} ({_some(classes)}){other}"
        )
        said += [
            f"look at the classes {one!r} and {other!r}, which differ in case or spaces alone"
            for one, other in _alike(classes)
        ]
    elif classes and _OF_EACH_ANSWER * len(classes) <= len(rows):
        said.append(
            f"{answer!r} has {len(classes)} different answers ({_some(classes)}), learned as texts; --task {CLASSIFICATION} would classify"
        )
    return Suggestion(sections, said)


def _are_classes(
    classes: Sequence[str], rows: Sequence[Values], prompt: str, answer: str, classifies: bool | None, task: str
) -> bool:
    """Returns whether short answers are learned as classes: as asked, as the model can, else by the names and numbers of the data."""
    is_class = answer.lower() in _CLASSES
    if not is_class and 2 * len(classes) > len(rows):
        return False
    if task or classifies is not None:
        return task == CLASSIFICATION or (not task and bool(classifies))
    if is_class:
        return True
    is_asked = prompt.lower() in _ASKED or answer.lower() in _ANSWERS
    return not is_asked and _OF_EACH_CLASS * len(classes) <= len(rows)


def _class_field(rows: Sequence[Values], names: Sequence[str], task: str) -> str:
    """Returns the field beside a text whose few short values are classes; empty if there is none, or another task was asked for."""
    if task not in ("", CLASSIFICATION):
        return ""
    others = [name for name in names if name.lower() not in (*_PROMPTS, *_ABOUT) and not _is_id(name)]
    likely = [name for name in others if name.lower() in _TOPICS] or (others if task or len(others) == 1 else [])
    return next((name for name in likely if _has_few_values(rows, name)), "")


def _has_few_values(rows: Sequence[Values], name: str) -> bool:
    """Returns whether a field holds a few short texts, or numbers if its name is that of classes, each of them often."""
    kinds = (str, int) if name.lower() in _TOPICS else str
    fit = all(isinstance(row.get(name), kinds) for row in rows)
    return fit and 0 < _OF_EACH_CLASS * len(_classes(rows, name)) <= len(rows)


def _is_answer(name: str) -> bool:
    return name.lower() in _ANSWERS or name.lower().removesuffix("s") in _ANSWERS


def _first(rows: Sequence[Values], name: str) -> str:
    """Writes the first value of a field that is no text; "nothing" if there is none."""
    values = (row.get(name) for row in rows)
    return next((shown(value) for value in values if value is not None and not isinstance(value, str)), "nothing")


def _alike(classes: Sequence[str]) -> list[tuple[str, str]]:
    """Returns pairs of classes that are written alike but for case and spaces."""
    first: dict[str, str] = {}
    return [
        (one, name) for name in classes if (one := first.setdefault(" ".join(name.casefold().split()), name)) != name
    ]


def _may_be_texts(rows: Sequence[Values], name: str) -> bool:
    """Whether a field holds nothing but texts, some of them not empty."""
    return all(isinstance(row.get(name) or "", str) for row in rows) and any(row.get(name) for row in rows)


def _classes(rows: Sequence[Values], name: str) -> list[str]:
    """Returns the different answers in order, if they look like classes; else none. An example may lack its answer."""
    found = {str(row[name]) for row in rows if not is_blank(row.get(name))}
    if not 2 <= len(found) <= _MOST_CLASSES or any(len(one) > _LONGEST_CLASS or "\n" in one for one in found):
        return []
    return sorted(found, key=lambda one: (0, int(one), "") if one.isdecimal() else (1, 0, one))


def choose_fields(path: object, names: list[str], labels: Sequence[str] = ()) -> tuple[str, str]:
    """Chooses (prompt, answer) by names that are common in data sets, else the first two. DataError for fewer than two.

    labels: those of the names that can only be answers.
    """
    if len(names) < 2:
        raise DataError(
            f"{path} has {human_count(len(names), 'field')} with a text in every example ({_some(names) or 'none'}); two are needed, "
            f"a question and its answer",
            "columns",
        )
    answer = _known(names, _ANSWERS) or (labels[0] if labels else "")
    askable = [name for name in names if name != answer and name not in labels and not _is_id(name)]
    prompt = _known(askable, _PROMPTS)
    others = [name for name in askable if name != prompt]
    if not (prompt or others) or not (answer or others[not prompt :]):
        return choose_fields(path, askable)
    prompt = prompt or others.pop(0)
    return prompt, answer or others.pop(0)


def _is_id(name: str) -> bool:
    """Whether a field by its name numbers examples."""
    lowered = name.lower()
    return lowered in _IDS or lowered.endswith(("_id", "-id")) or lowered.startswith("unnamed:")


def _known(names: Sequence[str], known: tuple[str, ...]) -> str:
    lowered = {name.lower(): name for name in names}
    return next((lowered[word] for word in known if word in lowered), "")


def _some(names: Sequence[str]) -> str:
    return printable(", ".join(names), 80)
