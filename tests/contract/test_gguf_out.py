"""A result as GGUF files: what is written is read back as the same model, by our reader and, where it is installed, by llama.cpp.

What another program would compute otherwise is refused by name before anything is written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import jinja2
import numpy as np
import pytest
import torch
from peft import PeftModel
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from edgelam_fl.errors import ConfigError
from edgelam_fl.model.gguf_header import read_header
from edgelam_fl.model.gguf_tokenizer import CUTS
from edgelam_fl.model.source import ModelSource, find_model
from edgelam_fl.model.tokenizer import load_tokenizer
from edgelam_fl.model.whole import load_whole
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.serving.export import export
from edgelam_fl.serving.results import open_result
from server.global_adapter import first_adapter
from tests.gguf_files import BYTES, across_words, keys_of, needs_llama_cpp, read_by_llama_cpp, sharp_model, tensors_of
from tests.parity.test_lora_kinds import moved
from tests.results import trained_adapter, write_result
from tests.support import run_config

TEXTS = (
    "Hello world, it's 12345 o'clock: WE'RE 1,234.5 strong!\n\n\n  def f(x):\n\treturn x**2\r\n",
    "camelCase HTTPServer naïve Ĥello  end  \n 这是测试 2024年 Привет मर 한국 😀 e-mail: a.b@c.de",
)
LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SPECIALS = ("<unk>", "</s>", "<s>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
THETA = 10_000.0
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "tie_word_embeddings": False, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGELAM_CACHE", str(tmp_path_factory.getbasetemp() / "gguf-out-cache"))


def byte_level(cut: str = "gpt-2", *, add_bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer whose merges cross words, so that each way to cut text shows."""
    merges = [(one, other) for one, _, other in (merge.partition(" ") for merge in across_words(TEXTS))]
    vocabulary = {token: number for number, token in enumerate([*SPECIALS, *BYTES])}
    for merge in merges:
        vocabulary.setdefault("".join(merge), len(vocabulary))
    way = CUTS[cut]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=way.ignore_merges))
    splits = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in way.expressions]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return finished(backend, add_bos=add_bos)


def finished(backend: Tokenizer, *, add_bos: bool) -> PreTrainedTokenizerFast:
    backend.add_special_tokens(list(SPECIALS[1:]))
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", bos_token="<s>", add_bos_token=add_bos
    )
    made.chat_template = LLAMA_TEMPLATE
    return made


def spaced(prefix: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer in the way of SentencePiece: spaces are a character, unknown characters are bytes."""
    space = "\u2581"
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = sorted(
        {character for text in TEXTS for character in text.replace(" ", space) if character.isascii()} | {space}
    )
    vocabulary = {token: number for number, token in enumerate([*SPECIALS, *bytes_, *letters])}
    merges = [
        (space, "e"),
        ("e", "n"),
        (space, "w"),
        (f"{space}e", "n"),
        ("l", "l"),
        ("o", "r"),
        ("1", "2"),
        (f"{space}en", "d"),
    ]
    for merge in merges:
        vocabulary.setdefault("".join(merge), len(vocabulary))
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    steps = [*([normalizers.Prepend(space)] if prefix else []), normalizers.Replace(" ", space)]
    backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = decoders.Sequence([decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse()])
    return finished(backend, add_bos=True)


def saved(folder: Path, config: Any, tokenizer: PreTrainedTokenizerFast, rows: int = 0) -> ModelSource:
    """Writes a random model in Hugging Face's layout: sharp attention, so that positions matter, and norms that are not one."""
    config.vocab_size = rows or len(tokenizer)
    model = sharp_model(config)
    model.generation_config.eos_token_id = [1, 3]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return find_model(str(folder))


def result_of(tmp_path: Path, source: ModelSource, *overrides: str) -> Path:
    targets = ["c_attn"] if source.config["model_type"] == "gpt2" else ["q_proj", "k_proj", "up_proj"]
    settings = (f"lora.targets={json.dumps(targets)}", "split.front=1", "split.back=1", *overrides)
    adapter = trained_adapter(source, 8, tuple(targets))
    return write_result(tmp_path / "run", source, *settings, adapter=adapter)


def exported(run: Path, dtype: str = "") -> Path:
    made, _ = export(open_result(run), "gguf", None, dtype)
    return made


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = model.eval()(input_ids=ids).logits.float()
    return result


def merged_by_peft(run: Path, source: ModelSource) -> Any:
    """The result by transformers and peft alone."""
    base = AutoModelForCausalLM.from_pretrained(source.folder)
    return PeftModel.from_pretrained(base, run / "adapter").merge_and_unload()


ROPE = {"rope_type": "default", "rope_theta": THETA}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16, "tie_word_embeddings": True}
FAR_AND_NEAR = {"full_attention": {**ROPE, "rope_theta": 1e6}, "sliding_attention": ROPE}


