"""Measures peft's kinds of LoRA in one short training each: perplexity here and in peft alone, size, and processor time per step.

One device and one host in one process, SmolLM2-135M and the demo's data; each kind starts from the same factors and takes the same
batches. The adapter's folder is then read by a process that has transformers and peft and never imports the product
(tests/integration/elsewhere.py): with this Python, or with --python, one where the product is not installed. Trainings stay in
runs/benchmark-lora-kinds; a second call takes those that are done. --smoke: one on a tiny random model.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.common import Figure, main
from edgelam_fl.config import RunConfig, parse_run_file
from edgelam_fl.federation.demo_text import RUN_FILE
from edgelam_fl.model.adapter import write_peft_folder
from edgelam_fl.model.source import ModelSource, find_model
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.tasks.docstrings import write_device_files
from server.global_adapter import first_adapter
from tests.fleet import check_done, joined, memory_fleet, read_by_transformers
from tests.integration.elsewhere import elsewhere, held_out_pairs
from tests.support import write_data_files, write_tiny_llama

KINDS = {
    "LoRA": [],
    "rsLoRA": ["lora.use_rslora=true"],
    "DoRA": ["lora.use_dora=true"],
    "patterns": [
        "lora.rank_pattern={ 'layers.(27|28|29).*' = 32 }",
        "lora.alpha_pattern={ 'layers.(27|28|29).*' = 64.0 }",
    ],
    "last ten layers": [f"lora.layers_to_transform={list(range(20, 30))}"],
    "norms": ["lora.modules_to_save=norm"],
}
EXAMPLES, HELD_OUT, BATCH, STEPS = 32, 12, 4, 12
MOST_APART = 1e-4  # of the perplexity


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--python",
        default=sys.executable,
        metavar="FILE",
        help="with transformers and peft, perhaps without EdgeLAM-FL",
    )


def measure(smoke: bool, options: argparse.Namespace) -> tuple[dict[str, Any], list[Figure]]:
    torch.set_num_threads(1)
    if smoke:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            tiny = find_model(str(write_tiny_llama(folder / "tiny")))
            torch.save(AutoModelForCausalLM.from_pretrained(tiny.folder), folder / "base.pt")
            file = write_data_files(folder)[0]
            kinds = {"DoRA and norms": [*KINDS["DoRA"], *KINDS["norms"]]}
            return {"smoke": True}, list(figures(tiny, folder / "base.pt", folder, file, kinds, 2, options.python))
    folder = Path("runs/benchmark-lora-kinds")
    source = find_model("smollm2-135m")
    assert source.gguf is not None
    (data,) = write_device_files(folder / "data", 1)
    file = folder / "few.jsonl"
    file.write_text(
        "".join(data.read_text(encoding="utf-8").splitlines(keepends=True)[: EXAMPLES + HELD_OUT]), encoding="utf-8"
    )
    base = read_by_transformers(source.gguf, torch.float32)
    settings = {
        "demo": RUN_FILE, "kinds": KINDS, "examples": EXAMPLES, "held_out": HELD_OUT, "batch": BATCH, "steps": STEPS,
        "EdgeLAM-FL is installed where peft is alone": _has_the_product(options.python),
    }  # fmt: skip
    return settings, list(figures(source, base, folder, file, KINDS, STEPS, options.python))


def figures(
    source: ModelSource, base: Path, folder: Path, file: Path, kinds: dict[str, list[str]], steps: int, python: str
) -> Iterator[Figure]:
    """Yields the figures of each kind. `base`: a file of torch's with the whole model, as transformers reads it."""
    for kind, overrides in kinds.items():
        settings = [f"model.name={source.name}", f"federation.batch_size={BATCH}"]
        settings += [f"data.held_out={HELD_OUT / (EXAMPLES + HELD_OUT)}", *overrides]
        config = parse_run_file(RUN_FILE, source="the demo's run file", overrides=settings)
        found = _trained(source, base, folder / kind.replace(" ", "-"), file, config, steps, python)
        yield Figure(f"{kind}, held-out perplexity before", round(found["before"], 3), "")
        yield Figure(f"{kind}, held-out perplexity", round(found["after"], 3), "")
        apart = abs(found["elsewhere"] / found["after"] - 1)
        yield Figure(
            f"{kind}, perplexity in peft alone against here", float(f"{apart:.2g}"), "of it",
            f"at most {MOST_APART:g}", apart <= MOST_APART,
        )  # fmt: skip
        yield Figure(f"{kind}, numbers that learn", int(found["numbers"]), "")
        yield Figure(f"{kind}, processor time per step", round(found["step_s"], 2), "s")


def _trained(
    source: ModelSource, base: Path, folder: Path, file: Path, config: RunConfig, steps: int, python: str
) -> dict[str, float]:
    """Returns what one training found, which is made unless it is there already."""
    made = folder / "found.json"
    if made.exists():
        return dict(json.loads(made.read_text(encoding="utf-8")))
    spec = RunSpec(config, source)
    start = first_adapter(spec)
    with memory_fleet(source, config, [file]) as fleet:
        check_done(fleet.run(start, 0))  # loads the slices
        began_s = time.process_time()
        trained = fleet.run(start, steps)
        check_done(trained)
        trained_s = time.process_time()
        adapter = {**start, **joined(trained)}
        after = fleet.run(adapter, 0, step_offset=steps)
        check_done(after)
        evaluated_s = time.process_time() - trained_s
    lora = config.lora
    write_peft_folder(
        adapter, folder / "adapter", reference=source.reference, rank=lora.rank, alpha=lora.alpha, targets=lora.targets,
        kind=spec.kind,
    )  # fmt: skip
    pairs = held_out_pairs({"device-1": file}, config)
    scores = elsewhere(base.resolve(), source.folder, {"own": (folder / "adapter").resolve()}, config, pairs, python)
    report, measured = trained["device-1"], after["device-1"]
    found = {
        "before": math.exp(report.eval_loss_sum / report.eval_labels),
        "after": math.exp(measured.eval_loss_sum / measured.eval_labels),
        "elsewhere": scores["own"]["device-1"],
        "numbers": sum(array.size for array in adapter.values()),
        "step_s": (trained_s - began_s - evaluated_s) / steps,  # a round begins with the same evaluation
    }
    made.write_text(json.dumps(found), encoding="utf-8")
    print(folder.name, found, flush=True)
    return found


def _has_the_product(python: str) -> bool:
    code = "import importlib.util; print(importlib.util.find_spec('edgelam_fl') is not None)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, cwd="/", env=environment)
    return done.stdout.strip() == "True"


if __name__ == "__main__":
    main("lora_kinds", measure, add_options)
