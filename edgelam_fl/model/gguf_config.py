"""Turns the keys of a GGUF file into a config as transformers has it. Knows no files, no vocabulary and no torch.

Every key is used, or known to be harmless (with the reason beside it), or refused by name. What llama.cpp assumes if a key is
absent is assumed here. transformers' own reader drops what it does not know: scalings of the rotary positions among it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgelam_fl.errors import ModelError

FACTORS = "rope_freqs.weight"  # a tensor: what each rotary frequency is divided by; no key says that it is there
_INSTEAD = "Set model.name to the model's safetensors folder"
_LLAMA3 = (1.0, 4.0)  # low_freq_factor and high_freq_factor of every Llama 3 since 3.1
_LARGEST = 1e12
_CLOSE = 1e-5  # relative; factors are stored in fp32


_OPTIONAL = frozenset({"attention.head_count_kv", "attention.key_length"})


@dataclass(frozen=True)
class GgufArchitecture:
    """How one architecture's keys, which begin with its name, are called in transformers."""

    model_type: str
    keys: Mapping[str, str]
    optional: frozenset[str] = _OPTIONAL
    rotary: bool = True
    scalings: frozenset[str] = frozenset({"default"})  # of its rotary positions
    paired: bool = False  # rows of q and k are in the order that llama.cpp's rotary positions want: pairs, not halves
    raised: bool = (
        False  # llama.cpp multiplies with norms as they are stored; transformers' model adds 1 to them itself
    )
    fixed: Mapping[str, Any] = field(default_factory=dict)  # what the architecture is, and no key says
    more: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]] | None = (
        None  # (keys, config so far) -> more of it
    )


_DECODER = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}


def _gemma2(_own: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the scale of the attention, which no key says: llama.cpp knows the largest model by its layers."""
    largest = config["num_hidden_layers"] == 46
    return {
        "query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"]
        if largest
        else config["head_dim"]
    }


def _gemma3(own: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the scale of the attention, and the positions of both kinds of layers: a scaling is for those without a window."""
    largest = config["num_hidden_layers"] == 62
    near = {"rope_type": "default", "rope_theta": float(own.get("rope.freq_base_swa", 10_000.0))}
    return {
        "query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"]
        if largest
        else config["head_dim"],
        "rope_parameters": {"full_attention": config["rope_parameters"], "sliding_attention": near},
    }


