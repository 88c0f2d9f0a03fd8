"""Looks into the files of a local run's devices before anything starts: what of each is learned, and whether that can be done.

A device would find the same faults a minute later, and say them in a code alone: its messages may quote the data. Knows no
processes but the one that tokenizes.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelam_fl.config import RunConfig
from edgelam_fl.errors import ConfigError, DataError
from edgelam_fl.federation.template import in_fork
from edgelam_fl.model.source import ModelSource
from edgelam_fl.names import printable
from edgelam_fl.plan.making import task_settings
from edgelam_fl.tasks.arrays import Sample, ranges_of
from edgelam_fl.tasks.data import Chat, DevicePairs, Pair
from edgelam_fl.tasks.files import format_of
from edgelam_fl.tasks.kinds import device_data, make_task, place_in, values_of
from edgelam_fl.telemetry.events import DataCounts
from edgelam_fl.telemetry.human import human_count
from edgelam_fl.wire import edgelam_pb2 as pb

if TYPE_CHECKING:
    from edgelam_fl.tasks.base import Made, Task

_PLACES_SAID, _CLASSES_SAID = 5, 12
_SHOWN_CHARACTERS, _SHOWN_LINES = 400, 12  # of each stretch of an example, and of the whole
_LEARNED = ("⟦", "⟧")


Ranges = Mapping[str, tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class FileSeen:
    """The examples that a run finds in one device's file, and what is left out of them."""

    file: str
    format: str
    shape: str
    """What its examples are, in words."""
    fields: tuple[str, ...]
    """Names of the fields that something is learned from; none of a plain text."""
    examples: int
    held_out: int
    counts: DataCounts
    max_tokens: int
    tokens: int
    """Tokens of all examples to learn."""
    bad_places: tuple[str, ...]
    """Places of the first examples that cannot be read."""
    unread: tuple[str, ...]
    """Names of fields that nothing is learned from."""
    classes: tuple[tuple[str, int], ...] = ()
    """How many of the examples to learn have each class of task.classes; none for another task."""
    first: tuple[tuple[str, bool], ...]
    """The first example as the model gets it: texts in their order, each with whether it is learned."""
    remarks: tuple[str, ...] = ()
    """What else is to be known of the examples, as a sentence without a full stop each."""
    eval_file: str = ""
    """The file of the examples that are held out; empty: they are a share of its own."""
    also_learned: int = 0
    """Examples of that file that are learned as well."""
    learned_ranges: Ranges = field(default_factory=dict)
    """Of samples of arrays, what those to learn lie between: numbers per sample by key, lengths of axes by name."""
    measured_ranges: Ranges = field(default_factory=dict)
    """The same of those to measure."""

    def in_words(self) -> list[str]:
        """Returns a sentence on what is read, and one for each thing that is left out or cut, without full stops."""
        fields = f" from {', '.join(map(repr, self.fields))}" if self.fields else ""
        measured = f"{self.held_out} of {self.eval_file} to measure" if self.eval_file else f"{self.held_out} held out"
        said = f"{self.file} ({self.format}, {self.shape}{fields}): {human_count(self.examples, 'example')} to learn, {measured}"
        if self.also_learned:
            said += f". WARNING: {self.also_learned} of those to measure are learned as well"
        lines = [said, *self.counts.in_words(self.examples, self.held_out, self.max_tokens)]
        if self.classes:
            most = ", ".join(f"{count} {printable(name, 40)}" for name, count in self.classes[:_CLASSES_SAID])
            lines.append(f"to learn: {most}{' ...' if len(self.classes) > _CLASSES_SAID else ''}")
        if self.bad_places:
            more = " ..." if self.counts.bad > len(self.bad_places) else ""
            lines.append(f"cannot be read: {', '.join(self.bad_places)}{more}")
        if self.unread:
            one = "array" if self.shape == _SAMPLES else "field"
            fields = f"the {one}" if len(self.unread) == 1 else f"the {one}s"
            lines.append(f"not learned: {fields} {printable(', '.join(self.unread), 200)}")
        return [*lines, *self.remarks]

    def words_of_first(self, model: str) -> str:
        """Says what the lines of the first example are."""
        begin, end = _LEARNED
        return f"The first example as {model} gets it; what is between {begin} and {end} is learned:"

    def first_in_lines(self) -> list[str]:
        """Returns the first example as lines of text, the learned part between marks."""
        begin, end = _LEARNED
        text = "".join(
            f"{begin}{_shortened(text)}{end}" if learned else _shortened(text) for text, learned in self.first
        )
        lines = [printable(line, 2 * _SHOWN_CHARACTERS) for line in text.rstrip("\n").split("\n")]
        if len(lines) > _SHOWN_LINES:
            lines[_SHOWN_LINES // 2 : -_SHOWN_LINES // 2] = ["..."]
        return [wrapped for line in lines for wrapped in textwrap.wrap(line, 110, break_on_hyphens=False) or [""]]


def outside_words(seen: Sequence[FileSeen]) -> Iterator[str]:
    """Says which evaluation files have samples outside of what any device learns, such as other speeds or numbers of users."""
    for each in (each for each in seen if each.eval_file):
        for name, (low, high) in each.measured_ranges.items():
            learned = [one.learned_ranges[name] for one in seen if name in one.learned_ranges] or [(low, high)]
            least, most = min(lows for lows, _ in learned), max(highs for _, highs in learned)
            if low < least or high > most:
                yield (
                    f"WARNING: {each.eval_file} has {name} = {_range(low, high)} to measure, outside of the {_range(least, most)} that are "
                    f"learned"
                )


def _range(low: float, high: float) -> str:
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _shortened(text: str) -> str:
    half = _SHOWN_CHARACTERS // 2
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:half]} ... {text[-half:]}"


