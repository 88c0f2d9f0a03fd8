"""Measures the bytes that a trained token takes on a device's links, over three epochs with their evaluations, by ways to save some.

Two devices and a host in this process train on the demo's data with SmolLM2-135M's tokenizer and width; of its layers there are
three, narrow inside and with random weights, as bytes depend on none of that. Counted is all that the devices send
and receive, with headers and gRPC's prefixes. The result of each way is divided by that of plain fp32 training, in which all ends
learn: four transfers of a hidden state per token. --smoke: two ways, with a tiny random model and one epoch.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import Figure, main
from edgelam_fl.config import RunConfig, parse_run_file
from edgelam_fl.model.adapter import initial_adapter
from edgelam_fl.model.source import ModelSource, find_model
from edgelam_fl.model.tokenizer import load_tokenizer
from edgelam_fl.tasks.causal_lm import CausalLm
from edgelam_fl.tasks.data import read_pairs
from edgelam_fl.tasks.docstrings import write_device_files
from edgelam_fl.tasks.held_out import set_aside
from edgelam_fl.wire import edgelam_pb2 as pb
from tests.fleet import check_done, joined, memory_fleet
from tests.support import write_tiny_llama

MODEL, LAYERS, SEED = "smollm2-135m", 3, 1
DEVICES, EXAMPLES, EPOCHS = 2, 18, 3  # of the examples, a tenth is held out; the rest are two batches of eight
FP32_BYTES = 4
SAME = ("federation.batch_size=8", "split.micro_batches=4", "federation.epochs=1", "split.front=1")
BACK, NO_BACK, FROZEN, CACHE = "split.back=1", "split.back=0", "lora.train=['hosts','back']", "wire.front_cache_mb=1000"
INT8, INT4 = ((f"wire.activation_codec={codec}", f"wire.gradient_codec={codec}") for codec in ("int8", "int4"))


@dataclass(frozen=True)
class Way:
    """A way to train: its settings, and the most bytes that it may take, in plain training's."""

    settings: tuple[str, ...]
    most: float | None = None


PLAIN = "plain"
WAYS: Mapping[str, Way] = {
    PLAIN: Way((BACK,)),
    "int8": Way((BACK, *INT8), 0.26),
    "int4": Way((BACK, *INT4), 0.15),
    "loss rows": Way((NO_BACK,)),
    "cache, layers in the back": Way((BACK, FROZEN, CACHE)),
    "cache, loss rows": Way((NO_BACK, FROZEN, CACHE), 0.25),
    "cache, layers in the back, int8": Way((BACK, FROZEN, CACHE, *INT8)),
    "cache, loss rows, int8": Way((NO_BACK, FROZEN, CACHE, *INT8), 0.06),
}
MOST_OF_FORMULA = 1.05


@dataclass
class Counted:
    """What a way took, summed over the devices."""

    sent_and_received: int = 0
    trained: int = 0  # real tokens
    evaluated: int = 0  # real tokens, of all evaluations
    labels: int = 0  # of training

    def per_token(self) -> float:
        return self.sent_and_received / self.trained


def measure(smoke: bool) -> tuple[dict[str, Any], list[Figure]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = find_model(str(write_tiny_llama(folder / "model") if smoke else short_model(folder / "model")))
        files = few(write_device_files(folder / "data", DEVICES), EXAMPLES)
        ways = [PLAIN, "cache, loss rows"] if smoke else [*WAYS]
        counted = {way: trained(source, WAYS[way], files, 1 if smoke else EPOCHS) for way in ways}
    figures = [*_of_plain(counted[PLAIN], source.hidden_size)]
    for way, found in counted.items():
        ratio, most = found.per_token() / counted[PLAIN].per_token(), WAYS[way].most
        figures.append(Figure(f"{way}: bytes per trained token", round(found.per_token()), "bytes"))
        bar = (None, None) if most is None else (f"at most {most}", ratio <= most)
        figures.append(Figure(f"{way}: of plain", round(ratio, 4), "times", *bar))
    settings = {
        "model": source.name if smoke else f"{MODEL}, {LAYERS} layers", "devices": DEVICES, "examples": EXAMPLES, "epochs": EPOCHS,
        "seed": SEED, "same": SAME, "ways": {way: WAYS[way].settings for way in ways},
    }  # fmt: skip
    return settings, figures


def _of_plain(plain: Counted, hidden_size: int) -> list[Figure]:
    """Compares plain training with its formula: four hidden states for each token that is trained, two if it is measured."""
    formula = hidden_size * FP32_BYTES * (4 * plain.trained + 2 * plain.evaluated)
    ratio = plain.sent_and_received / formula
    return [
        Figure("labels per trained token", round(plain.labels / plain.trained, 3), ""),
        Figure("evaluated tokens per trained token", round(plain.evaluated / plain.trained, 3), ""),
        Figure("plain, by the formula", round(formula / plain.trained), "bytes"),
        Figure(
            "plain: of the formula", round(ratio, 4), "times", f"at most {MOST_OF_FORMULA}", ratio <= MOST_OF_FORMULA
        ),
    ]


def trained(source: ModelSource, way: Way, files: list[Path], epochs: int) -> Counted:
    """Trains so many rounds of an epoch, with an evaluation before each and one at the end, and counts."""
    config = parse_run_file("", source="benchmark", overrides=[f"model.name={source.name}", *SAME, *way.settings])
    adapter, counted = initial_adapter(source, config.lora.targets, config.lora.rank, SEED), Counted()
    measured = sum(_tokens(source, config, file)[1] for file in files)
    with memory_fleet(source, config, files) as fleet:
        batches = -(-max(fleet.examples.values()) // config.federation.batch_size)
        for round_ in range(epochs + 1):
            reports = fleet.run(adapter, batches if round_ < epochs else 0, step_offset=round_ * batches)
            check_done(reports)
            adapter = {**adapter, **joined(reports)}
            counted.evaluated += measured
            for report in (report for report in reports.values() if report.role == pb.DEVICE):
                counted.sent_and_received += sum(one.payload_bytes + one.framing_bytes for one in report.bytes)
                counted.trained += report.tokens_trained
                counted.labels += report.labels_trained
    return counted


def _tokens(source: ModelSource, config: RunConfig, file: Path) -> tuple[int, int]:
    """Counts the tokens of a device's examples to train on and of those to measure on."""
    task, parts = (
        CausalLm(source.folder, config.task),
        set_aside(read_pairs(file, "question", "answer"), config.data.held_out),
    )
    training, held_out = (sum(len(example.ids) for example in task.examples(part).examples) for part in parts)
    return training, held_out


def few(files: list[Path], examples: int) -> list[Path]:
    """Leaves the first so many examples in each file."""
    for file in files:
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        file.write_text("".join(lines[:examples]), encoding="utf-8")
    return files


def short_model(folder: Path) -> Path:
    """Writes a model of the built-in one's shape and tokenizer with few and narrow layers of random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    built_in = find_model(MODEL)
    load_tokenizer(built_in.folder).save_pretrained(folder)
    kept = json.loads((built_in.folder / "config.json").read_text(encoding="utf-8"))
    torch.manual_seed(SEED)
    LlamaForCausalLM(LlamaConfig(**{**kept, "num_hidden_layers": LAYERS, "intermediate_size": 64})).save_pretrained(
        folder
    )
    return folder


if __name__ == "__main__":
    main("bytes", measure)