_ROPES = frozenset({"default", "linear", "yarn"})
_GEMMA = {"tie_word_embeddings": True}
_SCALES = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
_CAPS = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}
_WINDOW = {"attention.sliding_window": "sliding_window"}
ARCHITECTURES = {  # those whose logits were compared with llama.cpp's
    "llama": GgufArchitecture("llama", _DECODER, paired=True, scalings=_ROPES | {"llama3", "longrope"}),
    "qwen2": GgufArchitecture("qwen2", _DECODER, scalings=_ROPES),
    "qwen3": GgufArchitecture("qwen3", _DECODER, scalings=_ROPES),
    "granite": GgufArchitecture("granite", {**_DECODER, **_SCALES}, paired=True),
    "smollm3": GgufArchitecture(
        "smollm3", _DECODER, paired=True, fixed={"no_rope_layer_interval": 4, "use_sliding_window": False}
    ),
    "olmo2": GgufArchitecture("olmo2", _DECODER),
    "gemma": GgufArchitecture("gemma", _DECODER, raised=True, fixed={**_GEMMA, "hidden_act": "gelu_pytorch_tanh"}),
    "gemma2": GgufArchitecture(
        "gemma2",
        {**_DECODER, **_CAPS, **_WINDOW},
        optional=_OPTIONAL | _CAPS.keys() | _WINDOW.keys(),  # absent in older files: then as in the config's defaults
        raised=True,
        fixed=_GEMMA,
        more=_gemma2,
    ),
    "gemma3": GgufArchitecture(
        "gemma3_text",
        {**_DECODER, **_WINDOW},
        raised=True,
        scalings=frozenset({"default", "linear"}),
        fixed=_GEMMA,
        more=_gemma3,
    ),
    "gpt2": GgufArchitecture(
        "gpt2",
        {
            "context_length": "n_positions",
            "embedding_length": "n_embd",
            "block_count": "n_layer",
            "feed_forward_length": "n_inner",
            "attention.head_count": "n_head",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
        },
        rotary=False,
    ),
}
BY_MODEL_TYPE = {architecture.model_type: architecture for architecture in ARCHITECTURES.values()}
_NEUTRAL: dict[str, Callable[[Any], bool]] = {  # keys of an architecture that change nothing if they have this value
    "expert_count": lambda value: value == 0,
    "expert_used_count": lambda value: value == 0,
    "attention.causal": lambda value: value is True,
    "attention.max_alibi_bias": lambda value: value == 0,
    "attention.clamp_kqv": lambda value: value == 0,
    "attn_logit_softcapping": lambda value: value == 0,
    "final_logit_softcapping": lambda value: value == 0,
    "logit_scale": lambda value: value == 1,
    "embedding_scale": lambda value: value == 1,
    "residual_scale": lambda value: value == 1,
    "use_parallel_residual": lambda value: value is False,
    "pooling_type": lambda value: value == 0,
    "vocab_size": lambda _: True,  # the table of tokens has as many rows as it has
    "rope.scaling.finetuned": lambda _: True,  # how the model was made
    # llama.cpp computes with these values, whatever the keys say.
    "rope.scaling.yarn_beta_fast": lambda value: value == 32,
    "rope.scaling.yarn_beta_slow": lambda value: value == 1,
}
_ROPE = (  # keys of an architecture that say where its positions are
    "rope.dimension_count", "rope.freq_base", "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor",
    "rope.scaling.attn_factor", "rope.scaling.original_context_length", "rope.freq_base_swa",
)  # fmt: skip
_OTHERS = ("attention.value_length", "attention.sliding_window", "attention.scale")  # checked below
HARMLESS = {  # keys, or beginnings of keys that end with a dot -> why they may be left unread
    "general.architecture": "read first",
    "general.alignment": "used to find the tensors",
    "general.quantization_version": "each tensor names its own element type",
    "general.file_type": "each tensor names its own element type",
    "general.name": "says what the model is called",
    "general.basename": "says what the model is called",
    "general.finetune": "says what the model is called",
    "general.parameter_count": "the tensors say it",  # Ollama's
    "general.size_label": "says what the model is called",
    "general.version": "says what the model is called",
    "general.author": "says who made it",
    "general.organization": "says who made it",
    "general.quantized_by": "says who made it",
    "mradermacher.": "says who made it",
    "general.description": "a text for people",
    "general.license": "a text for people",
    "general.license.": "texts for people",
    "general.tags": "texts for people",
    "general.languages": "texts for people",
    "general.datasets": "texts for people",
    "general.url": "where it comes from",
    "general.repo_url": "where it comes from",
    "general.doi": "where it comes from",
    "general.uuid": "where it comes from",
    "general.source.": "where it comes from",
    "general.base_model.": "where it comes from",
    "general.dataset.": "where it comes from",
    "general.sampling.": "how other programs draw tokens; here the likeliest is taken",
    "quantize.imatrix.": "how the weights were rounded",
    "split.no": "counts from 0; files of several parts are refused by split.count",
    "split.tensors.count": "files of several parts are refused by split.count",
}


def config_of(
    keys: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], factors: np.ndarray | None, place: str
) -> dict[str, Any]:
    """Returns a config for transformers' AutoConfig.for_model, without the ids of special tokens.

    shapes: of all stored tensors, by name; factors: the numbers of rope_freqs.weight, None if there is none; place: the file, for
    messages. Raises ModelError for a key that is missing, not understood, or has a value that is not.
    """
    _check_kind(keys, place)
    name = keys.get("general.architecture")
    architecture = ARCHITECTURES.get(str(name))
    if architecture is None:
        raise ModelError(
            f"model.name: {place} is a GGUF file of the architecture {name!r}, which is read from a folder in Hugging Face's layout "
            f"alone; GGUF files: {', '.join(ARCHITECTURES)}. {_INSTEAD}"
        )
    if "token_embd.weight" not in shapes:
        what = "a vocabulary alone" if not shapes else "no table of tokens (token_embd.weight)"
        raise ModelError(f"{place} holds {what}. Set model.name to a .gguf file with all weights")
    own = {key.removeprefix(f"{name}."): value for key, value in keys.items() if key.startswith(f"{name}.")}
    config = {"model_type": architecture.model_type, **architecture.fixed}
    for key, target in architecture.keys.items():
        if key in own:
            config[target] = _one(own[key], f"{name}.{key}", place)
        elif key not in architecture.optional:
            raise ModelError(
                f"{place} lacks the key {name}.{key}. Convert the model again with llama.cpp's convert_hf_to_gguf.py"
            )
    _check_keys(keys, own, architecture, place)
    if architecture.rotary:
        config |= _attention(own, config, shapes, architecture, place)
        config["rope_parameters"] = _rope(own, config, factors, place)
        if config["rope_parameters"]["rope_type"] not in architecture.scalings:
            scaled = own.get("rope.scaling.type", FACTORS if factors is not None else "linear")
            raise refusal(f"scaled rotary positions of {name}", scaled, place)
        config |= architecture.more(own, config) if architecture.more else {}
    elif factors is not None:
        raise ModelError(f"{place} has {FACTORS}, and {name} has no rotary positions. {_INSTEAD}")
    config["vocab_size"] = shapes["token_embd.weight"][0]
    config.setdefault("tie_word_embeddings", "output.weight" not in shapes)
    return config


