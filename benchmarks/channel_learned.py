"""Measures what learned predictors reach at channel prediction, on the same links, series and features: TDD at 10 dB, and FDD.

A language model's first layers, frozen with LoRA and learned norms, are trained by the engine: stations are devices with the input and
output modules, one host holds the layers, and rounds end with FedAvg. Beside them stand the same layers with random weights, and
a small network, a GRU and a plain transformer that are trained in one place by a plain loop, each for the CPU time that the
language model took. All correct the same autoregressions. Then stations with 5 % of the links each: together, with all
their links in one place, and alone. As autoregressions leave little to gain, trainings from the last value of each series
(`radio.base`) come first, of the layers with their own and with random weights: they say what pre-training is worth where there
is something to learn. Errors are over the test links of `benchmarks.channel_prediction`, with noise of each seed's own.

Cells that are done stay in runs/benchmark-channel-learned, and a second call takes them. --minutes: the CPU time after which no further
cell begins. Draws results/channel_learned.svg. --smoke: a tiny random model and few links of the small generator; writes no result.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save_file
from torch import nn

from benchmarks.channel_prediction import TEST
from benchmarks.common import RESULTS, Figure, main
from benchmarks.compared.bars import bars
from benchmarks.series_networks import Recurrent, SeriesNetwork, Transformer, count, of_size
from edgelam_fl.config import RunConfig, parse_run_file
from edgelam_fl.files import cache_folder
from edgelam_fl.model.adapter import Adapter, Span
from edgelam_fl.model.source import ModelSource, find_model
from edgelam_fl.model.stage import LoraSettings, load_stages
from edgelam_fl.model.value_ends import ValueEnds
from edgelam_fl.node.examples import DeviceExamples
from edgelam_fl.plan.making import task_settings
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.tasks.base import Made, Task, Unit, ValueExample
from edgelam_fl.tasks.kinds import device_data, make_task
from edgelam_fl.wireless.channels.links import SPEEDS_KMH, Links
from edgelam_fl.wireless.channels.paths import Paths
from edgelam_fl.wireless.channels.store import kept
from edgelam_fl.wireless.channels.uma import UrbanMacro
from edgelam_fl.wireless.prediction.score import nmse_db
from server.global_adapter import first_adapter
from tests.fleet import averaged, check_done, memory_fleet
from tests.support import write_tiny_llama

TRAINING = UrbanMacro(2400, seed=1)
SEEDS = (1, 2, 3)
LAYERS = 2  # of SmolLM2's 30
STATIONS, SHARE = 10, 0.05  # the stations that have all links; the share of the links at each station otherwise
COUNTS = (1, 2, 5, 10)  # stations with that share
ENGINE, PLAIN = ("pre-trained", "random"), ("small network", "plain transformer", "GRU")
PLAIN_LR, PLAIN_BATCH = 2e-3, 32
MOST_DB = {"tdd": -12.0, "fdd": -1.5}
RESAMPLED, STUDENT = 2000, {1: 12.706, 2: 4.303}  # drawn sets of test links; 97.5 % quantiles by degrees of freedom
FOLDER = Path("runs/benchmark-channel-learned")
RUN_FILE = """\
[model]
base = "bf16"

[split]
front = 0
back = 0
micro_batches = 1

[lora]
rank = 8
alpha = 16
targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
modules_to_save = ["input_layernorm", "post_attention_layernorm"]

[task]
kind = "channel-prediction"

[radio]
snr_db = 10
series = 64

[data]
held_out = 0

[federation]
join_deadline_s = 3600.0
step_deadline_s = 3600.0

[optimizer]
lr = 5e-4
schedule = "linear"
weight_decay = 0.01
"""
MakeExamples = Callable[[Task, bytes, list[Any]], Made]
_Errors = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Trained:
    """What one training reached: the error of each test link, and what it took."""

    errors: _Errors
    cpu_s: float
    numbers: int
    """Trainable numbers."""
    others: Mapping[str, float]
    """Errors of the methods to compare with, the mean over the same links with the same noise."""


@dataclass(frozen=True)
class Size:
    """How large a training of ten stations with all links is."""

    rounds: int
    local_steps: int
    batch: int  # links per station and step


SIZE = Size(rounds=4, local_steps=30, batch=4)
LAST_LR = 4e-3  # of the cells that correct the last value


# ---------------------------------------------------------------- links as files


def write_stations(folder: Path, links: Links, stations: int, each: int) -> list[Path]:
    """Writes a file of arrays per station, with `each` links of its own, in float16; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number in range(stations):
        own = slice(number * each, (number + 1) * each)
        files.append(folder / f"links-{own.start}-to-{own.stop}.safetensors")
        if not files[-1].exists():
            bands = {"up": links.up_NTFM[own], "down": links.down_NTFM[own]}
            halves = {name: np.stack([band.real, band.imag], -1).astype(np.float16) for name, band in bands.items()}
            save_file({**halves, "speed_kmh": links.speed_kmh[own]}, files[-1])
    return files


