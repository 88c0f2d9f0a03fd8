from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, BertModel

from edgelam_fl.errors import ConfigError, ProtocolError
from edgelam_fl.model import adapter as adapters
from edgelam_fl.model.adapter import Span
from edgelam_fl.model.index import layer_number
from edgelam_fl.model.source import ModelSource, find_model
from tests.fleet import same_bits
from tests.support import write_tiny_llama

LEAVES = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
Q3 = "model.layers.3.self_attn.q_proj"


def test_the_start_is_pefts_default_with_global_names(tiny: ModelSource) -> None:
    start = adapters.initial_adapter(tiny, ("q_proj", "v_proj"), 8, 1)
    assert len(start) == 6 * 2 * 2  # layers, targets, A and B
    a, b = (start[f"base_model.model.{Q3}.lora_{factor}.weight"] for factor in "AB")
    assert (a.shape, b.shape, a.dtype, b.dtype) == ((8, 64), (64, 8), np.float32, np.float32)
    assert not b.any()
    bound = 64**-0.5
    assert 0.9 * bound < np.abs(a).max() <= bound
    assert abs(a.mean()) < bound / 5
    assert start[f"base_model.model.{Q3.replace('q_proj', 'v_proj')}.lora_B.weight"].shape == (
        2 * 16,
        8,
    )  # two KV heads


def test_the_start_is_a_function_of_seed_and_module(tiny: ModelSource) -> None:
    one = adapters.initial_adapter(tiny, ("q_proj", "v_proj"), 8, 1)
    assert same_bits(one, adapters.initial_adapter(tiny, ("v_proj", "q_proj"), 8, 1))
    alone = adapters.initial_adapter(tiny, ("v_proj",), 8, 1)
    assert same_bits(alone, {name: one[name] for name in alone})
    other = adapters.initial_adapter(tiny, ("q_proj", "v_proj"), 8, 2)
    factors = [array.tobytes() for start in (one, other) for name, array in start.items() if "lora_A" in name]
    assert len(set(factors)) == 2 * 12


def test_slices_are_disjoint_and_join_to_the_whole(tiny: ModelSource) -> None:
    whole = adapters.initial_adapter(tiny, ("q_proj",), 4, 1)
    ends, middle = adapters.slice_of(whole, [Span(0, 2), Span(4, 6)]), adapters.slice_of(whole, [Span(2, 4)])
    assert len(ends) == 4 * 2
    assert len(middle) == 2 * 2
    assert same_bits(ends | middle, whole)
    assert adapters.slice_of(whole, [Span(2, 2)]) == {}


@pytest.mark.parametrize(
    "change",
    [
        lambda x: {**x, "b": x["b"] + np.float32(1e-7)},
        lambda x: {**x, "b": x["b"].astype(np.float64)},
        lambda x: {**x, "b": x["b"].reshape(2, 3)},
        lambda x: {"a": x["a"], "c": x["b"]},
        lambda x: {"a": x["a"]},
        lambda x: {"a": x["b"], "b": x["a"]},
        lambda x: {**x, "b": -x["b"]},  # zeros that differ in their sign bit only
    ],
)
def test_a_digest_feels_name_dtype_shape_and_value(change: Callable[[adapters.Adapter], adapters.Adapter]) -> None:
    before = {"a": np.ones((2, 3), np.float32), "b": np.zeros((3, 2), np.float32)}
    assert adapters.digest(change(before)) != adapters.digest(before)


def test_a_digest_does_not_feel_order_or_memory_layout() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    laid_out = np.asfortranarray(array)
    assert adapters.digest({"a": array, "b": array}) == adapters.digest({"b": laid_out, "a": array})


def test_bytes_and_back() -> None:
    adapter = {"x": np.arange(6, dtype=np.float32).reshape(2, 3).T, "y": np.array([np.nan, -0.0], np.float32)}
    back = adapters.from_bytes(adapters.to_bytes(adapter))
    assert adapters.digest(back) == adapters.digest(adapter)


