"""Trains a front under a defence, and attacks what leaves it: one cell of the defences' table.

What attacks of one cut share is computed once: the private states, what the model expects next, the loaded layers.
"""

from __future__ import annotations

import math
import random
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.numpy import load_file

from benchmarks.leakage.defence_cells import ALPHA, INVERTER, NONE, RANK, REPLAY, RIDGE, Row, Setting, Sizes
from benchmarks.leakage.texts import LEAST_TOKENS, glosses, other_docstrings, private_texts, token_ids
from edgelam_fl.model.adapter import Adapter, Span, initial_adapter
from edgelam_fl.model.index import layer_number
from edgelam_fl.model.memory import weights_bytes
from edgelam_fl.model.source import ModelSource
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
from edgelam_fl.wire.codecs import CODECS, describe
from tests.fleet import Fleet, check_done, joined

ROUND = 10
TRAINING = Training(width=96, epochs=3, texts=16, negatives=512, rate=4e-3)
SEARCH = Search(widths=(8, 64))


# ---------------------------------------------------------------- training


@dataclass(frozen=True)
class Trained:
    """A trained adapter, a private front included, and what the training cost. `perplexity`: nan if nothing is held out."""

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
        if held_out:
            reports = _finished(fleet.run(adapter, 0, step_offset=sizes.steps), nodes)
        if setting.is_private:
            (file,) = (Path(state) / FOLDER).iterdir()
            adapter |= load_file(file)
        for node in nodes.values():
            node.stop()
    last = reports["device-1"]
    perplexity = math.exp(last.eval_loss_sum / last.eval_labels) if held_out else math.nan
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


@dataclass(frozen=True)
class Leaving:
    """What happens to hidden states before a host has them, at one cut of one setting."""

    cut: int
    base: str
    clip: float
    noise: float
    codec: str

    def defence(self, stage: Stage, *, noisy: bool) -> CutDefence:
        return CutDefence(pb.Cut(clip=self.clip, noise=self.noise if noisy else 0.0), stage)

    def arrived(self, states: torch.Tensor) -> torch.Tensor:
        """Returns states as the other end of a link has them."""
        codec = CODECS[self.codec]
        return codec.decode(bytearray(codec.encode(states)), describe(states, self.codec)).float()


