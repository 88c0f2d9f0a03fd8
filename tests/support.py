"""What several test folders need and what imports no PyTorch: run files, a tiny model on disk, data files, sockets."""

from __future__ import annotations

import atexit
import json
import os
import random
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from edgelam_fl.config import RunConfig, parse_run_file
from edgelam_fl.model.source import OWN_NETWORKS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WAIT_S = 540.0  # for a node's part, a command, a run: far beyond what one takes, so that a slow machine is no failure
CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"

_RUN_FOLDER = "EDGELAM_TESTS_FOLDER"  # in the environment, which workers and commands inherit


@cache
def run_folder() -> Path:
    """Returns a folder that all workers of a test run share. The process that made the folder removes it at its end."""
    if _RUN_FOLDER not in os.environ:
        made = tempfile.TemporaryDirectory(prefix="edgelam-tests-")
        atexit.register(made.cleanup)
        os.environ[_RUN_FOLDER] = made.name
    return Path(os.environ[_RUN_FOLDER])


def byte_tokenizer(*, shuffled: int = 0, template: str = CHAT) -> PreTrainedTokenizerFast:
    """Makes a tokenizer that has a token for each byte. `shuffled`: gives them other numbers; 0: those of the alphabet."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if shuffled:
        random.Random(shuffled).shuffle(alphabet)
    vocabulary = {token: number for number, token in enumerate(["<unk>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    fast.chat_template = template
    return fast


def write_tiny_llama(
    folder: Path, *, layers: int = 6, tied: bool = True, seed: int = 0, tokenizer: PreTrainedTokenizerFast | None = None
) -> Path:
    """Writes a random Llama in Hugging Face's layout; returns its folder. `tokenizer`: None: one with a token per byte."""
    import torch  # seconds, for those tests alone that need a model
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tokenizer or byte_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=tied, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def run_config(model: str, *overrides: str) -> RunConfig:
    small = [f"model.name={model}", "federation.batch_size=4", "split.micro_batches=2"]
    small += [] if model in OWN_NETWORKS else ["task.max_tokens=128"]
    return parse_run_file("", source="test", overrides=[*small, *overrides])


def write_data_files(folder: Path, fewest: int = 24) -> list[Path]:
    """Writes three devices' data: different words, different answer lengths, so that label counts are unequal.

    `fewest`: examples of the first device; each further one has 7 / 24 of that more.
    """
    files = []
    for device in range(3):
        lines = [
            {"question": f"What is {device}.{n}?", "answer": f"It is {'word ' * (device * 3 + n % 4 + 1)}number {n}."}
            for n in range(fewest + fewest * 7 // 24 * device)
        ]
        file = folder / f"device-{device + 1}.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        files.append(file)
    return files


def cpu_seconds(pid: int) -> float:
    """Returns the processor time that a process has used, all threads together, in seconds. Linux only. OSError: there is none."""
    return time.clock_gettime((~pid << 3) | 2)  # as clock_getcpuclockid(3) makes it


@contextmanager
def grpc_server(handlers: Sequence[grpc.GenericRpcHandler], port: int = 0) -> Iterator[int]:
    """Serves `handlers` on a port of this machine, 0: a free one; yields the port."""
    server = grpc.server(ThreadPoolExecutor(16))
    server.add_generic_rpc_handlers(tuple(handlers))
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    yield port
    server.stop(None)


def hang_up_on_all(server: socket.socket) -> None:
    try:
        while True:
            server.accept()[0].close()
    except OSError:
        return
