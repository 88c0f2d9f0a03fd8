"""Measures what splitting costs in CPU seconds and memory, against plain transformers and peft on the same micro-batches.

Arms are processes of one thread that stay alive and take turns, so that a machine whose speed changes changes them all; figures
are medians of ratios within a turn. CPU seconds are user and system. --smoke: one turn of each arm with a tiny random model.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.common import Figure, main
from edgelam_fl.federation.template import warm_template

ROWS, TOKENS, TURNS, STEPS = 4, 128, 5, 1
MODEL, BASES = "smollm2-135m", ("fp32", "bf16", "int8", "nf4")
ANSWERED = 0.28  # share of positions that carry loss in the demo
MIB = 2**20
TRAINS, FORWARDS = "train", "forward"
# arm -> what it is asked: (work, micro-batches)
ASKED = {
    "plain": ((TRAINS, 1), (TRAINS, ROWS), (FORWARDS, ROWS)),
    "stage": ((TRAINS, ROWS), (FORWARDS, ROWS)),
    "lean": ((TRAINS, ROWS),),
    "unsplit": ((TRAINS, ROWS),),
    "split": ((TRAINS, ROWS),),
    "answers": ((TRAINS, ROWS),),
}


def measure(smoke: bool) -> tuple[dict[str, Any], list[Figure]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = _tiny(folder) if smoke else MODEL
        taken = _turns(folder, model, 0 if smoke else TURNS)
        figures = _cpu_figures(taken) + _memory_figures(folder, model, BASES[2:3] if smoke else BASES)
    settings = {
        "model": model, "rows": ROWS, "tokens": TOKENS, "turns": TURNS, "steps_per_turn": STEPS, "lora": "q, v; rank 8",
        "threads": 1, "cut": "front 2, back 2",
        "labelled_share_of_answers": ANSWERED, "arms": ASKED,
    }  # fmt: skip
    return settings, figures


def _tiny(folder: Path) -> str:
    from tests.support import write_tiny_llama

    return str(write_tiny_llama(folder / "tiny"))


# ---------------------------------------------------------------- CPU seconds


def _turns(folder: Path, model: str, turns: int) -> dict[tuple[str, str, int], list[float]]:
    """Returns the CPU seconds of a step, or of as many forward passes, per arm, work and number of micro-batches."""
    file = _write_examples(folder / "long.jsonl")
    arms = {arm: _start(_serve_arm, arm, model, file) for arm in ASKED}
    taken: dict[tuple[str, str, int], list[float]] = {}
    try:
        for turn in range(turns + 1):  # the first warms up, unless it is the only one
            for arm, pipe in arms.items():
                for work, pieces in ASKED[arm]:
                    pipe.send((work, pieces))
                    seconds = pipe.recv()
                    if turn or not turns:
                        taken.setdefault((arm, work, pieces), []).append(seconds)
            print(
                json.dumps({f"{arm} {work} {pieces}": took[-1:] for (arm, work, pieces), took in taken.items()}),
                flush=True,
            )
    finally:
        for pipe in arms.values():
            pipe.send(None)
    return taken


def _cpu_figures(taken: dict[tuple[str, str, int], list[float]]) -> list[Figure]:
    def ratio(one: tuple[str, str, int], other: tuple[str, str, int]) -> float:
        return round(statistics.median(a / b for a, b in zip(taken[one], taken[other], strict=True)), 3)

    plain, whole = ("plain", TRAINS, ROWS), ("stage", TRAINS, ROWS)
    tokens = ROWS * TOKENS
    times = [
        Figure(
            f"CPU ms per token, {arm}, {work}, {pieces} micro-batches",
            round(1e3 * statistics.median(took) / tokens, 3),
            "ms",
        )
        for (arm, work, pieces), took in taken.items()
    ]
    ratios = [
        _at_most("unsplit over plain", ratio(("unsplit", TRAINS, ROWS), plain), 1.03),
        _at_most("split over plain", ratio(("split", TRAINS, ROWS), plain), 1.08),
        Figure("plain in micro-batches over plain at once", ratio(plain, ("plain", TRAINS, 1)), ""),
        Figure("memory given back at once over kept", ratio(("lean", TRAINS, ROWS), whole), ""),
        Figure("answers alone labelled over all positions", ratio(("answers", TRAINS, ROWS), whole), ""),
        _at_most("training step over forward pass", ratio(whole, ("stage", FORWARDS, ROWS)), 2.4),
        Figure("training step over forward pass, plain", ratio(plain, ("plain", FORWARDS, ROWS)), ""),
    ]
    return times + ratios


def _at_most(name: str, value: float, bar: float) -> Figure:
    return Figure(name, value, "", f"at most {bar}", value <= bar)


def _write_examples(file: Path) -> Path:
    """Writes passages that are all longer than a row: docstrings, one after the other."""
    from edgelam_fl.tasks.docstrings import docstring_pairs

    texts = [pair.answer for pair in docstring_pairs()]
    with file.open("w", encoding="utf-8") as stream:
        at = 0
        for number in range(4 * ROWS):
            text = ""
            while len(text) < 10 * TOKENS:
                text += texts[at % len(texts)] + "\n"
                at += 1
            stream.write(json.dumps({"question": f"Text {number}", "answer": text}) + "\n")
    return file


# ---------------------------------------------------------------- in the processes of the arms


def _start(target: Callable[..., None], *arguments: Any) -> Connection:
    """Starts a process, forked from the template of nodes' processes, and returns the connection to it."""
    warm_template()
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    os.environ |= {"HF_HUB_OFFLINE": "1", "MALLOC_ARENA_MAX": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    context.Process(target=target, args=(*arguments, theirs), daemon=True).start()
    theirs.close()
    return ours


def _serve_arm(arm: str, model: str, file: Path, pipe: Connection) -> None:
    """Answers each request (work, micro-batches) with the CPU seconds of a step, until None comes."""
    import torch

    torch.set_num_threads(1)
    runs = {"plain": _plain, "unsplit": _nodes, "split": _nodes}.get(arm, _stage)
    with runs(arm, model, file) as run:
        for work, pieces in iter(pipe.recv, None):
            pipe.send(run(work, pieces))


def _config(model: str, pieces: int, *overrides: str) -> Any:
    from tests.support import run_config

    return run_config(
        model, f"federation.batch_size={ROWS}", f"task.max_tokens={TOKENS}", "task.template=plain", "task.loss_on=all",
        "task.too_long=cut-end", "data.held_out=0.1", f"split.micro_batches={pieces}", "split.window=2", *overrides,
    )  # fmt: skip


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


@contextmanager
def _plain(_: str, model: str, file: Path) -> Iterator[Callable[[str, int], float]]:
    """transformers and peft alone."""
    import torch

    from edgelam_fl.model.adapter import initial_adapter
    from edgelam_fl.model.source import find_model
    from tests.fleet import device_batches, plain_loss, plain_model, plain_optimizer

    source, config = find_model(model), _config(model, 1)
    whole = plain_model(source, config, initial_adapter(source, config.lora.targets, config.lora.rank, 1))
    parameters = [p.requires_grad_(".lora_" in name) for name, p in whole.named_parameters() if ".lora_" in name]
    optimizer = plain_optimizer(parameters, config)

    def run(work: str, pieces: int) -> float:
        batches = device_batches(source, _config(model, pieces), file, "device-1", STEPS)
        began = _cpu_s()
        with torch.set_grad_enabled(work == TRAINS):
            for units in batches:
                for unit in units:
                    loss = plain_loss(whole, unit) / sum(unit.count for unit in units)
                    if work == TRAINS:
                        loss.backward()
                if work == TRAINS:
                    optimizer.step()
                    optimizer.zero_grad()
        return (_cpu_s() - began) / STEPS

    yield run


@contextmanager
def _stage(arm: str, model: str, file: Path) -> Iterator[Callable[[str, int], float]]:
    """The product's stage of the whole model without nodes; with the arm "lean" all memory is given back at once."""
    import torch

    from edgelam_fl.model.adapter import Span
    from edgelam_fl.model.allocator import give_back_at_once, kept_if_roomy
    from edgelam_fl.model.source import find_model
    from edgelam_fl.model.stage import LoraSettings, load_stages
    from edgelam_fl.split.loss import judged
    from edgelam_fl.tasks.causal_lm import CausalLm
    from tests.fleet import device_batches, plain_optimizer

    give_back_at_once()
    source, config = find_model(model), _config(model, 1)
    span = Span(0, source.num_layers, embed=True, head=True)
    (stage,) = load_stages(source, [span], "fp32", LoraSettings(8, 16.0, ("q_proj", "v_proj")))
    task, optimizer = CausalLm(source.folder, config.task), plain_optimizer(stage.trainable(), config)

    def run(work: str, pieces: int) -> float:
        batches = device_batches(source, _config(model, pieces), file, "device-1", STEPS)
        with nullcontext() if arm == "lean" else kept_if_roomy(0, 1):
            began = _cpu_s()
            for units in batches:
                for unit in units:
                    labels = _answers(unit.labels) if arm == "answers" else unit.labels
                    with torch.set_grad_enabled(work == TRAINS):
                        output = stage(unit.inputs, unit.row_lengths, rows=task.loss_rows(labels))
                        found = judged(task, stage, output, labels, ROWS * TOKENS if work == TRAINS else None)
                    if work == TRAINS:
                        found.output.backward(found.grad)
                if work == TRAINS:
                    optimizer.step()
                    optimizer.zero_grad()
            return (_cpu_s() - began) / STEPS

    yield run


def _answers(labels_BT: Any) -> Any:
    """Returns the labels of the last positions of each row alone."""
    from edgelam_fl.tasks.masking import IGNORED

    answer = round(labels_BT.shape[1] * ANSWERED)
    answers_BT = labels_BT.clone()
    answers_BT[:, :-answer] = IGNORED
    return answers_BT


@contextmanager
def _nodes(arm: str, model: str, file: Path) -> Iterator[Callable[[str, int], float]]:
    """The product's nodes in one process: a device, and with the arm "split" an edge server between its layers."""
    from edgelam_fl.model.adapter import initial_adapter
    from edgelam_fl.model.allocator import give_back_at_once
    from edgelam_fl.model.source import find_model
    from edgelam_fl.node.daemon import allocating
    from edgelam_fl.node.play import NodeHooks
    from tests.fleet import check_done, memory_fleet

    give_back_at_once()
    source = find_model(model)
    config = _config(model, ROWS, f"split.hosts={0 if arm == 'unsplit' else 1}", "federation.evaluate_every=1000")
    start = initial_adapter(source, config.lora.targets, config.lora.rank, 1)
    hooks = NodeHooks(around_play=allocating)
    with memory_fleet(source, config, [file], {"device-1": hooks, "edge-1": hooks}) as fleet:

        def run(_: str, pieces: int) -> float:
            assert pieces == ROWS
            seconds = []
            for steps in (STEPS, 0):  # a round without a step: loading is over, messages remain
                began = _cpu_s()
                check_done(fleet.run(start, steps, step_offset=1))
                seconds.append(_cpu_s() - began)
            return (seconds[0] - seconds[1]) / STEPS

        yield run


# ---------------------------------------------------------------- memory


def _memory_figures(folder: Path, model: str, bases: tuple[str, ...]) -> list[Figure]:
    figures = []
    for base in bases:
        for kept in (True, False):
            peaks = {}
            for part in ("whole", "device"):
                pipe = _start(_peak, model, folder / "long.jsonl", base, part, kept)
                peaks[part] = pipe.recv()
            how = "kept" if kept else "given back"
            print(json.dumps({"base": base, "memory": how, **peaks}), flush=True)
            figures += [
                Figure(f"peak above the imports, {base}, {part}, memory {how}", round(peak / MIB), "MiB")
                for part, peak in peaks.items()
            ]
            figures.append(
                _at_most(f"device over whole, {base}, memory {how}", round(peaks["device"] / peaks["whole"], 3), 0.35)
            )
    return figures


def _peak(model: str, file: Path, base: str, part: str, kept: bool, pipe: Connection) -> None:
    """Sends the most memory that two steps on all positions of a micro-batch take above the imports, in bytes."""
    import torch

    from benchmarks.memory import _forget_peak, _resident
    from edgelam_fl.model.adapter import Span
    from edgelam_fl.model.allocator import give_back_at_once, kept_if_roomy
    from edgelam_fl.model.source import find_model
    from edgelam_fl.model.stage import LoraSettings, load_stages
    from edgelam_fl.split.loss import judged
    from edgelam_fl.tasks.causal_lm import CausalLm
    from tests.fleet import device_batches

    torch.set_num_threads(1)
    give_back_at_once()
    source, config = find_model(model), _config(model, 1)
    (unit,) = device_batches(source, config, file, "device-1", 1)[0]
    baseline = _resident("VmRSS")
    _forget_peak()
    end = source.num_layers
    spans = [Span(0, end, embed=True, head=True)]
    if part == "device":
        spans = [Span(0, 2, embed=True), Span(end - 2, end, head=True)]
    stages = load_stages(source, spans, base, LoraSettings(8, 16.0, ("q_proj", "v_proj")))
    optimizer = torch.optim.AdamW([p for stage in stages for p in stage.trainable()])
    task, back = CausalLm(source.folder, config.task), stages[-1]
    with kept_if_roomy(0, 1) if kept else nullcontext():
        for _ in range(2):
            sent = inputs = unit.inputs
            if len(stages) > 1:
                sent = stages[0](unit.inputs, unit.row_lengths)
                inputs = sent.detach().clone().requires_grad_()
            output = back(inputs, unit.row_lengths, rows=task.loss_rows(unit.labels))
            found = judged(task, back, output, unit.labels, unit.count)
            found.output.backward(found.grad)
            if inputs is not sent:
                sent.backward(inputs.grad)
            optimizer.step()
            optimizer.zero_grad()
    pipe.send(_resident("VmHWM") - baseline)


if __name__ == "__main__":
    main("compute", measure)