def test_views_are_the_same_tensors_and_know_all_numbers_as_one() -> None:
    adapter = {
        "x": np.arange(6, dtype=np.float32).reshape(2, 3),
        "y": np.array([7, -0.0], np.float32),
        "z": np.ones((0, 2), np.float32),
    }
    found = adapters.views(adapters.to_bytes(adapter))
    assert isinstance(found, adapters.Joined)
    assert adapters.digest(found) == adapters.digest(adapter)
    assert not any(array.flags.writeable for array in found.values())
    assert np.array_equal(found.numbers, np.concatenate([array.ravel() for array in found.values()]))
    assert found.layout == tuple((name, array.shape) for name, array in found.items())
    mixed = adapter | {"w": np.ones(3)}
    assert adapters.digest(adapters.views(adapters.to_bytes(mixed))) == adapters.digest(mixed), "not all are fp32"


def packed(header: Any, numbers: int) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(4 * numbers)


@pytest.mark.parametrize("read", [adapters.from_bytes, adapters.views])
@pytest.mark.parametrize(
    "data",
    [
        b"", b"no tensors", b"\xff" * 40, (10).to_bytes(8, "little") + b"{}", packed({}, 1),
        packed({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, 2),
        packed({"x": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}}, 2),
        packed({"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, 2),
        packed({n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "xy"}, 1),
        packed({"x": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}, 2),
        packed({"x": {"dtype": "F32", "shape": [0, 1 << 70], "data_offsets": [0, 0]}}, 0),
        packed({"x": []}, 0), packed([], 0),
    ],
)  # fmt: skip
def test_bytes_that_are_no_adapter_are_refused(read: Callable[[bytes], adapters.Adapter], data: bytes) -> None:
    with pytest.raises(ProtocolError, match="adapter tensors cannot be read"):
        read(data)


# ---------------------------------------------------------------- targets


def test_targets_match_whole_trailing_parts(tiny: ModelSource) -> None:
    assert len(adapters.target_modules(tiny, ["self_attn.q_proj", "q_proj"])) == 6
    assert adapters.target_modules(tiny, [Q3]) == {Q3: (64, 64)}
    assert len(adapters.target_modules(tiny, ["all-linear"])) == 6 * 7
    with pytest.raises(ConfigError):
        adapters.target_modules(tiny, ["proj"])


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("q_prj", f"is called 'q_prj'; did you mean 'q_proj'? Known: {LEAVES}"),
        ("xyz", f"is called 'xyz'; known: {LEAVES}"),
        ("lm_head", f"'lm_head' is a tied tensor of {{name}} (embedding and head are one); an adapter on it would change both. Allowed: {LEAVES}"),
        ("embed_tokens", "'embed_tokens' is a tied tensor of {name}"),
        ("", "is called ''"),
    ],
)  # fmt: skip
def test_a_target_that_matches_nothing_or_a_tied_tensor(tiny: ModelSource, target: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        adapters.target_modules(tiny, ["v_proj", target])
    assert str(caught.value).startswith("lora.targets: ")
    assert words.format(name=tiny.name) in str(caught.value)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_target_outside_the_layers_of_an_untied_model(tmp_path: Path, target: str) -> None:
    untied = find_model(str(write_tiny_llama(tmp_path, tied=False, layers=2)))
    with pytest.raises(ConfigError, match=f"'{target}' is outside the layers. Allowed: {LEAVES}"):
        adapters.target_modules(untied, [target])


# ---------------------------------------------------------------- peft's format


@pytest.mark.parametrize(
    ("targets", "expected"), [(("v_proj", "q_proj"), {"q_proj", "v_proj"}), (("all-linear",), "all-linear")]
)
def test_peft_reads_the_folder(tiny: ModelSource, tmp_path: Path, targets: tuple[str, ...], expected: object) -> None:
    adapter = adapters.initial_adapter(tiny, targets, 4, 1)
    folder = tmp_path / "run" / "adapter"
    adapters.write_peft_folder(adapter, folder, reference="org/base", rank=4, alpha=32.0, targets=targets)
    config = PeftConfig.from_pretrained(folder)
    assert (config.peft_type, config.task_type, config.base_model_name_or_path) == ("LORA", "CAUSAL_LM", "org/base")
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (4, 32.0, 0.0, "none")
    assert config.target_modules == expected
    assert same_bits(adapters.from_bytes((folder / "adapter_model.safetensors").read_bytes()), adapter)
    assert sorted(file.name for file in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert json.loads((folder / "adapter_config.json").read_text())["inference_mode"] is True


def test_ranks_that_differ_are_named_by_module(tiny: ModelSource, tmp_path: Path) -> None:
    """Layers 0 and 1 of rank 2, the others of rank 8: peft gives each module its own alpha / rank."""
    small, large = (adapters.initial_adapter(tiny, ("q_proj",), rank, 1) for rank in (2, 8))
    mixed = {name: (small if layer_number(name) in (0, 1) else large)[name] for name in large}
    adapters.write_peft_folder(mixed, tmp_path, reference="org/base", rank=8, alpha=16.0, targets=("q_proj",))
    config = PeftConfig.from_pretrained(tmp_path)
    assert config.rank_pattern == {f"model.layers.{layer}.self_attn.q_proj": 2 for layer in (0, 1)}
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny.folder), tmp_path)
    scales = [layer.self_attn.q_proj.scaling["default"] for layer in model.get_base_model().model.layers]
    assert scales == [16.0 / rank for rank in (2, 2, 8, 8, 8, 8)]
    loaded = get_peft_model_state_dict(model)
    assert same_bits({name: tensor.numpy() for name, tensor in loaded.items()}, mixed)


