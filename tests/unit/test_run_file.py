from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from edgelam_fl.cli.run_file import COMMON, allowed, described, explain, write_run_file
from edgelam_fl.config import RunConfig, known_keys, parse_run_file
from edgelam_fl.errors import ConfigError, DataError, ModelError
from edgelam_fl.model.source import ModelSource
from edgelam_fl.tasks.suggest import choose_fields
from tests.support import write_tiny_llama

SECTIONS = {name: field.annotation for name, field in RunConfig.model_fields.items()}
KEYS = [(section, key) for section, model in SECTIONS.items() for key in model.model_fields]


def uncommented(text: str) -> str:
    """As a user would: the '#' before each key taken away. Text begins with '# '."""
    return re.sub(r"^#(?=\w)", "", text, flags=re.MULTILINE)


def field_of(section: str, key: str):  # type: ignore[no-untyped-def]
    return SECTIONS[section].model_fields[key]


def data_file(folder: Path, *rows: Mapping[str, object]) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_new_file_is_the_defaults_with_and_without_its_comments(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    assert write_run_file(file, [], "") == []
    text = file.read_text(encoding="utf-8")
    assert parse_run_file(text, source="x") == RunConfig()
    assert parse_run_file(uncommented(text), source="x") == RunConfig()


def test_a_new_file_has_every_key_and_shows_the_common_ones(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    write_run_file(file, [], "")
    text = file.read_text(encoding="utf-8")

    def keys(text: str) -> set[str]:
        return {f"{section}.{key}" for section, values in tomllib.loads(text).items() for key in values}

    assert set(known_keys()) >= COMMON
    assert keys(text) == COMMON
    assert keys(uncommented(text)) == {f"{section}.{key}" for section, key in KEYS}
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize(("section", "key"), KEYS, ids=".".join)
def test_every_key_is_described(section: str, key: str) -> None:
    field = field_of(section, key)
    assert field.description, f"{section}.{key} has no description in config.py"
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
        assert all(inner.description for inner in field.annotation.model_fields.values())


@pytest.mark.parametrize(
    ("section", "key", "expected"),
    [
        ("model", "base", "fp32 | bf16 | int8 | nf4 | auto"),
        ("split", "front", "0 or more"),
        ("split", "hosts", "number | auto"),
        ("split", "cuts", "equal | auto | list of numbers"),
        ("split", "fronts", "table of numbers by name"),
        ("split", "checkpointing", "true | false | auto"),
        ("split", "window", "number | auto"),
        ("task", "packing", "true | false"),
        ("lora", "alpha", "above 0"),
        ("lora", "dropout", "at least 0, below 1"),
        ("lora", "train", "list of front | hosts | back"),
        ("optimizer", "lr", "above 0, at most 10"),
        ("strategy", "aggregation", ""),
        ("strategy", "options", "table of tables by name"),
    ],
)
def test_ranges_are_those_of_the_models(section: str, key: str, expected: str) -> None:
    assert allowed(field_of(section, key)) == expected


def test_a_key_of_keys_explains_each() -> None:
    assert (
        "prompt: what the model is asked, or a list of fields, joined by empty lines; answer: what the model should answer"
        in explain(field_of("data", "fields"))
    )


def test_what_is_explained_is_a_run_file_of_the_same_configuration() -> None:
    overrides = ["lora.rank=4", "split.hosts=3", "split.cuts=[10, 20]", "split.fronts.pi-1=1", "data.fields.prompt=q"]
    config = parse_run_file("[run]\nseed = 3", source="x", overrides=overrides)
    text = described(config, mark_changed=True)
    assert parse_run_file(text, source="x") == config
    marked = set(re.findall(r"^(\w+) = .*# changed, default", text, flags=re.MULTILINE))
    assert marked == {"rank", "hosts", "cuts", "fronts", "seed"}
    assert re.search(r"^rank = 4 +# changed, default 8; 1 to 1024: rank of every adapter$", text, flags=re.MULTILINE)
    # Too long to have its explanation beside it: it follows.
    assert re.search(r'^fields = .*"q".*\n +# changed, default \{ prompt = "question", ', text, flags=re.MULTILINE)


def written(tmp_path: Path, data: Path, model: str = "") -> tuple[RunConfig, str]:
    """Writes a run file for data, and returns it as a run reads it, and what was said."""
    file = tmp_path / "run.toml"
    file.unlink(missing_ok=True)
    said = "\n".join(write_run_file(file, [data], model)).replace(str(data), "DATA")
    return parse_run_file(file.read_text(encoding="utf-8"), source="x"), said


def test_the_fields_of_a_data_file(tmp_path: Path) -> None:
    rows = [{"id": n, "module": "m", "Frage": f"f{n}", "note": " " * n, "Response": f"r{n}"} for n in range(4)]
    config, said = written(tmp_path, data_file(tmp_path, *rows))
    assert said.splitlines() == [
        "data.fields: prompt = 'module', answer = 'Response'",
        *(f"not learned: the field {name!r} of DATA, which no key names" for name in ("id", "Frage", "note")),
    ], "no numbers, nothing that may be empty; each column left out is said"
    assert (config.data.fields.prompt, config.data.fields.answer) == ("module", "Response")


ASKED, SAID = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("row", "sections", "says"),
    [
        ({"messages": [ASKED, SAID]}, {}, ["task.template = 'chat': DATA holds chats in 'messages'"]),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "source": "web"},
            {},
            ["task.template = 'chat': DATA holds chats in 'conversations'", "not learned: the field 'source' of DATA, which no key names"],
        ),
        (
            {"dialog": [ASKED, SAID]},
            {"data": {"fields": {"prompt": "dialog"}}},
            ["task.template = 'chat': DATA holds chats in 'dialog'", "data.fields: prompt = 'dialog', the whole chats"],
        ),
        (
            {"messages": [ASKED, SAID], "question": "q", "answer": "a"},
            {"data": {"fields": {"prompt": "messages"}}},
            ["task.template = 'chat': DATA holds chats in 'messages'"],
        ),
        (
            {"prompt": [ASKED], "completion": [SAID]},
            {"data": {"fields": {"prompt": "prompt", "answer": "completion"}}},
            ["task.template = 'chat': DATA holds messages", "data.fields: prompt = 'prompt', answer = 'completion'"],
        ),
        (
            {"instruction": "Do.", "input": "this", "output": "done"},
            {"data": {"fields": {"prompt": ("instruction", "input"), "answer": "output"}}},
            ["data.fields: prompt = ['instruction', 'input'], which become one prompt, answer = 'output'"],
        ),
        (
            {"sentence1": "It rains.", "sentence2": "It is wet.", "answer": "yes"},
            {"data": {"fields": {"prompt": ("sentence1", "sentence2"), "answer": "answer"}}},
            ["data.fields: prompt = ['sentence1', 'sentence2'], which become one prompt, answer = 'answer'"],
        ),
        (
            {"text": "A passage.", "url": "u"},
            {"task": {"template": "plain", "loss_on": "all"}},
            ["task.template = 'plain', task.loss_on = 'all': DATA holds passages, which are learned whole", "not learned: the field 'url' of DATA, which no key names"],
        ),
        (
            {"question": "q", "answer": "a", "sources": [{"url": "u"}]},
            {"data": {"fields": {"prompt": "question", "answer": "answer"}}},
            ["data.fields: prompt = 'question', answer = 'answer'", "not learned: the field 'sources' of DATA, which no key names"],
        ),
    ],
)  # fmt: skip
def test_what_init_writes_fits_the_data(
    tmp_path: Path, row: dict[str, Any], sections: dict[str, Any], says: list[str]
) -> None:
    config, said = written(tmp_path, data_file(tmp_path, row, row, row))
    assert config == RunConfig.model_validate(sections)
    assert said.splitlines()[: len(says)] == says


