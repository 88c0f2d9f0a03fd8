"""Measures how much of a device's text a host can read from the hidden states at the cut, by attacks of growing strength.

The attacker is an honest but curious host. It has the public model and public text, and never saw the private text.

- Nearest neighbour and the ridge map use one position at a time. The ridge map is taught by glosses of WordNet and, apart, by
  docstrings of other modules, which are nearer to the private text.
- The inverter is a small recurrent network over all states of a text, taught by docstrings, with several seeds.
- Refined by gradients: the inverter's likely tokens are mixed so that the public front makes the states (arXiv 2409.00960).
- Token by token: likely tokens, by the docstrings' ridge map and what the public model expects next, are tried through the
  public front. This needs a causal model.

Intervals are 95 % intervals over texts. The upper line is cut 0 of the causal model: unprotected embeddings.

--smoke: two cuts of one model, few texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import Any

import torch

from benchmarks.common import RESULTS, Figure
from benchmarks.leakage.drawing import Panel, draw
from benchmarks.leakage.looking import back_of, expected_before, front_to, likely_tokens, look, stages_to
from benchmarks.leakage.texts import MODULES, glosses, other_docstrings, private_texts, token_ids
from edgelam_fl.model.source import ModelSource, find_model
from edgelam_fl.privacy.attacks import inverter, nearest, refine, replay, ridge
from edgelam_fl.privacy.attacks.inverter import Training
from edgelam_fl.privacy.attacks.replay import Search, candidates
from edgelam_fl.privacy.attacks.seen import GUESSES, Reading, Seen, best_tokens, chance, interval, reading, share

DEFAULT_CUT, BASE = 2, "fp32"
TRAINING = Training(width=96, epochs=3, texts=16, negatives=512, rate=4e-3)
SHOWN = 32
NEAREST, FIRST, AMONG = (
    "nearest neighbour in the embedding table",
    "ridge map, first guess",
    f"ridge map, first {GUESSES}",
)
DOCS = "ridge map taught by docstrings"
INVERTER, REFINED, REPLAY = "inverter", "inverter refined by gradients", "token by token through the public front"
LINES = (NEAREST, FIRST, DOCS, INVERTER, REFINED, REPLAY)


@dataclass(frozen=True)
class Measured:
    """A model, the layers that stay on the device after the embedding, and numbers of texts.

    `inverted`, `replayed` and `refined` are the private texts that the dearer attacks are tried on.
    """

    name: str
    cuts: tuple[int, ...]
    glosses: int
    docstrings: int
    private: int = 120
    inverted: int = 40
    replayed: int = 24
    refined: int = 4
    seeds: tuple[int, ...] = (0, 1, 2)
    search: Search = replay.USUAL


MODELS = (
    Measured("smollm2-135m", (0, 1, 2, 4, 8, 16), glosses=1200, docstrings=400),
    Measured("minilm-l6", (0, 1, 2, 4), glosses=1200, docstrings=400),
)
SMOKE = Measured(
    "smollm2-135m", (0, DEFAULT_CUT), glosses=20, docstrings=20, private=2, inverted=2, replayed=1, refined=1, seeds=(0,), search=Search((8,))
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """The share that one attack reads at one cut. `spread`: standard deviation over seeds, 0 without seeds."""

    model: str
    cut: int
    attack: str
    share: float
    interval: tuple[float, float]
    tokens: int
    spread: float = 0.0
    base: str = BASE


@dataclass
class Outcome:
    """The results of one model: the rows, tokens of each kind of text, and the beginning of a text with what is read of it."""

    rows: list[Row] = field(default_factory=list)
    tokens: dict[str, int] = field(default_factory=dict)
    chance: float = 0.0
    shown: tuple[str, ...] = ()


def measure(smoke: bool) -> tuple[dict[str, Any], list[Figure]]:
    measured = {each.name: measure_model(each) for each in ((SMOKE,) if smoke else MODELS)}
    if not smoke:
        (RESULTS / "leakage.md").write_text(table(measured), encoding="utf-8")
        (RESULTS / "leakage.svg").write_text(picture(measured), encoding="utf-8")
    return settings_of(measured), [figure for name, found in measured.items() for figure in figures_of(name, found)]


def measure_model(measured: Measured) -> Outcome:
    from transformers import AutoTokenizer

    torch.set_num_threads(1)
    source = find_model(measured.name)
    tokenizer, stages = AutoTokenizer.from_pretrained(source.folder), stages_to(source, BASE, measured.cuts)

    def seen(texts: list[str]) -> dict[int, Seen]:
        return look(stages, [token_ids(tokenizer, text) for text in texts], measured.cuts)

    public, docs = seen(glosses()[: measured.glosses]), seen(other_docstrings()[: measured.docstrings])
    private = seen(private_texts()[: measured.private])
    model: Any = stages[0].model
    embeddings_VD = model.get_input_embeddings().weight.detach()
    found = Outcome(chance=chance(public[0], private[0]))
    found.tokens = {"public": len(public[0].ids_N), "docstrings": len(docs[0].ids_N), "private": len(private[0].ids_N)}
    expected = None
    if source.family.task_head is None:
        back = back_of(source, BASE, source.num_layers - measured.cuts[-1])
        expected = expected_before(private[measured.cuts[-1]].texts(range(measured.replayed)), back), back.head_VD
    for cut in measured.cuts:
        attacked = _Attacked(source, cut, public[cut], docs[cut], private[cut], embeddings_VD)
        reads = attacked.all(measured, expected, found.rows)
        if cut == DEFAULT_CUT:
            found.shown = tuple(tokenizer.decode(ids_N[:SHOWN]) for ids_N in (private[cut].ids_N, *reads))
        del public[cut], docs[cut]
    return found


@dataclass(frozen=True)
class _Attacked:
    """One cut of one model, with what the attacker knows of it."""

    source: ModelSource
    cut: int
    public: Seen
    docs: Seen
    private: Seen
    embeddings_VD: torch.Tensor

    def all(
        self, measured: Measured, expected: tuple[torch.Tensor, torch.Tensor] | None, rows: list[Row]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds a row per attack; returns what the ridge map of glosses and the inverter read."""
        self._add(rows, NEAREST, [nearest.read(self.private, self.embeddings_VD)], self.private)
        read = ridge.read(self.public, self.private, self.embeddings_VD)
        self._add(rows, FIRST, [read], self.private)
        rows.append(Row(self.source.name, self.cut, AMONG, read.among_five, (0.0, 1.0), len(self.private.ids_N)))
        fitted = ridge.fit(self.docs, self.embeddings_VD)
        best_NG = best_tokens(fitted.vectors(self.private.states_ND), fitted.directions_VD)
        self._add(rows, DOCS, [reading(best_NG, self.private)], self.private)
        front = front_to(self.source, BASE, self.cut)
        if expected is not None:
            some = self.private.texts(range(measured.replayed))
            likely = likely_tokens(some, fitted, *expected)
            openings_K = self.docs.ids_N.unique()
            self._add(rows, REPLAY, [replay.read(some, likely, front, openings_K, measured.search)], some)
        if self.cut == 0:
            return read.ids_N, read.ids_N  # nothing is left to be read
        some = self.private.texts(range(measured.inverted))
        trained = [inverter.train(self.docs, self.embeddings_VD, seed, TRAINING) for seed in measured.seeds]
        reads = [reading(best_tokens(each.vectors(some), each.directions_VD), some) for each in trained]
        self._add(rows, INVERTER, reads, some)
        some = self.private.texts(range(measured.refined))
        scale = float(trained[0].log_scale.detach().exp())
        likely = candidates(trained[0].vectors(some), trained[0].directions_VD, scale)
        self._add(rows, REFINED, [refine.read(some, likely, front, self.embeddings_VD)], some)
        return read.ids_N, reads[0].ids_N

    def _add(self, rows: list[Row], attack: str, reads: Sequence[Reading], private: Seen) -> None:
        shares = [share(read.ids_N == private.ids_N) for read in reads]
        hits_N = torch.stack([(read.ids_N == private.ids_N).float() for read in reads]).mean(0)
        spread = stdev(shares) if len(shares) > 1 else 0.0
        around = interval(hits_N, private.lengths_R)
        rows.append(Row(self.source.name, self.cut, attack, mean(shares), around, len(private.ids_N), spread))
        print(rows[-1], flush=True)


