"""Writes a config of transformers as the keys of a GGUF file: `gguf_config` the other way round. Knows no files and no torch.

Whatever a config says is in the keys, or known to change nothing, or refused by name: the keys are read again as `gguf_config`
reads them, and must give the same config.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from edgelam_fl.errors import ConfigError
from edgelam_fl.model.gguf_config import ARCHITECTURES, FACTORS, config_of, llama3_factors
from edgelam_fl.model.gguf_header import GgufHeader

_BY_MODEL_TYPE = {architecture.model_type: name for name, architecture in ARCHITECTURES.items()} | {"mistral": "llama"}
_INSTEAD = "`--to merged` writes a folder for transformers, which has a place for it"
_CLOSE = 1e-5  # relative
_YARN = {"beta_fast": 32, "beta_slow": 1}  # llama.cpp computes with these alone
_OF_THE_FILE = (
    "general.architecture",
    "general.alignment",
    "general.file_type",
    "general.quantization_version",
    "general.type",
)
_WITHOUT_EFFECT = frozenset({  # keys of a config that change nothing in what a trained model computes
    "architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache", "return_dict",
    "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id", "pretraining_tp", "is_decoder",
    "attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "quantization_config", "id2label", "label2id", "problem_type",
    "output_attentions", "output_hidden_states", "chunk_size_feed_forward", "is_encoder_decoder", "task_specific_params", "summary_type",
    "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout", "max_window_layers", "use_sliding_window",
    "cache_implementation", "auto_map", "tokenizer_class", "prefix", "add_cross_attention", "cross_attention_hidden_size",
    "rope_theta", "rope_scaling", "tie_encoder_decoder", "num_labels", "_sliding_window_pattern", "sliding_window_pattern",
})  # fmt: skip


def architecture_for(model_type: str, name: str) -> str:
    """Returns llama.cpp's name of an architecture. Raises ConfigError for one that no GGUF file is written of."""
    if model_type not in _BY_MODEL_TYPE:
        raise ConfigError(
            f"{name} is of the architecture {model_type!r}, of which no GGUF file is written; written are {', '.join(_BY_MODEL_TYPE)}. "
            f"{_INSTEAD}"
        )
    return _BY_MODEL_TYPE[model_type]


def keys_of_file(header: GgufHeader) -> dict[str, Any]:
    """Returns the keys that a file with other weights in the place of this one's has: all but those about how numbers are stored."""
    return {
        key: value
        for key, value in header.keys.items()
        if key not in _OF_THE_FILE
        and value != []
        and not key.startswith(("split.", "quantize.", "general.source.", "general.base_model."))
    }


def keys_of(config: Mapping[str, Any], name: str) -> tuple[dict[str, Any], np.ndarray | None]:
    """Returns the keys of a config, whole as transformers writes it, and the numbers of rope_freqs.weight; None: there is none.

    name: the model's, for messages. Raises ConfigError for a value that has no place in a GGUF file.
    """
    called = architecture_for(config["model_type"], name)
    architecture = ARCHITECTURES[called]
    own = {key: config[target] for key, target in architecture.keys.items() if config.get(target) is not None}
    factors = None
    if called == "gpt2":
        own.setdefault("feed_forward_length", 4 * config["n_embd"])
    if architecture.rotary:
        width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        own |= {"attention.key_length": width, "attention.value_length": width, "rope.dimension_count": width}
        ropes = config["rope_parameters"]
        far = ropes.get("full_attention", ropes)
        scaled, factors = _rope(far, config, width, name)
        own |= {"rope.freq_base": float(far["rope_theta"]), **scaled}
        if "sliding_attention" in ropes:
            own["rope.freq_base_swa"] = float(ropes["sliding_attention"]["rope_theta"])
    return {f"{called}.{key}": value for key, value in own.items()}, factors