def test_passages_of_a_plain_text(tmp_path: Path) -> None:
    data = tmp_path / "passages.txt"
    data.write_text("One.\n\nTwo.\n\nThree.\n")
    config, _ = written(tmp_path, data)
    assert (config.task.template, config.task.loss_on) == ("plain", "all")


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["plant", "animal"], ("animal", "plant")),
        ([0, 1, 10, 2], ("0", "1", "2", "10")),
        ([True, False], ("False", "True")),
    ],
)
def test_few_short_answers_become_classes(tmp_path: Path, labels: list[Any], classes: tuple[str, ...]) -> None:
    rows = [{"text": f"text {n}", "label": labels[n % len(labels)]} for n in range(12)]
    config, said = written(tmp_path, data_file(tmp_path, *rows))
    assert (config.task.kind, config.task.classes, config.model.name) == ("classification", classes, "minilm-l6")
    assert (config.data.fields.prompt, config.data.fields.answer) == ("text", "label")
    assert f"task.classes: {len(classes)} classes of 'label' ({', '.join(classes)})" in said


def test_answers_of_a_language_model_stay_texts(tmp_path: Path, tiny: ModelSource) -> None:
    rows = [{"question": f"q{n}", "answer": "yes" if n % 2 else "no", "label": n % 2} for n in range(8)]
    config, said = written(tmp_path, data_file(tmp_path, *rows), tiny.name)
    assert config.task.kind == "causal-lm"
    assert "'answer' has 2 different answers (no, yes), learned as texts" in said
    numbers = data_file(tmp_path, *({"text": f"t{n}", "label": n % 2} for n in range(8)))
    with pytest.raises(DataError, match="'label' holds numbers, which are classes, and this model answers with text"):
        written(tmp_path, numbers, tiny.name)


def test_data_that_no_run_file_fits_are_refused_as_a_run_refuses_them(tmp_path: Path) -> None:
    preference = data_file(tmp_path, *[{"prompt": "p", "chosen": "a", "rejected": "b"}] * 2)
    with pytest.raises(DataError, match=r"holds a preference \(chosen, rejected\)"):
        written(tmp_path, preference)
    broken = data_file(tmp_path, {"question": "q", "answer": "a\ud83d"})
    with pytest.raises(DataError, match="line 1 holds half of a character"):
        written(tmp_path, broken)


