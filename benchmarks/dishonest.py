"""Measures what one dishonest device of four does to the others, and whether an honest one is taken for dishonest.

Real stage hosts, rounds and strategies in one process, over links in memory: a joint host and four devices whose data are
skewed by label (as in `edgelam bench`). In each of 20 seeded runs one device sends huge values, values that are not finite,
gradients with the sign flipped, wrong shapes, or nothing. The others' held-out perplexity is compared with that of the same
run without the device; then 20 runs have four honest devices. A flipped sign has the size of an honest gradient, and is seen by
its direction alone: it is measured with the defaults, with nothing split, and with a copy of the hosts' layers per device and
a robust rule. --smoke: one run of each table, short, on a model of three layers that was not trained before.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from flwr.app import ConfigRecord, RecordDict

from benchmarks.common import Figure, main
from benchmarks.data.wordnet import SAMPLE
from benchmarks.hostile import Change, dishonest, on
from edgelam_fl.config import parse_run_file
from edgelam_fl.flower import from_record, to_record
from edgelam_fl.model import adapter as adapters
from edgelam_fl.model.source import ModelSource, find_model
from edgelam_fl.node.examples import DeviceExamples
from edgelam_fl.node.service import StageHost
from edgelam_fl.plan.reading import part_id
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.split.route import memory_dial
from edgelam_fl.tasks.partition import deal
from edgelam_fl.telemetry.events import EVENTS_FILE, RoundDone, of_kind, read_events
from edgelam_fl.telemetry.report.incidents import incidents
from edgelam_fl.wire import PROTOCOL_VERSION
from edgelam_fl.wire import edgelam_pb2 as pb
from server.exchange import Addressee, Arrived, Exchange, ExchangeTiming, Missing, Request
from server.roster import Roster
from server.rounds import Rounds
from server.run_folder import RunFolder
from tests.support import write_tiny_llama

DEVICES, BAD, EDGE, ADDRESS = ("ann", "bob", "cleo", "dan"), "dan", "edge-1", "edge-1:1"
SKEW, ROUNDS, STEPS, LATE_S = "dirichlet:0.3", 2, 8, 4.0
EXAMPLES, LETTERS, LAYERS, PRETRAINING_STEPS = 1200, 48, 4, 150
MOST = 1.02  # of the others' perplexity, over that without the device
ROBUST = ("split.host_mode=copies", "strategy.aggregation=fedmedian")
UNSPLIT = ("split.hosts=0",)
KINDS = ("huge", "not finite", "sign-flipped", "bad-shaped", "late")
QUICK = (  # of a smoke run
    "federation.rounds=1", "federation.local_steps=2", "federation.batch_size=4", "federation.step_deadline_s=2",
    "lora.targets=['q_proj']",
)  # fmt: skip
SETTINGS = (
    "split.hosts=1", "split.front=1", "split.back=1", "split.micro_batches=2", f"federation.rounds={ROUNDS}",
    f"federation.local_steps={STEPS}", "federation.batch_size=8", "federation.join_deadline_s=60",
    f"federation.step_deadline_s={LATE_S}", "optimizer.lr=1e-2", "lora.targets=['all-linear']", "task.max_tokens=64", "task.template=plain",
)  # fmt: skip


@dataclass(frozen=True)
class Way:
    """One way of being dishonest."""

    kind: str
    what: str
    change: Change  # of the frames that the device sends
    update: float = 1.0  # factor of what it says to have trained, over its start


def honest(header: pb.Header, tensor: torch.Tensor | None) -> tuple[pb.Header, torch.Tensor | None]:
    return header, tensor


FLIPPED_UPDATE = Way("sign-flipped", "update times -1", honest, update=-1.0)


def way(kind: str, seed: int) -> Way:
    """Draws a way of one kind."""
    chance = random.Random(f"{kind}/{seed}")
    frame = chance.choice([pb.ACT, pb.GRAD])
    name = pb.Kind.Name(frame)
    if kind == "huge":
        power = chance.uniform(3, 30)
        if chance.random() < 1 / 3:
            return Way(kind, f"update times 1e{power:.0f}", honest, update=10**power)
        if frame == pb.ACT:  # the layers scale anything smaller down: it harms nobody but its sender
            return Way(kind, "ACT of 3e38", on(pb.ACT, lambda tensor: torch.full_like(tensor, 3e38)))
        return Way(kind, f"GRAD times 1e{power:.0f}", on(pb.GRAD, lambda tensor: tensor * 10**power))
    if kind == "not finite":
        value, share = chance.choice([math.nan, math.inf]), chance.choice([0.01, 1.0])
        if chance.random() < 1 / 3:
            return Way(kind, f"update of {value}", honest, update=value)
        return Way(kind, f"{share:.0%} of {name} {value}", on(frame, lambda tensor: _spoiled(tensor, value, share)))
    if kind == "sign-flipped":
        update = chance.choice([1.0, -1.0])
        return Way(kind, f"GRAD times -1, update times {update:g}", on(pb.GRAD, lambda tensor: -tensor), update)
    if kind == "bad-shaped":
        axis = chance.choice([0, 1, 2])
        return Way(
            kind, f"{name} one shorter in axis {axis}", on(frame, lambda t: t.narrow(axis, 0, t.shape[axis] - 1))
        )
    first = chance.randrange(STEPS - 3)
    return Way(kind, f"no GRAD from step {first} on", _silent_from(first))


def _spoiled(tensor: torch.Tensor, value: float, share: float) -> torch.Tensor:
    spoiled = tensor.clone()
    spoiled.view(-1)[: max(1, int(share * tensor.numel()))] = value
    return spoiled


def _silent_from(first: int) -> Change:
    def change(header: pb.Header, tensor: torch.Tensor | None) -> tuple[pb.Header, torch.Tensor | None] | None:
        return None if header.kind == pb.GRAD and header.step >= first else (header, tensor)

    return change


# ---------------------------------------------------------------- a federation in memory


@dataclass(frozen=True)
class _Answer:
    """A stand-in with what a roster reads of a Message; a real Message needs a running ServerApp."""

    content: RecordDict

    def has_error(self) -> bool:
        return False


class MemoryExchange(Exchange):
    """The server's messages, handed to stage hosts of this process."""

    def __init__(self, hosts: Mapping[str, StageHost], examples: Mapping[str, int], bad: Way | None) -> None:
        nodes: Any = self  # all that a roster asks a grid for is below
        super().__init__(nodes, ExchangeTiming())
        self._hosts, self._examples, self._bad = hosts, examples, bad
        self._starts: dict[str, adapters.Adapter] = {}

    def get_node_ids(self) -> list[int]:
        return list(range(len(self._hosts)))

    def send(self, requests: Iterable[Request]) -> dict[str, Addressee]:
        """Takes questions for profiles; all nodes answer at once."""
        names = list(self._hosts)
        return {names[request.node_id]: Addressee(request.name, request.node_id) for request in requests}

    def arrived(self, message_ids: Iterable[str]) -> dict[str, Any]:
        return {
            name: _Answer(RecordDict({"profile": ConfigRecord({"profile": self._profile(name)})}))
            for name in message_ids
        }

    def replies(self, requests: Iterable[Request], limit_s: float, **_: Any) -> Iterator[Arrived | Missing]:
        """Hands all jobs over and yields their reports."""
        parts: list[tuple[str, str]] = []
        for request in requests:
            plan = pb.Plan.FromString(request.content["plan"]["plan"])
            tensors = from_record(request.content["adapter"]) if "adapter" in request.content else {}
            self._starts[request.name] = {**self._starts.get(request.name, {}), **tensors}
            submitted = pb.SubmitRequest(plan=plan, adapter=adapters.to_bytes(tensors))
            reply = self._hosts[request.name].submit(submitted)
            assert reply.accepted, reply.reason
            parts.append((request.name, part_id(plan)))
        for name, part in parts:
            yield Arrived(name, self._answer(name, self._hosts[name].wait(pb.WaitRequest(job=part, timeout_s=limit_s))))

    def _profile(self, name: str) -> bytes:
        if name == EDGE:
            profile = pb.Profile(name=name, role=pb.EDGE, address=ADDRESS, protocol_version=PROTOCOL_VERSION)
        else:
            profile = pb.Profile(
                name=name, role=pb.DEVICE, examples=self._examples[name], protocol_version=PROTOCOL_VERSION
            )
        return profile.SerializeToString()

    def _answer(self, name: str, report: pb.JobReport) -> RecordDict:
        trained = [adapters.from_bytes(part.adapter) for part in report.contributions]
        start = self._starts[name]
        for tensors in trained:
            self._starts[name] = {**self._starts[name], **tensors}  # what the node goes on with
        if name == BAD and self._bad is not None and self._bad.update != 1.0:
            trained = [
                {
                    key: start[key] + (array - start[key]) * type(array.flat[0])(self._bad.update)
                    for key, array in one.items()
                }
                for one in trained
            ]
        content = RecordDict({"report": ConfigRecord({"report": report.SerializeToString()})})
        for number, tensors in enumerate(trained):
            content[f"adapter-{number}"] = to_record(tensors)
        return content