def eval_files(devices: int, eval_data: Sequence[Path]) -> list[Path | None]:
    """Returns the evaluation file of each device; None: it measures with a share of its data.

    eval_data: none, one for all devices, or one each. Raises ConfigError for another number.
    """
    if len(eval_data) not in (0, 1, devices):
        raise ConfigError(
            f"--eval-data must be given once for all devices, or once per device ({human_count(devices, 'time')}), got it "
            f"{human_count(len(eval_data), 'time')}"
        )
    return [*eval_data] if len(eval_data) == devices else [*eval_data, None][:1] * devices


def check_files(config: RunConfig, data: Sequence[Path], eval_data: Sequence[Path] = ()) -> None:
    """Raises DataError for the first file that cannot be read as the run file says; takes no model. eval_data: as of `eval_files`."""
    for file, eval_file in zip(data, eval_files(len(data), eval_data), strict=True):
        device_data(file, task_settings(config), eval_file)


def look_into_files(
    config: RunConfig, source: ModelSource, data: Sequence[Path], eval_data: Sequence[Path] = ()
) -> list[FileSeen]:
    """Reads every file and makes its examples with the run's task; takes seconds, since PyTorch is imported for it.

    eval_data: as of `eval_files`. Raises DataError for the first file that cannot be read, or that the run's model and settings
    cannot learn from.
    """
    settings = task_settings(config).SerializeToString()
    return in_fork(look_into, list(data), settings, source.folder, eval_files(len(data), eval_data))


def look_into(
    files: Sequence[Path], settings: bytes, tokenizer_folder: Path, eval_files: Sequence[Path | None] = ()
) -> list[FileSeen]:
    """Raises DataError for the first file of whose training examples none can be learned, or one cannot be written as a text.

    `settings`: a serialized TaskSettings. `tokenizer_folder`: with the model's tokenizer. `eval_files`: of each file's device; empty: none.
    """
    parsed = pb.TaskSettings.FromString(settings)
    task = make_task(parsed, tokenizer_folder)
    each = zip(files, eval_files or [None] * len(files), strict=True)
    return [_seen(file, eval_file, task, parsed) for file, eval_file in each]


def _seen(file: Path, eval_file: Path | None, task: Task, settings: pb.TaskSettings) -> FileSeen:
    from edgelam_fl.tasks.base import template_refuses  # brings torch, which the fork has

    found = device_data(file, settings, eval_file)
    try:
        made, measured = task.examples(found.training), task.examples(found.held_out)
    except DataError as error:
        places = ((file, found.training), (eval_file or file, found.held_out))
        raise next(filter(None, (_placed(task, *place, settings) for place in places)), error) from error
    if not made.examples:
        raise DataError(
            f"{file}: no example for training has an answer within task.max_tokens = {settings.max_tokens}; raise it"
            f"{template_refuses(made)}",
            "no-answer-fits",
        )
    shape = _shape(found.training, settings)
    return FileSeen(
        file=str(file), format=format_of(file), shape=shape, fields=found.read if shape != _PASSAGES else (),
        examples=len(made.examples), held_out=len(measured.examples), counts=_counts(found, made, measured),
        max_tokens=settings.max_tokens, tokens=sum(example.length for example in made.examples),
        bad_places=found.bad[:_PLACES_SAID], unread=found.unread, first=tuple(task.seen(made.examples[0])),
        classes=_class_counts(found.training, settings),
        eval_file=str(eval_file) if eval_file else "", also_learned=found.also_learned,
        remarks=(*made.remarks, *(f"to measure: {words}" for words in measured.remarks)),
        learned_ranges=_ranges(found.training, settings), measured_ranges=_ranges(found.held_out, settings),
    )  # fmt: skip


_PASSAGES, _CLASSES, _SAMPLES = "passages", "texts with a class", "samples"


def _shape(pairs: Sequence[Any], settings: pb.TaskSettings) -> str:
    """Says what the examples of a file are."""
    if values_of(settings.kind):
        return _SAMPLES
    if settings.classes:
        return _CLASSES
    kinds = {
        "chats" if isinstance(prompt, Chat) else _PASSAGES if not prompt else "questions and answers"
        for prompt, _ in pairs
    }
    return " and ".join(sorted(kinds))


def _ranges(examples: Sequence[Any], settings: pb.TaskSettings) -> Ranges:
    values = values_of(settings.kind)
    return ranges_of(examples, values.arrays) if values is not None else {}


def _class_counts(pairs: Sequence[Any], settings: pb.TaskSettings) -> tuple[tuple[str, int], ...]:
    """Counts the examples of each class, the most frequent first; a class without any counts 0."""
    counts = Counter(answer for _, answer in pairs) if settings.classes else {}
    return tuple(sorted(((name, counts[name]) for name in settings.classes), key=lambda pair: -pair[1]))


def _counts(found: DevicePairs, *made: Made) -> DataCounts:
    return DataCounts(
        bad=len(found.bad) + sum(each.refused for each in made),
        skipped=sum(each.skipped for each in made),
        cut=sum(each.cut for each in made),
        cut_answers=sum(each.cut_answers for each in made),
        unmeasured=found.unmeasured,
    )


def _placed(
    task: Task, file: Path, pairs: Sequence[Pair] | Sequence[Sample], settings: pb.TaskSettings
) -> DataError | None:
    """Returns the error of the first example that cannot be written as a text, with the file, its place and the way out."""
    for pair in pairs:
        try:
            task.examples([pair])
        except DataError as error:
            place = place_in(file, pair, settings)
            words = f"{file}, {place}: {error} (data.bad_lines = 'skip' leaves such examples out)"
            return DataError(words, error.fault, place)
    return None
