"""Judges config.json and the tensors of a folder: refuses by name what a slice would compute wrong or leave out. Imports no torch.

What transformers itself computes from a config is right in a slice too, since its own modules compute it; refused is what it
would leave out in silence, and what depends on more than one call.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgelam_fl.errors import ModelError
from edgelam_fl.model.architecture import Architecture
from edgelam_fl.model.families import Family
from edgelam_fl.model.folder import listed
from edgelam_fl.model.index import TensorEntry, layer_number
from edgelam_fl.model.packing import FLOATS

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope", "proportional")
_ONLY = {  # key of config.json -> its only value that is read, and what another one would mean
    "is_encoder_decoder": (False, "an encoder and a decoder"),
    "add_cross_attention": (False, "attention to an encoder"),
    "position_embedding_type": ("absolute", "positions in the attention, which transformers 5 no longer computes"),
    "return_dict": (True, "outputs without names"),
    "is_causal": (True, "attention to later tokens, as in models that embed texts"),
    "use_bidirectional_attention": (False, "attention to later tokens, as in models that embed texts"),
    "is_decoder": (False, "attention to earlier tokens alone, in an encoder"),
}
# Keys that change what a model computes -> the value that changes nothing, and the families that transformers computes them in;
# in other families it passes them over in silence.
_ELSEWHERE: dict[str, tuple[object, tuple[str, ...]]] = {
    "rope_interleaved": (False, ()),
    "alibi": (False, ()),
    "qk_layernorm": (False, ()),
    "use_qk_norm": (False, ()),
    "clip_qkv": (None, ()),
    "logit_scale": (1, ()),
    "scale_emb": (1, ()),
    "embedding_multiplier": (1, ("granite",)),
    "residual_multiplier": (1, ("granite",)),
    "logits_scaling": (1, ("granite",)),
    "attn_logit_softcapping": (None, ("gemma2", "gemma3_text")),
    "final_logit_softcapping": (None, ("gemma2", "gemma3_text")),
    "partial_rotary_factor": (1, ("phi3",)),
    "attention_multiplier": (None, ("granite",)),
    "query_pre_attn_scalar": (None, ("gemma2", "gemma3_text")),
    "no_rope_layers": (None, ("smollm3",)),
}
_WITHOUT_WINDOWS = ("llama", "gemma", "olmo2", "granite", "gpt2", "bert")  # transformers passes sliding_window over
_SIZES = (
    ("num_hidden_layers", "n_layer"),
    ("hidden_size", "n_embd"),
    ("num_attention_heads", "n_head"),
    ("vocab_size",),
)
# Tensors that hold no weights of the model: tables that are computed, and heads of BERT's pretraining, for which a
# classification has a head of its own.
_IDLE = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"attn\.masked_bias$")
_IDLE_HEADS = (r"^cls\.",)
_HINTS = (  # pattern of a name that no module takes -> what it means and the way out
    (r"lora_|\.(base_layer|modules_to_save)\.", "an adapter lies among the weights: merge it with peft (merge_and_unload) and save the result"),
    (r"^(classifier|score|qa_outputs)\.", "a trained head would be lost, and a run makes a new one: save the model without it, AutoModel.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"),
    (r"(qweight|qzeros|g_idx|_packed|scales?|scale_inv|absmax|biases|SCB)$", "the weights are quantized in a way that quantization_config of config.json does not say: set model.name to the unquantized model"),
)  # fmt: skip


def check_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises ModelError for a value of config.json with which a slice would compute something else than the whole model."""
    for keys in _SIZES:  # transformers would take the sizes of some model for those that are missing
        sizes = [config[key] for key in keys if key in config]
        if not sizes or type(sizes[0]) is not int or sizes[0] < 1:
            said = repr(sizes[0]) if sizes else "nothing"
            raise ModelError(
                f"config.json of {folder} must say {keys[0]}, a whole number of at least 1; it says {said}. "
                f"Fetch the file again, or save the model with the save_pretrained of transformers"
            )
    for key, (value, meaning) in _ONLY.items():
        if config.get(key, value) not in (value, None):
            raise ModelError(
                f"config.json of {folder} has {key} = {config[key]!r} ({meaning}); read is {value!r} alone"
            )
    for key, value in _passed_over(config):
        raise ModelError(
            f"config.json of {folder} has {key} = {value!r}, which transformers does not compute in {config.get('model_type')!r} "
            f"models: its results would not be the model's. If the key means nothing here, take it out of config.json"
        )
    for kind in rope_kinds(config):
        if kind == "dynamic":
            raise ModelError(
                f"config.json of {folder} has rope_type = 'dynamic', whose numbers depend on the longest text that was computed "
                f"before, so slices that saw unlike texts would differ. Allowed: {', '.join(ROPE_TYPES)}. Texts within "
                f"max_position_embeddings need no scaling: take the key out of config.json"
            )
        if kind not in ROPE_TYPES:
            raise ModelError(
                f"config.json of {folder} has rope_type = {kind!r}, which is not known; allowed: {', '.join(ROPE_TYPES)}"
            )