# ---------------------------------------------------------------- figures, table, plot


def figures_of(model: str, found: Outcome) -> list[Figure]:
    before = "" if model == MODELS[0].name else f"{model}, "
    figures = []
    for row in found.rows:
        check: tuple[str | None, bool | None] = (None, None)
        if (row.model, row.cut, row.attack) == (MODELS[0].name, 0, NEAREST):
            check = "100 %: embeddings are the text", row.share == 1.0
        figures.append(Figure(f"{before}cut {row.cut}: {row.attack}", percent(row.share), "% of tokens", *check))
    figures.append(Figure(f"{before}always the commonest public token", percent(found.chance), "% of tokens"))
    behind = sum(best_of(found, cut) < best_of(found, cut, (FIRST,)) for cut in {row.cut for row in found.rows})
    name = f"{before}cuts at which the best attack reads less than the ridge map"
    return [*figures, Figure(name, behind, "", "0", behind == 0)]


def best_of(found: Outcome, cut: int, attacks: Sequence[str] = LINES) -> float:
    """Returns the largest share that one of the attacks reads at a cut."""
    return max(row.share for row in found.rows if row.cut == cut and row.attack in attacks)


def settings_of(measured: dict[str, Outcome]) -> dict[str, Any]:
    first = measured[MODELS[0].name]
    return {
        "model": MODELS[0].name, "base": BASE, "cuts": sorted({row.cut for row in first.rows}), "public_tokens": first.tokens["public"],
        "private_tokens": first.tokens["private"], "private_modules": list(MODULES), "ridge": ridge.RIDGE,
        "default_cut": DEFAULT_CUT, "map": f"{find_model(MODELS[0].name).hidden_size + 1} x {find_model(MODELS[0].name).hidden_size} numbers",
        "seeds": list(MODELS[0].seeds), "tokens": {name: found.tokens for name, found in measured.items()},
        "chance": {name: found.chance for name, found in measured.items()},
        "training": vars(TRAINING), "refinement": vars(refine.USUAL), "search": vars(replay.USUAL),
        "table": [vars(row) for found in measured.values() for row in found.rows if row.attack != AMONG],
    }  # fmt: skip


