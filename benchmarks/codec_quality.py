"""Measures what codecs do to a training and save in bytes: held-out perplexity over three paired seeds, three epochs over few examples.

One device and one host in one process; each codec, for hidden states and gradients alike, starts from the same adapter and takes the
same batches. Bytes are the payloads on the device's links, with two evaluations. The formula: hidden x 4 bytes for each real token, four
times for one that is trained, twice for one that is evaluated. Trainings stay in runs/benchmark-codecs; a second call takes those that are done.
--smoke: one short training of a tiny random model with each of two codecs.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import product
from math import exp
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.common import Figure, main
from edgelam_fl.config import parse_run_file
from edgelam_fl.federation.demo_text import RUN_FILE
from edgelam_fl.model.adapter import Adapter, initial_adapter
from edgelam_fl.model.source import ModelSource, find_model
from edgelam_fl.plan.making import task_settings
from edgelam_fl.tasks.data import device_pairs
from edgelam_fl.tasks.docstrings import write_device_files
from edgelam_fl.tasks.kinds import make_task
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.codec_bytes import RAW
from tests.fleet import Fleet, check_done, joined, memory_fleet
from tests.support import write_data_files, write_tiny_llama

TRAINED, SEEDS = (RAW, "int8", "int4"), (1, 2, 3)
MOST_WORSE = {"int8": 0.3, "int4": 1.5}  # % of the held-out perplexity
MOST_BYTES = {RAW: 1.05, "int8": 0.26, "int4": 0.15}  # of raw's; raw's own of the formula's
EPOCHS, EXAMPLES, HELD_OUT, BATCH = 3, 32, 16, 4
FP32_BYTES = 4


def measure(smoke: bool) -> tuple[dict[str, Any], list[Figure]]:
    torch.set_num_threads(1)
    settings = {
        "demo": RUN_FILE, "epochs": EPOCHS, "examples": EXAMPLES, "held_out": HELD_OUT, "batch": BATCH, "seeds": SEEDS,
    }  # fmt: skip
    if not smoke:
        folder = Path("runs/benchmark-codecs")
        folder.mkdir(parents=True, exist_ok=True)
        return settings, list(quality(find_model("smollm2-135m"), folder, TRAINED, SEEDS, smoke))
    with tempfile.TemporaryDirectory() as name:
        tiny = find_model(str(write_tiny_llama(Path(name) / "tiny")))
        return {"smoke": True}, list(quality(tiny, Path(name), (RAW, "int4"), SEEDS[:1], smoke))


def quality(
    source: ModelSource, folder: Path, codecs: Sequence[str], seeds: Sequence[int], smoke: bool
) -> Iterator[Figure]:
    file = write_data_files(folder)[0] if smoke else write_device_files(folder / "data", 1)[0]
    lines = file.read_text(encoding="utf-8").splitlines()
    found = {
        (codec, seed): _trained(source, folder, lines, codec, seed, smoke) for seed, codec in product(seeds, codecs)
    }  # pairs one after the other
    for codec in codecs:
        moved, formula = (sum(found[codec, s][key] for s in seeds) for key in ("payload_bytes", "formula_bytes"))
        plain = sum(found[RAW, s]["payload_bytes"] for s in seeds)
        ratio, beside = (moved / formula, "the formula's") if codec == RAW else (moved / plain, "raw's")
        most = MOST_BYTES[codec]
        yield Figure(f"{codec}, bytes by {beside}", round(ratio, 4), "times", f"at most {most}", ratio <= most)
        perplexity = mean(found[codec, s]["after"] for s in seeds)
        yield Figure(f"{codec}, held-out perplexity", round(perplexity, 3), "mean of seeds")
    before = mean(found[RAW, seed]["before"] for seed in seeds)
    yield Figure("held-out perplexity before", round(before, 3), "mean of seeds")
    for codec in codecs:
        if codec == RAW:
            continue
        for after, what in (
            ("after", "held-out perplexity"),
            ("after_raw", "held-out perplexity, evaluated without a codec"),
        ):
            worse = [100 * (found[codec, s][after] / found[RAW, s][after] - 1) for s in seeds]
            most = MOST_WORSE[codec]
            bar = (f"at most {most}", mean(worse) <= most) if after == "after" else (None, None)
            yield Figure(f"{codec}, {what}, against raw", round(mean(worse), 3), "% more, mean of seeds", *bar)
            for seed, value in zip(seeds, worse, strict=True):
                yield Figure(f"{codec}, {what}, against raw, seed {seed}", round(value, 3), "% more")


def _trained(
    source: ModelSource, folder: Path, lines: Sequence[str], codec: str, seed: int, smoke: bool
) -> dict[str, float]:
    """Returns perplexities and bytes of one training, which is made unless it is there already. `lines`: examples, of which each seed has others."""
    made = folder / f"{codec}-{seed}.json"
    if made.exists():
        return dict(json.loads(made.read_text(encoding="utf-8")))
    examples, epochs = (8, 1) if smoke else (EXAMPLES, EPOCHS)
    held_out = HELD_OUT if not smoke else 4
    file = folder / f"few-{seed}.jsonl"
    first = (seed - 1) * (examples + held_out)
    file.write_text("\n".join(lines[first : first + examples + held_out]) + "\n", encoding="utf-8")
    settings = [f"model.name={source.name}", f"run.seed={seed}", f"data.held_out={held_out / (examples + held_out)}"]
    steps = epochs * examples // BATCH

    def fleet_over(activations: str, gradients: str) -> AbstractContextManager[Fleet]:
        overrides = [*settings, f"wire.activation_codec={activations}", f"wire.gradient_codec={gradients}"]
        config = parse_run_file(RUN_FILE, source="the demo's run file", overrides=overrides)
        return memory_fleet(source, config, [file])

    with fleet_over(codec, codec) as fleet:
        start = initial_adapter(source, fleet.config.lora.targets, fleet.config.lora.rank, seed)
        trained = fleet.run(start, steps)
        check_done(trained)
        learned = {**start, **joined(trained)}
        after = _evaluated(fleet, learned, steps)
        moved = _payload(trained) + _payload(after)
    with fleet_over(RAW, RAW) as fleet:
        after_raw = _evaluated(fleet, learned, steps)
        tokens = 4 * trained["device-1"].tokens_trained + 2 * 2 * _held_out_tokens(fleet, file)
    result = {
        "before": _perplexity(trained), "after": _perplexity(after), "after_raw": _perplexity(after_raw),
        "payload_bytes": moved, "formula_bytes": tokens * source.hidden_size * FP32_BYTES,
    }  # fmt: skip
    made.write_text(json.dumps(result), encoding="utf-8")
    print(made.name, result, flush=True)
    return result


def _held_out_tokens(fleet: Fleet, file: Path) -> int:
    settings = task_settings(fleet.config)
    made = make_task(settings, fleet.source.folder).examples(device_pairs(file, settings).held_out)
    return sum(len(example.ids) for example in made.examples)


def _evaluated(fleet: Fleet, adapter: Adapter, steps: int) -> dict[str, pb.JobReport]:
    reports = fleet.run(adapter, 0, step_offset=steps)
    check_done(reports)
    return reports


def _perplexity(reports: Mapping[str, pb.JobReport]) -> float:
    report = reports["device-1"]
    return exp(report.eval_loss_sum / report.eval_labels)


def _payload(reports: Mapping[str, pb.JobReport]) -> int:
    return sum(part.payload_bytes for part in reports["device-1"].bytes)


if __name__ == "__main__":
    main("codec_quality", measure)
