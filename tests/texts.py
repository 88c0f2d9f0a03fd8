"""Small tokenizers of the kinds that models have, and chat templates in the forms of known families, in short."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from edgelam_fl.config import TaskSection
from edgelam_fl.tasks.causal_lm import CausalLm
from edgelam_fl.tasks.data import Chat

MARKS = (
    "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<start_of_turn>",
    "<end_of_turn>", "<|head|>", "<|head_end|>", "<|eot|>",
)  # fmt: skip
CORPUS = [  # no token goes from a line to the next
    "Q: Who keeps the data? A: The device keeps the data. Who keeps the data? Nobody: it is 42 or 1999, [INST] and [/INST].",
    "### user: Why?",
    "### assistant: Because it is so.",
    *("system", "user", "assistant", "model", "\n\n"),
] * 20

# Templates mark what the assistant generates, as transformers' masks need it; `unmarked` takes the marks out.
TEMPLATES: Mapping[str, str] = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content + '<|im_end|>\n' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama 3": (
        "{{ bos_token }}{% for m in messages %}{{ '<|head|>' + m.role + '<|head_end|>\n\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content | trim + '<|eot|>' }}{% endgeneration %}{% else %}{{ m.content | trim + '<|eot|>' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant<|head_end|>\n\n' }}{% endif %}"
    ),
    "llama 2": (
        "{% if messages[0].role == 'system' %}{% set first, turns = messages[0].content, messages[1:] %}{% else %}"
        "{% set first, turns = '', messages %}{% endif %}{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'user' %}"
        "{{ bos_token + '[INST] ' + ('<<SYS>>\n' + first + '\n<</SYS>>\n\n' if first and loop.first else '') + m.content + ' [/INST]' }}"
        "{% else %}{% generation %}{{ ' ' + m.content + ' ' + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    ),
    "zephyr": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content + eos_token + '\n' }}{% endgeneration %}{% else %}{{ m.content + eos_token + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
        "{% endif %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content | trim + '<end_of_turn>\n' }}{% endgeneration %}{% else %}"
        "{{ m.content | trim + '<end_of_turn>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "phi 3": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content + '<|end|>\n' }}{% endgeneration %}{% else %}{{ m.content + '<|end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{% generation %}{{ eos_token }}{% endgeneration %}{% endif %}"
    ),
    "alpaca": (  # ends no answer
        "{% for m in messages %}{{ '### ' + m.role + ': ' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content + '\n' }}"
        "{% endgeneration %}{% else %}{{ m.content + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### assistant: ' }}{% endif %}"
    ),
    "think": (  # opens a thought for the answer to come, and leaves the earlier ones out
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
        "{{ '<|user|>' + m.content }}{% else %}{{ '<|assistant|>' }}{% generation %}"
        "{{ m.content.split('</think>')[-1] if not loop.last else m.content }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
    ),
}
STOPS = {
    "chatml": "<|im_end|>",
    "llama 3": "<|eot|>",
    "gemma": "<end_of_turn>",
    "phi 3": "<|end|>",
}  # others end with </s>
NO_SYSTEM = ("gemma",)
PARTS = (  # takes a content as a list of parts alone
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}{% for call in m.tool_calls or [] %}"
    "<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_THINK = (  # writes an empty thought before the last answer, which is no part of the prompt
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def unmarked(template: str) -> str:
    return template.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def with_marks(trained: Any) -> Any:
    """Returns a tokenizer with the same parts whose only special tokens are MARKS."""
    from tokenizers import Tokenizer

    made = Tokenizer(trained.model)
    made.normalizer, made.decoder = trained.normalizer, trained.decoder
    made.add_special_tokens(list(MARKS))
    return made


@cache
def tokenizer(kind: str, *, bos: bool = False, eos: bool = True) -> Any:
    """Makes a tokenizer with MARKS as special tokens. bos: it writes <s> before every text. eos: it names </s>."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    marks: list[Any] = list(MARKS)
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=kind == "byte fallback"))
    if kind in ("byte-level", "byte-level, trimmed", "bytes"):
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.post_processor = processors.ByteLevel(trim_offsets="trimmed" in kind)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    elif kind == "metaspace":
        made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
        made.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="first", split=False)
        alphabet = [*map(chr, range(32, 127)), "\n", "▁"]
    else:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        alphabet = [*map(chr, range(33, 127)), "▁"]
        marks += [f"<0x{byte:02X}>" for byte in range(256)]
    size = len(marks) + len(set(alphabet)) + (0 if kind == "bytes" else 120)
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=marks, initial_alphabet=sorted(alphabet), show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    if kind == "byte fallback":  # whose bytes are no special tokens
        known = json.loads(made.to_str())["model"]
        merges = [tuple(merge) for merge in known["merges"]]
        made.model = models.BPE(vocab=known["vocab"], merges=merges, unk_token="<unk>", byte_fallback=True)
        made = with_marks(made)
    if bos:
        first = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", MARKS.index("<s>"))])
        before = [made.post_processor] if made.post_processor else []
        made.post_processor = processors.Sequence([*before, first])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", extra_special_tokens=list(MARKS[3:]),
        **({"eos_token": "</s>"} if eos else {}),
    )  # fmt: skip
    return fast


def language(
    kind: str, jinja: str | dict[str, str], *, stops: str = "", bos: bool = False, eos: bool = True, **settings: Any
) -> CausalLm:
    """Makes the task of a model with this tokenizer and chat template; `stops` is listed in its generation_config.json."""
    from copy import deepcopy

    made = deepcopy(tokenizer(kind, bos=bos, eos=eos))
    made.chat_template = jinja
    task = CausalLm(Path("none"), TaskSection(**{"max_tokens": 4096, **settings}))
    task.tokenizer = made
    task.stop_ids = frozenset(MARKS.index(mark) for mark in (stops, made.eos_token) if mark)
    return task


def chat(*contents: str, system: str = "") -> Chat:
    """Makes a chat of contents that are the user's and the assistant's by turns."""
    roles = ("user", "assistant")
    turns = [{"role": roles[number % 2], "content": content} for number, content in enumerate(contents)]
    return Chat(tuple([{"role": "system", "content": system}] * bool(system) + turns))


def random_chat(seed: int, system: bool = True) -> Chat:
    """Makes a conversation of up to four turns: words, digits, line ends, characters outside of the alphabet, and doubled ones."""
    chance = random.Random(seed)
    words = [
        "The",
        "device",
        "keeps",
        "42",
        "data.",
        "é€",
        "🙂",
        "a\nb",
        "Who?",
        "### user:",
        "so",
        "x  y",
        "1999",
        "“q”",
    ]

    def some() -> str:
        return " ".join(chance.choices(words, k=chance.randint(1, 8)))

    contents = [some() for _ in range(2 * chance.randint(1, 4))]
    return chat(*contents, system=some() if system and chance.random() < 0.5 else "")