def llama(**more: Any) -> Any:
    return LlamaConfig(**{**SIZES, "rope_parameters": ROPE, **more})


CASES = {
    "llama": ("llama", llama),
    "llama, tied": ("llama", lambda: llama(tie_word_embeddings=True)),
    "llama, wide heads and biases": ("llama", lambda: llama(head_dim=32, attention_bias=True, mlp_bias=True)),
    "llama 3": ("llama", lambda: llama(rope_parameters={**ROPE, **LLAMA3, "rope_theta": 500_000.0})),
    "llama, linear": ("llama", lambda: llama(rope_parameters={**ROPE, "rope_type": "linear", "factor": 4.0})),
    "llama, yarn": ("llama", lambda: llama(rope_parameters={**ROPE, **YARN, "attention_factor": 0.9})),
    "mistral": ("llama", lambda: MistralConfig(**{**SIZES, "rope_parameters": ROPE, "sliding_window": None})),
    "qwen2": ("qwen2", lambda: Qwen2Config(**{**SIZES, "rope_parameters": {**ROPE, **YARN}})),
    "qwen3": ("qwen3", lambda: Qwen3Config(**{**SIZES, "head_dim": 32, "rope_parameters": ROPE})),
    "smollm3": ("smollm3", lambda: SmolLM3Config(**{**SIZES, "num_hidden_layers": 5, "rope_parameters": ROPE})),
    "olmo2": ("olmo2", lambda: Olmo2Config(**{**SIZES, "rope_parameters": ROPE})),
    "granite": (
        "granite",
        lambda: GraniteConfig(
            **SIZES, rope_parameters=ROPE, attention_multiplier=0.1, embedding_multiplier=12.0, residual_multiplier=0.22, logits_scaling=0.125
        ),
    ),
    "gemma": ("gemma", lambda: GemmaConfig(**{**SIZES, "head_dim": 32, "tie_word_embeddings": True, "rope_parameters": ROPE})),
    "gemma2": ("gemma2", lambda: Gemma2Config(**{**SIZES, **GEMMA, "attn_logit_softcapping": 5.0, "rope_parameters": ROPE})),
    "gemma3": ("gemma3", lambda: Gemma3TextConfig(**{**SIZES, **GEMMA, "num_hidden_layers": 7, "rope_parameters": FAR_AND_NEAR})),
    "gpt2": ("gpt2", lambda: GPT2Config(n_positions=256, n_embd=64, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=1)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_merged_model_is_read_back_as_itself(tmp_path: Path, name: str) -> None:
    architecture, config = CASES[name]
    source = saved(tmp_path / "model", config(), byte_level(), rows=0)
    run = result_of(tmp_path, source)
    wanted = merged_by_peft(run, source)
    made = exported(run)
    assert sorted(file.name for file in made.iterdir()) == ["Modelfile", "README.md", "adapter.gguf", "model.gguf"]
    header = read_header(made / "model.gguf")
    assert header.keys["general.architecture"] == architecture
    back = find_model(str(made / "model.gguf"))
    ids = torch.randint(8, len(byte_level()), (1, 60), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(logits(load_whole(back, "fp32"), ids), logits(wanted, ids), rtol=1e-4, atol=1e-4)
    assert back.stop_ids >= {1, 3}
    by_hand = tensors_of(wanted, architecture)
    reader = {tensor.name: tensor for tensor in gguf.GGUFReader(made / "model.gguf").tensors}
    for stored, array in by_hand.items():
        np.testing.assert_allclose(reader[stored].data, array, rtol=1e-5, atol=1e-5, err_msg=stored)
    expected = {key: value for key, value in keys_of(wanted.config, architecture).items() if value is not None}
    assert {key: header.keys.get(key) for key in expected} == pytest.approx(expected)


SAYS_ITS_LAST_TOKEN_AGAIN = {"llama, tied", "gemma"}  # with and without an adapter: answers would show nothing


@needs_llama_cpp
@pytest.mark.parametrize("name", [name for name in CASES if name not in SAYS_ITS_LAST_TOKEN_AGAIN])
def test_llama_cpp_answers_as_transformers(tmp_path: Path, name: str) -> None:
    """Merged, and as an adapter beside the base; 20 tokens after each of three prompts."""
    source = saved(tmp_path / "model", CASES[name][1](), byte_level())
    run = result_of(tmp_path, source)
    made = exported(run)
    prompts = [
        byte_level()(text, add_special_tokens=False)["input_ids"]
        for text in ("Hello world", "def f(x):", "It is 12345")
    ]
    wanted = [answer(merged_by_peft(run, source), ids) for ids in prompts]
    assert read_by_llama_cpp(made / "model.gguf", tmp_path, prompts=prompts, count=20)["continued"] == wanted
    still = write_result(tmp_path / "still", source, *still_settings(source), adapter=zero_adapter(source))
    base = exported(still) / "model.gguf"
    beside = read_by_llama_cpp(base, tmp_path, prompts=prompts, count=20, lora=made / "adapter.gguf")
    assert beside["continued"] == wanted
    assert read_by_llama_cpp(base, tmp_path, prompts=prompts, count=20)["continued"] != wanted, "the adapter"


def still_settings(source: ModelSource) -> Sequence[str]:
    return ('lora.targets=["c_attn"]',) if source.config["model_type"] == "gpt2" else ()


def zero_adapter(source: ModelSource) -> Any:
    targets = ("c_attn",) if source.config["model_type"] == "gpt2" else ("q_proj", "v_proj")
    return {name: array * np.float32("lora_A" in name) for name, array in trained_adapter(source, 8, targets).items()}


def answer(model: Any, ids: Sequence[int]) -> list[int]:
    said = model.generate(
        torch.tensor([list(ids)]), max_new_tokens=20, do_sample=False, eos_token_id=[1, 3], pad_token_id=0
    )
    new = said[0, len(ids) :].tolist()
    return [token for number, token in enumerate(new) if not {1, 3} & set(new[: number + 1])]


@pytest.mark.parametrize(("dtype", "kind", "tolerance"), [("fp16", "F16", 2e-3), ("bf16", "BF16", 2e-2)])
def test_matrices_in_half_precision(tmp_path: Path, dtype: str, kind: str, tolerance: float) -> None:
    source = saved(tmp_path / "model", llama(), byte_level())
    run = result_of(tmp_path, source)
    file = exported(run, dtype) / "model.gguf"
    kinds = {name: each.kind for name, each in read_header(file).tensors.items()}
    assert {kinds[name] for name in kinds if "norm" not in name} == {kind}
    assert {kinds[name] for name in kinds if "norm" in name} == {"F32"}
    ids = torch.arange(8, 40)[None]
    wanted, got = logits(merged_by_peft(run, source), ids), logits(load_whole(find_model(str(file)), "fp32"), ids)
    assert (got - wanted).norm() < tolerance * wanted.norm() * 5


def test_a_number_that_fp16_cannot_hold_is_refused(tmp_path: Path) -> None:
    source = saved(tmp_path / "model", llama(), byte_level())
    model = AutoModelForCausalLM.from_pretrained(source.folder)
    model.lm_head.weight.data[0, 0] = 70_000.0
    model.save_pretrained(tmp_path / "wide")
    byte_level().save_pretrained(tmp_path / "wide")
    run = result_of(tmp_path, find_model(str(tmp_path / "wide")))
    with pytest.raises(
        ConfigError, match=r"--dtype fp16 cannot hold a number of output.weight: 70000; take fp32 or bf16"
    ):
        exported(run, "fp16")
    assert not (run / "gguf").exists()


# ---------------------------------------------------------------- the adapter


def test_an_adapter_keeps_its_own_ranks_and_scale(tmp_path: Path) -> None:
    """llama.cpp scales by alpha / rank of each module; rows of queries and keys are in pairs."""
    source = saved(tmp_path / "model", llama(), byte_level())
    run = result_of(tmp_path, source, "lora.alpha=11.0")
    check_adapter_file(exported(run) / "adapter.gguf", run / "adapter", source)


def check_adapter_file(file: Path, adapter: Path, source: ModelSource) -> None:
    """What llama.cpp computes from the file, B A alpha / rank, is what peft adds to each matrix."""
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source.folder), adapter)
    header = read_header(file)
    assert (header.keys["general.type"], header.keys["adapter.type"]) == ("adapter", "lora")
    alpha = header.keys["adapter.lora.alpha"]
    stored = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(file).tensors}
    for module, place in (("q_proj", "attn_q"), ("k_proj", "attn_k"), ("up_proj", "ffn_up")):
        layer = tuned.get_base_model().model.layers[1]
        owner = layer.mlp if module == "up_proj" else layer.self_attn
        delta = getattr(owner, module).get_delta_weight("default").detach().numpy()
        if module != "up_proj":
            heads = 4 if module == "q_proj" else 2
            delta = delta.reshape(heads, 2, len(delta) // heads // 2, -1).swapaxes(1, 2).reshape(delta.shape)
        a_RI, b_OR = (stored[f"blk.1.{place}.weight.lora_{part}"] for part in "ab")
        np.testing.assert_allclose(alpha / len(a_RI) * b_OR @ a_RI, delta, rtol=1e-4, atol=1e-5)


PATTERNS = ("lora.rank_pattern={ q_proj = 3 }", "lora.alpha_pattern={ k_proj = 5.0 }")
KINDS = {
    "patterns of rsLoRA": (("lora.use_rslora=true", *PATTERNS), ""),
    "DoRA": (("lora.use_dora=true",), "DoRA scales whole rows"),
    "saved modules": (("lora.modules_to_save=['lm_head', 'norm']",), "lora.modules_to_save trained whole modules"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_lora(tmp_path: Path, kind: str) -> None:
    """Each is in the merged file; those that llama.cpp's adapters hold are one, with their own scales in B."""
    settings, reason = KINDS[kind]
    source = saved(tmp_path / "model", llama(), byte_level())
    targets = 'lora.targets=["q_proj", "k_proj", "up_proj"]'
    config = run_config(source.name, targets, *settings)
    adapter = moved(first_adapter(RunSpec(config, source)))
    run = write_result(tmp_path / "run", source, targets, "split.front=1", "split.back=1", *settings, adapter=adapter)
    made, how = export(open_result(run), "gguf", None)
    ids = torch.arange(8, 60)[None]
    wanted = logits(
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source.folder), run / "adapter"), ids
    )
    got = logits(load_whole(find_model(str(made / "model.gguf")), "fp32"), ids)
    assert (got - wanted).norm() < 1e-4 * wanted.norm()
    assert (logits(AutoModelForCausalLM.from_pretrained(source.folder), ids) - wanted).norm() > 1e-2 * wanted.norm()
    assert reason in how
    assert (made / "no-adapter.txt").is_file() == bool(reason)
    assert (made / "adapter.gguf").is_file() != bool(reason)
    if not reason:
        check_adapter_file(made / "adapter.gguf", run / "adapter", source)


# ---------------------------------------------------------------- the vocabulary


@pytest.mark.parametrize(
    ("cut", "add_bos"),
    [("llama-bpe", True), ("dbrx", False), ("smollm", False), ("gpt-2", False), ("qwen2", False), ("tekken", True)],
)
def test_each_way_to_cut_words_is_found(tmp_path: Path, cut: str, add_bos: bool) -> None:
    tokenizer = byte_level(cut, add_bos=add_bos)
    source = saved(tmp_path / "model", llama(num_hidden_layers=1, hidden_size=32, intermediate_size=32), tokenizer)
    file = exported(write_result(tmp_path / "run", source, "split.front=0", "split.back=0")) / "model.gguf"
    assert CUTS[read_header(file).keys["tokenizer.ggml.pre"]] == CUTS[cut]
    check_same_tokens(tokenizer, file)


@pytest.mark.parametrize("prefix", [True, False])
def test_a_vocabulary_of_sentencepiece(tmp_path: Path, prefix: bool) -> None:
    source = saved(tmp_path / "model", llama(num_hidden_layers=1, hidden_size=32, intermediate_size=32), spaced(prefix))
    file = exported(write_result(tmp_path / "run", source, "split.front=0", "split.back=0")) / "model.gguf"
    keys = read_header(file).keys
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.add_space_prefix"]) == ("llama", prefix)
    check_same_tokens(spaced(prefix), file)


@needs_llama_cpp
@pytest.mark.parametrize(
    "cut", ["llama-bpe", "dbrx", "smollm", "gpt-2", "qwen2", "tekken", "with a space before", "without one"]
)
def test_llama_cpp_makes_the_same_tokens(tmp_path: Path, cut: str) -> None:
    tokenizer = byte_level(cut) if cut in CUTS else spaced(cut == "with a space before")
    source = saved(tmp_path / "model", llama(num_hidden_layers=1, hidden_size=32, intermediate_size=32), tokenizer)
    file = exported(write_result(tmp_path / "run", source, "split.front=0", "split.back=0")) / "model.gguf"
    texts = [*TEXTS, "<|user|>\nHello<|end|>", "quite another text, with 77 new words"]
    said = read_by_llama_cpp(file, tmp_path, texts=texts, vocabulary=len(tokenizer))
    assert said["tokens"] == [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert set(said["ends"]) >= {1, 3}


def check_same_tokens(tokenizer: Any, file: Path) -> None:
    back = load_tokenizer(find_model(str(file)).folder)
    for text in (*TEXTS, "<|user|>\nHello<|end|>", "quite another text, with 77 new words"):
        assert back(text)["input_ids"] == tokenizer(text)["input_ids"], text
    chat = [{"role": "user", "content": "Hello"}]
    how = {"tokenize": False, "add_generation_prompt": True}
    assert back.apply_chat_template(chat, **how) == tokenizer.apply_chat_template(chat, **how)


def test_a_table_with_more_rows_than_tokens(tmp_path: Path) -> None:
    tokenizer = byte_level()
    source = saved(tmp_path / "model", llama(num_hidden_layers=1), tokenizer, rows=len(tokenizer) + 5)
    file = exported(write_result(tmp_path / "run", source, "split.front=0", "split.back=0")) / "model.gguf"
    keys = read_header(file).keys
    assert len(keys["tokenizer.ggml.tokens"]) == len(tokenizer) + 5
    assert keys["tokenizer.ggml.token_type"][-5:] == [5] * 5
    check_same_tokens(tokenizer, file)


# ---------------------------------------------------------------- what is refused


def digits_in_twos() -> PreTrainedTokenizerFast:
    """A tokenizer that cuts text as no known one does."""
    made = byte_level()
    cut = pre_tokenizers.Split(Regex(r"\p{N}{1,2}"), "isolated")
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return made


def word_level() -> PreTrainedTokenizerFast:
    backend = Tokenizer(
        models.WordLevel({token: number for number, token in enumerate([*SPECIALS, "a", "b"])}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return finished(backend, add_bos=False)


def without_merges() -> PreTrainedTokenizerFast:
    vocabulary = {token: number for number, token in enumerate([*SPECIALS, *BYTES])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return finished(backend, add_bos=False)


ONE = {"num_hidden_layers": 1}
REFUSED = {
    "another activation": (lambda: llama(**ONE, hidden_act="gelu"), byte_level, r"has hidden_act = gelu in its config.json; a GGUF file of llama"),
    "a window of a model that has none": (
        lambda: MistralConfig(**{**SIZES, **ONE, "rope_parameters": ROPE, "sliding_window": 64}), byte_level, r"has (layer_types|sliding_window) ="
    ),
    "another beta of yarn": (
        lambda: llama(**ONE, rope_parameters={**ROPE, **YARN, "beta_fast": 16.0}), byte_level, r"has beta_fast = 16.0 in its rotary positions"
    ),
    "an architecture that is not written": (
        lambda: Phi3Config(**{**SIZES, **ONE, "pad_token_id": 0}), byte_level, r"is of the architecture 'phi3', of which no GGUF file is written; written are llama"
    ),
    "a tokenizer that cuts otherwise": (lambda: llama(**ONE), digits_in_twos, "cuts text in a way that GGUF files have no name for"),
    "a tokenizer of whole words": (lambda: llama(**ONE), word_level, "is of the kind 'WordLevel'; a GGUF file is written of byte pair"),
    "a tokenizer without merges": (lambda: llama(**ONE), without_merges, "has no merges"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_another_program_would_compute_otherwise_is_refused(tmp_path: Path, name: str) -> None:
    config, tokenizer, says = REFUSED[name]
    source = saved(tmp_path / "model", config(), tokenizer())
    targets = 'lora.targets=["o_proj"]'
    run = write_result(
        tmp_path / "run",
        source,
        "split.front=0",
        "split.back=0",
        targets,
        adapter=trained_adapter(source, 8, ("o_proj",)),
    )
    with pytest.raises(ConfigError, match=says):
        exported(run)
    assert not (run / "gguf").exists()


def test_a_classification_has_no_gguf_file(tmp_path: Path, tiny: ModelSource) -> None:
    run = write_result(tmp_path / "run", tiny)
    text = (
        (run / "config.toml")
        .read_text()
        .replace('kind = "causal-lm"', 'kind = "classification"')
        .replace("classes = []", 'classes = ["a", "b"]')
    )
    (run / "config.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"a GGUF file answers with text, not with a class; `--to merged`"):
        exported(run)


# ---------------------------------------------------------------- from a GGUF file


def test_a_base_that_is_a_gguf_file_keeps_its_own_keys(tmp_path: Path) -> None:
    """First a folder as a file; then a run on that file, whose export has its vocabulary and its rotary factors."""
    source = saved(tmp_path / "model", CASES["llama 3"][1](), byte_level("llama-bpe"))
    (tmp_path / "one").mkdir()
    first = exported(result_of(tmp_path / "one", source)) / "model.gguf"
    base = find_model(str(first))
    (tmp_path / "two").mkdir()
    run = result_of(tmp_path / "two", base)
    made = exported(run)
    old, new = read_header(first), read_header(made / "model.gguf")
    kept = {key for key in old.keys if key.startswith(("tokenizer.", "llama."))}
    assert {key: new.keys[key] for key in kept} == {key: old.keys[key] for key in kept}
    assert new.tensors.keys() == old.tensors.keys() >= {"rope_freqs.weight"}
    merged, _ = export(open_result(run), "merged", None)
    ids = torch.arange(8, 60)[None]
    wanted = logits(AutoModelForCausalLM.from_pretrained(merged), ids)
    torch.testing.assert_close(
        logits(load_whole(find_model(str(made / "model.gguf")), "fp32"), ids), wanted, rtol=1e-4, atol=1e-4
    )


# ---------------------------------------------------------------- Ollama


def written_by_ollama(text: str, messages: Sequence[dict[str, str]]) -> str:
    """Runs a template of a Modelfile: the few words of Go's templates that it may have."""
    inside = re.fullmatch(r"\{\{ range \$number, \$_ := .Messages \}\}(.*)\{\{ end \}\}", text, re.DOTALL)
    if inside is None:
        return text.replace("{{ .Prompt }}", messages[-1]["content"])
    said = ""
    for number, message in enumerate(messages):
        python = re.sub(r"\{\{ if eq \.Role \"(\w+)\" \}\}", r"{% if role == '\1' %}", inside[1])
        python = python.replace("{{ if eq $number 0 }}", "{% if number == 0 %}").replace("{{ else }}", "{% else %}")
        python = python.replace("{{ end }}", "{% endif %}").replace("{{ .Content }}", "{{ content }}")
        said += jinja2.Environment(keep_trailing_newline=True).from_string(python).render(number=number, **message)
    return said


SYSTEM_BY_DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}<|system|>\nYou are kind.<|end|>\n{% endif %}"
    + LLAMA_TEMPLATE.removeprefix("{{ bos_token }}")
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + LLAMA_TEMPLATE
TOOLS_BESIDE = LLAMA_TEMPLATE + "{% if tools %}tools{% endif %}"


@pytest.mark.parametrize(
    ("template", "add_bos"),
    [
        (LLAMA_TEMPLATE, True), (LLAMA_TEMPLATE, False), (SYSTEM_BY_DEFAULT, False), (NO_SYSTEM, True), (TOOLS_BESIDE, False),
    ],
    ids=range(5),
)  # fmt: skip
def test_ollama_writes_the_chats_of_the_template(tmp_path: Path, template: str, add_bos: bool) -> None:
    tokenizer = byte_level(add_bos=add_bos)
    tokenizer.chat_template = template
    source = saved(tmp_path / "model", llama(**ONE), tokenizer)
    text = (exported(write_result(tmp_path / "run", source, "split.front=0", "split.back=0")) / "Modelfile").read_text()
    found = re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL)
    assert found
    chat = [{"role": role, "content": words} for role, words in (("user", "a?"), ("assistant", "b."), ("user", "c?"))]
    for messages in (chat, chat[:1], *([] if template is NO_SYSTEM else [[{"role": "system", "content": "s"}, *chat]])):
        wanted = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert written_by_ollama(found[1], messages) == (wanted.removeprefix("<s>") if add_bos else wanted)
    assert "{{ .Content }}<|end|>" in found[1], "what ends a turn stands behind its words"
    assert 'PARAMETER stop "<|end|>"' in text
    assert 'PARAMETER stop "</s>"' in text
    assert "FROM ./model.gguf" in text
    assert "PARAMETER temperature 0\nPARAMETER repeat_penalty 1\n" in text


@pytest.mark.parametrize(
    ("template", "wanted"), [("plain", "{{ .Prompt }}\n"), ("Q: {prompt}\nA:{answer}", "Q: {{ .Prompt }}\nA:")]
)
def test_other_templates_of_the_run_file(tmp_path: Path, template: str, wanted: str) -> None:
    source = saved(tmp_path / "model", llama(**ONE), byte_level())
    run = write_result(
        tmp_path / "run", source, "split.front=0", "split.back=0", f"task.template={json.dumps(template)}"
    )
    assert f'TEMPLATE """{wanted}"""' in (exported(run) / "Modelfile").read_text()


def test_a_template_that_is_no_pattern_is_left_to_ollama(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = LLAMA_TEMPLATE.replace(
        "m['content']", "(m['content'] if loop.last else m['content'] | upper)"
    )
    source = saved(tmp_path / "model", llama(**ONE), tokenizer)
    text = (exported(write_result(tmp_path / "run", source, "split.front=0", "split.back=0")) / "Modelfile").read_text()
    assert "TEMPLATE" not in text.replace("# No TEMPLATE", "")
    assert "# No TEMPLATE: Ollama takes the form of a chat" in text
