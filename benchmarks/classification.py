"""Measures how well an encoder (MiniLM), split over three devices and one host, sorts WordNet's definitions into ten domains.

Compares split with unsplit (the same federation with the whole model on each device) and with one device that has all data.
With one adapter per device on the host, split is the same computation as unsplit; with one adapter for all devices (the
default) the host learns from every device at each step instead of once per round. Training lasts until no variant improves;
accuracy is measured on 3,000 definitions, so one point is 30 definitions. WordNet is downloaded with apt-get, without root.
--smoke: few examples of the sample in benchmarks/data, one device, one step, split only. Runs stay in runs/benchmark-classification.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.common import Figure, main
from benchmarks.data.wordnet import SAMPLE, definitions, sample, unpacked
from edgelam_fl.federation import program
from edgelam_fl.files import cache_folder

DEVICES, EXAMPLES = 3, 12_000
RUN_FILE = """\
[model]
name = "minilm-l6"

[split]
front = 1
back = 1

[lora]
targets = ["query", "value"]

[task]
kind = "classification"
classes = {classes}
max_tokens = 48

[data]
fields = {{ prompt = "gloss", answer = "domain" }}
held_out = 0.25

[federation]
rounds = 6
local_steps = 50
batch_size = 16

[optimizer]
lr = 3e-3
schedule = "linear"
"""
# variants of the federation, as overrides of the run file
WAYS = {
    "unsplit": ["split.hosts=0"],
    "split": [],
    "split, an adapter a device": ["split.host_mode=copies"],
}
ONE_DEVICE = ["split.hosts=0", f"federation.batch_size={DEVICES * 16}", f"split.micro_batches={DEVICES * 2}"]
_SMOKE = ["federation.rounds=1", "federation.local_steps=1", "federation.batch_size=2"]
_POINTS = 1.0


def measure(smoke: bool) -> tuple[dict[str, Any], list[Figure]]:
    out = Path("runs") / ("benchmark-classification-smoke" if smoke else "benchmark-classification")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    rows = in_choosing_order(few() if smoke else many())
    classes = sorted({row["domain"] for row in rows})
    run_file = out / "wordnet.toml"
    run_file.write_text(RUN_FILE.format(classes=json.dumps(classes)), encoding="utf-8")
    files = [write(out / f"device-{n + 1}.jsonl", rows[n::DEVICES]) for n in range(DEVICES)]
    if smoke:
        summary = run(run_file, out / "split", files[:1], _SMOKE)
        return {"run_file": run_file.read_text("utf-8")}, [accuracy_figure("split", summary)]
    accuracies, figures = {}, []
    everything = [write(out / "all.jsonl", rows)]
    for way, overrides in {**WAYS, "one device with all data": ONE_DEVICE}.items():
        folder = out / way.replace(",", "").replace(" ", "-")
        summary = run(run_file, folder, everything if overrides is ONE_DEVICE else files, overrides)
        figures.append(accuracy_figure(way, summary))
        accuracies[way] = accuracy(summary, "after")
    figures.append(Figure("before training", accuracy(summary, "before"), "% accuracy"))
    figures.append(Figure("always the largest class", largest_class(rows), "% accuracy"))
    for way in list(WAYS)[1:]:
        apart = round(accuracies[way] - accuracies["unsplit"], 2)
        bar = f"within {_POINTS:g} point of unsplit"
        figures.append(Figure(f"{way}, less unsplit", apart, "points", bar, abs(apart) <= _POINTS))
    head = head_tensors(out / "split" / "adapter")
    figures.append(Figure("the head's tensors in the averaged adapter", head, "", "weight and bias", head >= 2))
    return {"run_file": run_file.read_text("utf-8"), "ways": WAYS, "one_device": ONE_DEVICE}, figures


def few() -> list[dict[str, str]]:
    return [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()[:90]]


def many() -> list[dict[str, str]]:
    nouns = unpacked(cache_folder() / "wordnet") / "wordnet" / "data.noun"
    return [{"gloss": gloss, "domain": domain} for gloss, domain in sample(list(definitions(nouns)), EXAMPLES)]


def in_choosing_order(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Sorts rows so that, dealt to devices in turn, the devices' held-out examples are those of one file of all rows.

    The order is that of the hashes by which `set_aside` chooses.
    """
    return sorted(rows, key=lambda row: hashlib.sha256(row["gloss"].encode()).hexdigest())


def write(file: Path, rows: list[dict[str, str]]) -> Path:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def run(run_file: Path, folder: Path, files: list[Path], overrides: list[str]) -> dict[str, Any]:
    """Runs one federation on this machine and returns its summary. Raises as `program.run`."""
    program.run(
        files, run_file, [f"federation.expect_nodes={len(files)}", *overrides],
        folder=folder, on_event=lambda event: print(folder.name, type(event).__name__, flush=True),
    )  # fmt: skip
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def accuracy(summary: dict[str, Any], when: str) -> float:
    """Returns the accuracy in percent over all devices' held-out examples; all devices have equally many."""
    return round(100 * fmean(device[f"metrics_{when}"]["accuracy"] for device in summary["devices"]), 2)


def accuracy_figure(way: str, summary: dict[str, Any]) -> Figure:
    return Figure(f"{way}: held-out accuracy", accuracy(summary, "after"), "% accuracy")


def largest_class(rows: list[dict[str, str]]) -> float:
    domains = [row["domain"] for row in rows]
    return round(100 * max(map(domains.count, set(domains))) / len(domains), 2)


def head_tensors(adapter: Path) -> int:
    from safetensors import safe_open

    with safe_open(adapter / "adapter_model.safetensors", "numpy") as file:
        return sum("lora_" not in name for name in file.keys())  # noqa: SIM118  (not a mapping)


if __name__ == "__main__":
    main("classification", measure)