@dataclass(frozen=True)
class Played:
    """The result of a run."""

    perplexity: float  # geometric mean over the devices that are in all runs
    before: float  # the same before the first round
    named: frozenset[str]  # devices that the report's list of incidents names


def play(
    source: ModelSource, data: Mapping[str, Path], folder: Path, bad: Way | None, settings: Sequence[str]
) -> Played:
    """Plays a run of a joint host and the devices of `data`."""
    overrides = [f"model.name={source.folder}", *SETTINGS, f"federation.min_nodes={len(data) - 1}", *settings]
    spec = RunSpec(parse_run_file("", source="benchmarks.dishonest", overrides=overrides), source)
    hosts: dict[str, StageHost] = {}
    dial = memory_dial(hosts)
    with ExitStack() as stack:
        for name in (EDGE, *data):
            its_dial = dishonest(dial, bad.change) if bad is not None and name == BAD else dial
            examples = DeviceExamples(data[name]) if name in data else None
            hosts[name] = StageHost(name, its_dial, lambda event: None, examples=examples)
            stack.callback(hosts[name].stop)
        counts = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in data.items()}
        run = RunFolder(folder, spec)
        exchange = MemoryExchange(hosts, counts, bad)
        roster = Roster(exchange, run, pb.ProfileRequest(protocol_version=PROTOCOL_VERSION))
        Rounds(spec, exchange, roster, run, folder.name).run()
    events = list(read_events(run.path / EVENTS_FILE))
    first, *_, last = of_kind(events, RoundDone)
    named = frozenset(who for _, _, who, _ in incidents(events) if who in DEVICES)
    return Played(_perplexity(last), _perplexity(first), named)


