"""Reads prompts and answers from a device's file, and orders those that are learned. Knows texts, not tokens."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from edgelam_fl.errors import DataError, nearest
from edgelam_fl.names import printable
from edgelam_fl.tasks.files import Row, check_number, scan
from edgelam_fl.tasks.held_out import sample, set_aside
from edgelam_fl.tasks.shapes import Chat as Chat
from edgelam_fl.tasks.shapes import Fields, Unfit, pair_of
from edgelam_fl.tasks.shapes import Message as Message
from edgelam_fl.tasks.shapes import Pair as Pair
from edgelam_fl.tasks.shapes import Prompt as Prompt


class TaskSettings(Protocol):
    """The settings of a task, as in a run file's [task] section and in a plan."""

    @property
    def kind(self) -> str: ...
    @property
    def classes(self) -> Sequence[str]: ...
    @property
    def max_tokens(self) -> int: ...
    @property
    def template(self) -> str: ...
    @property
    def loss_on(self) -> str: ...
    @property
    def weighting(self) -> str: ...
    @property
    def too_long(self) -> str: ...
    @property
    def label_smoothing(self) -> float: ...
    @property
    def packing(self) -> bool: ...
    @property
    def metrics(self) -> Sequence[str]: ...


class DataSettings(TaskSettings, Protocol):
    """The settings for reading a device's file, as in a run file's [task] and [data] sections and in a plan."""

    @property
    def prompt_field(self) -> str: ...
    @property
    def more_prompt_fields(self) -> Sequence[str]: ...
    @property
    def answer_field(self) -> str: ...
    @property
    def held_out(self) -> float: ...
    @property
    def bad_lines(self) -> str: ...


class DevicePairs(NamedTuple):
    """The examples of a device as they are read: pairs, untokenized, or samples of arrays."""

    training: list[Any]  # pairs, or of a task of values tasks.arrays.Sample
    held_out: list[Any]
    bad: tuple[str, ...] = ()
    """Places of the examples that were left out because they cannot be read (data.bad_lines = "skip")."""
    unread: tuple[str, ...] = ()
    """Names of fields that several examples have and that nothing is learned from."""
    unmeasured: int = 0
    """Held-out examples beyond those to measure with (federation.evaluate_examples)."""
    also_learned: int = 0
    """Examples of an evaluation file that are learned as well, since the data has them too."""
    read: tuple[str, ...] = ()
    """Names of the fields that something is learned from, in the order of the first example that has them."""

    def sampled(self, most: int) -> DevicePairs:
        """Returns these examples with at most `most` held-out ones, as `sample` chooses them; 0: all."""
        kept = sample(self.held_out, most)
        return self._replace(held_out=kept, unmeasured=len(self.held_out) - len(kept))


class FilePairs(NamedTuple):
    """The examples of a file, and what was left out; `bad`, `unread` and `read` as in `DevicePairs`."""

    pairs: list[Pair]
    bad: tuple[str, ...]
    unread: tuple[str, ...]
    read: tuple[str, ...] = ()


def device_pairs(path: Path, settings: DataSettings, eval_file: Path | None = None) -> DevicePairs:
    """Reads a device's file and splits its examples into those that are learned and those that are only measured.

    eval_file: has the examples to measure; all of `path` are then learned, whatever the share `held_out`. Raises DataError if a
    file does not fit the task.
    """
    found = pairs_by(settings, path)
    _check_prompts(path, found.pairs, settings)
    most = getattr(settings, "evaluate_examples", 0)  # callers may know only the keys that every run has
    if eval_file is None:
        sides = set_aside(found.pairs, settings.held_out, classes=bool(settings.classes))
        return DevicePairs(*sides, found.bad, found.unread, read=found.read).sampled(most)
    measured = pairs_by(settings, eval_file)
    _check_prompts(eval_file, measured.pairs, settings)
    learned = set(found.pairs)
    bad = (*found.bad, *(f"evaluation file, {place}" for place in measured.bad))
    unread = tuple(dict.fromkeys((*found.unread, *measured.unread)))
    both = sum(pair in learned for pair in measured.pairs)
    return DevicePairs(found.pairs, measured.pairs, bad, unread, also_learned=both, read=found.read).sampled(most)


def pairs_by(settings: DataSettings, path: Path) -> FilePairs:
    """Reads every example of a file by the settings of a run. Raises DataError as they say."""
    fields = _fields(settings)
    skip_bad = getattr(settings, "bad_lines", "refuse") == "skip"
    try:
        return read_file(path, fields, skip_bad=skip_bad)
    except DataError as error:
        if skip_bad or not error.place:
            raise
        words = f"{error} (data.bad_lines = 'skip' leaves such examples out)"
        raise DataError(words, error.fault, error.place) from error


