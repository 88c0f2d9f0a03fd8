from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
from pydantic import BaseModel

from edgelam_fl.cli.run_file import COMMON, allowed, choose_fields, described, explain, text_fields, write_run_file
from edgelam_fl.config import RunConfig, known_keys, parse_run_file
from edgelam_fl.errors import ConfigError, DataError, ModelError
from edgelam_fl.model.source import ModelSource
from tests.support import write_tiny_llama

SECTIONS = {name: field.annotation for name, field in RunConfig.model_fields.items()}
KEYS = [(section, key) for section, model in SECTIONS.items() for key in model.model_fields]


def uncommented(text: str) -> str:
    """As a user would: the '#' before each key taken away. Text begins with '# '."""
    return re.sub(r"^#(?=\w)", "", text, flags=re.MULTILINE)


def field_of(section: str, key: str):  # type: ignore[no-untyped-def]
    return SECTIONS[section].model_fields[key]


def data_file(folder: Path, *rows: dict[str, object]) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_new_file_is_the_defaults_with_and_without_its_comments(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    assert write_run_file(file, None, "") == []
    text = file.read_text(encoding="utf-8")
    assert parse_run_file(text, source="x") == RunConfig()
    assert parse_run_file(uncommented(text), source="x") == RunConfig()


def test_a_new_file_has_every_key_and_shows_the_common_ones(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    write_run_file(file, None, "")
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
        ("split", "checkpointing", "true | false"),
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


def test_the_fields_of_a_data_file(tmp_path: Path) -> None:
    rows = [{"id": n, "module": "m", "Frage": f"f{n}", "note": " " * n, "Response": f"r{n}"} for n in range(2)]
    data = data_file(tmp_path, *rows)
    assert text_fields(data) == ["module", "Frage", "Response"], "no numbers, nothing that may be empty"
    file = tmp_path / "run.toml"
    (chosen,) = write_run_file(file, data, "")
    assert chosen == f"data.fields: prompt = 'module', answer = 'Response'; {data} has module, Frage, Response"
    fields = parse_run_file(file.read_text(encoding="utf-8"), source="x").data.fields
    assert (fields.prompt, fields.answer) == ("module", "Response")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["answer", "question"], ("question", "answer")),
        (["a", "b", "c"], ("a", "b")),
        (["context", "instruction", "output"], ("instruction", "output")),
        (["id", "text", "label"], ("text", "label")),
        (["answer", "x"], ("x", "answer")),
        (["y", "question"], ("question", "y")),
    ],
)
def test_which_field_is_which(names: list[str], expected: tuple[str, str]) -> None:
    assert choose_fields(Path("x"), names) == expected


def test_data_with_one_text_is_refused_and_nothing_written(tmp_path: Path) -> None:
    data = data_file(tmp_path, {"only": "a", "n": 1}, {"only": "b", "n": 2})
    with pytest.raises(DataError, match=r"has 1 fields with a text in every example \(only\); two are needed"):
        write_run_file(tmp_path / "run.toml", data, "")
    assert not (tmp_path / "run.toml").exists()


def test_a_file_that_exists_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("mine")
    with pytest.raises(ConfigError, match=r"run\.toml exists; give another name"):
        write_run_file(file, None, "")
    assert file.read_text() == "mine"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written: No such file"):
        write_run_file(tmp_path / "none" / "run.toml", None, "")


def test_a_model_that_fits_changes_its_name_only(tmp_path: Path, tiny: ModelSource) -> None:
    file = tmp_path / "run.toml"
    write_run_file(file, None, tiny.name)
    assert parse_run_file(file.read_text(encoding="utf-8"), source="x") == RunConfig.model_validate(
        {"model": {"name": tiny.name}}
    )


def test_a_model_of_few_layers_gets_ends_that_leave_one(tmp_path: Path) -> None:
    small = write_tiny_llama(tmp_path / "small", layers=4)
    file = tmp_path / "run.toml"
    write_run_file(file, None, str(small))
    split = parse_run_file(file.read_text(encoding="utf-8"), source="x").split
    assert (split.front, split.back) == ((4 - 1) // 2, (4 - 1) // 2)


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not built in"):
        write_run_file(tmp_path / "run.toml", None, "no/such-model")