def _perplexity(done: RoundDone) -> float:
    found = [device.perplexity for device in done.devices if device.name != BAD]
    assert len(found) == len(DEVICES) - 1
    return math.exp(sum(math.log(one or math.inf) for one in found) / len(found))


# ---------------------------------------------------------------- model and data


def trained_model(folder: Path, texts: Sequence[str], layers: int, steps: int) -> ModelSource:
    """Writes a tiny Llama that has learned from `texts` in capitals: much is left to learn, and there is something to lose."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    write_tiny_llama(folder, layers=layers)
    model, tokenizer = LlamaForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    optimizer, chance = torch.optim.AdamW(model.parameters(), lr=3e-3), random.Random(0)
    for _ in range(steps):
        rows = [tokenizer(text)["input_ids"][:64] for text in chance.sample(texts, 32)]
        ids_BT = torch.tensor([row + [1] * (64 - len(row)) for row in rows])
        optimizer.zero_grad()
        model(input_ids=ids_BT, labels=ids_BT).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return find_model(str(folder))


def dealt(rows: Sequence[Mapping[str, str]], folder: Path, seed: int) -> dict[str, Path]:
    """Deals the rows to the devices, skewed by domain; returns a data file per device."""
    folder.mkdir()
    files = {}
    for name, numbers in zip(DEVICES, deal([row["domain"] for row in rows], len(DEVICES), SKEW, seed), strict=True):
        files[name] = folder / f"{name}.jsonl"
        lines = [{"question": rows[n]["domain"], "answer": rows[n]["gloss"][:LETTERS]} for n in numbers]
        files[name].write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return files


# ---------------------------------------------------------------- what is measured


@dataclass(frozen=True)
class Case:
    """A dishonest run beside the same run without the device."""

    way: Way
    ratio: float  # of the others' perplexity, over that without the device
    named: bool
    others_named: frozenset[str]


def measure(smoke: bool) -> tuple[dict[str, Any], list[Figure]]:
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    seeds, kinds = (1, ("bad-shaped",)) if smoke else (4, KINDS)
    with TemporaryDirectory() as name:
        folder = Path(name)
        texts = [row["gloss"].upper() for row in rows[EXAMPLES:]]
        layers, steps = (3, 0) if smoke else (LAYERS, PRETRAINING_STEPS)
        source = trained_model(folder / "model", texts, layers, steps)
        table = Table(source, rows[: 80 if smoke else EXAMPLES], folder, QUICK if smoke else ())
        cases = [table.case(way(kind, seed), seed) for kind in kinds for seed in range(seeds)]
        unsplit = [table.case(FLIPPED_UPDATE, seed, *UNSPLIT) for seed in range(seeds)]
        robust = [table.case(way("sign-flipped", seed), seed, *ROBUST) for seed in range(seeds)]
        honest_runs = [table.honest(seed) for seed in range(1 if smoke else 20)]
    figures = [figure for kind in kinds for figure in of_kind_of_way(kind, [c for c in cases if c.way.kind == kind])]
    figures += of_kind_of_way("sign-flipped, nothing split", unsplit)
    figures += of_kind_of_way("sign-flipped, with copies and fedmedian", robust, has_bar=False)
    attacked = [*cases, *unsplit, *robust]
    left_out = sum(len(run.named) for run in honest_runs) + sum(len(case.others_named) for case in attacked)
    learned = max(run.perplexity / run.before for run in honest_runs)
    figures.append(Figure("honest: perplexity at the end, over that at the start", round(learned, 4), "x"))
    figures.append(Figure("honest devices left out, in all runs", left_out, "", "0", left_out == 0))
    settings = {
        "skew": SKEW, "devices": len(DEVICES), "run": [*SETTINGS], "honest runs": len(honest_runs),
        "ways": [{"kind": c.way.kind, "what": c.way.what, "ratio": round(c.ratio, 4), "named": c.named} for c in cases],
        "sign-flipped, nothing split": [round(case.ratio, 4) for case in unsplit],
        "sign-flipped with copies and fedmedian": [round(case.ratio, 4) for case in robust],
    }  # fmt: skip
    if smoke:
        figures = [replace(figure, bar=None, holds=None) for figure in figures]
    return settings, figures


def of_kind_of_way(kind: str, cases: Sequence[Case], *, has_bar: bool = True) -> list[Figure]:
    """Returns the worst run of a kind, and in how many the device was named."""
    worst, named = max(case.ratio for case in cases), sum(case.named for case in cases)
    bars = (f"at most {MOST} x", worst <= MOST) if has_bar else (None, None)
    return [
        Figure(f"{kind}: the others' perplexity, over that without it", round(worst, 4), "x", *bars),
        Figure(
            f"{kind}: runs in which it is named", named, "", f"{len(cases)}" if has_bar else None,
            named == len(cases) if has_bar else None,
        ),
    ]  # fmt: skip


class Table:
    """The runs of the benchmark, each played once."""

    def __init__(
        self, source: ModelSource, rows: Sequence[Mapping[str, str]], folder: Path, settings: Sequence[str]
    ) -> None:
        self._source, self._rows, self._folder, self._settings = source, rows, folder, tuple(settings)
        self._without: dict[tuple[int, tuple[str, ...]], float] = {}
        self._runs = 0

    def case(self, chosen: Way, seed: int, *settings: str) -> Case:
        """Plays a dishonest run, and the one without the device if it was not played yet."""
        data = self._data(seed)
        if (seed, settings) not in self._without:
            rest = {name: path for name, path in data.items() if name != BAD}
            self._without[seed, settings] = self._play(rest, None, settings).perplexity
        played = self._play(data, chosen, settings)
        found = Case(
            chosen, played.perplexity / self._without[seed, settings], BAD in played.named, played.named - {BAD}
        )
        print(
            f"{chosen.kind}, {chosen.what}: {found.ratio:.4f} x, named: {found.named}, others: {set(found.others_named)}",
            flush=True,
        )
        return found

    def honest(self, seed: int) -> Played:
        """Plays a run of four honest devices."""
        played = self._play(self._data(seed), None, ())
        print(f"honest, seed {seed}: {played.perplexity:.3f}, left out: {set(played.named)}", flush=True)
        return played

    def _data(self, seed: int) -> dict[str, Path]:
        self._runs += 1
        return dealt(self._rows, self._folder / f"data-{self._runs}", seed)

    def _play(self, data: Mapping[str, Path], bad: Way | None, settings: Sequence[str]) -> Played:
        self._runs += 1
        return play(self._source, data, self._folder / f"run-{self._runs}", bad, (*self._settings, *settings))


if __name__ == "__main__":
    main("dishonest", measure)
