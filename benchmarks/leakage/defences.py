"""Measures defences at the cut: what the best attacks read, beside what the defence costs in perplexity, bytes and time.

Each setting trains SmolLM2-135M (bf16, LoRA of rank 16 on all linear layers) on private docstrings, over one host and on the
code that a federation runs, all settings for the same steps; its perplexity is of held-out docstrings with the defence on. Then
attacks read private docstrings from the hidden states that leave the device. The attacker is adapted: it learns from public text
that went through the same defence and the trained front. A private front's adapter it does not have: it trains a front of its own
in the same way, on public text, and learns to read that one; what it would read with the adapter is measured beside it.

- Ridge map and inverter learn from public docstrings and glosses.
- Token by token: the inverter's likely tokens, together with what the trained model expects next, are tried through the front that
  the attacker has (a private one: its own, and the public one; the better of both counts), on the first texts alone.

What a setting has measured stays in benchmarks/results/leakage_defences/work/ and is not measured again. --smoke: a tiny random
model.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import load_file

from benchmarks.common import RESULTS, Figure
from benchmarks.leakage.drawing import Panel, draw
from benchmarks.leakage.texts import LEAST_TOKENS, glosses, other_docstrings, private_texts, token_ids
from edgelam_fl.config import RunConfig
from edgelam_fl.model.adapter import Adapter, Span, initial_adapter
from edgelam_fl.model.index import layer_number
from edgelam_fl.model.memory import weights_bytes
from edgelam_fl.model.source import ModelSource, find_model
from edgelam_fl.model.stage import LoraSettings, Stage, load_stages
from edgelam_fl.node.examples import DeviceExamples
from edgelam_fl.node.private_fronts import FOLDER
from edgelam_fl.node.service import StageHost
from edgelam_fl.privacy.attacks import inverter, replay, ridge
from edgelam_fl.privacy.attacks.front import Front
from edgelam_fl.privacy.attacks.inverter import Training
from edgelam_fl.privacy.attacks.replay import Search
from edgelam_fl.privacy.attacks.seen import Seen, best_tokens, chance, reading, share_read
from edgelam_fl.split.cut import CutDefence
from edgelam_fl.split.route import memory_dial
from edgelam_fl.tasks.data import DevicePairs, Pair
from edgelam_fl.wire import edgelam_pb2 as pb
from tests.fleet import Fleet, check_done, joined
from tests.support import run_config, write_tiny_llama

MODEL, BASE, RANK, ALPHA = "smollm2-135m", "bf16", 16, 32.0
ROUND, TEXTS_PER_STEP, SEEDS = 10, 4, (1,)
COMMON = (
    f"model.base={BASE}", f"lora.rank={RANK}", f"lora.alpha={ALPHA}", "lora.targets=all-linear", "task.template=plain",
    "task.loss_on=all", "task.max_tokens=96", f"federation.batch_size={TEXTS_PER_STEP}", "federation.evaluate_every=1000",
    "federation.step_deadline_s=36000.0", "federation.round_deadline_s=360000.0", "split.micro_batches=1", "split.window=1",
)  # fmt: skip
TRAINING = Training(width=96, epochs=3, texts=16, negatives=512, rate=4e-3)
SEARCH = Search(widths=(8, 64))
RIDGE, INVERTER, REPLAY = "ridge map", "inverter", "token by token"
BAR_POINTS, BAR_PERCENT = 30.0, 10.0
WORK = RESULTS / "leakage_defences" / "work"


@dataclass(frozen=True)
class Setting:
    """A defence as a run file would ask for it, at one or more cuts: without keys, a cut changes nothing in training."""

    name: str
    cuts: tuple[int, ...]
    keys: tuple[str, ...] = ()

    @property
    def is_private(self) -> bool:
        return "private_front=true" in self.keys

    def config(self, model: str, cut: int, seed: int) -> RunConfig:
        keys = (f"privacy.{key}" for key in self.keys)
        return run_config(model, *COMMON, f"split.front={cut}", f"run.seed={seed}", *keys)


def blurred(noise: float) -> tuple[str, ...]:
    return "cut_clip=2.0", f"cut_noise={noise}"


NONE = Setting("no defence", (2, 8))
SETTINGS = (
    NONE,
    Setting("noise 0.5", (2,), blurred(0.5)),
    Setting("noise 0.25", (2,), blurred(0.25)),
    Setting("noise 0.25, deep", (16,), blurred(0.25)),
    Setting("private front, deep", (8,), ("private_front=true",)),
    Setting("private front, disguise 0.1, deep", (8,), ("private_front=true", "disguise=0.1")),
    Setting("private front, disguise 0.3, deep", (8,), ("private_front=true", "disguise=0.3")),
    Setting("private front, disguise 1", (2,), ("private_front=true", "disguise=1.0")),
    Setting("private front, disguise 1, deep", (8,), ("private_front=true", "disguise=1.0")),
    Setting("private front, disguise 1, noise 0.25, deep", (8,), ("private_front=true", "disguise=1.0", *blurred(0.25))),
)  # fmt: skip
SMOKE = Setting("all", (2,), ("private_front=true", "disguise=1.0", *blurred(0.125)))


@dataclass(frozen=True)
class Sizes:
    """Steps, and numbers of texts: held out, attacked, attacked token by token, and of each public kind."""

    steps: int = 30
    held_out: int = 30
    read: int = 40
    replayed: int = 6
    glosses: int = 200
    docstrings: int = 250


SMALL = Sizes(steps=2, held_out=2, read=4, replayed=1, glosses=6, docstrings=6)


@dataclass(frozen=True)
class Row:
    """One setting at one cut with one seed. `known`: whether the attacker has a private front's adapter."""

    name: str
    cut: int
    seed: int
    known: bool
    perplexity: float
    cpu_s_per_step: float
    bytes_per_step: int
    weights_bytes: int
    shares: dict[str, float]

    @property
    def best(self) -> float:
        return max(self.shares.values())


