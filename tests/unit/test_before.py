"""What is said before a run: of each file, of its first example, and what the run file comes to; and what is refused then."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from safetensors.numpy import save_file

from edgelam_fl.cli.run_file import explained
from edgelam_fl.config import changed_keys, parse_run_file
from edgelam_fl.errors import ConfigError, EnvironmentProblem, ModelNotFound
from edgelam_fl.federation import runs
from edgelam_fl.federation.before import (
    before_words,
    check_folder,
    check_room,
    check_steps,
    first_example,
    resolved_of,
    unused_words,
)
from edgelam_fl.federation.data_check import FileSeen, look_into
from edgelam_fl.model.adapter import initial_adapter
from edgelam_fl.model.source import ModelSource
from edgelam_fl.plan.making import task_settings
from edgelam_fl.plan.resolved import DataSize, resolve
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.tasks.files import format_of
from server.checks import check_config
from tests.support import run_config

SIZE = DataSize(40, 4, 50.0)
OF_EACH_FORMAT = ("a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt")


def seen(source: ModelSource, file: Path, *overrides: str) -> FileSeen:
    return look_into([file], task_settings(run_config(source.name, *overrides)).SerializeToString(), source.folder)[0]


def questions(file: Path, *answers: str) -> Path:
    rows = [{"question": f"q{n}", "answer": answer, "id": n} for n, answer in enumerate(answers)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


# ---------------------------------------------------------------- data


def test_of_a_file_its_format_fields_and_counts_are_said(tiny: ModelSource, tmp_path: Path) -> None:
    file = questions(tmp_path / "ann.jsonl", *(f"answer {n}" for n in range(10)))
    file.write_text(file.read_text() + "broken\n")
    found = seen(tiny, file, "data.bad_lines=skip")
    assert found.in_words() == [
        f"{file} (JSON lines, questions and answers from 'question', 'answer'): 9 examples to learn, 1 held out",
        "WARNING: 1 of 11 examples were left out as they cannot be read; mend them; the device names their places",
        "cannot be read: line 11",
        "not learned: the field id",
    ]


def test_answers_that_lose_a_part_are_counted_beside_what_is_cut(tiny: ModelSource, tmp_path: Path) -> None:
    file = questions(tmp_path / "a.jsonl", "short", "long " * 30, "long " * 40)
    found = seen(tiny, file, "task.max_tokens=64", "data.held_out=0")
    assert (found.counts.cut, found.counts.cut_answers) == (2, 2)
    assert (
        "WARNING: 2 of 3 examples were cut (task.max_tokens = 64; 2 answers lost a part); raise task.max_tokens, or shorten them"
        in found.in_words()
    )
    asked = tmp_path / "b.jsonl"
    asked.write_text('{"question": "' + "why " * 40 + '", "answer": "so"}\n')
    prompt_alone = seen(tiny, asked, "task.max_tokens=64")
    assert (prompt_alone.counts.cut, prompt_alone.counts.cut_answers) == (1, 0), (
        "its prompt is cut, its answer is whole"
    )
    at_the_end = seen(tiny, file, "task.max_tokens=64", "data.held_out=0", "task.too_long=cut-end")
    assert (at_the_end.counts.cut, at_the_end.counts.cut_answers) == (2, 2)


def test_the_first_example_is_shown_as_the_model_gets_it(tiny: ModelSource, tmp_path: Path) -> None:
    file = questions(tmp_path / "a.jsonl", "Über \U0001f345!", "b")
    found = seen(tiny, file, "data.held_out=0")
    assert "".join(text for text, _ in found.first) == "<user>q0</s><assistant>Über \U0001f345!</s>"
    assert [text for text, learned in found.first if learned] == ["Über \U0001f345!</s>"]
    lines = first_example([found], "tiny")
    assert lines[0] == "The first example as tiny gets it; what is between ⟦ and ⟧ is learned:"
    assert lines[1:] == ["    <user>q0</s><assistant>⟦Über \U0001f345!</s>⟧"]
    passages = tmp_path / "a.txt"
    passages.write_text("One.\n\nTwo.\n\nThree.\n")
    plain = seen(tiny, passages, "task.template=plain", "task.loss_on=all", "data.held_out=0")
    assert (plain.shape, plain.fields, plain.format) == ("passages", (), "plain text")
    assert "".join(text for text, _ in plain.first) == "One.</s>"
    long = questions(tmp_path / "b.jsonl", "line\n" * 60, "b")
    assert len(first_example([seen(tiny, long, "task.max_tokens=512", "data.held_out=0")], "tiny")) < 20


@pytest.mark.real_model
def test_a_classification_shows_text_and_class(tmp_path: Path) -> None:
    from edgelam_fl.model.source import find_model

    source = find_model("minilm-l6")
    file = tmp_path / "a.csv"
    file.write_text("text,topic\nA rose.,plant\nA dog.,animal\nA cat.,animal\n")
    overrides = [
        "task.kind=classification",
        'task.classes=["plant", "animal"]',
        "data.fields.prompt=text",
        "data.fields.answer=topic",
    ]
    found = seen(source, file, *overrides, "data.held_out=0")
    assert (found.shape, found.format) == ("texts with a class", "CSV")
    assert "to learn: 2 animal, 1 plant" in found.in_words()
    assert found.first == (("[CLS] a rose. [SEP] -> ", False), ("plant", True))


def test_the_name_of_a_format(tmp_path: Path) -> None:
    assert [format_of(tmp_path / name) for name in OF_EACH_FORMAT] == ["JSON lines", "JSON", "CSV", "TSV", "plain text"]
    (tmp_path / "odd.data").write_bytes(b"PAR1....")
    assert [format_of(tmp_path / "odd.data"), format_of(tmp_path)] == ["Parquet", "a folder of tables"]


# ---------------------------------------------------------------- what a run file comes to


@pytest.mark.parametrize("overrides", [[], ["lora.rank=4"], ["lora.targets=all-linear"], ["split.hosts=0"]])
def test_what_is_trained_is_the_adapter(tiny: ModelSource, tmp_path: Path, overrides: list[str]) -> None:
    spec = RunSpec(run_config(tiny.name, *overrides), tiny)
    lora = spec.config.lora
    tensors = initial_adapter(tiny, lora.targets, lora.rank, 1)
    found = resolve(spec)
    assert found.trained == sum(tensor.size for tensor in tensors.values())
    save_file(dict(tensors), tmp_path / "adapter.safetensors")
    assert found.adapter_bytes == pytest.approx((tmp_path / "adapter.safetensors").stat().st_size, rel=0.2)
    assert found.parameters * 4 == tiny.fp32_bytes


def test_places_that_do_not_learn_are_not_counted(tiny: ModelSource) -> None:
    def trained(*overrides: str) -> int:
        return resolve(RunSpec(run_config(tiny.name, *overrides), tiny)).trained

    places = [trained(f"lora.train={place}") for place in ("front", "hosts", "back")]
    assert sum(places) == trained()
    assert places[0] == places[1] == places[2], "two of six layers each"


def test_bytes_and_memory_follow_the_run_file(tiny: ModelSource) -> None:
    def found(*overrides: str, data: DataSize | None = SIZE, devices: int = 2):  # type: ignore[no-untyped-def]
        return resolve(RunSpec(run_config(tiny.name, *overrides), tiny), devices, data)

    usual = found()
    steps, batch, held_out, hidden = 10, 4, 4, 64
    assert usual.up_bytes == (2 * steps * batch + held_out) * 50 * hidden * 4
    assert found("wire.activation_codec=fp16", "wire.gradient_codec=fp16").up_bytes < 0.51 * usual.up_bytes
    assert found("federation.local_steps=20").up_bytes > 1.9 * usual.up_bytes
    assert found("split.hosts=0").up_bytes == 0
    assert found(data=None).is_bound
    assert found("model.base=bf16").device_bytes < usual.device_bytes
    assert found("task.max_tokens=512").host_bytes > usual.host_bytes
    assert found(devices=8).host_bytes > usual.host_bytes
    words = list(usual.in_words())
    assert (
        words[0]
        == f"{tiny.name}: 6 layers (2 layers in front and 2 at the back stay on each device, 2 on 1 host), {usual.parameters:,} parameters in fp32"
    )
    assert words[2].startswith("per round and device: about ")
    assert not any("per round" in each for each in found("split.hosts=0").in_words())


def test_keys_off_their_default_are_named() -> None:
    config = parse_run_file(
        "[lora]\nrank = 4\n[data.fields]\nprompt = 'q'", source="x", overrides=["split.cuts=[3]", "split.hosts=2"]
    )
    assert changed_keys(config) == {
        "lora.rank": 4, "split.cuts": [3], "split.hosts": 2, "data.fields": {"prompt": "q", "answer": "answer"},
    }  # fmt: skip
    assert changed_keys(parse_run_file("", source="x")) == {}


def test_keys_that_do_nothing_for_these_devices_are_said() -> None:
    config = run_config(
        "m", "split.fronts={'pi-*'=1, 'a*'=2}", "lora.ranks={'edge-1'=4}", "federation.devices_per_round=3"
    )
    assert list(unused_words(config, ["ann", "bob"])) == [
        "WARNING: split.fronts: 'pi-*' is the name of no node of this run (ann, bob)",
        "WARNING: federation.devices_per_round = 3 is more than the 2 devices of this run",
    ]
    (said,) = unused_words(run_config("m", "federation.expect_nodes=3"), ["ann", "bob"])
    assert "federation.expect_nodes = 3 does nothing here" in said


def test_a_rate_that_would_rise_for_ever_is_known_once_the_data_are(tiny: ModelSource, tmp_path: Path) -> None:
    found = seen(tiny, questions(tmp_path / "a.jsonl", *map(str, range(10))))
    config = run_config(tiny.name, "federation.epochs=1", "federation.rounds=2", "optimizer.warmup_steps=6")
    with pytest.raises(ConfigError, match=r"optimizer\.warmup_steps = 6 must be below 6"):
        check_steps(config, [found])
    check_steps(config, [])


# ---------------------------------------------------------------- refused before anything starts


@pytest.mark.parametrize(
    ("overrides", "devices", "says"),
    [
        (["federation.min_nodes=3"], 2, r"min_nodes = 3 and the run has 2 devices: no round could begin\. Allowed: min_nodes of at most 2"),
        (["strategy.require_tags=['pi']"], 2, "keeps every device of this run out"),
        (["strategy.aggregation=krum"], 4, "needs at least 5 devices per round, and the run has 4"),
        (["strategy.aggregation=fedmedian", "federation.devices_per_round=2"], 4, "needs at least 3 devices per round, and the run has 2"),
        (["lora.ranks={'d1'=4}"], 2, "d1 with rank 4"),
        (["split.fronts={'d1'=4}"], 2, "its route does not cross host edge-1"),
        (["split.host_on=any", "split.hosts=2"], 1, r"split\.hosts = 2 with split\.host_on = 'any' needs as many devices"),
        (["task.kind=classification", 'task.classes=["a", "b"]'], 2, "answers with text"),
        (["privacy.mode=central", "privacy.delta=0.3", "split.hosts=0"], 4, r"privacy\.delta = 0\.3 must be below"),
    ],
)  # fmt: skip
def test_what_devices_cannot_do_is_known_before_a_run(
    tiny: ModelSource, overrides: list[str], devices: int, says: str
) -> None:
    config = run_config(tiny.name, *overrides)
    with pytest.raises(ConfigError, match=says):
        check_config(config, devices=[f"d{n}" for n in range(devices)])
    with pytest.raises(ConfigError, match=says):
        explained(config, [f"d{n}" for n in range(devices)], here=True)


def test_a_folder_that_cannot_be_made_is_refused_and_one_that_can_is_not_left_behind(tmp_path: Path) -> None:
    check_folder(tmp_path / "a" / "b", makes=True)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    for place, why in {
        tmp_path / "file" / "run": "Not a directory",
        tmp_path / ("x" * 300): "File name too long",
        Path("/proc/nowhere/run"): "No such file or directory",
        tmp_path / "nul\0": "null byte",
    }.items():
        with pytest.raises(ConfigError, match=f"cannot be made: .*{why}.*; choose another with --out"):
            check_folder(place, makes=True)


def test_a_run_that_needs_more_than_the_machine_has_is_refused(tiny: ModelSource, tmp_path: Path) -> None:
    usual = resolved_of(RunSpec(run_config(tiny.name), tiny), [])
    check_room(usual, tmp_path, 2, 1)
    with pytest.raises(
        EnvironmentProblem,
        match=r"2 devices and 1 edge server of this run take about .* of memory, and .* are free now",
    ):
        check_room(replace(usual, device_bytes=1 << 50), tmp_path, 2, 1)
    with pytest.raises(EnvironmentProblem, match=r"the run's folder takes about .*, and .* are free on the disk of"):
        check_room(replace(usual, adapter_bytes=1 << 55), tmp_path / "new", 2, 1)


def test_explain_says_what_a_run_comes_to(tiny: ModelSource, tmp_path: Path) -> None:
    file = questions(tmp_path / "ann.jsonl", *(f"answer {n}" for n in range(10)))
    config = run_config(tiny.name, "lora.rank=4")
    text = explained(config, ["ann"], lambda source: [seen(tiny, file)], here=True)
    assert parse_run_file(text, source="x") == config
    said = " ".join(line.removeprefix("# ") for line in text.splitlines())
    for words in (
        f"ann: {file} (JSON lines,", "trained: ", "memory: about ", "lora.rank = 4", "⟦answer ", "Other than the defaults:"
    ):  # fmt: skip
        assert words in said, words
    assert next(before_words(RunSpec(config, tiny), [seen(tiny, file)], ["ann"])).startswith("ann: ")


def test_a_model_that_may_be_elsewhere_is_explained_and_a_slip_is_not() -> None:
    assert "org/elsewhere is not on this machine" in " ".join(explained(run_config("org/elsewhere")).split())
    with pytest.raises(ModelNotFound, match="did you mean 'smollm2-135m'"):
        explained(run_config("smollm2-135n"))
    with pytest.raises(ModelNotFound, match="org/elsewhere"):
        explained(run_config("org/elsewhere"), ["ann"], here=True)


def test_a_run_that_goes_on_is_checked_with_its_devices(
    tiny: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = questions(tmp_path / "ann.jsonl", "a", "b")
    (tmp_path / "local.json").write_text(json.dumps({"data": [str(file)], "names": ["ann"]}))
    config = run_config(tiny.name, "federation.min_nodes=2")
    resuming = SimpleNamespace(
        check_can_resume=lambda folder: None, resumption=lambda *_: SimpleNamespace(config=config)
    )
    monkeypatch.setattr(runs, "app_module", lambda name: resuming)
    with pytest.raises(ConfigError, match=r"min_nodes = 2 and the run has 1 device"):
        runs.resume_here(Console(), tmp_path, ["federation.min_nodes=2"])