def _rope(
    rope: Mapping[str, Any], config: Mapping[str, Any], width: int, name: str
) -> tuple[dict[str, Any], np.ndarray | None]:
    """Returns the keys of a scaling of rotary positions, and what each frequency is divided by."""
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return {}, None
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}, None
    if kind == "yarn":
        return _yarn(rope, name), None
    if kind == "llama3":
        numbers = (float(rope[key]) for key in ("rope_theta", "factor", "low_freq_factor", "high_freq_factor"))
        theta, factor, low, high = numbers
        original = int(rope["original_max_position_embeddings"])
        return {}, llama3_factors(theta, width, factor, low, high, original).astype(np.float32)
    if (
        kind == "longrope"
        and rope.get("short_factor") == rope.get("long_factor")
        and rope.get("attention_factor") == 1.0
    ):
        return {}, np.array(rope["short_factor"], np.float32)
    raise ConfigError(
        f"{name} has rotary positions of the type {kind!r} with {_listed(rope)}, for which a GGUF file has no place here. {_INSTEAD}"
    )


def _yarn(rope: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns YaRN's keys. llama.cpp multiplies attn_factor with 0.1 ln(factor) + 1 (arXiv 2309.00071)."""
    for key, value in _YARN.items():
        if rope.get(key) not in (None, value):
            raise ConfigError(
                f"{name} has {key} = {rope[key]} in its rotary positions; llama.cpp computes with {value}. {_INSTEAD}"
            )
    factor = float(rope["factor"])
    keys = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": int(rope["original_max_position_embeddings"]),
    }
    attention = rope.get("attention_factor")
    return keys if attention is None else {**keys, "rope.scaling.attn_factor": float(attention) / _usual(factor)}


def _usual(factor: float) -> float:
    """Returns YaRN's own scale of the attention."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def check_keys(
    config: Mapping[str, Any], keys: Mapping[str, Any], shapes: Mapping[str, Any], factors: np.ndarray | None, name: str
) -> None:
    """Raises ConfigError for a value of the config that is not in the keys: another program would compute another model.

    shapes: of all tensors, by their names in the file. name: the model's, for messages.
    """
    from transformers import AutoConfig

    called = architecture_for(config["model_type"], name)
    with_factors = dict(shapes) | ({FACTORS: factors.shape} if factors is not None else {})
    back = AutoConfig.for_model(
        **config_of({"general.architecture": called, **keys}, with_factors, factors, name)
    ).to_dict()
    given = _settled(config)
    for key in sorted((given.keys() | back.keys()) - _WITHOUT_EFFECT):
        if not _same(given.get(key), back.get(key)):
            raise ConfigError(
                f"{name} has {key} = {str(given.get(key))[:80]} in its config.json; a GGUF file of {called} has no place for that value, "
                f"so llama.cpp would compute with {str(back.get(key))[:80]}. {_INSTEAD}"
            )


def _settled(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config without what has no effect at its own values."""
    given = dict(config)
    if given["model_type"] == "gpt2":
        given["n_inner"] = given["n_inner"] or 4 * given["n_embd"]
    else:
        given["head_dim"] = given.get("head_dim") or given["hidden_size"] // given["num_attention_heads"]
    rope = given.get("rope_parameters") or {}
    if rope.get("rope_type") == "yarn":
        known = {key: value for key, value in rope.items() if value is not None}
        given["rope_parameters"] = {**_YARN, "attention_factor": _usual(float(rope["factor"])), **known}
    window, positions = given.get("sliding_window"), given.get("max_position_embeddings")
    if given.get("use_sliding_window") is False or (
        window is not None and positions is not None and window >= positions
    ):
        given.pop("sliding_window", None)
    return given


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        keys = {key for each in (one, other) for key, value in each.items() if value is not None}
        return all(_same(one.get(key), other.get(key)) for key in keys)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if any(isinstance(value, float) for value in (one, other)) and not any(value is None for value in (one, other)):
        return math.isclose(float(one), float(other), rel_tol=_CLOSE)
    return bool(one == other) or {one, other} == {None, False}


def _listed(rope: Mapping[str, Any]) -> str:
    return ", ".join(sorted(rope))