def measure(smoke: bool) -> tuple[dict[str, Any], list[Figure]]:
    torch.set_num_threads(1)
    if smoke:
        with tempfile.TemporaryDirectory() as made:
            source = find_model(str(write_tiny_llama(Path(made) / "model")))
            lab = Lab(source, SMALL, Path(made))
            rows = lab.rows(SMOKE, 1)
    else:
        lab = Lab(find_model(MODEL), Sizes(), WORK)
        rows = [row for seed in SEEDS for setting in SETTINGS for row in lab.rows(setting, seed)]
        (RESULTS / "leakage_defences.md").write_text(table(rows, lab), encoding="utf-8")
        (RESULTS / "leakage_defences.svg").write_text(picture(rows), encoding="utf-8")
    settings = {
        "model": MODEL, "base": BASE, "rank": RANK, "texts_per_step": TEXTS_PER_STEP, "seeds": list(SEEDS), **asdict(lab.sizes),
        "public_tokens": len(lab.public_ids), "private_tokens": len(lab.private_ids), "chance": lab.chance,
        "keys": {setting.name: list(setting.keys) for setting in SETTINGS}, "table": [asdict(row) for row in rows],
    }  # fmt: skip
    return settings, figures_of(rows)


# ---------------------------------------------------------------- training


@dataclass(frozen=True)
class Trained:
    """A trained adapter, a private front included, and what the training cost."""

    adapter: Adapter
    perplexity: float
    cpu_s_per_step: float
    bytes_per_step: int