def first_layers(folder: Path, layers: int, seed: int | None) -> ModelSource:
    """Writes SmolLM2's first layers as a model folder and returns it. `seed`: of random weights of the same sizes; None: its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    whole = find_model("smollm2-135m")
    if not (folder / "model.safetensors").exists():
        torch.manual_seed(seed or 0)
        # The table of tokens is not used: a small one.
        model = LlamaForCausalLM(LlamaConfig(**{**whole.config, "num_hidden_layers": layers, "vocab_size": 8}))
        if seed is None:
            from edgelam_fl.model.weights import read_tensors

            own = [name for name in model.state_dict() if name in whole.index and "embed" not in name]
            model.load_state_dict(dict(read_tensors(whole, own, "fp32")), strict=False)
        model.save_pretrained(folder)
    return find_model(str(folder))


def kept_examples(folder: Path) -> Callable[[Task, bytes, list[Any]], Made]:
    """Returns what makes examples of samples, once: they then lie in `folder`, since all cells of a seed have the same ones."""

    def make(task: Task, _: bytes, samples: list[Any]) -> Made:
        if not samples:  # none is held out
            return Made([])
        of_all = "".join(sample.digest for sample in samples)
        name = hashlib.sha256(f"{vars(task)} {of_all}".encode()).hexdigest()[:24]
        file = folder / f"{name}.npz"
        if not file.exists():
            made = task.examples(samples).examples
            folder.mkdir(parents=True, exist_ok=True)
            ends = np.cumsum([example.length for example in made])[:-1]
            inputs, labels = (np.concatenate([getattr(one, part) for one in made]) for part in ("inputs", "labels"))
            np.savez(file, inputs=inputs, labels=labels, ends=ends)
        with np.load(file) as arrays:
            parts = [np.split(arrays[part], arrays["ends"]) for part in ("inputs", "labels")]
        return Made([ValueExample(inputs, labels, 1) for inputs, labels in zip(*parts, strict=True)])

    return make


# ---------------------------------------------------------------- the language model, by the engine


def by_engine(
    source: ModelSource, files: Sequence[Path], test: Path, size: Size, settings: Sequence[str], make: MakeExamples
) -> Trained:
    """Trains over one host and a station per file, with FedAvg between rounds."""
    federation = [f"federation.{key}={value}" for key, value in vars(size).items() if key != "batch"]
    overrides = [f"model.name={source.name}", f"federation.batch_size={size.batch}", *federation, *settings]
    config = parse_run_file(RUN_FILE, source="the benchmark's run file", overrides=overrides)
    spec = RunSpec(config, source)
    adapter, task = first_adapter(spec), make_task(task_settings(config), source.folder)
    for file in files:
        make(task, b"", device_data(file, task_settings(config)).training)  # before nodes wait for each other
    with memory_fleet(source, config, files, examples=partial(DeviceExamples, tokenize=make)) as fleet:
        check_done(fleet.run(adapter, 0))  # loads layers and links
        began_s = time.process_time()
        for number in range(size.rounds):
            reports = fleet.run(adapter, size.local_steps, step_offset=number * size.local_steps)
            check_done(reports)
            adapter = averaged(adapter, reports)
            print(f"round {number + 1}: {time.process_time() - began_s:.0f} s of CPU", flush=True)
    cpu_s = time.process_time() - began_s
    errors, others = _tested(config, source, test, _whole(spec, adapter), make)
    return Trained(errors, cpu_s, sum(array.size for array in adapter.values()), others)


def _whole(spec: RunSpec, adapter: Adapter) -> Callable[[Unit], torch.Tensor]:
    """Returns the whole model with an adapter as a function of a micro-batch."""
    lora, whole = spec.config.lora, [Span(0, spec.source.num_layers, embed=True, head=True)]
    settings = LoraSettings(lora.rank, lora.alpha, lora.targets, kind=spec.kind)
    (stage,) = load_stages(spec.source, whole, spec.config.model.base, settings, values=spec.values)
    stage.load_adapter(adapter)
    return lambda unit: stage(unit.inputs, unit.row_lengths)


def _tested(
    config: RunConfig, source: ModelSource, file: Path, predict: Callable[[Unit], torch.Tensor], make: MakeExamples
) -> tuple[_Errors, dict[str, float]]:
    """Returns each test link's error, and the mean errors of the methods to compare with."""
    task, settings = make_task(task_settings(config), source.folder), task_settings(config)
    examples = make(task, b"", device_data(file, settings).training).examples
    each, sums = list[float](), dict[str, float]()
    for example in examples:
        (unit,) = task.units([example], 1)
        with torch.no_grad():
            loss, found = task.loss(predict(unit).flatten(0, 1)[task.loss_rows(unit.labels)], unit.labels)
        each.append(float(loss))
        for name, value in found.items():
            if "/sum/" in name:
                who = name.rpartition("/")[2]
                sums[who] = sums.get(who, 0.0) + value / len(examples)
    return np.array(each), {who: value for who, value in sums.items() if who}


