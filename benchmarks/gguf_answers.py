"""Counts answers that llama.cpp gives as transformers does: from a run's GGUF files, and from its merged folder.

Ten prompts, the 20 likeliest tokens after each. llama.cpp is that of the npm package node-llama-cpp, with keys and values in fp32:
EDGELAM_LLAMA_CPP names the folder where it was installed. The run is that of `python -m benchmarks.demo`, or another (--run).
--smoke: two prompts, five tokens.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.common import Figure, main
from edgelam_fl.errors import EnvironmentProblem
from edgelam_fl.model.source import ModelSource, find_model
from edgelam_fl.model.whole import load_whole
from edgelam_fl.serving.export import export
from edgelam_fl.serving.gguf_out import plan_file, write_merged
from edgelam_fl.serving.results import Result, open_result
from edgelam_fl.serving.trained_on import trained_on
from edgelam_fl.tasks.kinds import make_task
from tests.gguf_files import LLAMA_CPP, read_by_llama_cpp

RUN = Path("runs/benchmark-demo")
QUESTIONS = (
    "What is a device?", "What is the capital of France?", "Define the word 'river'.", "Write a sentence about tomatoes.",
    "Is 12345 an even number?", "What does it mean to learn?", "Name three colours.", "What is a musical instrument?",
    "Translate 'good morning' into French.", "What does the word 'bank' mean?",
)  # fmt: skip
TOKENS = 20


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, default=RUN, help="a run's folder")


def measure(smoke: bool, options: argparse.Namespace) -> tuple[dict[str, Any], list[Figure]]:
    if not (LLAMA_CPP and shutil.which("node")):
        raise EnvironmentProblem(
            "llama.cpp is not here: `npm install node-llama-cpp` in a folder, which EDGELAM_LLAMA_CPP names"
        )
    result = open_result(options.run)
    source = find_model(result.config.model.name)
    questions, count = (QUESTIONS[:2], 5) if smoke else (QUESTIONS, TOKENS)
    prompts = [_ids(result, source, question) for question in questions]
    with tempfile.TemporaryDirectory() as made:
        place = Path(made)
        merged, _ = export(result, "merged", place / "merged")
        wanted = _by_transformers(merged, prompts, count, source.stop_ids)
        whole, _ = export(result, "gguf", place / "fp32")
        half, _ = export(result, "gguf", place / "fp16", "fp16")
        write_merged(load_whole(source, "fp32"), plan_file(source, trained_on(source)), place / "base.gguf", "fp32")
        ways = {
            "merged, F32": (whole / "model.gguf", None, True),
            "merged, F16": (half / "model.gguf", None, True),
            "adapter beside its base in F32": (place / "base.gguf", whole / "adapter.gguf", True),
        }
        if source.gguf is not None:
            ways["adapter beside its base as it came"] = (source.gguf, whole / "adapter.gguf", False)
        figures = []
        for name, (file, lora, is_exact) in ways.items():
            said = read_by_llama_cpp(file, place, prompts=prompts, count=count, lora=lora)["continued"]
            equal = sum(one == other for one, other in zip(said, wanted, strict=True))
            bar = "all" if is_exact else None
            figures.append(
                Figure(f"{name}: equal answers", equal, "answers", bar, equal == len(prompts) if is_exact else None)
            )
        base = read_by_llama_cpp(place / "base.gguf", place, prompts=prompts, count=count)["continued"]
        same = sum(one == other for one, other in zip(base, wanted, strict=True))
    figures.append(Figure("base without the adapter: equal answers", same, "answers", "not all", same < len(prompts)))
    figures.append(Figure("prompts", len(prompts), "prompts"))
    figures.append(Figure("tokens after each", count, "tokens"))
    package = json.loads((Path(LLAMA_CPP) / "node_modules/node-llama-cpp/package.json").read_text(encoding="utf-8"))
    settings = {
        "run_file": (options.run / "config.toml").read_text(encoding="utf-8"),
        "questions": list(questions),
        "node_llama_cpp": package["version"],
        "trained_on": trained_on(source).as_json(),
    }
    return settings, figures


def _ids(result: Result, source: ModelSource, question: str) -> list[int]:
    task: Any = make_task(result.config.task, source.folder)
    return list(task.opening([{"role": "user", "content": question}]).ids)


@torch.no_grad()
def _by_transformers(
    folder: Path, prompts: Sequence[Sequence[int]], count: int, ends: frozenset[int]
) -> list[list[int]]:
    """Returns the tokens before the first that ends an answer. Nothing else of generation_config.json has an effect here."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    answers = []
    for ids in prompts:
        said = model.generate(
            torch.tensor([list(ids)]), max_new_tokens=count, do_sample=False, eos_token_id=sorted(ends), pad_token_id=0
        )
        new = said[0, len(ids) :].tolist()
        end = next((number for number, token in enumerate(new) if token in ends), len(new))
        answers.append(new[:end])
    return answers


if __name__ == "__main__":
    main("gguf_answers", measure, add_options)