def _check_kind(keys: Mapping[str, Any], place: str) -> None:
    """Raises ModelError for GGUF files that hold no whole model."""
    kind = keys.get("general.type", "model")
    architecture = keys.get("general.architecture")
    if kind == "adapter" or "adapter.type" in keys:
        raise ModelError(
            f"{place} is an adapter (general.type = 'adapter') and no model. Set model.name to its base model"
        )
    if kind == "mmproj" or architecture == "clip" or any(key.startswith("clip.") for key in keys):
        raise ModelError(
            f"{place} is a projector of images (mmproj) and no language model. Set model.name to the file beside it"
        )
    if kind == "imatrix" or "imatrix.chunk_count" in keys:
        raise ModelError(f"{place} is an importance matrix and no model. Set model.name to a .gguf file with weights")
    if kind != "model":
        raise ModelError(f"{place}: general.type = {kind!r} must be 'model'. {_INSTEAD}")
    parts = keys.get("split.count", 0)
    _check_number(parts, "split.count", place)
    if parts > 1:
        raise ModelError(
            f"{place} is one of {parts} parts of a model. Join them: llama-gguf-split --merge FIRST_PART.gguf WHOLE.gguf, or set "
            f"model.name to the model's safetensors folder"
        )


def _check_keys(keys: Mapping[str, Any], own: Mapping[str, Any], architecture: GgufArchitecture, place: str) -> None:
    """Raises ModelError for the first key that nobody here understands."""
    understood = {*architecture.keys, *(_ROPE if architecture.rotary else ()), *_OTHERS}
    for key, value in own.items():
        if key not in understood and not (key in _NEUTRAL and _NEUTRAL[key](value)):
            raise refusal(f"{keys['general.architecture']}.{key}", value, place)
        if key in (*_ROPE, *_OTHERS) and key != "rope.scaling.type":
            _check_number(value, f"{keys['general.architecture']}.{key}", place)
    beginnings = tuple(name for name in HARMLESS if name.endswith("."))
    for key, value in keys.items():
        ours = key.startswith((f"{keys['general.architecture']}.", "tokenizer.")) or key in (
            "general.type",
            "split.count",
        )
        if not ours and key not in HARMLESS and not key.startswith(beginnings):
            raise refusal(key, value, place)


def refusal(key: str, value: Any, place: str) -> ModelError:
    return ModelError(f"{place} has {key} = {str(value)[:60]}, which is not understood in a GGUF file here. {_INSTEAD}")


def _one(value: Any, key: str, place: str) -> Any:
    """Returns a positive number; of a list with one number per layer, the number if it is the same in all."""
    if isinstance(value, list) and len(set(map(str, value))) == 1:
        value = value[0]
    if isinstance(value, list):
        raise ModelError(
            f"{place}: {key} differs between layers ({str(value)[:60]}), which is not understood here. {_INSTEAD}"
        )
    _check_number(value, key, place)
    if value == 0:
        raise ModelError(f"{place}: {key} = 0 must be above 0. Convert the model again")
    return value