# ---------------------------------------------------------------- networks beside it, by a plain loop


def by_plain_loop(
    name: str,
    source: ModelSource,
    files: Sequence[Path],
    test: Path,
    settings: Sequence[str],
    make: MakeExamples,
    beside: Trained,
) -> Trained:
    """Trains a network with all stations' links in one place, with as many trainable numbers and for the CPU time of the training `beside`.

    The learning rate falls to nothing over that time.
    """
    config = parse_run_file(RUN_FILE, source="the benchmark's run file", overrides=list(settings))
    torch.manual_seed(config.run.seed)
    task, ends = make_task(task_settings(config), source.folder), RunSpec(config, source).values
    assert isinstance(ends, ValueEnds)
    makers: dict[str, Callable[[int], nn.Module]] = {
        "small network": lambda width: SeriesNetwork(ends.features, ends.outputs, width),
        "GRU": lambda width: Recurrent(ends.features, ends.outputs, width),
        "plain transformer": lambda width: Transformer(ends.features, ends.outputs, width, ends.places),
    }
    network = of_size(makers[name], beside.numbers)
    found = [device_data(file, task_settings(config)).training for file in files]
    examples = [example for samples in found for example in make(task, b"", samples).examples]
    began_s = time.process_time()
    _train(network, task, examples, began_s, beside.cpu_s)
    spent_s = time.process_time() - began_s
    network.eval()
    errors, others = _tested(config, source, test, lambda unit: network(unit.inputs), make)
    return Trained(errors, spent_s, count(network), others)


def _train(network: nn.Module, task: Task, examples: Sequence[Any], began_s: float, cpu_s: float) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), PLAIN_LR, weight_decay=1e-3)
    batch = min(PLAIN_BATCH, len(examples))
    while True:
        for rows in torch.randperm(len(examples)).split(batch):
            done = (time.process_time() - began_s) / cpu_s
            if done >= 1:
                return
            optimizer.param_groups[0]["lr"] = PLAIN_LR * (1 - done)
            (unit,) = task.units([examples[row] for row in rows], 1)
            places = task.loss_rows(unit.labels)
            loss, _ = task.loss(network(unit.inputs).flatten(0, 1)[places], unit.labels, places, training=True)
            optimizer.zero_grad()
            (loss / unit.count).backward()
            optimizer.step()


# ---------------------------------------------------------------- cells


@dataclass(frozen=True)
class Cell:
    """One training. `who`: "pre-trained" or "random" (layers, by the engine), or the name of a network of the plain loop."""

    who: str
    seed: int = 1
    duplex: str = "tdd"
    stations: int = STATIONS
    share: float = 1 / STATIONS  # of all links, at each station
    together: bool = True  # else all links are in one place
    base: str = "autoregressions"

    @property
    def name(self) -> str:
        where = f"{self.stations} stations" if self.together else f"the links of {self.stations} stations in one place"
        base = "" if self.base == "autoregressions" else f" from the {self.base} value"
        return f"{self.duplex}{base}, {where} with {100 * self.share:g} % each, {self.who}, seed {self.seed}"


