"""A run of data files alone: which are meant, what their devices are called, which run file fits, and how one file is dealt."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgelam_fl.config import RunConfig
from edgelam_fl.errors import ConfigError, DataError
from edgelam_fl.federation.dealing import deal_file, read_split
from edgelam_fl.federation.from_data import config_from_data, device_names, expanded
from edgelam_fl.model.source import ModelSource
from edgelam_fl.names import why_no_name
from edgelam_fl.plan.making import task_settings
from edgelam_fl.tasks.data import device_pairs, pairs_by
from edgelam_fl.wireless.channels.sectors import Sector
from server.checks import check_config
from tests.support import run_config

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def written(file: Path, *rows: Mapping[str, Any]) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def asked(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"question": f"q{n}", "answer": f"a{n}"} for n in range(first, first + count)]


# ---------------------------------------------------------------- files and names


def test_a_pattern_is_every_file_that_fits_in_their_order(tmp_path: Path) -> None:
    files = [written(tmp_path / name, *asked(2)) for name in ("a.jsonl", "b.jsonl", "c.csv")]
    assert expanded([tmp_path / "*.jsonl", files[2]]) == files
    odd = written(tmp_path / "d[1].jsonl", *asked(2))
    assert expanded([odd]) == [odd], "a file of this very name is no pattern"
    assert expanded([Path("hf:owner/name:train[:10]")]) == [Path("hf:owner/name:train[:10]")]
    with pytest.raises(DataError, match=r"no file fits --data '.*\*\.tsv'"):
        expanded([tmp_path / "*.tsv"])
    with pytest.raises(DataError, match=r"a\.jsonl is given twice"):
        expanded([files[0], tmp_path / "*.jsonl"])


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["ann.jsonl", "bob.csv"], ["ann", "bob"]),
        (["ann/data.jsonl", "bob/data.jsonl"], ["ann-data", "bob-data"]),
        (["ward 3/Ünïcode näme!.jsonl"], ["n-code-n-me"]),
        (["server.jsonl", "edge-1.txt"], ["server-data", "edge-1-data"]),
        (["....jsonl", "ann.jsonl", "ann.csv", "x/Ann.txt"], ["data", "here-ann", "here-ann-2", "x-Ann"]),
        (["hf:owner/name:train"], ["name-train"]),
    ],
)
def test_devices_are_named_after_their_files_each_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], names: list[str]
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    found = device_names([Path(file) for file in files])
    assert found == names
    assert not [name for name in found if why_no_name(name)]


# ---------------------------------------------------------------- the run file


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (asked(6), {}),
        ([{"instruction": f"q{n}", "output": f"a{n}"} for n in range(6)], {"data": {"fields": {"prompt": "instruction", "answer": "output"}}}),
        ([{"messages": CHAT}] * 3, {}),
        ([{"text": f"passage {n}"} for n in range(6)], {"task": {"template": "plain", "loss_on": "all"}}),
        (
            [{"text": f"text {n}", "topic": "ab"[n % 2]} for n in range(12)],
            {
                "model": {"name": "minilm-l6"}, "lora": {"targets": ("query", "value")},
                "task": {"kind": "classification", "classes": ("a", "b")},
                "data": {"fields": {"prompt": "text", "answer": "topic"}},
            },
        ),
        ([{"text": f"text {n}", "lang": "ab"[n % 2]} for n in range(12)], {"task": {"template": "plain", "loss_on": "all"}}),
        ([{"question": f"q{n}", "answer": "no" if n % 2 else "yes"} for n in range(12)], {}),
    ],
)  # fmt: skip
def test_data_alone_make_a_run_file(tmp_path: Path, rows: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    file = written(tmp_path / "a.jsonl", *rows)
    made = config_from_data([file])
    assert made.config == RunConfig.model_validate(expected)
    assert made.said, "every choice is said"
    assert config_from_data([file], ["federation.rounds=2"]).config.federation.rounds == 2
    device_pairs(file, task_settings(made.config))  # as a run reads it


def test_classes_are_those_of_all_devices(tmp_path: Path) -> None:
    one = written(tmp_path / "a.jsonl", *({"text": f"t{n}", "label": "plant"} for n in range(6)))
    two = written(tmp_path / "b.jsonl", *({"text": f"t{n}", "label": "animal"} for n in range(6)))
    assert config_from_data([one, two]).config.task.classes == ("animal", "plant")


def test_a_task_and_a_model_that_are_asked_for_count(tmp_path: Path, tiny: ModelSource) -> None:
    topics = written(tmp_path / "a.jsonl", *({"text": f"t{n}", "label": "ab"[n % 2]} for n in range(12)))
    assert config_from_data([topics], task="causal-lm").config.task.kind == "causal-lm"
    assert config_from_data([topics], ["task.kind=causal-lm"]).config.task.classes == ()
    chosen = config_from_data([topics], [f"model.name={tiny.name}"]).config
    assert (chosen.model.name, chosen.task.kind) == (tiny.name, "causal-lm")
    answers = written(
        tmp_path / "b.jsonl", *({"question": f"q{n}", "answer": "no" if n % 2 else "yes"} for n in range(12))
    )
    assert config_from_data([answers], task="classification").config.task.classes == ("no", "yes")
    with pytest.raises(DataError, match=r"--task classification learns classes, and .* holds none"):
        config_from_data([written(tmp_path / "c.jsonl", *asked(80))], task="classification")


def test_fields_that_are_named_are_not_guessed(tmp_path: Path) -> None:
    file = written(tmp_path / "a.jsonl", *({"x": f"q{n}", "y": f"a{n}", "answer": "no"} for n in range(4)))
    made = config_from_data([file], ["data.fields.prompt=x", "data.fields.answer=y"])
    assert (made.config.data.fields.prompt, made.config.data.fields.answer, made.said) == ("x", "y", [])


@pytest.mark.parametrize(
    ("arrays", "changed"),
    [
        (
            {"channels": Sector(4, 3).draw(4, seed=1)},
            {"model": {"name": "beamformer"}, "split": {"hosts": 0}, "task": {"kind": "beamforming"}},
        ),
        (
            {"up": np.ones((4, 20, 2, 2), np.complex64) * np.arange(1, 5)[:, None, None, None], "speed_kmh": np.ones(4)},
            {"task": {"kind": "channel-prediction"}},
        ),
    ],
)  # fmt: skip
def test_arrays_alone_make_a_run_file_that_can_be_run(
    tmp_path: Path, tiny: ModelSource, arrays: dict[str, Any], changed: dict[str, Any]
) -> None:
    np.savez(tmp_path / "cell.npz", **arrays)
    kind, own = changed["task"]["kind"], changed.get("model", {}).get("name", "")
    made = config_from_data([tmp_path / "cell.npz"])
    assert made.config == RunConfig.model_validate(changed) == config_from_data([], task=kind).config
    model = f"model.name={own or tiny.name}"  # the tiny model has no chat template, which is nothing to say here
    check_config(config_from_data([tmp_path / "cell.npz"], [model]).config)
    with pytest.raises(ConfigError, match=f"{kind}' cannot be learned by the model"):
        config_from_data([tmp_path / "cell.npz"], [f"model.name={tiny.name if own else 'beamformer'}"])


# ---------------------------------------------------------------- one data set for several devices


@pytest.mark.parametrize(
    ("text", "devices", "partition"),
    [("5", 5, "iid"), ("2:iid", 2, "iid"), ("3:dirichlet=0.3", 3, "dirichlet:0.3"), ("16:size=1.0", 16, "size:1.0")],
)
def test_what_split_says(text: str, devices: int, partition: str) -> None:
    split = read_split(text)
    assert (split.devices, split.partition) == (devices, partition)
    assert read_split(str(split)) == split


@pytest.mark.parametrize("text", ["", "x", "0", "17", "3:", "3:iid=1", "3:dirichlet", "3:size=-1", "3:size=x", "3:natural", "3:dirichlet=inf"])  # fmt: skip
def test_what_split_may_not_say(text: str) -> None:
    with pytest.raises(ConfigError, match=f"--split {text!r}"):
        read_split(text)


@pytest.mark.parametrize("split", ["3", "3:size=1.0"])
@pytest.mark.parametrize(
    "rows", [asked(30), [{"messages": [{**CHAT[0], "content": f"q{n}"}, CHAT[1]]} for n in range(30)]], ids=["asked", "chats"]
)  # fmt: skip
def test_each_example_is_dealt_once_and_as_it_was(tmp_path: Path, rows: list[dict[str, Any]], split: str) -> None:
    file, config = written(tmp_path / "all.jsonl", *rows), run_config("m")
    files = deal_file(file, config, read_split(split), tmp_path / "dealt")
    dealt = [pair for each in files for pair in pairs_by(task_settings(config), each).pairs]
    assert Counter(dealt) == Counter(pairs_by(task_settings(config), file).pairs)
    again = deal_file(file, config, read_split(split), tmp_path / "again")
    assert [each.read_bytes() for each in files] == [each.read_bytes() for each in again]
    other = deal_file(file, run_config("m", "run.seed=2"), read_split(split), tmp_path / "other")
    assert [each.read_bytes() for each in files] != [each.read_bytes() for each in other]


def test_passages_and_rows_of_csv_are_dealt(tmp_path: Path) -> None:
    passages = tmp_path / "all.txt"
    passages.write_text("\n\n".join(f"passage {n}" for n in range(9)))
    config = run_config("m", "task.template=plain", "task.loss_on=all")
    files = deal_file(passages, config, read_split("3"), tmp_path / "dealt")
    assert sorted(pair for file in files for pair in pairs_by(task_settings(config), file).pairs) == sorted(
        pairs_by(task_settings(config), passages).pairs
    )


def test_a_label_skew_needs_labels_and_gives_devices_other_shares(tmp_path: Path) -> None:
    topics = written(tmp_path / "all.jsonl", *({"text": f"t{n}", "label": "abc"[n % 3]} for n in range(300)))
    config = config_from_data([topics]).config
    files = deal_file(topics, config, read_split("3:dirichlet=0.1"), tmp_path / "dealt")
    largest = [
        max(Counter(answer for _, answer in pairs_by(task_settings(config), file).pairs).values()) for file in files
    ]
    sizes = [len(pairs_by(task_settings(config), file).pairs) for file in files]
    assert sum(largest) > 0.6 * sum(sizes), "one label is most of what a device has"
    with pytest.raises(ConfigError, match=r"30 different ones\. Allowed: --split 3 \(at random\)"):
        deal_file(
            written(tmp_path / "b.jsonl", *asked(30)), run_config("m"), read_split("3:dirichlet=0.1"), tmp_path / "x"
        )
    with pytest.raises(
        ConfigError, match=r"5 training examples are too few for 3 devices \(--split 3:iid\): each needs 2"
    ):
        deal_file(written(tmp_path / "c.jsonl", *asked(5)), run_config("m"), read_split("3"), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_examples_that_cannot_be_read_are_refused_or_left_out(tmp_path: Path) -> None:
    file = written(tmp_path / "all.jsonl", *asked(9))
    file.write_text(file.read_text() + '{"question": "q"}\nbroken\n')
    with pytest.raises(DataError, match="line 10 lacks the field 'answer'"):
        deal_file(file, run_config("m"), read_split("3"), tmp_path / "dealt")
    files = deal_file(file, run_config("m", "data.bad_lines=skip"), read_split("3"), tmp_path / "dealt")
    assert sum(len(each.read_text().splitlines()) for each in files) == 9
