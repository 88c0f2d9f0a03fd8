"""What a model folder says about generating text: its form of a chat, and the tokens that end an answer. Imports no torch, and knows
no weights.

generation_config.json, config.json and the tokenizer each name such tokens, and often not the same ones: Llama 3 and Gemma end a
turn with a token that only generation_config.json lists.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelam_fl.config import RunConfig
from edgelam_fl.errors import ConfigError, ModelError
from edgelam_fl.model.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from edgelam_fl.model.source import ModelSource

GENERATION = "generation_config.json"
APPLIED = (  # in transformers' order; `serving.generate` computes with them
    "sequence_bias", "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "min_length", "min_new_tokens",
    "suppress_tokens", "begin_suppress_tokens",
)  # fmt: skip
_WITHOUT_EFFECT = frozenset({  # keys that do not change which token is likeliest after a prompt, or how long an answer may be
    "do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",  # drawing
    "max_length", "max_new_tokens", "max_time", "early_stopping", "length_penalty", "num_return_sequences",  # the caller's
    "eos_token_id", "bos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id", "transformers_version",
    "use_cache", "cache_implementation", "cache_config", "max_cache_len", "output_attentions", "output_hidden_states",
    "output_scores", "output_logits", "return_dict_in_generate", "renormalize_logits", "remove_invalid_values", "low_memory",
    "compile_config", "disable_compile", "prefill_chunk_size", "continuous_batching_config", "assistant_early_exit",
    "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
    "assistant_lookbehind", "target_lookbehind", "prompt_lookup_num_tokens", "max_matching_ngram_size", "speculation_type",
    "use_mtp", "_from_model_config", "trust_remote_code", "user_token_id", "assistant_token_id", "chat_format", "max_window_size",
})  # fmt: skip
_NEUTRAL = {  # values of other keys that ask for nothing
    "num_beams": 1, "num_beam_groups": 1, "guidance_scale": 1.0, "penalty_alpha": 0.0, "diversity_penalty": 0.0,
    "encoder_repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0, "token_healing": False,
}  # fmt: skip


def generation_settings(folder: Path) -> dict[str, Any]:
    """Reads generation_config.json; an absent one is empty. Raises ModelError for a file that holds no JSON object."""
    return _read(folder, GENERATION)


def applied(folder: Path) -> dict[str, Any]:
    """Returns the settings of generation_config.json that change which token is likeliest, in the order in which they apply."""
    settings = generation_settings(folder)
    neutral: dict[str, Any] = {
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "min_length": 0,
        "min_new_tokens": 0,
    }
    return {
        key: settings[key]
        for key in APPLIED
        if settings.get(key) not in (None, [], {}) and settings[key] != neutral.get(key)
    }


def left_out(folder: Path) -> dict[str, Any]:
    """Returns the settings of generation_config.json that would change a greedy answer and are not computed here."""
    return {
        key: value
        for key, value in generation_settings(folder).items()
        if key not in _WITHOUT_EFFECT
        and key not in APPLIED
        and value not in (None, [], {})
        and value != _NEUTRAL.get(key)
    }


def stop_ids(folder: Path) -> frozenset[int]:
    """Returns the ids of all tokens that end an answer, from generation_config.json, config.json and the tokenizer.

    Raises ModelError for a file that cannot be read, or that names an end which is no whole number.
    """
    ends = {
        *_ids(generation_settings(folder), folder / GENERATION),
        *_ids(_read(folder, "config.json"), folder / "config.json"),
    }
    own = _tokenizer_end(folder)
    return frozenset(ends if own is None else ends | {own})


def has_chat_template(folder: Path) -> bool:
    """Returns whether a model's folder holds a chat template, in any of the places where transformers looks for one."""
    files = ("chat_template.jinja", "chat_template.json")
    named = any((folder / "additional_chat_templates").glob("*.jinja"))
    return (
        named
        or any((folder / file).is_file() for file in files)
        or bool(_read(folder, "tokenizer_config.json").get("chat_template"))
    )


def check_answers(config: RunConfig, source: ModelSource) -> None:
    """Raises ConfigError or ModelError if the model has no form for a chat, or nothing that could end an answer."""
    if config.task.kind != "causal-lm":
        return
    if config.task.template == "chat" and not has_chat_template(source.folder):
        raise ConfigError(f"task.template = 'chat', but {source.name} has no chat template; set 'plain' or a text")
    if config.task.loss_on != "all" and not source.stop_ids:
        raise ModelError(
            f"nothing ends an answer of {source.name}: neither its tokenizer nor generation_config.json names an end token, so it "
            "would never learn to stop; name an eos_token in tokenizer_config.json of a copy of its folder"
        )


def _ids(settings: dict[str, Any], file: Path) -> list[int]:
    ends = settings.get("eos_token_id")
    listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if any(isinstance(end, bool) or not isinstance(end, int) for end in listed):
        raise ModelError(f"{file}: eos_token_id = {str(ends)[:80]} must be a whole number or a list of them")
    return listed


def _read(folder: Path, name: str) -> dict[str, Any]:
    file = folder / name
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} must hold one JSON object")
    return content


def _tokenizer_end(folder: Path) -> int | None:
    """Returns the id of the tokenizer's own end token; None if it has none.

    tokenizer.json is asked first. transformers, which takes seconds, only if the files leave the token to the tokenizer's class
    or the id to a vocabulary of another format.
    """
    settings = _read(folder, "tokenizer_config.json")
    vocabulary = _read(folder, "tokenizer.json")
    if not settings and not vocabulary:
        return None
    token = settings.get("eos_token", _read(folder, "special_tokens_map.json").get("eos_token"))
    text = token.get("content") if isinstance(token, dict) else token
    known = {added.get("content"): added.get("id") for added in vocabulary.get("added_tokens") or []}
    if isinstance(known.get(text), int):
        return int(known[text])
    if "eos_token" in settings and text is None:
        return None
    end: int | None = load_tokenizer(folder).eos_token_id
    return end