class Lab:
    """The texts of all settings, and the layers that were loaded so far."""

    def __init__(self, source: ModelSource, sizes: Sizes, search: Search = SEARCH) -> None:
        from transformers import AutoTokenizer

        self.source, self.sizes, self._search = source, sizes, search
        tokenizer = AutoTokenizer.from_pretrained(source.folder)
        private, docs = private_texts(), other_docstrings()
        random.Random(0).shuffle(private)
        self._held_out, self._learned = private[: sizes.held_out], private[sizes.held_out :]
        public = [*glosses()[: sizes.glosses], *docs[: sizes.docstrings]]
        self._own = docs[sizes.docstrings : sizes.docstrings + len(self._learned)]  # the attacker's, to train a front
        self.public = _long_enough(token_ids(tokenizer, text) for text in public)
        self.private = _long_enough(token_ids(tokenizer, text) for text in self._learned[: sizes.read])
        self.lora = LoraSettings(RANK, ALPHA, NONE.config(source.name, 0, 1).lora.targets)
        (embedding,) = load_stages(source, [Span(0, 0, embed=True)], "fp32", None)
        self._embeddings_VD = embedding.embeddings()
        self._loaded: dict[tuple[Span, str], Stage] = {}

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
        """Trains and attacks one cell, which takes minutes."""
        trained, fronts = self._trained(setting, seed)
        rows = []
        for cut in setting.cuts:
            config = setting.config(self.source.name, cut, seed)
            leaving = Leaving(
                cut, config.model.base, config.privacy.cut_clip, config.privacy.cut_noise, config.wire.activation_codec
            )
            weights = weights_bytes(self.source, [Span(0, cut, embed=True)], leaving.base)
            for known, shares in self._attacks(leaving, trained.adapter, fronts, seed).items():
                rows.append(
                    Row(
                        setting.name, cut, seed, known, trained.perplexity, trained.cpu_s_per_step,
                        trained.bytes_per_step, weights, shares,
                    )
                )  # fmt: skip
                print(rows[-1], flush=True)
        self._loaded.clear()
        return rows

    def _trained(self, setting: Setting, seed: int) -> tuple[Trained, dict[bool, list[Adapter]]]:
        """Returns what training made, and per attacker, by whether it has the front's adapter, the fronts that it can try."""
        cut = setting.cuts[0]
        trained = train(self.source, setting, cut, seed, self.sizes, self._learned, self._held_out)
        fronts = {}
        for known in setting.attackers(seed):
            fronts[known] = [trained.adapter]
            if not known:
                own = train(self.source, setting, cut, seed + 100, self.sizes, self._own, ())
                start = initial_adapter(self.source, self.lora.targets, RANK, seed)
                public = trained.adapter | {name: array for name, array in start.items() if _layer(name) < cut}
                fronts[known] = [own.adapter, public]
        return trained, fronts

    def _attacks(
        self, leaving: Leaving, adapter: Adapter, fronts: Mapping[bool, Sequence[Adapter]], seed: int
    ) -> dict[bool, dict[str, float]]:
        """Returns per attacker what each attack reads of the private texts."""
        private = self._seen(leaving, adapter, self.private)
        some = private.texts(range(self.sizes.replayed))
        logits_NV = self._expected(leaving, adapter, some)
        return {known: self._attack(leaving, private, some, logits_NV, has, seed) for known, has in fronts.items()}

    def _attack(
        self, leaving: Leaving, private: Seen, some: Seen, logits_NV: torch.Tensor, has: Sequence[Adapter], seed: int
    ) -> dict[str, float]:
        """Returns what one attacker reads. `some`: the private texts that are read token by token. `has`: its fronts' adapters."""
        public = self._seen(leaving, has[0], self.public)
        learned = inverter.train(public, self._embeddings_VD, seed, TRAINING)
        scale = learned.log_scale.exp().item()
        likely = replay.candidates(
            learned.vectors(some),
            learned.directions_VD,
            scale,
            lambda part: logits_NV[part],
            most=self._search.widths[-1],
        )
        openings_K = public.ids_N.unique()
        reads = [replay.read(some, likely, self._front(leaving, one), openings_K, self._search) for one in has]
        best_NG = best_tokens(learned.vectors(private), learned.directions_VD)
        return {
            RIDGE: share_read(ridge.read(public, private, self._embeddings_VD), private),
            INVERTER: share_read(reading(best_NG, private), private),
            REPLAY: max(share_read(read, some) for read in reads),
        }

    @torch.no_grad()
    def _seen(self, leaving: Leaving, adapter: Adapter, texts: Sequence[list[int]]) -> Seen:
        """Returns what a host has of texts."""
        stage = self._stage(Span(0, leaving.cut, embed=True), leaving.base, adapter)
        defence, states = leaving.defence(stage, noisy=True), []
        for ids in texts:
            sent = defence.states(stage(torch.tensor([ids]), [len(ids)]), [len(ids)])
            states.append(leaving.arrived(sent)[0])
        return Seen(torch.cat(states), torch.tensor([token for ids in texts for token in ids]), tuple(map(len, texts)))

    @torch.no_grad()
    def _expected(self, leaving: Leaving, adapter: Adapter, seen: Seen) -> torch.Tensor:
        """Returns logits [N, V] of each token by the tokens before it, as the host's own layers and the back say."""
        stage = self._stage(Span(leaving.cut, self.source.num_layers, head=True), leaving.base, adapter)
        parts = []
        for states_TD in seen.states_of_texts:
            logits_TV = stage(states_TD[None].to(stage.dtype), [len(states_TD)])[0].float()
            parts.append(torch.cat([torch.zeros(1, logits_TV.shape[1]), logits_TV[:-1]]))
        return torch.cat(parts)

    def _front(self, leaving: Leaving, adapter: Adapter) -> Front:
        """Returns a front as the attacker runs it: with the limit and the codec, which it knows, and without noise.

        It is to be used before the next one is asked for: both are the same layers.
        """
        stage = self._stage(Span(0, leaving.cut, embed=True), leaving.base, adapter)
        defence = leaving.defence(stage, noisy=False)

        def shown(states_BKD: torch.Tensor) -> torch.Tensor:
            rows, tokens, _ = states_BKD.shape
            return leaving.arrived(
                defence.states(states_BKD, [tokens] * rows, begins=tokens == 1)
            )  # alone: begins a text

        return Front(stage.model, stage.new_cache, shown)

    def _stage(self, span: Span, base: str, adapter: Adapter) -> Stage:
        if (span, base) not in self._loaded:
            (self._loaded[span, base],) = load_stages(self.source, [span], base, self.lora)
        stage = self._loaded[span, base]
        stage.load_adapter(adapter)
        return stage


def _long_enough(texts: Iterable[list[int]]) -> list[list[int]]:
    return [ids for ids in texts if len(ids) >= LEAST_TOKENS]
