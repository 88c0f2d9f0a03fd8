"""A run of a task of values as the server has it: what it draws, averages, keeps and exports, and what it refuses."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest

from edgelam_fl.cli.run_file import explained
from edgelam_fl.config import RadioSection
from edgelam_fl.errors import ConfigError, ModelError
from edgelam_fl.model.adapter import PREFIX, digest, initial_adapter, read_peft_folder
from edgelam_fl.model.index import layer_number
from edgelam_fl.model.memory import weights_bytes
from edgelam_fl.model.source import ModelSource
from edgelam_fl.model.stage import Span, load_stages
from edgelam_fl.model.value_ends import ValueEnds, is_of_input, is_of_values
from edgelam_fl.plan.fronts import host_readings
from edgelam_fl.plan.resolved import resolve
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.privacy.limits import why_refused
from edgelam_fl.serving.chat import check_can_talk
from edgelam_fl.serving.export import export
from edgelam_fl.serving.results import open_result
from edgelam_fl.tasks.kinds import TASKS
from server.checks import check_config
from server.global_adapter import first_adapter
from server.privacy import start_of_updates
from tests.by_hand import LABELS
from tests.results import write_result
from tests.support import run_config
from tests.toy_values import KIND, SERIES, SETTINGS, TOY
from tests.unit.conftest import MakeFederation


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, KIND, TOY)


def test_first_values_follow_from_the_seed_and_the_name_alone() -> None:
    ends = ValueEnds(features=6, outputs=2, places=(5, 3), hidden_in=(8,), hidden_out=(4,))
    one, again, other = (dict(ends.first_values(64, seed)) for seed in (1, 1, 2))
    assert {name: array.shape for name, array in one.items()} == ends.shapes(64)
    assert not [name for name in one if layer_number(PREFIX + name) is not None], "they belong to no layer"
    last = {name for name in one if name.startswith("output_module.maps.1")}
    for name, array in one.items():
        assert array.dtype == np.float32
        assert np.array_equal(array, again[name])
        is_drawn = not name.endswith("bias") and name not in last
        assert np.array_equal(array, other[name]) != is_drawn
        assert array.any() == is_drawn
    wider = dict(ValueEnds(features=6, outputs=7, hidden_in=(8,)).first_values(64, 1))
    assert np.array_equal(wider["input_module.maps.0.weight"], one["input_module.maps.0.weight"])


def test_the_modules_belong_to_the_ends_of_a_route(tiny: ModelSource) -> None:
    spec = RunSpec(run_config(tiny.name, *SETTINGS), tiny)
    adapter = first_adapter(spec)
    own = {name for name in adapter if is_of_values(name)}
    assert {name.removeprefix(PREFIX): adapter[name].shape for name in own} == spec.values.shapes(tiny.hidden_size)
    assert {name for name in own if Span(0, 2, embed=True).holds(name)} == {name for name in own if is_of_input(name)}
    assert not [name for name in own if Span(2, 4).holds(name)]
    assert spec.outputs == 2
    kept = RunSpec(run_config(tiny.name, *SETTINGS, "task.private_modules=output"), tiny)
    assert (
        "in the places of embedding and head, on each device: an input module of 952 numbers, averaged over devices, and an output module "
        "of 130 numbers, kept by each device"
    ) in resolve(kept).in_words()
    assert (
        spec.value_weights
        == sum(adapter[name].size for name in own)
        == 6 * 8 + 8 + 8 * 64 + 64 + SERIES * 64 + 64 * 2 + 2
    )


def test_a_slice_holds_no_table_of_tokens_and_no_head(tiny: ModelSource) -> None:
    values = RunSpec(run_config(tiny.name, *SETTINGS), tiny).values
    spans = [Span(0, 1, embed=True), Span(5, 6, head=True)]
    for stage in load_stages(tiny, spans, "fp32", None, values=values):
        frozen = sum(p.numel() for name, p in stage.model.named_parameters() if not is_of_values(name))
        assert 4 * frozen == weights_bytes(tiny, [stage.span], "fp32", tokens=False)
        assert (
            weights_bytes(tiny, [stage.span], "fp32") - 4 * frozen
            == 4 * tiny.index["model.embed_tokens.weight"].shape[0] * 64
        )


def test_modules_are_averaged_and_kept_with_the_adapter(federation: MakeFederation) -> None:
    run = federation("ab", "e", *SETTINGS)
    result = run.run()
    own = [name for name in run.start if is_of_values(name)]
    assert len(own) == 4 + 1 + 2
    assert all(np.allclose(result[name], run.start[name] + 2) for name in own), "two rounds of devices that add 1"
    kept = read_peft_folder(run.folder.path / "adapter")
    assert digest(kept) == digest(result)
    config = json.loads((run.folder.path / "adapter/adapter_config.json").read_text("utf-8"))
    assert config["value_ends"]["features"] == 6
    assert config["modules_to_save"] is None
    assert set(LABELS) >= {"a", "b"}


def test_a_module_that_devices_keep_is_not_averaged(federation: MakeFederation) -> None:
    run = federation("ab", "e", *SETTINGS, "task.private_modules=input")
    result = run.run()
    inputs = [name for name in result if is_of_input(name)]
    assert len(inputs) == 5
    assert all(np.array_equal(result[name], run.start[name]) for name in inputs)
    assert all(
        is_of_input(name) or not np.array_equal(result[name], run.start[name]) for name in result if is_of_values(name)
    )
    assert not any(name in plan_start for name in inputs for plan_start in run.nodes["a"].received)
    updates = start_of_updates(RunSpec(run_config("tiny", *SETTINGS, "task.private_modules=input"), run.spec.source))
    assert not set(inputs) & updates.keys()


def test_an_adapter_of_values_is_exported_alone(tiny: ModelSource, tmp_path: Path) -> None:
    config = run_config(tiny.name, *SETTINGS)
    adapter = initial_adapter(tiny, config.lora.targets, config.lora.rank, 1, values=RunSpec(config, tiny).values)
    result = open_result(write_result(tmp_path / "run", tiny, *SETTINGS, adapter=adapter))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft names the setting that it leaves out
        folder, _ = export(result, "peft", tmp_path / "out")
    assert digest(read_peft_folder(folder)) == digest(adapter)
    assert "`input_module` and `output_module`" in (folder / "README.md").read_text("utf-8")
    kept = open_result(write_result(tmp_path / "kept", tiny, *SETTINGS, "task.private_modules=input", adapter=adapter))
    with pytest.raises(
        ConfigError, match=r"with task\.private_modules = \['input'\] these modules are as the run began"
    ):
        export(kept, "peft", tmp_path / "never")
    for kind in ("merged", "gguf"):
        with pytest.raises(ConfigError, match=r"are no part of a language model; `--to peft` writes them"):
            export(result, kind, tmp_path / kind)
    with pytest.raises(ConfigError, match="this run's model takes and gives values, not text"):
        check_can_talk(result.config, None)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [
            "split.hosts=2",
            "split.front=0",
            "split.back=0",
            "wire.activation_codec=int8",
            "strategy.aggregation=fedadam",
        ],
        ["lora.use_dora=true", "lora.modules_to_save=norm", "model.base=bf16", "federation.batch_size=8"],
        ["privacy.mode=central", "optimizer.name=sgd"],
    ],
)
def test_settings_that_go_with_values(tiny: ModelSource, overrides: list[str]) -> None:
    check_config(run_config(tiny.name, *SETTINGS, *overrides))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["task.template=plain"], "task.template = 'plain' cannot be combined with task.kind = 'toy-series': it is about texts"),
        (["task.weighting=examples"], "task.weighting = 'examples' cannot be combined"),
        (["data.fields={ prompt = 'q', answer = 'a' }"], r"data.fields = \['q', 'a'\] cannot be combined"),
        (["split.labels=last-stage", "split.back=0"], "split.labels = 'last-stage' .* Allowed: split.labels = 'device'"),
        (["split.fronts=auto:0.2"], "split.fronts = 'auto:0.2' .* is measured on texts"),
        (["split.trust=measured:0.2"], "split.trust = 'measured:0.2' .* is measured on texts"),
        (["wire.front_cache_mb=9", "lora.train=['hosts','back']"], "wire.front_cache_mb = 9 .* in the place of the embedding learns"),
        (["wire.gradients=lowrank"], "wire.gradients = 'lowrank' .* needs the whole gradient"),
        (["privacy.cut_clip=2.0"], "privacy.cut_clip = 2.0 cannot be combined .* it defends tokens"),
        (["privacy.disguise=0.5"], "privacy.disguise = 0.5 cannot be combined"),
        (["privacy.private_front=true"], "privacy.private_front = True cannot be combined"),
        (["lora.modules_to_save=lm_head"], "lora.modules_to_save = 'lm_head' .* always learns"),
        (["lora.train=['hosts']"], r"lora.train = \['hosts'\] .* learn with the back"),
        (["task.private_modules=['input']", "federation.load_best=true", "federation.early_stopping_patience=2"], "cannot be combined with federation.load_best"),
        (["task.private_modules=input", "strategy.aggregation=scaffold", "optimizer.name=sgd"], r"\['input'\] cannot be combined with strategy.aggregation = 'scaffold'"),
        (["task.kind=causal-lm", "task.private_modules=input"], "is for tasks of values, and task.kind = 'causal-lm' learns from texts"),
        (["task.kind=causal-lm", "radio.history_slots=16", "radio.future_slots=4", "model.layers=2"], "model.layers = 2 is for tasks of values"),
        (["model.layers=7"], "model.layers = 7 is more than .* has. Allowed: 0 to 6, 0 for all"),
        (["radio.beam_snrs_db=[3.0]"], r"radio.beam_snrs_db = \[3.0\] has no effect with .* task.kind = 'beamforming'"),
        (["radio.series=129"], "radio.series = 129 must be at most task.max_tokens = 128"),
        (["task.classes=['a','b']"], "task.classes is for task.kind = 'classification', got 'toy-series'"),
        (["task.packing=true"], "task.packing = true is for task.kind = 'causal-lm', and 'toy-series' has one sample per row"),
        (["task.metrics=rouge_l"], "'toy-series' answers with values, whose error is measured anyway"),
        (["task.kind=causal-lm"], "radio.history_slots = 6 has no effect with task.kind = 'causal-lm', .* or task.kind = .*'toy-series'"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_with_values(tiny: ModelSource, overrides: list[str], words: str) -> None:
    with pytest.raises((ConfigError, ModelError), match=words):
        check_config(run_config(tiny.name, *SETTINGS, *overrides))


def test_every_key_of_the_radio_section_is_used_by_a_task() -> None:
    used = {key for name, kind in TASKS.items() if kind.values and name != KIND for key in kind.values.settings}
    assert used == RadioSection.model_fields.keys()


def test_what_hosts_read_of_values_is_not_said_in_numbers_of_texts() -> None:
    config = run_config("smollm2-135m", *SETTINGS)
    (reading,) = host_readings(config)
    assert reading.words().startswith("what a host can read of a device's values is not measured")
    told = explained(run_config("smollm2-135m", *SETTINGS, "split.front=0", "split.back=0"))
    assert "# WARNING: front = 0 sends what the input module alone makes of the values.\n" in told
    assert not [word for word in ("which are the text", "solved for", "on your own text") if word in told]
    assert (reading.text, reading.worst) == (None, None)
    assert "is not measured" in why_refused("measured:0.5", reading)
    assert not why_refused("hosts", reading)
