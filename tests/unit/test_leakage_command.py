"""`edgelam leakage`: what is measured, kept and printed, on a tiny random model; and what is refused before that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from edgelam_fl.cli.leakage import KEPT_FROM, USUAL_FRONTS, fronts_of_run, fronts_to_measure, keep
from edgelam_fl.cli.main import app, exit_code
from edgelam_fl.errors import ConfigError, DataError, EnvironmentProblem
from edgelam_fl.model.adapter import Span
from edgelam_fl.model.source import ModelSource
from edgelam_fl.model.stage import load_stages
from edgelam_fl.model.whole import load_whole
from edgelam_fl.privacy import known
from edgelam_fl.privacy.known import KnownLeakage, known_leakage, shipped, store
from edgelam_fl.serving import leakage as serving
from edgelam_fl.serving.leakage import (
    LayerReading,
    MeasuredLeakage,
    TextCounts,
    built_in_texts,
    look,
    measure_leakage,
    public_texts,
    texts_of_file,
)
from tests.support import run_config


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "cache_folder", lambda: tmp_path / "cache")


def measured(digest: str, public_tokens: int, share: float = 0.5) -> MeasuredLeakage:
    readings = (LayerReading(0, 1.0, 0.9, 0.8, None, 1.0), LayerReading(2, 0.1, 0.2, share, 0.3, 0.7))
    return MeasuredLeakage("m", digest, public_tokens, 100, 0.01, readings, 2, (("a", "b"),), TextCounts(9, 1, 2, 3))


def test_what_a_host_sees_is_what_the_whole_model_computes(tiny: ModelSource) -> None:
    texts = [[5, 6, 7, 8, 9], [9, 8, 7, 6], [3] * 20]
    (stage,) = load_stages(tiny, [Span(0, 4, embed=True)], "fp32", None)
    seen = look(stage, texts, [0, 1, 4], lambda done: None)
    model = load_whole(tiny, "fp32")
    for front, found in seen.items():
        assert found.lengths_R == (5, 4, 20)
        for ids, states_TD in zip(texts, found.states_of_texts, strict=True):
            with torch.no_grad():
                hidden = model.base_model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
            torch.testing.assert_close(states_TD, hidden[front][0])
    assert seen[0].ids_N.tolist() == [token for ids in texts for token in ids]


def test_the_command_measures_shows_and_says_what_would_change_it(tiny: ModelSource, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(f'[model]\nname = "{tiny.folder}"\n', encoding="utf-8")
    done = CliRunner().invoke(app, ["leakage", str(file), "--cuts", "0,2", "--tokens", "500", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [reading["front"] for reading in found["readings"]] == [0, 2]
    assert found["readings"][0]["nearest"] == 1.0, "embeddings are the text"
    assert found["readings"][0]["replay"] is None
    assert found["readings"][1]["replay"] > 0.95, "the front is the attacker's own, to the bit"
    assert found["digest"] == tiny.leakage_key
    assert found["kept"] == "", "too short to judge later runs by"
    assert 3 <= len(found["examples"]) <= 4
    assert found["shown_front"] == 2
    texts = found["private_texts"]
    assert sum(texts[key] for key in ("read", "short", "spare")) == len(built_in_texts()[1])


@pytest.mark.real_model
def test_an_encoder_for_classes_is_measured_too(tmp_path: Path) -> None:
    file, data = tmp_path / "run.toml", tmp_path / "a.jsonl"
    file.write_text('[model]\nname = "minilm-l6"\n', encoding="utf-8")
    rows = [{"question": f"Where is room {n} of the old house?", "answer": "upstairs"} for n in range(12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = ["--data", str(data), "--cuts", "0,2", "--tokens", "500", "--json"]
    done = CliRunner().invoke(app, ["leakage", str(file), *options])
    assert done.exit_code == 0, done.output
    shares = [max(each["nearest"], each["ridge"], each["inverter"]) for each in json.loads(done.stdout)["readings"]]
    assert shares[0] > 0.9
    assert shares[1] > 0.5


def test_what_is_printed(tiny: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "measure_leakage", lambda source, *_: measured(source.leakage_key, KEPT_FROM))
    file = tmp_path / "run.toml"
    file.write_text(f'[model]\nname = "{tiny.folder}"\n', encoding="utf-8")
    text = " ".join(CliRunner().invoke(app, ["leakage", str(file)]).stdout.split())
    assert "2 <- this run" in text
    assert "100 tokens of a built-in text" in text
    assert "9 texts, 1 of them cut at 96 tokens; not read: 2 shorter than 4 tokens, 3 that were not needed" in text
    assert "by chance 1.0 % would be read" in text
    assert "private a read b" in text
    assert "split.hosts = 0: each device trains the whole model" in text
    assert "kept in" in text
    now_known = known_leakage(tiny.name, tiny.leakage_key)
    assert now_known is not None
    assert now_known.read == {0: 1.0, 2: 0.5}
    alone = " ".join(CliRunner().invoke(app, ["leakage", str(file), "--set", "split.hosts=0"]).stdout.split())
    assert "this run has no host" in alone
    assert "<- this run" not in alone


def test_long_measurements_of_other_models_are_kept_and_the_larger_share_counts() -> None:
    assert keep(measured("d", KEPT_FROM - 1)) is None
    assert keep(measured(shipped()[0].digest, KEPT_FROM)) is None
    assert keep(measured("d", KEPT_FROM, 0.6)) is not None
    keep(measured("d", KEPT_FROM, 0.4))
    assert known_leakage("m", "d") == KnownLeakage("m", "d", {0: 1.0, 2: 0.6}, {}, 0.01)


def test_layers_to_measure(tiny: ModelSource) -> None:
    config = run_config(tiny.name, "split.front=3", "split.fronts={'a'=5}")
    assert fronts_to_measure(config, tiny, "") == [0, 1, 2, 3, 4, 5]
    assert fronts_to_measure(config, tiny, "4, 0,4") == [0, 4]
    assert max(USUAL_FRONTS) > tiny.num_layers
    auto = run_config(tiny.name, "split.fronts=auto:0.5")
    assert fronts_of_run(auto, tiny) == {}
    store(KnownLeakage(tiny.name, tiny.leakage_key, {0: 1.0, 3: 0.4}, {}, 0.01))
    assert fronts_of_run(auto, tiny) == {"split.fronts": 3}
    assert 3 in fronts_to_measure(auto, tiny, "")


@pytest.mark.parametrize("cuts", ["6", "-1", "a", "1,,2", "1;2"])
def test_layers_that_are_none_are_refused(tiny: ModelSource, cuts: str) -> None:
    with pytest.raises(ConfigError, match=r"--cuts .* must be numbers of layers, 0 to 5"):
        fronts_to_measure(run_config(tiny.name), tiny, cuts)


def test_bad_input_is_refused_before_anything_is_measured(
    tiny: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serving, "measure_leakage", lambda *_: pytest.fail("measured"))
    file, data = tmp_path / "run.toml", tmp_path / "a.jsonl"
    file.write_text(f'[model]\nname = "{tiny.folder}"\n', encoding="utf-8")
    data.write_text('{"question": " ", "answer": "b"}\n' * 2, encoding="utf-8")
    for arguments, words in [
        (["--set", "split.front=6"], "split.front = 6 is outside the model"),
        (["--set", "model.name=nowhere-to-be-found"], "is not built in"),
        (["--data", str(data)], "must be a text that is not empty"),
        (["--data", str(tmp_path / "none.jsonl")], "none.jsonl"),
    ]:
        assert exit_code(app, "edgelam", ["leakage", str(file), *arguments]) == 2
        assert words in " ".join(capsys.readouterr().err.split())


def test_too_little_text_and_too_little_memory_are_refused(tiny: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = (["some public text"] * 20, ["private text"] * 3)
    with pytest.raises(DataError, match="hold 3 texts of at least 4 tokens, and 8 are needed"):
        measure_leakage(tiny, [0], 0, texts, 1000, lambda words: None)
    monkeypatch.setattr(serving, "memory_free_bytes", lambda: 1000)
    with pytest.raises(EnvironmentProblem, match=r"measure fewer layers \(--cuts\) or fewer tokens \(--tokens\)"):
        measure_leakage(tiny, [0], 0, texts, 1000, lambda words: None)


def test_the_attackers_text_has_none_of_the_private_text(tmp_path: Path) -> None:
    public, private = built_in_texts()
    assert len(public) > 4 * len(private) > 0
    assert not set(public) & set(private)
    data = tmp_path / "a.jsonl"
    rows = [{"question": "What?", "answer": text} for text in public[:5]]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    own = texts_of_file(data, run_config("x"))
    assert own == [f"What? {text}" for text in public[:5]]
    assert not set(public_texts(own)) & set(public[:5])