def train(
    source: ModelSource, setting: Setting, cut: int, seed: int, sizes: Sizes, learned: Sequence[str], held_out: Sequence[str]
) -> Trained:  # fmt: skip
    """Trains one device over one host, in rounds, as a server would."""
    config = setting.config(source.name, cut, seed)
    nodes: dict[str, StageHost] = {}
    fleet = Fleet(source, config, {}, {})
    pairs = DevicePairs(_as_pairs(learned), _as_pairs(held_out))
    with tempfile.TemporaryDirectory() as state:
        nodes["edge-1"] = StageHost("edge-1", memory_dial(nodes), fleet.emit, address="edge-1")
        examples = DeviceExamples(Path("-"), lambda *_: pairs)
        nodes["device-1"] = StageHost("device-1", memory_dial(nodes), fleet.emit, examples=examples, state=Path(state))
        fleet.devices["device-1"], fleet.hosts["edge-1"] = nodes["device-1"], (nodes["edge-1"], "edge-1")
        start = initial_adapter(source, config.lora.targets, config.lora.rank, seed)
        adapter = {name: array for name, array in start.items() if not (setting.is_private and _layer(name) < cut)}
        fleet.round, began, sent = 1, time.process_time(), 0  # the first round of a run would measure before it trains
        for offset in range(0, sizes.steps, ROUND):
            reports = _finished(fleet.run(adapter, min(ROUND, sizes.steps - offset), step_offset=offset), nodes)
            adapter |= joined(reports)
            rows = [row for row in reports["device-1"].bytes if row.direction == "sent"]
            sent += sum(row.payload_bytes + row.framing_bytes for row in rows)
        cpu_s = time.process_time() - began
        reports = _finished(fleet.run(adapter, 0, step_offset=sizes.steps), nodes)
        if setting.is_private:
            (file,) = (Path(state) / FOLDER).iterdir()
            adapter |= load_file(file)
        for node in nodes.values():
            node.stop()
    last = reports["device-1"]
    perplexity = float(torch.tensor(last.eval_loss_sum / last.eval_labels).exp())
    return Trained(adapter, perplexity, cpu_s / sizes.steps, sent // sizes.steps)


def _finished(reports: dict[str, pb.JobReport], nodes: Mapping[str, StageHost]) -> dict[str, pb.JobReport]:
    """Waits for parts that a fleet no longer waits for, on a machine that has other things to do."""
    while waiting := {name: report for name, report in reports.items() if report.state == "running"}:
        for name, report in waiting.items():
            reports[name] = nodes[name].wait(pb.WaitRequest(job=report.job, timeout_s=60.0))
    check_done(reports)
    return reports


def _as_pairs(texts: Sequence[str]) -> list[Pair]:
    return [("", text) for text in texts]


def _layer(name: str) -> int:
    layer = layer_number(name)
    assert layer is not None
    return layer


# ---------------------------------------------------------------- attacking


class Lab:
    """The texts of all settings, and what was measured so far."""

    def __init__(self, source: ModelSource, sizes: Sizes, work: Path) -> None:
        from transformers import AutoTokenizer

        self.source, self.sizes, self._work = source, sizes, work
        tokenizer = AutoTokenizer.from_pretrained(source.folder)
        private, docs = private_texts(), other_docstrings()
        random.Random(0).shuffle(private)
        self._held_out, self._learned = private[: sizes.held_out], private[sizes.held_out :]
        self._public = [*glosses()[: sizes.glosses], *docs[: sizes.docstrings]]
        self._own = docs[sizes.docstrings : sizes.docstrings + len(self._learned)]  # the attacker's, to train a front
        self.public = _long_enough(token_ids(tokenizer, text) for text in self._public)
        self.private = _long_enough(token_ids(tokenizer, text) for text in self._learned[: sizes.read])
        config = NONE.config(source.name, 0, 1)
        self.lora = LoraSettings(RANK, ALPHA, config.lora.targets)
        (embedding,) = load_stages(source, [Span(0, 0, embed=True)], "fp32", None)
        self._embeddings_VD = embedding.embeddings()

    @property
    def public_ids(self) -> list[int]:
        return [token for ids in self.public for token in ids]

    @property
    def private_ids(self) -> list[int]:
        return [token for ids in self.private for token in ids]

    @property
    def chance(self) -> float:
        nothing = torch.zeros(0)
        public, private = (Seen(nothing, torch.tensor(ids), ()) for ids in (self.public_ids, self.private_ids))
        return chance(public, private)

    def rows(self, setting: Setting, seed: int) -> list[Row]:
        """Returns the rows of a setting: those that were measured before, and the others, which take minutes."""
        file = self._work / f"{setting.name}-{seed}.json"
        if not file.exists():
            rows = self._measure(setting, seed)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
        return [Row(**row) for row in json.loads(file.read_text(encoding="utf-8"))]

    def _measure(self, setting: Setting, seed: int) -> list[Row]:
        trained = train(self.source, setting, setting.cuts[0], seed, self.sizes, self._learned, self._held_out)
        fronts = {True: [trained.adapter]}
        if setting.is_private:
            own = train(self.source, setting, setting.cuts[0], seed + 100, self.sizes, self._own, self._held_out)
            start = initial_adapter(self.source, self.lora.targets, RANK, seed)
            fronts[False] = [
                own.adapter,
                trained.adapter | {n: a for n, a in start.items() if _layer(n) < setting.cuts[0]},
            ]
        rows = []
        for cut in setting.cuts:
            cut_keys = _cut_of(setting, self.source, cut)
            for known, adapters in fronts.items():
                shares = self._attack(cut, cut_keys, trained.adapter, adapters, seed)
                weights = weights_bytes(self.source, [Span(0, cut, embed=True)], BASE)
                rows.append(
                    Row(
                        setting.name, cut, seed, known, trained.perplexity, trained.cpu_s_per_step,
                        trained.bytes_per_step, weights, shares,
                    )
                )  # fmt: skip
                print(rows[-1], flush=True)
        return rows

    def _attack(
        self, cut: int, keys: pb.Cut, adapter: Adapter, known: Sequence[Adapter], seed: int
    ) -> dict[str, float]:
        """Returns what each attack reads of the private texts. `known`: the adapters of the fronts that the attacker has."""
        private = self._leaving(cut, keys, adapter, self.private)
        public = self._leaving(cut, keys, known[0], self.public)
        learned = inverter.train(public, self._embeddings_VD, seed, TRAINING)
        some = private.texts(range(self.sizes.replayed))
        scale = learned.log_scale.exp().item()
        logits_NV = self._expected(cut, adapter, some)
        likely = replay.candidates(
            learned.vectors(some), learned.directions_VD, scale, lambda part: logits_NV[part], most=SEARCH.widths[-1]
        )
        reads = [replay.read(some, likely, self._front(cut, keys, one), public.ids_N.unique(), SEARCH) for one in known]
        best_NG = best_tokens(learned.vectors(private), learned.directions_VD)
        return {
            RIDGE: share_read(ridge.read(public, private, self._embeddings_VD), private),
            INVERTER: share_read(reading(best_NG, private), private),
            REPLAY: max(share_read(read, some) for read in reads),
        }

    @torch.no_grad()
    def _leaving(self, cut: int, keys: pb.Cut, adapter: Adapter, texts: Sequence[list[int]]) -> Seen:
        """Returns what a host sees of texts, with what happens to hidden states before they leave."""
        stage = self._stage(Span(0, cut, embed=True), adapter)
        defence, states = CutDefence(keys, stage), []
        for ids in texts:
            sent = defence.states(stage(torch.tensor([ids]), [len(ids)]), [len(ids)])
            states.append(sent[0].to(torch.bfloat16).float())
        return Seen(torch.cat(states), torch.tensor([token for ids in texts for token in ids]), tuple(map(len, texts)))

    @torch.no_grad()
    def _expected(self, cut: int, adapter: Adapter, seen: Seen) -> torch.Tensor:
        """Returns logits [N, V] of each token by the tokens before it, as the host's own layers and the back say."""
        stage = self._stage(Span(cut, self.source.num_layers, head=True), adapter)
        parts = []
        for states_TD in seen.states_of_texts:
            logits_TV = stage(states_TD[None].to(stage.dtype), [len(states_TD)])[0].float()
            parts.append(torch.cat([torch.zeros(1, logits_TV.shape[1]), logits_TV[:-1]]))
        return torch.cat(parts)

    def _front(self, cut: int, keys: pb.Cut, adapter: Adapter) -> Front:
        """Returns a front as the attacker runs it: with the limit, which it knows, and without noise."""
        stage = self._stage(Span(0, cut, embed=True), adapter)
        defence = CutDefence(pb.Cut(clip=keys.clip), stage)

        def shown(states_BKD: torch.Tensor) -> torch.Tensor:
            rows, tokens, _ = states_BKD.shape
            return defence.states(states_BKD, [tokens] * rows, begins=tokens == 1).float()  # one alone begins a text

        return Front(stage.model, stage.new_cache, shown)

    def _stage(self, span: Span, adapter: Adapter) -> Stage:
        (stage,) = load_stages(self.source, [span], BASE, self.lora)
        stage.load_adapter(adapter)
        return stage


def _cut_of(setting: Setting, source: ModelSource, cut: int) -> pb.Cut:
    privacy = setting.config(source.name, cut, 1).privacy
    return pb.Cut(clip=privacy.cut_clip, noise=privacy.cut_noise)


def _long_enough(texts: Iterable[list[int]]) -> list[list[int]]:
    return [ids for ids in texts if len(ids) >= LEAST_TOKENS]


# ---------------------------------------------------------------- figures, table, plot


@dataclass(frozen=True)
class Case:
    """The means over seeds of one setting at one cut."""

    name: str
    perplexity: float
    cpu_s: float
    bytes_per_step: float
    weights_bytes: int
    shares: dict[str, float]

    @property
    def best(self) -> float:
        return max(self.shares.values())


def cases(rows: Sequence[Row]) -> list[Case]:
    """Joins the seeds. A private front gives two cases: without its adapter, and with it."""
    found: dict[str, list[Row]] = {}
    private = {row.name for row in rows if not row.known}
    for row in rows:
        extra = ", adapter known" if row.known and row.name in private else ""
        found.setdefault(f"{row.name}, cut {row.cut}{extra}", []).append(row)
    return [
        Case(
            name,
            mean(row.perplexity for row in group),
            mean(row.cpu_s_per_step for row in group),
            mean(row.bytes_per_step for row in group),
            group[0].weights_bytes,
            {attack: mean(row.shares[attack] for row in group) for attack in (RIDGE, INVERTER, REPLAY)},
        )
        for name, group in found.items()
    ]


def gains(found: Sequence[Case]) -> dict[str, tuple[float, float]]:
    """Returns per case the points that the best attack loses against no defence at the first cut, and what that costs, in %."""
    first = found[0]
    return {
        case.name: (100 * (first.best - case.best), 100 * (case.perplexity / first.perplexity - 1)) for case in found
    }


def figures_of(rows: Sequence[Row]) -> list[Figure]:
    figures, found = [], cases(rows)
    for case in found:
        figures.append(Figure(f"{case.name}: perplexity", round(case.perplexity, 2), ""))
        figures += [
            Figure(f"{case.name}: {attack}", percent(share), "% of tokens") for attack, share in case.shares.items()
        ]
        figures.append(Figure(f"{case.name}: best attack", percent(case.best), "% of tokens"))
        figures.append(Figure(f"{case.name}: time of a step", round(case.cpu_s, 3), "CPU s"))
        figures.append(Figure(f"{case.name}: sent per step", round(case.bytes_per_step), "bytes"))
        figures.append(Figure(f"{case.name}: frozen weights on the device", case.weights_bytes, "bytes"))
    affordable = [points for points, price in gains(found).values() if price <= BAR_PERCENT]
    bar = f"at least {BAR_POINTS:.0f} points for at most {BAR_PERCENT:.0f} % perplexity"
    figures.append(
        Figure("points off the best attack at that price", round(max(affordable), 1), "points", bar, max(affordable) >= BAR_POINTS)
    )  # fmt: skip
    return figures


def percent(value: float) -> float:
    return round(100 * value, 1)


def mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def table(rows: Sequence[Row], lab: Lab) -> str:
    found = cases(rows)
    against = gains(found)
    lines = [
        "# Defences at the cut",
        "",
        f"% of {len(lab.private_ids):,} private tokens that attacks read, adapted to the defence (token by token: of the first",
        f"{lab.sizes.replayed} texts), and the perplexity of held-out texts after {lab.sizes.steps} steps. Points and price are against no",
        f"defence at cut {NONE.cuts[0]}. Always guessing the commonest token reads {percent(lab.chance)} %. Written by",
        "`python -m benchmarks.leakage --part defences`, whose module says what attacker and training are.",
        "",
        f"| setting | {RIDGE} | {INVERTER} | {REPLAY} | best | points off | perplexity | price | CPU s per step | sent per step | weights on the device |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in found:
        shares = " | ".join(f"{percent(case.shares[attack]):.1f}" for attack in (RIDGE, INVERTER, REPLAY))
        points, price = against[case.name]
        lines.append(
            f"| {case.name} | {shares} | {percent(case.best):.1f} | {points:.1f} | {case.perplexity:.2f} | {price:+.1f} % | "
            f"{case.cpu_s:.2f} | {case.bytes_per_step / 1e3:.0f} kB | {case.weights_bytes / 1e6:.0f} MB |"
        )
    return "\n".join(lines) + "\n"


def picture(rows: Sequence[Row]) -> str:
    """Draws recovered tokens against what the defence costs."""
    found = cases(rows)
    against = gains(found)
    lines = {case.name: [(round(max(0.0, against[case.name][1]), 1), percent(case.best))] for case in found}
    return draw([Panel("best attack, % of tokens", "perplexity, % above no defence", lines)])
