"""What a GGUF file can have: read as llama.cpp reads it, or refused by name when the model is looked up.

Each value that is read right is fixed twice: against the same weights in Hugging Face's layout, which needs nothing, and against
llama.cpp where it is installed (tests/gguf_files.py says how).
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    Olmo2Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from edgelam_fl.cli.run_file import explained
from edgelam_fl.doctor.checks import check_model
from edgelam_fl.errors import ModelError
from edgelam_fl.hub.daemon import HubServer
from edgelam_fl.hub.fetch import open_model
from edgelam_fl.hub.slices import offered
from edgelam_fl.model.adapter import Span
from edgelam_fl.model.gguf_config import config_of
from edgelam_fl.model.gguf_header import read_header
from edgelam_fl.model.gguf_tokenizer import Vocabulary
from edgelam_fl.model.limits import check_tokens
from edgelam_fl.model.source import ModelSource, find_model
from edgelam_fl.model.stage import load_stages
from edgelam_fl.model.whole import load_whole
from edgelam_fl.serving.export import export
from edgelam_fl.serving.results import open_result
from tests.gguf_files import (
    across_words,
    byte_vocabulary,
    keys_of,
    needs_llama_cpp,
    read_by_llama_cpp,
    sharp_model,
    space_vocabulary,
    tensors_of,
    write_gguf,
)
from tests.results import write_result
from tests.support import run_config

VOCABULARY = byte_vocabulary()
SIZE = len(VOCABULARY["tokenizer.ggml.tokens"])
THETA, WIDTH, POSITIONS = 10_000.0, 16, 2048
SIZES = {
    "vocab_size": SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": POSITIONS, "tie_word_embeddings": False,
}  # fmt: skip
IDS = torch.randint(4, SIZE, (1, 200), generator=torch.Generator().manual_seed(1))
CACHE_OF_HALVES = (
    0.01  # llama.cpp keeps keys and values in fp16: its probabilities are off by up to this share of the largest
)
Change = Mapping[str, Any]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGELAM_CACHE", str(tmp_path_factory.getbasetemp() / "gguf-cache"))


def llama(**more: Any) -> Any:
    rope = {"rope_theta": THETA, **more.pop("rope", {})}
    return sharp_model(LlamaConfig(**{**SIZES, "head_dim": WIDTH, "rope_parameters": rope, **more}))


@pytest.fixture(scope="module")
def plain() -> Any:
    return llama()


def written(
    path: Path,
    model: Any,
    architecture: str = "llama",
    change: Change | None = None,
    extra: Change | None = None,
    **how: Any,
) -> Path:
    """Writes a model; `change` has keys, whose beginning `own.` stands for the architecture, `extra` has tensors."""
    keys = {**keys_of(model.config, architecture), **VOCABULARY}
    for key, value in (change or {}).items():
        keys[key.replace("own.", f"{architecture}.", 1) if key.startswith("own.") else key] = value
    return write_gguf(path / "model.gguf", keys, {**tensors_of(model, architecture), **(extra or {})}, **how)


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    result: torch.Tensor = model(input_ids=ids).logits
    return result


def refusal(file: Path) -> str:
    with pytest.raises(ModelError) as caught:
        find_model(str(file))
    return str(caught.value)


# ---------------------------------------------------------------- read right: architectures and positions


def divided(factor: float, original: int) -> np.ndarray:
    """Returns what llama.cpp's converter writes into rope_freqs.weight for Llama 3's rope: its own words, in Python."""
    factors = []
    for frequency in 1.0 / THETA ** (np.arange(0, WIDTH, 2) / WIDTH):
        wave = 2 * math.pi / frequency
        if wave < original / 4.0:
            factors.append(1.0)
        elif wave > original / 1.0:
            factors.append(factor)
        else:
            smooth = (original / wave - 1.0) / (4.0 - 1.0)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def llama3(factor: float, original: int) -> dict[str, Any]:
    return {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }  # fmt: skip


ODD = np.linspace(1, 9, WIDTH // 2).astype(np.float32)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
YARN_KEYS = {
    "own.rope.scaling.type": "yarn", "own.rope.scaling.factor": 4.0, "own.rope.scaling.original_context_length": 128,
}  # fmt: skip


@dataclass(frozen=True)
class Read:
    """A file and the same model as transformers has it."""

    model: Callable[[], Any]
    architecture: str = "llama"
    change: Change = field(default_factory=dict)
    extra: Change = field(default_factory=dict)
    rope_type: str = "default"


BASE = {"rope_parameters": {"rope_type": "default", "rope_theta": THETA}}
GRANITE = {
    "attention_multiplier": 0.1,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "logits_scaling": 0.125,
}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16, "tie_word_embeddings": True}


def gemma3_rope(**full: Any) -> dict[str, Any]:
    far = {"rope_type": "default", "rope_theta": 1e6, **full}
    return {
        "rope_parameters": {"full_attention": far, "sliding_attention": {"rope_type": "default", "rope_theta": THETA}}
    }


GPT2_SIZES = {"vocab_size": SIZE, "n_positions": 256, "n_embd": 32, "n_layer": 3, "n_head": 2}
LONG = {
    "rope_type": "longrope", "short_factor": ODD.tolist(), "long_factor": ODD.tolist(), "attention_factor": 1.0,
    "original_max_position_embeddings": POSITIONS, "factor": 1.0,
}  # fmt: skip
READ = {
    "llama": Read(llama),
    "llama with tied tables": Read(lambda: llama(tie_word_embeddings=True)),
    "llama with wide heads": Read(lambda: llama(head_dim=32)),
    "llama with biases of the attention": Read(lambda: llama(attention_bias=True)),
    "llama with all biases": Read(lambda: llama(attention_bias=True, mlp_bias=True)),
    "qwen2": Read(lambda: sharp_model(Qwen2Config(**SIZES)), "qwen2"),
    "qwen3": Read(lambda: sharp_model(Qwen3Config(**{**SIZES, "head_dim": 32})), "qwen3"),
    "gemma": Read(lambda: sharp_model(GemmaConfig(**{**SIZES, "head_dim": 32, "tie_word_embeddings": True})), "gemma"),
    "granite": Read(lambda: sharp_model(GraniteConfig(**{**SIZES, **GRANITE})), "granite"),
    "granite with biases": Read(
        lambda: sharp_model(GraniteConfig(**{**SIZES, **GRANITE, "attention_bias": True, "mlp_bias": True})), "granite"
    ),
    "smollm3": Read(lambda: sharp_model(SmolLM3Config(**{**SIZES, "num_hidden_layers": 5, **BASE, "pad_token_id": None})), "smollm3"),
    "olmo2": Read(lambda: sharp_model(Olmo2Config(**{**SIZES, "pad_token_id": None})), "olmo2"),
    "gemma2": Read(lambda: sharp_model(Gemma2Config(**{**SIZES, **GEMMA, "attn_logit_softcapping": 5.0})), "gemma2"),
    "gemma3": Read(lambda: sharp_model(Gemma3TextConfig(**{**SIZES, **GEMMA, "num_hidden_layers": 7, **gemma3_rope()})), "gemma3"),
    "gemma3 with a linear scaling": Read(
        lambda: sharp_model(
            Gemma3TextConfig(**{**SIZES, **GEMMA, "num_hidden_layers": 7, **gemma3_rope(rope_type="linear", factor=8.0)})
        ),
        "gemma3", change={"own.rope.scaling.type": "linear", "own.rope.scaling.factor": 8.0},
    ),
    "qwen2 with yarn": Read(
        lambda: sharp_model(Qwen2Config(**{**SIZES, "rope_parameters": {**BASE["rope_parameters"], **YARN}})), "qwen2", change=YARN_KEYS,
        rope_type="yarn",
    ),
    "qwen3 with yarn": Read(
        lambda: sharp_model(Qwen3Config(**{**SIZES, "head_dim": 32, "rope_parameters": {**BASE["rope_parameters"], **YARN}})), "qwen3",
        change=YARN_KEYS, rope_type="yarn",
    ),
    "gpt2": Read(lambda: sharp_model(GPT2Config(**GPT2_SIZES)), "gpt2"),
    "rope_freqs.weight of llama 3.1": Read(
        lambda: llama(rope=llama3(8.0, 256)), extra={"rope_freqs.weight": divided(8.0, 256)}, rope_type="llama3"
    ),
    "rope_freqs.weight of llama 3.2": Read(
        lambda: llama(rope=llama3(32.0, 1024)), extra={"rope_freqs.weight": divided(32.0, 1024)}, rope_type="llama3"
    ),
    "rope_freqs.weight of no known rope": Read(
        lambda: llama(rope=LONG), extra={"rope_freqs.weight": ODD}, rope_type="longrope"
    ),
    "rope_freqs.weight of ones": Read(llama, extra={"rope_freqs.weight": np.ones(WIDTH // 2, np.float32)}),
    "linear scaling": Read(
        lambda: llama(rope={"rope_type": "linear", "factor": 4.0}),
        change={"own.rope.scaling.type": "linear", "own.rope.scaling.factor": 4.0}, rope_type="linear",
    ),
    "a scaling factor without a type": Read(
        lambda: llama(rope={"rope_type": "linear", "factor": 4.0}), change={"own.rope.scaling.factor": 4.0}, rope_type="linear"
    ),
    "linear scaling in its old spelling": Read(
        lambda: llama(rope={"rope_type": "linear", "factor": 4.0}), change={"own.rope.scale_linear": 4.0}, rope_type="linear"
    ),
    "a factor that is turned off": Read(llama, change={"own.rope.scaling.type": "none", "own.rope.scaling.factor": 4.0}),
    "yarn": Read(lambda: llama(rope=YARN), change=YARN_KEYS, rope_type="yarn"),
    "yarn with a factor of the attention": Read(
        lambda: llama(rope={**YARN, "attention_factor": 0.7 * (0.1 * math.log(4.0) + 1)}),
        change={**YARN_KEYS, "own.rope.scaling.attn_factor": 0.7}, rope_type="yarn",
    ),
    "another base of the rotary frequencies": Read(lambda: llama(rope={"rope_theta": 500_000.0})),
    "data aligned to 64 bytes": Read(llama, change={"general.alignment": 64}),
    "keys that say who made it": Read(
        llama,
        change={
            "general.name": "mistral", "general.base_model.0.name": "x", "quantize.imatrix.file": "x", "general.tags": ["a", "b"],
            "mradermacher.quantize_version": "2", "general.license.link": "x", "own.expert_count": 0, "own.vocab_size": SIZE, "tokenizer.ggml.fim_pre_token_id": 3,
            "tokenizer.ggml.add_sep_token": False, "general.parameter_count": 12345,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_a_file_computes_what_its_model_does(tmp_path: Path, name: str) -> None:
    case = READ[name]
    model = case.model()
    source = find_model(str(written(tmp_path, model, case.architecture, case.change, case.extra)))
    rope = source.config.get("rope_parameters") or {}
    assert rope.get("rope_type", "default") == case.rope_type
    got = logits(load_whole(source, "fp32"))
    torch.testing.assert_close(got, logits(model), rtol=1e-4, atol=1e-4 * float(logits(model).std()))
    if case.rope_type != "default" and case.architecture == "llama":
        assert (got - logits(llama())).abs().max() > 0.1, "the model would be another without its scaling"


@needs_llama_cpp
@pytest.mark.parametrize("name", READ)
def test_llama_cpp_computes_the_same(tmp_path: Path, name: str) -> None:
    case = READ[name]
    file = written(tmp_path, case.model(), case.architecture, case.change, case.extra)
    (wanted,) = read_by_llama_cpp(file, tmp_path, ids=IDS.tolist())["probabilities"]
    got = logits(load_whole(find_model(str(file)), "fp32"))[0].softmax(-1)
    assert (got - wanted).abs().max() < CACHE_OF_HALVES * wanted.max()


@pytest.mark.parametrize("quantization", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
def test_element_types(tmp_path: Path, plain: Any, quantization: str) -> None:
    source = find_model(str(written(tmp_path, plain, quantization=quantization)))
    assert {entry.stored_type for entry in source.index.values()} == {"F32", quantization}
    wanted, got = logits(plain), logits(load_whole(source, "fp32"))
    assert (got - wanted).norm() < (0.7 if quantization.startswith(("Q4", "Q5")) else 0.2) * wanted.norm()


# ---------------------------------------------------------------- slices


SPANS = [Span(0, 1, embed=True), Span(1, 2), Span(2, 3, head=True)]


def through(source: ModelSource) -> torch.Tensor:
    """Returns the logits of three slices, each loaded for itself."""
    hidden, lengths = IDS, [IDS.shape[1]]
    with torch.no_grad():
        for span in SPANS:
            (stage,) = load_stages(source, [span], "fp32", None)
            hidden = stage(hidden, lengths)
    return hidden


def test_the_factors_reach_every_slice_also_over_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama(rope=llama3(8.0, 256))
    source = find_model(str(written(tmp_path, model, extra={"rope_freqs.weight": divided(8.0, 256)})))
    torch.testing.assert_close(through(source), logits(model))
    server = HubServer("127.0.0.1", 0, tmp_path / "hub")
    try:
        with offered(source, tmp_path / "hub") as token:
            monkeypatch.setenv("EDGELAM_CACHE", str(tmp_path / "a node without the file"))
            served = open_model("elsewhere", source.digest, f"127.0.0.1:{server.port}", token=token, tokenizer=True)
            assert torch.equal(through(served), through(source))
            assert served.stop_ids == source.stop_ids == {1, 3}
    finally:
        server.stop()


# ---------------------------------------------------------------- refused by name


Harm = Callable[[Path, Any], Path]


def with_keys(**change: Any) -> Harm:
    return lambda folder, model: written(
        folder, model, change={key.replace("__", "."): value for key, value in change.items()}
    )


def with_tensor(name: str, *shape: int) -> Harm:
    return lambda folder, model: written(folder, model, extra={name: np.ones(shape, np.float32)})


def with_bytes(change: Callable[[bytes], bytes]) -> Harm:
    def harm(folder: Path, model: Any) -> Path:
        file = written(folder, model)
        file.write_bytes(change(file.read_bytes()))
        return file

    return harm


def without(name: str) -> Harm:
    def harm(folder: Path, model: Any) -> Path:
        tensors = tensors_of(model, "llama")
        del tensors[name]
        return write_gguf(folder / "model.gguf", {**keys_of(model.config, "llama"), **VOCABULARY}, tensors)

    return harm


def renumbered(old: int, new: int) -> Callable[[bytes], bytes]:
    """Returns a change of the element type of the table of tokens."""

    def change(content: bytes) -> bytes:
        at = content.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 2 * 8
        assert content[at] == old
        return content[:at] + bytes([new]) + content[at + 1 :]

    return change


REFUSED: dict[str, tuple[Harm, str]] = {
    "another scaling": (with_keys(own__rope__scaling__type="longrope"), r"rope\.scaling\.type = longrope"),
    "factors of Phi-3": (with_tensor("rope_factors_long.weight", 8), r"the tensor rope_factors_long\.weight, which llama .* has not"),
    "factors and scaling": (
        lambda folder, model: written(folder, model, change=YARN_KEYS, extra={"rope_freqs.weight": ODD}),
        r"rope_freqs\.weight and rope\.scaling\.type = 'yarn', one of which",
    ),
    "factors of another width": (with_tensor("rope_freqs.weight", 5), "rope_freqs.weight must hold 8 positive numbers"),
    "yarn without its length": (with_keys(own__rope__scaling__type="yarn"), r"lacks rope\.scaling\.original_context_length"),
    "other ends of yarn": (with_keys(**{key.replace(".", "__"): value for key, value in YARN_KEYS.items()}, own__rope__scaling__yarn_beta_fast=4.0), r"yarn_beta_fast = 4\.0"),
    "a part of each head turns": (with_keys(own__rope__dimension_count=8), r"rope\.dimension_count = 8 must equal the size of a head, 16"),
    "values of another width": (with_keys(own__attention__value_length=8), r"attention\.value_length = 8 must equal attention\.key_length, 16"),
    "a window": (with_keys(own__attention__sliding_window=64), r"attention\.sliding_window = 64"),
    "another scale of the attention": (with_keys(own__attention__scale=0.5), r"attention\.scale = 0\.5"),
    "Granite's scales": (with_keys(own__logit_scale=8.0), r"llama\.logit_scale = 8\.0"),
    "Granite's embedding": (with_keys(own__embedding_scale=12.0), r"llama\.embedding_scale = 12\.0"),
    "Gemma 2's caps": (with_keys(own__attn_logit_softcapping=50.0), r"llama\.attn_logit_softcapping = 50\.0"),
    "factors of another architecture": (
        lambda folder, _: written(folder, sharp_model(Qwen2Config(**SIZES)), "qwen2", extra={"rope_freqs.weight": ODD}),
        r"scaled rotary positions of qwen2 = rope_freqs\.weight",
    ),
    "experts": (with_keys(own__expert_count=8), r"llama\.expert_count = 8"),
    "a key of tomorrow": (with_keys(own__attention__twist=1), r"llama\.attention\.twist = 1, which is not understood"),
    "a key of nobody": (with_keys(other__key="x"), r"other\.key = x, which is not understood"),
    "a key that is missing": (with_keys(own__attention__layer_norm_rms_epsilon=None), r"lacks the key llama\.attention\.layer_norm_rms_epsilon"),
    "heads that differ between layers": (with_keys(own__attention__head_count_kv=[1, 2, 1]), r"head_count_kv differs between layers"),
    "an architecture that was not compared": (with_keys(general__architecture="phi3"), r"architecture 'phi3'.*; GGUF files: llama, qwen2"),
    "a tensor too many": (with_tensor("blk.0.attn_sinks.weight", 2), r"the tensor blk\.0\.attn_sinks\.weight"),
    "one bias of three": (with_tensor("blk.1.attn_q.bias", 32), r"the tensor blk\.1\.attn_q\.bias"),
    "a tensor that is missing": (without("blk.1.ffn_up.weight"), r"lacks tensors of its own architecture llama: model\.layers\.1\.mlp\.up_proj"),
    "keys and shapes that disagree": (with_keys(own__feed_forward_length=40), r"ffn_\w+\.weight is of shape .* it must be"),
    "an adapter": (with_keys(general__type="adapter"), r"is an adapter .* Set model\.name to its base model"),
    "a projector": (with_keys(general__type="mmproj"), "is a projector of images"),
    "an importance matrix": (with_keys(general__type="imatrix"), "is an importance matrix"),
    "a part of a set": (with_keys(split__count=3, split__no=0), r"is one of 3 parts .*llama-gguf-split --merge"),
    "a vocabulary alone": (
        lambda folder, model: write_gguf(folder / "model.gguf", {**keys_of(model.config, "llama"), **VOCABULARY}, {}),
        "holds a vocabulary alone",
    ),
    "no vocabulary": (with_keys(tokenizer__ggml__tokens=None, tokenizer__ggml__token_type=None), "has no vocabulary"),
    "a word cutter that nobody knows": (with_keys(tokenizer__ggml__pre="chameleon"), r"tokenizer\.ggml\.pre = 'chameleon', which says how"),
    "no word cutter": (with_keys(tokenizer__ggml__pre=None), r"no tokenizer\.ggml\.pre, which says how"),
    "a vocabulary of T5": (with_keys(tokenizer__ggml__model="t5"), r"tokenizer\.ggml\.model = 't5'; read are 'gpt2'"),
    "a vocabulary of BERT": (with_keys(tokenizer__ggml__model="bert"), r"tokenizer\.ggml\.model = 'bert'; read are 'gpt2'"),
    "a space before byte-level text": (with_keys(tokenizer__ggml__add_space_prefix=True), r"byte-level, has tokenizer\.ggml\.add_space_prefix"),
    "a separator": (with_keys(tokenizer__ggml__add_sep_token=True), r"tokenizer\.ggml\.add_sep_token = True"),
    "an end beyond the vocabulary": (with_keys(tokenizer__ggml__eot_token_id=999), r"eot_token_id = 999 must be below the 261"),
    "merges of other tokens": (with_keys(tokenizer__ggml__merges=["x yz"]), r"tokenizer\.ggml\.merges do not fit"),
    "a text for a number": (with_keys(own__block_count="three"), r"llama\.block_count = 'three' must be a number"),
    "a number for a text": (with_keys(tokenizer__ggml__pre=7), r"tokenizer\.ggml\.pre = 7 is of another kind"),
    "no layer": (with_keys(own__block_count=0), r"llama\.block_count = 0 must be above 0"),
    "heads that do not divide": (with_keys(own__attention__head_count=3), r"head_count|size of a head|transformers makes no model"),
    "big-endian": (lambda folder, model: written(folder, model, big_endian=True), "is big-endian; read are little-endian"),
    "version 1": (with_bytes(lambda content: content[:4] + b"\1" + content[5:]), "is of GGUF version 1"),
    "cut off in the data": (with_bytes(lambda content: content[:-1000]), r"is cut off: its tensors end at byte \d+"),
    "cut off in the header": (with_bytes(lambda content: content[:900]), "its header cannot be read"),
    "an element type of nobody": (with_bytes(renumbered(0, 99)), r"token_embd\.weight is of the element type number 99"),
    "an element type of whole numbers": (with_bytes(renumbered(0, 26)), r"token_embd\.weight is of the element type I32"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused_by_name(tmp_path: Path, plain: Any, name: str) -> None:
    harm, message = REFUSED[name]
    said = refusal(harm(tmp_path, plain))
    assert str(tmp_path) in said
    assert re.search(message, said), said


# ---------------------------------------------------------------- text


TEXTS = [
    "The capital of France is", " 12 34 5678 x9y", "<|im_start|>user\nHi <|im_end|>\n", "a  b\t\tc\n\n\nd ", "don't I'LL we've HE'S",
    "\u00fcn\u00efc\u00f6d\u00e9 \u4f60\u597d \U0001f600\u00e9", "12345", "  leading", "x=1;y=[2]//z", "\n\n1. a\r\n  2) b",
    "HelloWorld camelCase ABCdef", "tab\tx  ", "---\n===", "a'b ''c", "\u0661\u0662\u0663 x\u00b2 \u216b", "!!!/path/to\n/x", "$5.00+10%",
]  # fmt: skip
MERGES = across_words(TEXTS)
STRANGE = ("<unk>", "</s>", "<|im_start|>", "<|im_end|>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "<two words>")
VOCABULARIES = {
    **{pre: byte_vocabulary(pre, MERGES) for pre in ("llama-bpe", "dbrx", "smollm", "gpt-2", "qwen2", "tekken")},
    "special tokens outside of the byte alphabet": byte_vocabulary("qwen2", MERGES, STRANGE),
    "no key about the first token": {**byte_vocabulary("llama-bpe", MERGES), "tokenizer.ggml.add_bos_token": None},
    "space": space_vocabulary(TEXTS),
    "no space": space_vocabulary(TEXTS, prefix=False),
}
MORE_TEXTS = [*TEXTS, "<|user|>\nhello<|user|> x", "a<\uff5cend\u2581of\u2581sentence\uff5c> <two words>b"]
# Numbers of tokens of TEXTS, as llama.cpp has them.
COUNTS: dict[str, list[int]] = json.loads((Path(__file__).with_name("gguf_tokens.json")).read_text())


def vocabulary_file(folder: Path, name: str) -> Path:
    vocabulary = VOCABULARIES[name]
    model = sharp_model(
        LlamaConfig(**{**SIZES, "num_hidden_layers": 1, "vocab_size": len(vocabulary["tokenizer.ggml.tokens"])})
    )
    return write_gguf(
        folder / "model.gguf", {**keys_of(model.config, "llama"), **vocabulary}, tensors_of(model, "llama")
    )


@pytest.mark.parametrize("name", VOCABULARIES)
def test_text_becomes_llama_cpps_tokens(tmp_path: Path, name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(find_model(str(vocabulary_file(tmp_path, name))).folder)
    got = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in MORE_TEXTS]
    assert got == COUNTS[name]
    for text, ids in zip(TEXTS, got, strict=False):
        assert tokenizer.decode(ids) == text


@needs_llama_cpp
@pytest.mark.parametrize("name", VOCABULARIES)
def test_llama_cpp_says_the_same_of_text(tmp_path: Path, name: str) -> None:
    file = vocabulary_file(tmp_path, name)
    size = len(VOCABULARIES[name]["tokenizer.ggml.tokens"])
    said = read_by_llama_cpp(file, tmp_path, texts=MORE_TEXTS, vocabulary=size)
    if os.environ.get("EDGELAM_WRITE_TOKENS"):
        COUNTS[name] = said["tokens"]
        Path(__file__).with_name("gguf_tokens.json").write_text(json.dumps(COUNTS) + "\n")
    source = find_model(str(file))
    tokenizer = AutoTokenizer.from_pretrained(source.folder)
    assert said["tokens"] == COUNTS[name]
    assert set(said["ends"]) == source.stop_ids
    assert said["begins"] == (tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id)


@pytest.mark.parametrize(
    ("change", "ends"),
    [
        ({}, {1, 3}),  # <|im_end|> is an end by its spelling
        ({"tokenizer.ggml.eot_token_id": 7}, {1, 3, 7}),
        ({"tokenizer.ggml.eom_token_id": 8, "tokenizer.ggml.eos_token_id": None}, {1, 3, 8}),
    ],
)
def test_ends_of_answers(tmp_path: Path, plain: Any, change: Change, ends: set[int]) -> None:
    assert find_model(str(written(tmp_path, plain, change=change))).stop_ids == ends


def test_chat_templates(tmp_path: Path, plain: Any) -> None:
    templates = {
        "tokenizer.chat_template": "{{ messages[0]['content'] }}!", "tokenizer.chat_template.tool_use": "{{ tools | length }}?",
        "tokenizer.chat_templates": ["tool_use"],
    }  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(find_model(str(written(tmp_path, plain, change=templates))).folder)
    chat = [{"role": "user", "content": "a"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "a!"
    assert tokenizer.apply_chat_template(chat, tokenize=False, tools=[{"type": "function"}]) == "1?"


def test_tokens_that_never_come(tmp_path: Path, plain: Any) -> None:
    source = find_model(str(written(tmp_path, plain, change={"tokenizer.ggml.suppress_tokens": [5, 6]})))
    assert json.loads((source.folder / "generation_config.json").read_text())["suppress_tokens"] == [5, 6]


def test_what_an_older_reader_unpacked_is_made_anew(tmp_path: Path) -> None:
    source = find_model(
        str(written(tmp_path, llama(rope=llama3(8.0, 256)), extra={"rope_freqs.weight": divided(8.0, 256)}))
    )
    index = json.loads((source.folder / "tensors.json").read_text())
    config = source.folder / "config.json"
    config.write_text(json.dumps({**source.config, "rope_parameters": {"rope_theta": THETA, "rope_type": "default"}}))
    (source.folder / "tensors.json").write_text(json.dumps({"tensors": index["tensors"]}))
    (source.folder / "fp32").mkdir(exist_ok=True)
    again = find_model(str(tmp_path / "model.gguf"))
    assert again.config["rope_parameters"]["rope_type"] == "llama3"
    assert not (source.folder / "fp32").exists(), "weights that the older reader converted"


def test_exports_of_a_model_that_transformers_reads_otherwise(tmp_path: Path) -> None:
    model = llama(rope=llama3(8.0, 256))
    source = find_model(str(written(tmp_path, model, extra={"rope_freqs.weight": divided(8.0, 256)})))
    result = open_result(write_result(tmp_path / "run", source, "split.front=1", "split.back=1", "split.hosts=1"))
    _, how = export(result, "peft", None)
    assert "which transformers does not read as llama.cpp" in how
    assert "gguf_file" not in how
    merged, _ = export(result, "merged", None)
    with torch.no_grad():
        plain = PeftModel.from_pretrained(model, result.adapter).merge_and_unload()
    own = AutoModelForCausalLM.from_pretrained(merged)
    torch.testing.assert_close(logits(own), logits(plain), rtol=1e-3, atol=1e-3)
    assert own.generation_config.eos_token_id == [1, 3]


def test_doctor_and_explain_refuse_it_too(tmp_path: Path, plain: Any) -> None:
    file = written(tmp_path, plain, change={"own.logit_scale": 8.0})
    finding = check_model(str(file))
    assert (finding.state, "llama.logit_scale = 8.0" in finding.found) == ("problem", True)
    with pytest.raises(ModelError, match=r"llama\.logit_scale = 8\.0"):
        explained(run_config(str(file)))


def test_damaged_files_are_refused_and_raise_nothing_else(tmp_path: Path, plain: Any) -> None:
    """Some bytes of what comes before the tensors are changed; a file that is still understood is one too."""
    file = written(tmp_path, plain)
    content, rng = file.read_bytes(), np.random.default_rng(5)
    refused = 0
    for _ in range(300):
        changed = bytearray(content)
        for place in rng.integers(4, 6_000, rng.integers(1, 4)):
            changed[place] = rng.integers(256)
        file.write_bytes(changed)
        try:
            header = read_header(file)
            config_of(header.keys, {name: tensor.shape for name, tensor in header.tensors.items()}, None, "x")
            Vocabulary(header.keys, "llama", "x")
        except ModelError:
            refused += 1
    assert 100 < refused < 300


def test_each_file_has_its_own_last_token(tmp_path: Path) -> None:
    """What is kept of a tokenizer goes by the file that holds it."""
    check_tokens(find_model(str(written(tmp_path, llama()))))
    more = {
        "tokenizer.ggml.tokens": [*VOCABULARY["tokenizer.ggml.tokens"], "zz"],
        "tokenizer.ggml.token_type": [*VOCABULARY["tokenizer.ggml.token_type"], 1],
    }
    (tmp_path / "more").mkdir()
    with pytest.raises(ModelError, match="'zz' the id 261"):
        check_tokens(find_model(str(written(tmp_path / "more", llama(), change=more))))