def cells() -> list[Cell]:
    """Lists all cells, what matters most first."""
    tdd, fdd = ([Cell(who, seed, duplex) for seed in SEEDS for who in (*ENGINE, PLAIN[0])] for duplex in ("tdd", "fdd"))
    beside = [Cell(who, seed, duplex) for seed in SEEDS for duplex in ("tdd", "fdd") for who in PLAIN[1:]]
    few = [*with_few_links("last"), *with_few_links()]
    return [*from_last_value(), *tdd, *fdd[:3], *few, *beside[:4], *fdd[3:], *beside[4:]]


def from_last_value() -> list[Cell]:
    """Lists the cells that correct the last value of each series."""
    return [_from_last_value(who, seed) for seed in SEEDS for who in ENGINE]


def _from_last_value(who: str, seed: int) -> Cell:
    return Cell(who, seed, base="last")


def with_few_links(base: str = "autoregressions") -> list[Cell]:
    """Lists the cells of stations with a small share of the links: together, and all links in one place."""
    ways = [(count, together) for count, together in product(COUNTS, (True, False)) if together or count > 1]
    seeds = SEEDS if base == "last" else SEEDS[:1]
    return [
        Cell("pre-trained", seed, "tdd", count, SHARE, together, base) for seed in seeds for count, together in ways
    ]