def place_of(path: Path, pair: Pair, settings: DataSettings) -> str:
    """Returns the place of the first example of a file that is this pair; empty if none is."""
    fields = _fields(settings)
    rows = (row for row in scan(path) if not isinstance(row, DataError))
    return next((place for place, values in rows if _is_pair(pair, values, fields)), "")


def answer_of(values: Mapping[str, Any], settings: DataSettings) -> str | None:
    """Returns the answer of one record; None for a record that cannot be read by these settings."""
    try:
        return pair_of(values, _fields(settings))[0][1]
    except Unfit:
        return None


def _is_pair(pair: Pair, values: Mapping[str, Any], fields: Fields) -> bool:
    try:
        return pair_of(values, fields)[0] == pair
    except Unfit:
        return False


def _fields(settings: DataSettings) -> Fields:
    more = getattr(settings, "more_prompt_fields", ())  # callers may know only the keys that every run has
    return Fields((settings.prompt_field, *more), settings.answer_field, tuple(settings.classes))


def read_pairs(path: Path, prompt_field: str, answer_field: str, classes: Sequence[str] = ()) -> list[Pair]:
    """Reads the (prompt, answer) pair of each example.

    `classes`: the answers allowed; empty: any. Raises DataError with the place of an example and what it lacks.
    """
    return read_file(path, Fields((prompt_field,), answer_field, tuple(classes))).pairs


def read_file(path: Path, fields: Fields, *, skip_bad: bool = False) -> FilePairs:
    """Reads every example of a file.

    skip_bad: leaves out the examples that cannot be read, instead of raising DataError for the first one.
    """
    pairs: list[Pair] = []
    bad: list[str] = []
    first_bad: DataError | None = None
    examples_with: Counter[str] = Counter()
    used: set[str] = set()
    for row in scan(path):
        try:
            pair, own, names = _pair(path, row, fields)
        except DataError as error:
            if not skip_bad:
                raise
            first_bad = first_bad or error
            bad.append(error.place)
            continue
        pairs.append(pair)
        examples_with.update(names)
        used.update(own)
    if first_bad and not pairs:
        raise DataError(
            f"none of the {len(bad)} examples can be used; the first: {first_bad}", first_bad.fault, first_bad.place
        )
    check_number(path, len(pairs))
    absent = [name for name in fields.prompt[1:] if name in used and not examples_with[name]]
    if absent:
        raise DataError(
            f"no example of {path} has the field {absent[0]!r} ({printable(nearest(absent[0], examples_with), 200)}); data.fields "
            f"in the run file names them",
            "missing-field",
        )
    # What stands in one example alone may be data in the place of a name.
    unread = [name for name, examples in examples_with.items() if examples > 1 and name not in used]
    read = tuple(name for name in examples_with if name in used)
    return FilePairs(pairs, tuple(bad), tuple(unread), read)


def _pair(path: Path, row: Row, fields: Fields) -> tuple[Pair, Collection[str], Collection[str]]:
    """Returns the pair of an example, the names of the fields that it is made of, and those of all its fields."""
    if isinstance(row, DataError):
        raise row
    place, values = row
    try:
        return *pair_of(values, fields), values.keys()
    except Unfit as error:
        raise DataError(f"{path}, {place}{error}", error.fault, place) from error


def _check_prompts(path: Path, pairs: list[Pair], settings: DataSettings) -> None:
    """Refuses passages, which have no prompt, and chats, whose prompt is not plain text, with settings that cannot learn from them."""
    passages = any(prompt == "" for prompt, _ in pairs)
    chats = any(isinstance(prompt, Chat) for prompt, _ in pairs)
    if settings.classes:
        if passages or chats:
            raise DataError(
                f"{path} holds {'passages' if passages else 'chats'}; a classification needs a text and a class",
                "passages" if passages else "chat",
            )
    elif passages and (settings.template, settings.loss_on) != ("plain", "all"):
        raise DataError(
            f"{path} holds passages without questions: they need task.template = 'plain' and task.loss_on = 'all', "
            f"got {settings.template!r} and {settings.loss_on!r}",
            "passages",
        )
    elif chats and settings.template != "chat":
        raise DataError(f"{path} holds chats: they need task.template = 'chat', got {settings.template!r}", "chat")


def batch_indices(examples: int, batch_size: int, step: int, seed: int, node: str) -> list[int]:
    """Returns the examples that a device takes at a global step: one shuffle per epoch, continued across epochs.

    Depends only on its arguments, so that a node that restarts or misses a round needs no cursor.
    """
    wanted = range(step * batch_size, (step + 1) * batch_size)
    orders: dict[int, list[int]] = {}
    for epoch in {position // examples for position in wanted}:
        orders[epoch] = list(range(examples))
        random.Random(f"{seed}/{node}/{epoch}").shuffle(orders[epoch])
    return [orders[position // examples][position % examples] for position in wanted]
