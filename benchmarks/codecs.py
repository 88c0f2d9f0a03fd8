"""Measures what codecs do to hidden states and to gradients, what they cost, and what a host reads of states that came through them.

- Errors: hidden states and gradients of the demo's first steps at both cuts, by the length of their rows; and the gradient of
  the hosts' LoRA that comes of rounded gradients, with and without error feedback. Feedback adds what rounding took from a
  micro-batch's gradient to the next one of the same number, or to the same micro-batch an epoch later.
- Reading: the ridge map, taught by docstrings whose states went through the same codec, at the default cut.
- Cost: CPU milliseconds for a MiB of float32, encoding and decoding together, on one thread.

What they do to a whole training, and to its bytes: `benchmarks.codec_quality`. --smoke: a tiny random model, nothing is read.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cosine_similarity

from benchmarks.common import Figure, main
from edgelam_fl.config import RunConfig, parse_run_file
from edgelam_fl.federation.demo_text import RUN_FILE
from edgelam_fl.model.adapter import Span, initial_adapter
from edgelam_fl.model.source import ModelSource, find_model
from edgelam_fl.model.stage import LoraSettings, load_stages
from edgelam_fl.plan.making import task_settings
from edgelam_fl.split.loss import judged
from edgelam_fl.tasks.base import Task, Unit
from edgelam_fl.tasks.data import batch_indices, read_pairs
from edgelam_fl.tasks.docstrings import write_device_files
from edgelam_fl.tasks.kinds import make_task
from edgelam_fl.wire.codec_bytes import CODEC_BYTES, RAW
from edgelam_fl.wire.codecs import CODECS, describe
from edgelam_fl.wire.codecs.rows import LEAST_SCALE
from tests.support import write_tiny_llama

BATCH, FRONT, BACK = 4, 2, 2
PLACES = ("states after the front", "states before the back", "gradients before the back", "gradients after the front")


def measure(smoke: bool) -> tuple[dict[str, Any], list[Figure]]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        model = str(write_tiny_llama(Path(name) / "tiny")) if smoke else ""
        config = parse_run_file(RUN_FILE, source="the demo's run file", overrides=[f"model.name={model}"] * smoke)
        source = find_model(config.model.name)
        figures = [
            *errors(source, config, Path(name), steps=2 if smoke else 4),
            *costs(64 if smoke else 4096),
            *([] if smoke else reading(source)),
        ]
    settings = {
        "demo": RUN_FILE, "batch": BATCH, "front": FRONT, "back": BACK,
        "codec_bytes": {codec: asdict(size) for codec, size in CODEC_BYTES.items()},
    }  # fmt: skip
    return settings, figures


def through(codec: str, tensor: torch.Tensor) -> torch.Tensor:
    """Returns what the other end of a link gets."""
    return CODECS[codec].decode(bytearray(CODECS[codec].encode(tensor)), describe(tensor, codec))


def in_groups(rows_ND: torch.Tensor, apart: int = 0) -> torch.Tensor:
    """Returns rows rounded as `int4` rounds them, but without turning groups. `apart`: the largest numbers of a row travel as bfloat16."""
    numbers = rows_ND.abs().topk(apart, dim=1).indices
    kept = rows_ND.gather(1, numbers).to(torch.bfloat16).float()
    groups = rows_ND.scatter(1, numbers, 0.0).view(-1, CODEC_BYTES["int4"].group)
    scales = (groups.abs().amax(1, keepdim=True) / 7).clamp(min=LEAST_SCALE)
    return ((groups / scales).round() * scales).view(rows_ND.shape).scatter(1, numbers, kept)


ROUNDED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    **{codec: partial(through, codec) for codec in CODEC_BYTES if codec != RAW},
    "int4 without turning": in_groups,
    "int4 with the four largest apart": partial(in_groups, apart=4),
}

# ---------------------------------------------------------------- errors


@dataclass(frozen=True)
class Passed:
    """One micro-batch's tensors at both cuts, [tokens, hidden] in the order of PLACES, and the gradient of the hosts' LoRA by the way it was sent."""

    tensors: tuple[torch.Tensor, ...]
    learned: Mapping[str, torch.Tensor]


class Sender:
    """Sends gradients by a codec. `keeps`: what becomes of what rounding takes: nothing, or it is added to the next of the same key."""

    def __init__(self, codec: str, keeps: bool = False) -> None:
        self._codec, self._keeps = codec, keeps
        self._taken: dict[Any, torch.Tensor] = {}

    def __call__(self, key: Any, grad: torch.Tensor) -> torch.Tensor:
        wanted = grad.clone()
        if key in self._taken:
            taken = self._taken[key]
            rows, tokens = (min(a, b) for a, b in zip(taken.shape[:2], grad.shape[:2], strict=True))
            wanted[:rows, :tokens] += taken[:rows, :tokens]
        sent = through(self._codec, wanted)
        if self._keeps:
            self._taken[key] = wanted - sent
        return sent


WAYS: dict[str, Callable[[], Sender]] = {
    RAW: lambda: Sender(RAW),
    "int8": lambda: Sender("int8"),
    "int4": lambda: Sender("int4"),
    "int4 with error feedback": lambda: Sender("int4", keeps=True),
}


def errors(source: ModelSource, config: RunConfig, folder: Path, steps: int) -> Iterator[Figure]:
    file = write_device_files(folder / "data", 1)[0]
    task = make_task(task_settings(config), source.folder)
    examples = task.examples(read_pairs(file, "question", "answer")).examples
    steps_of_units = [
        task.units([examples[i] for i in batch_indices(len(examples), BATCH, step, 0, "device-1")], 2)
        for step in range(steps)
    ]
    passed = list(_passes(source, config, task, steps_of_units, lambda step, number: number))
    for codec, (place, number) in product(ROUNDED, zip(PLACES, range(4), strict=True)):
        rows_ND = torch.cat([one.tensors[number] for one in passed])
        rows_ND = rows_ND[rows_ND.norm(dim=1) > 0]  # a loss on answers alone gives some tokens no gradient
        error, lengths = (ROUNDED[codec](rows_ND) - rows_ND).norm(dim=1), rows_ND.norm(dim=1)
        yield Figure(f"{codec}, {place}", round(100 * (error / lengths).mean().item(), 3), "% of a row's length")
    yield from _learned(passed, "")
    twice = list(
        _passes(source, config, task, steps_of_units[:2] * (steps // 2), lambda step, number: (step % 2, number))
    )
    yield from _learned(twice, ", the same examples again")


def _learned(passed: Sequence[Passed], what: str) -> Iterator[Figure]:
    exact = torch.stack([one.learned[RAW] for one in passed]).sum(0)
    for way in WAYS:
        if way != RAW:
            found = torch.stack([one.learned[way] for one in passed]).sum(0)
            error = (found - exact).norm() / exact.norm()
            name = f"{way}, sum of the hosts' gradients{what}"
            yield Figure(name, round(100 * error.item(), 2), "% of its length")
            cosine = cosine_similarity(found.double(), exact.double(), dim=0).item()
            yield Figure(f"{name}, cosine", round(cosine, 5), "")


def _passes(
    source: ModelSource, config: RunConfig, task: Task, steps: Sequence[Sequence[Unit]], key: Callable[[int, int], Any]
) -> Iterator[Passed]:
    """Trains over exact gradients; yields what passes the cuts, and what hosts would learn if it came by each of WAYS.

    `key`: under which a sender remembers a micro-batch, by its step and number.
    """
    lora = LoraSettings(config.lora.rank, config.lora.alpha, tuple(config.lora.targets))
    layers = source.num_layers
    spans = [Span(0, FRONT, embed=True), Span(FRONT, layers - BACK), Span(layers - BACK, layers, head=True)]
    front, host, back = load_stages(source, spans, "fp32", lora)
    start = initial_adapter(source, config.lora.targets, config.lora.rank, 1)
    for stage in (front, host, back):
        stage.load_adapter(start)
    own, hosts = [*front.trainable(), *back.trainable()], host.trainable()
    optimizer = torch.optim.AdamW([*own, *hosts], lr=config.optimizer.lr, weight_decay=0.0)
    senders = {way: make() for way, make in WAYS.items()}
    for number, units in enumerate(steps):
        labels = sum(unit.count for unit in units)
        for index, unit in enumerate(units):
            sent = front(unit.inputs, unit.row_lengths)
            entered = sent.detach().requires_grad_()
            left = host(entered, unit.row_lengths)
            returned = left.detach().requires_grad_()
            output = back(returned, unit.row_lengths, rows=task.loss_rows(unit.labels))
            found_loss = judged(task, back, output, unit.labels, labels)
            found_loss.output.backward(found_loss.grad)
            assert returned.grad is not None
            learned = {}
            for way, sender in senders.items():
                grad = sender(key(number, index), returned.grad)
                into, *found = torch.autograd.grad(left, [entered, *hosts], grad, retain_graph=True)
                learned[way] = torch.cat([each.flatten() for each in found])
                if way == RAW:
                    sent.backward(into)
                    back_to_front = into
                    for parameter, each in zip(hosts, found, strict=True):
                        parameter.grad = each if parameter.grad is None else parameter.grad + each
            real_BT = torch.arange(unit.shape[1]) < torch.tensor(unit.row_lengths)[:, None]
            both = (entered.detach(), returned.detach(), returned.grad, back_to_front)
            yield Passed(tuple(tensor[real_BT] for tensor in both), learned)
        optimizer.step()
        optimizer.zero_grad()


# ---------------------------------------------------------------- cost


def costs(rows: int) -> Iterator[Figure]:
    tensor = torch.randn(rows, 576, generator=torch.Generator().manual_seed(1))
    mebibytes = tensor.nbytes / (1 << 20)
    for codec in CODEC_BYTES:
        taken = []
        for _ in range(7):
            began = time.thread_time()
            through(codec, tensor)
            taken.append(time.thread_time() - began)
        yield Figure(f"{codec}, CPU for a MiB", round(1000 * min(taken) / mebibytes, 2), "ms")


# ---------------------------------------------------------------- reading


def reading(source: ModelSource) -> Iterator[Figure]:
    """Yields what the ridge map reads at the default cut of states that went through each codec."""
    from transformers import AutoTokenizer

    from benchmarks.leakage.looking import look, stages_to
    from benchmarks.leakage.texts import other_docstrings, private_texts, token_ids
    from edgelam_fl.privacy.attacks import ridge
    from edgelam_fl.privacy.attacks.seen import share_read

    tokenizer, stages = AutoTokenizer.from_pretrained(source.folder), stages_to(source, "fp32", (FRONT,))
    docs, private = (
        look(stages, [token_ids(tokenizer, text) for text in texts], (FRONT,))[FRONT]
        for texts in (other_docstrings()[:400], private_texts()[:120])
    )
    embeddings_VD = stages[0].embeddings()
    for codec in CODEC_BYTES:
        taught, seen = (each.seen_as(through(codec, each.states_ND)) for each in (docs, private))
        share = share_read(ridge.read(taught, seen, embeddings_VD), private)
        yield Figure(f"{codec}, tokens that the ridge map reads", round(100 * share, 1), "% of tokens")


if __name__ == "__main__":
    main("codecs", measure)