class Bench:
    """Trains cells, each once: its file is then there."""

    def __init__(
        self, folder: Path, training: Links, test: Links, size: Size, model: Callable[[int | None], ModelSource]
    ):
        """`model`: returns the layers with their own weights (None), or with random ones of a seed."""
        self._folder, self._training, self._size, self._model = folder, training, size, model
        self._examples = kept_examples(folder / "examples")
        (self._test,) = write_stations(folder / "test", test, 1, len(test.speed_kmh))

    def found(self, cell: Cell) -> Trained | None:
        """Returns what was found of a cell; None: it was not trained."""
        file = self._folder / f"{cell.name}.json"
        if not file.exists():
            return None
        kept = json.loads(file.read_text(encoding="utf-8"))
        return Trained(**{**kept, "errors": np.array(kept["errors"])})

    def train(self, cell: Cell) -> Trained:
        """Trains a cell. A network of the plain loop takes as long as the language model's cell, which is trained first."""
        settings = [f"run.seed={cell.seed}", f"radio.duplex={cell.duplex}", f"radio.base={cell.base}"]
        each = int(cell.share * len(self._training.speed_kmh))
        if cell.who in PLAIN:
            of_model = Cell(ENGINE[0], cell.seed, cell.duplex)
            beside = self.found(of_model) or self.train(of_model)
            files = self._files(cell.stations, each)
            trained = by_plain_loop(cell.who, self._model(None), files, self._test, settings, self._examples, beside)
        else:
            stations, links = (cell.stations, each) if cell.together else (1, cell.stations * each)
            # As many passes over the links and as many links per step in one place as together.
            steps = max(1, round(self._size.local_steps * cell.share * STATIONS))
            size = Size(self._size.rounds, steps, self._size.batch * cell.stations // stations)
            settings += [f"optimizer.lr={LAST_LR}"] if cell.base == "last" else []
            source = self._model(None if cell.who == ENGINE[0] else cell.seed)
            files = self._files(stations, links)
            trained = by_engine(source, files, self._test, size, settings, self._examples)
        kept_of_it = {**vars(trained), "errors": [float(f"{error:.5g}") for error in trained.errors]}
        (self._folder / f"{cell.name}.json").write_text(json.dumps(kept_of_it), encoding="utf-8")
        print(f"{cell.name}: {nmse_db(trained.errors):.2f} dB, {trained.cpu_s:.0f} s of CPU", flush=True)
        return trained

    def _files(self, stations: int, each: int) -> list[Path]:
        return write_stations(self._folder / "stations", self._training, stations, each)


# ---------------------------------------------------------------- figures


def figures(bench: Bench, speeds_kmh: npt.NDArray[np.floating], smoke: bool) -> Iterator[Figure]:
    """Yields the figures of all cells that are done."""
    for duplex in ("tdd", "fdd"):
        for who in (*ENGINE, *PLAIN):
            found = [one for seed in SEEDS if (one := bench.found(Cell(who, seed, duplex)))]
            if found:
                most_db = MOST_DB[duplex] if who == ENGINE[0] and not smoke else None
                yield from _of_predictor(f"{duplex.upper()}, {who}", found, speeds_kmh, most_db)
        if first := bench.found(Cell(ENGINE[0], duplex=duplex)):
            for name, value in first.others.items():
                yield Figure(f"{duplex.upper()}, {name}, all", round(10 * math.log10(value), 2), "dB, seed 1")
        for who in (ENGINE[1], *PLAIN):
            pairs = [
                (own, other)
                for seed in SEEDS
                if (own := bench.found(Cell(ENGINE[0], seed, duplex)))
                and (other := bench.found(Cell(who, seed, duplex)))
            ]
            if pairs:
                yield from _apart(f"{duplex.upper()}, {ENGINE[0]} less {who}", pairs)
    yield from _of_last_value(bench, speeds_kmh)
    for base in ("last", "autoregressions"):
        yield from _of_few_links(bench, base)


def _few_links(bench: Bench, base: str) -> dict[tuple[int, bool], list[Trained]]:
    """Returns what stations with few links each have reached, per seed, by their number and whether they were together."""
    found: dict[tuple[int, bool], list[Trained]] = {}
    for cell in with_few_links(base):
        if one := bench.found(cell):
            found.setdefault((cell.stations, cell.together), []).append(one)
    return found


def _of_few_links(bench: Bench, base: str) -> Iterator[Figure]:
    """Yields what stations with few links each reach, together and with all links in one place, and how far the two lie apart."""
    begin, found = "from the last value, " if base == "last" else "", _few_links(bench, base)
    for (number, together), of_seeds in found.items():
        where = f"{number} stations together" if together else f"{number} stations' links in one place"
        each = [nmse_db(one.errors) for one in of_seeds]
        yield Figure(f"{begin}{where}, all", round(fmean(each), 2), f"dB, mean of {len(each)} seeds")
        if len(each) > 1:
            yield Figure(f"{begin}{where}, standard deviation over seeds", round(stdev(each), 3), "dB")
    for number in COUNTS[1:]:
        if pairs := list(zip(found.get((number, True), []), found.get((number, False), []), strict=False)):
            yield from _apart(f"{begin}{number} stations, together less one place", pairs)


def plot_of_few_links(bench: Bench) -> str:
    """Returns a plot of how far below 0 dB the errors of stations with few links are, from the last value; empty if no cell is done."""
    rows: dict[str, list[float]] = {}
    for (number, together), of_seeds in _few_links(bench, "last").items():
        where = "together" if together else "all links in one place"
        name = "1 station, alone" if number == 1 else f"{number} stations, {where}"
        rows[name] = [-float(nmse_db(one.errors)) for one in of_seeds]
    title = "Error below a prediction of zero's, 120 links per station, median and range of seeds"
    return bars(title, "dB", rows, [name for name in rows if "one place" not in name]) if rows else ""


def _of_last_value(bench: Bench, speeds_kmh: npt.NDArray[np.floating]) -> Iterator[Figure]:
    """Yields the figures of the cells that correct the last value, with and without pre-training."""
    name = "TDD from the last value"
    own, other = ([bench.found(_from_last_value(who, seed)) for seed in SEEDS] for who in ENGINE)
    for who, found in zip(ENGINE, (own, other), strict=True):
        if done := [one for one in found if one]:
            yield from _of_predictor(f"{name}, {who}", done, speeds_kmh, None)
    if own[0]:
        for method, value in own[0].others.items():
            yield Figure(f"{name}, {method}, all", round(10 * math.log10(value), 2), "dB, seed 1")
    if pairs := [(one, beside) for one, beside in zip(own, other, strict=True) if one and beside]:
        yield from _apart(f"{name}, {ENGINE[0]} less {ENGINE[1]}", pairs)


def _of_predictor(
    name: str, found: Sequence[Trained], speeds_kmh: npt.NDArray[np.floating], most_db: float | None
) -> Iterator[Figure]:
    each = [nmse_db(one.errors) for one in found]
    value = round(fmean(each), 2)
    bar = (None, None) if most_db is None else (f"at most {most_db:g}", value <= most_db)
    yield Figure(f"{name}, all", value, f"dB, mean of {len(found)} seeds", *bar)
    if len(each) > 1:
        yield Figure(f"{name}, standard deviation over seeds", round(stdev(each), 3), "dB")
    for speed in SPEEDS_KMH:
        if (at := speeds_kmh == speed).any():
            yield Figure(f"{name}, {speed:g} km/h", round(fmean(nmse_db(one.errors[at]) for one in found), 2), "dB")
    yield Figure(f"{name}, trainable numbers", found[0].numbers, "")
    yield Figure(f"{name}, CPU per training", round(fmean(one.cpu_s for one in found), 1), "s")


def _apart(name: str, pairs: Sequence[tuple[Trained, Trained]]) -> Iterator[Figure]:
    """Yields how far two predictors lie apart: the mean over seeds, and an interval over drawn test links, which seeds share."""
    own_LS, other_LS = (np.stack([pair[side].errors for pair in pairs], axis=1) for side in (0, 1))
    apart = [nmse_db(own_LS[:, seed]) - nmse_db(other_LS[:, seed]) for seed in range(len(pairs))]
    yield Figure(name, round(fmean(apart), 3), f"dB, mean of {len(pairs)} seeds")
    random = np.random.default_rng(0)
    drawn = random.integers(len(own_LS), size=(RESAMPLED, len(own_LS)))
    means = [10 * np.log10(errors_LS.mean(1)[drawn].mean(1)) for errors_LS in (own_LS, other_LS)]
    low, high = np.quantile(means[0] - means[1], (0.025, 0.975))
    yield Figure(f"{name}, low end", round(float(low), 3), "dB, 95 % interval over links")
    yield Figure(f"{name}, high end", round(float(high), 3), "dB, 95 % interval over links")
    if len(apart) > 2:
        half = STUDENT[len(apart) - 1] * stdev(apart) / math.sqrt(len(apart))
        yield Figure(f"{name}, half the interval over seeds", round(half, 3), "dB, 95 %, Student's t")


def _db(errors_L: _Errors) -> float:
    return round(nmse_db(errors_L), 2)


# ---------------------------------------------------------------- the command


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=60.0, help="CPU minutes after which no further cell begins")