def test_a_field_that_is_empty_once_is_not_replaced_by_another(tmp_path: Path) -> None:
    rows = [{"id": f"i{n}", "question": f"q{n}", "answer": f"a{n}" if n != 2 else ""} for n in range(5)]
    data = data_file(tmp_path, *rows)
    with pytest.raises(DataError, match=r"line 3: 'answer' must be a text that is not empty"):
        written(tmp_path, data)


@pytest.mark.parametrize("odd", [{}, {"conversations": []}, {"question": "q"}, {"question": "q", "answer": None}])
def test_an_example_without_its_answer_is_named_by_its_line(tmp_path: Path, odd: dict[str, Any]) -> None:
    good = [{"question": f"q{n}", "answer": "yes" if n % 2 else "no"} for n in range(4)]
    for rows, line in (([odd, *good], 1), ([*good, odd], 5)):
        with pytest.raises(DataError, match=rf"a\.jsonl, line {line}[: ]"):
            written(tmp_path, data_file(tmp_path, *rows))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["answer", "question"], ("question", "answer")),
        (["a", "b", "c"], ("a", "b")),
        (["context", "instruction", "output"], ("instruction", "output")),
        (["id", "text", "label"], ("text", "label")),
        (["answer", "x"], ("x", "answer")),
        (["y", "question"], ("question", "y")),
        (["id", "question", "answerKey"], ("question", "answerKey")),
        (["doc_id", "Unnamed: 0", "article", "highlights"], ("article", "highlights")),
    ],
)
def test_which_field_is_which(names: list[str], expected: tuple[str, str]) -> None:
    assert choose_fields(Path("x"), names) == expected


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("answer", 1, "1"),
        ("answers", {"text": ["a"]}, "{'text': ['a']}"),
        ("label", 1.0, "1.0"),
        ("answer", True, "True"),
    ],
)
def test_answers_that_are_no_texts_are_not_replaced_by_another_field(
    tmp_path: Path, name: str, value: object, shown: str
) -> None:
    data = data_file(tmp_path, *({"question": f"q{n}", "subject": "maths", name: value} for n in range(3)))
    with pytest.raises(
        DataError, match=re.escape(f"'{name}' seems to hold the answers, and it holds {shown}, not a text")
    ):
        written(tmp_path, data)


def test_classes_that_differ_in_case_or_spaces_alone_are_said(tmp_path: Path) -> None:
    labels = ["good", "Good ", "bad"]
    _, said = written(tmp_path, data_file(tmp_path, *({"text": f"t{n}", "label": labels[n % 3]} for n in range(9))))
    assert "look at the classes 'Good ' and 'good', which differ in case or spaces alone" in said


def test_data_with_one_text_is_refused_and_nothing_written(tmp_path: Path) -> None:
    data = data_file(tmp_path, {"only": "a", "n": 1}, {"only": "b", "n": 2})
    with pytest.raises(DataError, match=r"has 1 field with a text in every example \(only\); two are needed"):
        write_run_file(tmp_path / "run.toml", [data], "")
    assert not (tmp_path / "run.toml").exists()


def test_a_file_that_exists_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("mine")
    with pytest.raises(ConfigError, match=r"run\.toml exists; give another name"):
        write_run_file(file, [], "")
    assert file.read_text() == "mine"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written: No such file"):
        write_run_file(tmp_path / "none" / "run.toml", [], "")


def test_a_model_that_fits_changes_its_name_only(tmp_path: Path, tiny: ModelSource) -> None:
    file = tmp_path / "run.toml"
    write_run_file(file, [], tiny.name)
    assert parse_run_file(file.read_text(encoding="utf-8"), source="x") == RunConfig.model_validate(
        {"model": {"name": tiny.name}}
    )


def test_a_model_of_few_layers_gets_ends_that_leave_one(tmp_path: Path) -> None:
    small = write_tiny_llama(tmp_path / "small", layers=4)
    file = tmp_path / "run.toml"
    write_run_file(file, [], str(small))
    split = parse_run_file(file.read_text(encoding="utf-8"), source="x").split
    assert (split.front, split.back) == ((4 - 1) // 2, (4 - 1) // 2)


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not built in"):
        write_run_file(tmp_path / "run.toml", [], "no/such-model")


def test_a_model_without_a_chat_template_gets_a_plain_one(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "model", layers=3)
    for file in model.glob("chat_template*"):
        file.unlink()
    asked = data_file(tmp_path, *({"question": f"q{n}", "answer": f"a{n}"} for n in range(3)))
    config, said = written(tmp_path, asked, str(model))
    assert config.task.template == "plain"
    assert "task.template = 'plain': the model has no chat template" in said
    with pytest.raises(DataError, match="holds chats, and this model has no chat template"):
        written(tmp_path, data_file(tmp_path, *[{"messages": [ASKED, SAID]}] * 2), str(model))