# ---------------------------------------------------------------- modules that learn as a whole


def test_norms_of_layers_are_saved_and_that_of_an_embedding_is_not(bert: ModelSource) -> None:
    saved = adapters.saved_tensors(bert, ["output.LayerNorm"])
    assert len(saved) == 2 * 2 * 2, "weight and bias of two norms per layer"
    assert set(saved.values()) == {(16,)}
    with pytest.raises(
        ConfigError, match=r"it ends .*embeddings.LayerNorm, and .* Allowed for this model: output.LayerNorm$"
    ):
        adapters.saved_tensors(bert, ["LayerNorm"])
    with pytest.raises(ConfigError, match="the head of a classification always learns as a whole: leave it out"):
        adapters.saved_tensors(bert, ["classifier"])


# ---------------------------------------------------------------- a classifier's head


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    folder = tmp_path_factory.mktemp("bert")
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(**sizes, intermediate_size=24)).save_pretrained(folder)
    return find_model(str(folder))


HEAD = "base_model.model.classifier"


def test_the_task_head_is_small_seeded_and_without_bias(bert: ModelSource) -> None:
    start = adapters.initial_adapter(bert, ("query",), 4, 1, classes=200)
    weight, bias = start[f"{HEAD}.weight"], start[f"{HEAD}.bias"]
    assert (weight.shape, weight.dtype, bias.shape, bias.dtype) == ((200, 16), np.float32, (200,), np.float32)
    assert not bias.any()
    assert abs(weight.std() / 0.02 - 1) < 0.1
    assert same_bits(start, adapters.initial_adapter(bert, ("query",), 4, 1, classes=200))
    assert not np.array_equal(adapters.initial_adapter(bert, ("query",), 4, 2, classes=200)[f"{HEAD}.weight"], weight)
    without = adapters.initial_adapter(bert, ("query",), 4, 1)
    assert same_bits({name: array for name, array in start.items() if not name.startswith(HEAD)}, without)


def test_the_task_head_is_the_last_spans(bert: ModelSource) -> None:
    start = adapters.initial_adapter(bert, ("query",), 4, 1, classes=3)
    assert [name for name in adapters.slice_of(start, [Span(0, 2, embed=True)]) if name.startswith(HEAD)] == []
    assert set(adapters.slice_of(start, [Span(2, 2, head=True)])) == {f"{HEAD}.weight", f"{HEAD}.bias"}


@pytest.mark.parametrize("targets", [("dense",), ("all-linear",)])
def test_a_classifiers_folder_names_what_was_trained(
    bert: ModelSource, tmp_path: Path, targets: tuple[str, ...]
) -> None:
    """peft would take the pooler for a `dense`, too, and train it from a random start."""
    start = adapters.initial_adapter(bert, targets, 4, 1, classes=3)
    adapters.write_peft_folder(
        start, tmp_path, reference="org/base", rank=4, alpha=8.0, targets=targets, classes=("a", "b", "c")
    )
    config = PeftConfig.from_pretrained(tmp_path)
    assert (config.task_type, config.modules_to_save, config.rank_pattern) == ("SEQ_CLS", ["classifier"], {})
    assert config.target_modules == set(adapters.target_modules(bert, targets))
    model = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(bert.folder, num_labels=3), tmp_path
    )
    loaded = get_peft_model_state_dict(model)
    assert same_bits({name: tensor.numpy() for name, tensor in loaded.items()}, start)