def measure(smoke: bool, options: argparse.Namespace) -> tuple[dict[str, Any], list[Figure]]:
    torch.set_num_threads(1)
    if smoke:
        return {"smoke": True}, _smoke(Path("runs/benchmark-channel-learned-smoke"))
    cache = cache_folder() / "channels"
    training, test = kept(TRAINING, cache), kept(TEST, cache)
    bench = Bench(
        FOLDER, training, test, SIZE, lambda seed: first_layers(FOLDER / f"layers-{seed or 'own'}", LAYERS, seed)
    )
    for cell in cells():
        if time.process_time() > 60 * options.minutes:
            print("the minutes are over; a further call goes on", flush=True)
            break
        if bench.found(cell) is None:
            bench.train(cell)
    settings = {
        "run_file": RUN_FILE, "size": vars(SIZE), "lr_from_last_value": LAST_LR, "stations": STATIONS, "layers": LAYERS, "training": repr(TRAINING),
        "test": repr(TEST), "seeds": SEEDS, "plain_lr": PLAIN_LR, "plain_batch": PLAIN_BATCH, "resampled": RESAMPLED,
    }  # fmt: skip
    if plot := plot_of_few_links(bench):
        (RESULTS / "channel_learned.svg").write_text(plot, encoding="utf-8")
    return settings, list(figures(bench, test.speed_kmh, smoke))


def _smoke(folder: Path) -> list[Figure]:
    shutil.rmtree(folder, ignore_errors=True)
    training, test = Paths(2 * STATIONS, seed=1).draw(), Paths(6, seed=2).draw()
    tiny = find_model(str(write_tiny_llama(folder / "tiny", layers=2)))
    bench = Bench(folder, training, test, Size(1, 1, 1), lambda seed: tiny)
    for cell in (*map(Cell, PLAIN), with_few_links()[0], *with_few_links("last")[1:3], *from_last_value()[:2]):
        bench.train(cell)
    return list(figures(bench, test.speed_kmh, smoke=True))


if __name__ == "__main__":
    main("channel_learned", measure, add_options)