def percent(value: float) -> float:
    return round(100 * value, 1)


def table(measured: dict[str, Outcome]) -> str:
    lines = ["# What a host reads from the hidden states", ""]
    lines += [
        "% of the private tokens, with 95 % intervals over texts. Written by `python -m benchmarks.leakage --part states`,",
        "whose module says what the attacks are.",
    ]
    for name, found in measured.items():
        attacks = [
            attack for attack in (*LINES[:2], AMONG, *LINES[2:]) if any(row.attack == attack for row in found.rows)
        ]
        lines += [
            "",
            f"## {name}",
            "",
            f"Taught by {found.tokens['public']:,} tokens of glosses or {found.tokens['docstrings']:,} of docstrings, tried on "
            f"{found.tokens['private']:,} private tokens",
            f"(inverter: {_tokens(found, INVERTER)}, refined: {_tokens(found, REFINED)}, token by token: {_tokens(found, REPLAY)}). Always the commonest public token: "
            f"{percent(found.chance)} %.",
            "",
            f"| layers on the device | {' | '.join(attacks)} |",
            "|---" * (len(attacks) + 1) + "|",
        ]
        for cut in sorted({row.cut for row in found.rows}):
            cells = {row.attack: _cell(row) for row in found.rows if row.cut == cut}
            lines.append(f"| {cut} | " + " | ".join(cells.get(attack, "") for attack in attacks) + " |")
        lines += [
            "",
            f"At cut {DEFAULT_CUT}, the beginning of the private text, what the ridge map reads, and what the inverter reads:",
            "",
            "```",
            *(f"{who:8} {' '.join(text.split())}" for who, text in zip(("private", "ridge", "inverter"), found.shown, strict=True)),
            "```",
        ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _cell(row: Row) -> str:
    if row.attack == AMONG:
        return f"{percent(row.share):.1f}"
    return f"{percent(row.share):.1f} ({percent(row.interval[0]):.1f} to {percent(row.interval[1]):.1f})"


def _tokens(found: Outcome, attack: str) -> str:
    return next((f"{row.tokens:,}" for row in found.rows if row.attack == attack), "not tried")


def picture(measured: dict[str, Outcome]) -> str:
    panels = []
    for name, found in measured.items():
        lines = {
            attack: [(float(row.cut), 100 * row.share) for row in found.rows if row.attack == attack]
            for attack in LINES
            if any(row.attack == attack for row in found.rows)
        }
        panels.append(Panel(f"{name}: tokens read, %", "layers on the device", lines))
    return draw(panels)