def _passed_over(config: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Yields the keys, with their values, that would change what the model computes and that transformers passes over."""
    family = config.get("model_type")
    for key, (neutral, families) in _ELSEWHERE.items():
        if config.get(key, neutral) not in (neutral, None) and family not in families:
            yield key, config[key]
    key = "partial_rotary_factor"  # where transformers 5 saves it
    for each in rope_parameters(config):
        if each.get(key, 1) not in (1, None) and family != "phi3" and each.get("rope_type") != "proportional":
            yield f"rope_parameters.{key}", each[key]
    window, positions = config.get("sliding_window"), config.get("max_position_embeddings")
    narrow = type(window) is int and type(positions) is int and 0 < window < positions
    if family in _WITHOUT_WINDOWS and narrow and config.get("use_sliding_window") is not False:
        yield "sliding_window", window


def rope_parameters(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yields the parameters of rotary positions, in both spellings; several if kinds of layers have their own."""
    for key in ("rope_parameters", "rope_scaling"):
        given = config.get(key)
        if isinstance(given, dict):
            nested = [value for value in given.values() if isinstance(value, dict)]
            yield from nested
            if not nested or "rope_type" in given or "type" in given:
                yield given


def rope_kinds(config: Mapping[str, Any]) -> list[str]:
    """Lists the types of rotary positions that config.json names. Old Phi-3 files have two other names for longrope."""
    kinds = [str(each.get("rope_type", each.get("type", "default"))) for each in rope_parameters(config)]
    return ["longrope" if config.get("model_type") == "phi3" and kind in ("su", "yarn") else kind for kind in kinds]


def check_code(folder: Path, config: Mapping[str, Any], model_class: str) -> None:
    """Raises ModelError for a model that brings its own code, unless transformers has the class of this name and computes it."""
    own_module = f"modeling_{config.get('model_type')}"
    own_code = config.get("auto_map")
    for auto, place in own_code.items() if isinstance(own_code, dict) else ():
        module, _, name = str(place).rpartition("--")[2].rpartition(".")
        if auto.startswith("AutoModel") and (module != own_module or not _alike(name, model_class)):
            raise ModelError(
                f"config.json of {folder} names code of its own (auto_map: {auto} = {place!r}), which is not run, and transformers' "
                f"{model_class} may compute something else. Set model.name to a model without auto_map; if both are the same, take "
                f"auto_map out of config.json"
            )


def _alike(name: str, model_class: str) -> bool:
    """Tells whether two classes are of one architecture, with whatever head."""
    return name.partition("For")[0].removesuffix("Model") == model_class.partition("For")[0].removesuffix("LMHeadModel")


def matched(
    folder: Path,
    config: Mapping[str, Any],
    family: Family,
    architecture: Architecture,
    stored: Mapping[str, TensorEntry],
) -> dict[str, TensorEntry]:
    """Returns the tensors that the architecture needs. `stored` is by name in the model with its head.

    Raises ModelError if one is missing, has another shape or a type of numbers that is not read, or if the files hold one that
    no module takes.
    """
    found = dict(stored)
    for name, other in architecture.tied.items():
        if name in found and other not in found:  # transformers ties in both directions
            found[other] = found.pop(name)
    idle = [*_IDLE, *architecture.ignored, *(_IDLE_HEADS if family.task_head else ())]
    strange = [
        name for name in found if name not in architecture.shapes and not any(re.search(each, name) for each in idle)
    ]
    missing = [name for name in architecture.shapes if name not in found and architecture.tied.get(name) not in found]
    index = {name: entry for name, entry in found.items() if name in architecture.shapes}
    unlike = [
        f"{name} is {list(entry.shape)} and should be {list(architecture.shapes[name])}"
        for name, entry in index.items()
        if entry.shape != architecture.shapes[name]
    ]
    if strange or missing or unlike:
        said = [
            f"no module takes {listed(strange)}" if strange else "",
            f"missing are {listed(missing)}" if missing else "",
            listed(unlike) if unlike else "",
        ]
        raise ModelError(
            f"the files of {folder} are not those of its config.json ({architecture.model_class}): "
            f"{'; '.join(part for part in said if part)}. {_hint(config, strange, missing)}"
        )
    for name, entry in index.items():
        kind = next(
            (each.stored_type for each in entry.stored if not each.packing and each.stored_type not in FLOATS), ""
        )
        if kind:
            raise ModelError(
                f"{name} of {folder} is stored as {kind}, and quantization_config of config.json does not say what the numbers "
                f"stand for; read are {', '.join(FLOATS)}. Set model.name to the unquantized model"
            )
    return index


def _hint(config: Mapping[str, Any], strange: list[str], missing: list[str]) -> str:
    for pattern, hint in _HINTS:
        if name := next((name for name in strange if re.search(pattern, name)), ""):
            return f"{name}: {hint}"
    if any(".pooler." in name for name in missing):
        return (
            "A BERT that guesses masked words has no pooler. AutoModel.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER) draws one, "
            "which all nodes then share; copy the tokenizer's files beside it"
        )
    layers = [number for name in strange if (number := layer_number(name)) is not None]
    count = config.get("num_hidden_layers", config.get("n_layer"))
    if layers and isinstance(count, int) and max(layers) >= count:
        return f"The files have layers up to {max(layers)}, and config.json {count} layers (0 to {count - 1})"
    return "Fetch the folder again, or save the model with the save_pretrained of transformers"
