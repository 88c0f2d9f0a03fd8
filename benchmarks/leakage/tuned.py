"""Measures what a host reads from the states of a front that was fine-tuned, with and without the front's adapter.

A device trains for some steps in a real split run; then a second round begins with the new adapter, and its first frames are
attacked as the host recorded them. A host that sees adapters between rounds (FedAvg) knows the front; one that does not has the
public front alone. The first frames of the first round come from the public front itself.

At the cut that was not run, the states are computed with the same adapter. --smoke: a tiny random model, one step, one seed,
two texts.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from benchmarks.common import Figure
from benchmarks.leakage.frames import Recorded, record, seen_in
from benchmarks.leakage.looking import back_of, expected_before, front_to, likely_tokens, look, stages_to
from benchmarks.leakage.texts import other_docstrings, private_texts, token_ids
from edgelam_fl.model.adapter import Adapter
from edgelam_fl.model.source import ModelSource, find_model
from edgelam_fl.model.stage import LoraSettings
from edgelam_fl.privacy.attacks import replay, ridge
from edgelam_fl.privacy.attacks.front import Front
from edgelam_fl.privacy.attacks.replay import Search
from edgelam_fl.privacy.attacks.seen import Seen, interval, share
from tests.support import run_config, write_tiny_llama

MODEL, BASE, RUN_CUT, CUTS = "smollm2-135m", "fp32", 2, (2, 8)
SEEDS, STEPS, TEXTS, DOCSTRINGS, MOST_TOKENS, BATCH, RATE = (0, 1, 2), 8, 60, 250, 40, 4, 1e-3
FRESH, UNKNOWN, KNOWN = "public front", "tuned front, adapter unknown", "tuned front, adapter known"
RIDGE, REPLAY = "ridge map taught by docstrings", "token by token"
UNIT, MICRO_BATCHES = "% of tokens", 2


@dataclass(frozen=True)
class Reads:
    """Hits of each token, and the number of tokens per text."""

    hits_N: torch.Tensor
    lengths_R: tuple[int, ...]


def measure(smoke: bool) -> tuple[dict[str, Any], list[Figure]]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        return measure_model(find_model(str(write_tiny_llama(Path(folder))) if smoke else MODEL), smoke)


def measure_model(source: ModelSource, smoke: bool) -> tuple[dict[str, Any], list[Figure]]:
    from transformers import AutoTokenizer

    steps, seeds, cuts = (1, SEEDS[:1], CUTS[:1]) if smoke else (STEPS, SEEDS, CUTS)
    tokenizer = AutoTokenizer.from_pretrained(source.folder)
    texts = [token_ids(tokenizer, text) for text in other_docstrings()[: 20 if smoke else DOCSTRINGS]]
    search = Search((8,)) if smoke else replay.USUAL
    attacker = _Attacker(source, look(stages_to(source, BASE, cuts), texts, cuts), search)
    reads: dict[str, list[Reads]] = {}
    farthest = 0.0
    for seed in seeds:
        config = run_config(
            source.name, f"model.base={BASE}", f"split.front={RUN_CUT}", f"task.max_tokens={32 if smoke else MOST_TOKENS}",
            "task.template=plain", f"split.micro_batches={MICRO_BATCHES}", f"federation.batch_size={2 if smoke else BATCH}", f"run.seed={seed}", f"optimizer.lr={RATE}",
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            first, second = record(source, config, private_texts()[:TEXTS], Path(folder), rounds=[steps, 1])
        lora = LoraSettings(config.lora.rank, config.lora.alpha, config.lora.targets)
        farthest = max(farthest, attacker.apart(first), attacker.apart(second, lora, second.adapter))
        for name, found in attacker.reads(first, second, lora, cuts).items():
            reads.setdefault(name, []).append(found)
    table = [_row(name, parts) for name, parts in reads.items()]
    figures = [Figure(row["attack"], round(100 * row["share"], 1), UNIT) for row in table]
    check = (None, None) if smoke else ("0: the host records what the front computes", farthest == 0)
    figures.append(Figure("recorded states, farthest from what the front computes", farthest, "", *check))
    settings = {
        "model": MODEL, "base": BASE, "cut of the run": RUN_CUT, "cuts": list(cuts), "seeds": list(seeds), "steps": steps,
        "rate": RATE, "batch": BATCH, "max_tokens": MOST_TOKENS, "docstrings": DOCSTRINGS, "search": vars(search), "table": table,
    }  # fmt: skip
    return settings, figures


@dataclass(frozen=True)
class _Attacker:
    source: ModelSource
    docs: dict[int, Seen]
    search: Search

    def apart(self, recorded: Recorded, lora: LoraSettings | None = None, adapter: Adapter | None = None) -> float:
        """Returns the largest difference of the first step's recorded states from those that the front computes."""
        frame, unit = recorded.frames[0], recorded.units[0]
        front = front_to(self.source, BASE, RUN_CUT, lora, adapter)
        states_BTD = front.of_tokens(unit.inputs, frame.lengths_B)
        return max(
            float((frame.states_BTD[row, :length] - states_BTD[row, :length]).abs().max())
            for row, length in enumerate(frame.lengths_B)
        )

    def reads(self, first: Recorded, second: Recorded, lora: LoraSettings, cuts: tuple[int, ...]) -> dict[str, Reads]:
        """Attacks the first step of both rounds at the run's cut, and the same texts at the other cuts."""
        found = {}
        for cut in cuts:
            public, tuned = front_to(self.source, BASE, cut), front_to(self.source, BASE, cut, lora, second.adapter)
            fresh, changed = (seen_in(part, slice(0, MICRO_BATCHES)) for part in (first, second))
            if cut != RUN_CUT:
                fresh, changed = _through(public, fresh), _through(tuned, changed)
            for name, seen, front in ((FRESH, fresh, public), (UNKNOWN, changed, public), (KNOWN, changed, tuned)):
                known = _through(front, self.docs[cut]) if name == KNOWN else self.docs[cut]
                fitted = ridge.fit(known, self._embeddings_VD())
                back = back_of(self.source, BASE, self.source.num_layers - cut)
                likely = likely_tokens(seen, fitted, expected_before(seen, back), back.head_VD)
                vectors_ND = fitted.vectors(seen.states_ND)
                one = replay.candidates(vectors_ND, fitted.directions_VD, 1.0, most=5).ids_NK[:, 0]
                read = replay.read(seen, likely, front, self.docs[cut].ids_N.unique(), self.search)
                found[f"{name}, cut {cut}: {RIDGE}"] = Reads((one == seen.ids_N).float(), seen.lengths_R)
                found[f"{name}, cut {cut}: {REPLAY}"] = Reads((read.ids_N == seen.ids_N).float(), seen.lengths_R)
        return found

    def _embeddings_VD(self) -> torch.Tensor:
        (stage,) = stages_to(self.source, BASE, (0,))
        model: Any = stage.model
        return model.get_input_embeddings().weight.detach()


def _through(front: Front, seen: Seen) -> Seen:
    """Returns the same texts as another front shows them."""
    states = [front.of_tokens(ids_T[None], [len(ids_T)])[0] for ids_T in seen.ids_N.split(list(seen.lengths_R))]
    return seen.seen_as(torch.cat(states))


def _row(name: str, parts: list[Reads]) -> dict[str, Any]:
    hits_N, lengths_R = torch.cat([part.hits_N for part in parts]), tuple(n for part in parts for n in part.lengths_R)
    shares = [share(part.hits_N) for part in parts]
    return {
        "model": MODEL, "base": BASE, "attack": name, "share": mean(shares), "interval": list(interval(hits_N, lengths_R)),
        "spread": stdev(shares) if len(shares) > 1 else 0.0, "tokens": len(hits_N),
    }  # fmt: skip