def _check_number(value: Any, key: str, place: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < _LARGEST:
        raise ModelError(
            f"{place}: {key} = {str(value)[:60]!r} must be a number from 0 to {_LARGEST:.0e}. Convert the model again"
        )


def _attention(
    own: Mapping[str, Any],
    config: Mapping[str, Any],
    shapes: Mapping[str, Sequence[int]],
    architecture: GgufArchitecture,
    place: str,
) -> dict[str, Any]:
    """Returns heads and biases. Raises ModelError for attention that transformers' model of the architecture cannot compute."""
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    for key, rule in (
        ("attention.value_length", "attention.key_length"),
        ("rope.dimension_count", "the size of a head"),
    ):
        if own.get(key, width) != width:
            raise ModelError(
                f"{place}: {key} = {own[key]} must equal {rule}, {width}; other files are not read. {_INSTEAD}"
            )
    if "rope.freq_base_swa" in own and architecture.model_type != "gemma3_text":
        raise refusal("rope.freq_base_swa", own["rope.freq_base_swa"], place)
    window = own.get("attention.sliding_window", 0)
    if 0 < window < config["max_position_embeddings"] and "attention.sliding_window" not in architecture.keys:
        raise refusal("attention.sliding_window", window, place)
    scale = own.get("attention.scale", width**-0.5)
    if not math.isclose(scale, width**-0.5, rel_tol=_CLOSE) and "attention.scale" not in architecture.keys:
        raise refusal("attention.scale", own["attention.scale"], place)
    made = {"head_dim": width, "num_key_value_heads": config.get("num_key_value_heads", heads)}
    if config["model_type"] in ("llama", "granite"):
        made["attention_bias"] = "blk.0.attn_q.bias" in shapes
        made["mlp_bias"] = "blk.0.ffn_up.bias" in shapes
    return made


# ---------------------------------------------------------------- rotary positions


def _rope(own: Mapping[str, Any], config: Mapping[str, Any], factors: np.ndarray | None, place: str) -> dict[str, Any]:
    """Returns transformers' rope_parameters of the keys and of rope_freqs.weight."""
    theta = float(own.get("rope.freq_base", 10_000.0))
    width, positions = own.get("rope.dimension_count", config.get("head_dim")), config["max_position_embeddings"]
    width = width or config["hidden_size"] // config["num_attention_heads"]
    factor = float(own.get("rope.scaling.factor", own.get("rope.scale_linear", 0.0))) or 1.0
    kind = own.get("rope.scaling.type", "linear")
    if kind == "none" or (kind == "linear" and factor == 1.0):
        scaled: dict[str, Any] = {"rope_type": "default"}
    elif kind == "linear":
        scaled = {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        scaled = _yarn(own, factor, positions, place)
    else:
        raise refusal("rope.scaling.type", kind, place)
    if kind != "yarn" and own.get("rope.scaling.attn_factor", 1.0) != 1.0:
        raise refusal("rope.scaling.attn_factor", own["rope.scaling.attn_factor"], place)
    if factors is not None and (
        factors.shape != (width // 2,) or not np.isfinite(factors).all() or not (factors > 0).all()
    ):
        raise ModelError(f"{place}: {FACTORS} must hold {width // 2} positive numbers. Convert the model again")
    if factors is not None and not np.allclose(factors, 1.0, rtol=_CLOSE):
        if scaled["rope_type"] != "default":
            raise ModelError(
                f"{place} has {FACTORS} and rope.scaling.type = {kind!r}, one of which is read. {_INSTEAD}"
            )
        scaled = _divided(factors.astype(np.float64), theta, width, positions)
    return {"rope_theta": theta, **scaled}


def _yarn(own: Mapping[str, Any], factor: float, positions: int, place: str) -> dict[str, Any]:
    """Returns YaRN's parameters (arXiv 2309.00071). llama.cpp multiplies attn_factor with the paper's 0.1 ln(factor) + 1."""
    original = own.get("rope.scaling.original_context_length")
    if original is None:
        raise ModelError(f"{place}: rope.scaling.type = 'yarn' lacks rope.scaling.original_context_length. {_INSTEAD}")
    scale = own.get("rope.scaling.attn_factor", 1.0) * (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "attention_factor": scale,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    }


def _divided(factors: np.ndarray, theta: float, width: int, positions: int) -> dict[str, Any]:
    """Returns parameters that divide each frequency by its factor: those of Llama 3 if they give these factors, else a list.

    transformers has a list in longrope alone, with one for short and one for long texts, which are the same here.
    """
    low, high = _LLAMA3
    for original in (8192, *(2**power for power in range(7, 20))):
        most = float(factors.max())
        if np.allclose(llama3_factors(theta, width, most, low, high, original), factors, rtol=_CLOSE):
            return {
                "rope_type": "llama3", "factor": round(most, 4), "low_freq_factor": low, "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }  # fmt: skip
    numbers = [float(number) for number in factors]
    return {
        "rope_type": "longrope", "short_factor": numbers, "long_factor": numbers, "attention_factor": 1.0,
        "original_max_position_embeddings": positions, "factor": 1.0,
    }  # fmt: skip


def llama3_factors(theta: float, width: int, factor: float, low: float, high: float, original: int) -> np.ndarray:
    waves = 2 * math.pi * theta ** (np.arange(0, width, 2) / width)
    smooth = (original / waves - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    return np.where(waves < original / high, 1.0, np.where(waves > original / low, factor, between))
