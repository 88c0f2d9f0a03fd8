"""Kills a server with kill -9 inside the write of a checkpoint, and fills its disk at every page of one.

A process of its own writes checkpoints back to back: a random Llama's adapter and three personal ones, all full of the number of
their round, so that a mix shows. It is killed at random moments; then the newest checkpoint is loaded, every file is compared with
its round, and the next process opens the folder, which must be without leftovers and go on. The full disk is a tmpfs that has room
for one page more each time (root alone can make one; without, one refused write after the other). Numbers of this benchmark count;
they do not depend on how fast the machine is.
--smoke: 5 kills, every 40th page.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Figure, main
from edgelam_fl.errors import ConfigError
from edgelam_fl.federation.template import warm_template
from edgelam_fl.model.adapter import Adapter, initial_adapter, read_peft_folder
from edgelam_fl.model.source import find_model
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.telemetry.events import RunDone, read_events
from server.checkpoint import CHECKPOINTS, Saved, load_newest
from server.run_folder import RunFolder
from server.state import FederationState
from tests.disk_faults import fill_at
from tests.support import run_config, write_tiny_llama

DEVICES = ("device-1", "device-2", "device-3")
PAGE_BYTES = 4096
_LONGEST_S = 0.4  # from the first checkpoint of a process until it is killed


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=200)


def measure(smoke: bool, options: argparse.Namespace) -> tuple[dict[str, Any], list[Figure]]:
    """Returns settings and figures."""
    kills = 5 if smoke else options.kills
    with tempfile.TemporaryDirectory(prefix="edgelam-commits-") as name:
        folder = Path(name)
        model = write_tiny_llama(folder / "model")
        killed = kill_writers(model, folder / "run", kills, random.Random(options.seed))
        filled, how = fill_the_disk(model, folder, 40 if smoke else 1)
    return {"kills": kills, "seed": options.seed, "full disk": how}, [
        Figure("kills", kills, ""),
        Figure("kills inside a write", killed["inside"], "", "at least half of them", 2 * killed["inside"] >= kills),
        *_judged("after a kill", killed),
        Figure("writes refused by a full disk", filled["refused"], "", "at least 1", filled["refused"] > 0),
        *_judged("after a full disk", filled),
    ]


def _judged(when: str, counts: Counter[str]) -> list[Figure]:
    what = ("no checkpoint to load", "finished rounds lost", "files of two rounds", "leftovers after the next start")
    return [Figure(f"{when}: {each}", counts[each], "", "none", not counts[each]) for each in what]


# ---------------------------------------------------------------- what is written


def spec_of(model: Path) -> RunSpec:
    return RunSpec(run_config(str(model), "strategy.aggregation=fedsa"), find_model(str(model)))


def saved_of(spec: RunSpec, number: int) -> Saved:
    """Returns a checkpoint whose tensors are all full of the number of its round."""
    config = spec.config
    start = initial_adapter(spec.source, config.lora.targets, config.lora.rank, config.run.seed)
    adapter = {name: np.full_like(array, number) for name, array in start.items()}
    personal = {name: {n: a for n, a in adapter.items() if ".lora_B." in n} for name in DEVICES}
    sites = dict.fromkeys(DEVICES, "site edge-1")
    state = FederationState(round=number, adapter=adapter, personal=personal, sites=sites)
    return Saved(run="run", state=state, memory={"strategy.selection": {"queue": float(number)}})


def write_for_ever(model: Path, run: Path, told: Connection) -> None:
    """Goes on from the folder's newest checkpoint, round after round; says what the folder holds when it is opened, which round it
    begins, and which is stored.
    """
    spec = spec_of(model)
    try:
        saved, _ = load_newest(run)
        folder = RunFolder.reopened(run, spec, saved)
    except ConfigError:
        saved = saved_of(spec, 0)
        folder = RunFolder(run, spec)
    told.send(("opened", len(leftovers(run))))
    number = saved.state.round
    while True:
        number += 1
        folder.emit(RunDone(summary=str(number)))
        told.send(("begins", number))
        folder.checkpoint(saved_of(spec, number))
        told.send(("stored", number))


# ---------------------------------------------------------------- judging


def leftovers(run: Path) -> list[str]:
    """Returns the half-written files and folders in a run's folder."""
    found = [path for path in run.rglob("*") if ".part" in path.name or path.name.startswith(".")]
    return sorted(str(path.relative_to(run)) for path in found)


def judge(spec: RunSpec, run: Path, stored: int, begun: int) -> Counter[str]:
    """Counts what is wrong with a folder, in which round `stored` was finished and `begun` may have been."""
    counts = Counter[str]()
    try:
        saved, problem = load_newest(run)
    except ConfigError:
        counts["no checkpoint to load"] += stored > 0
        return counts
    number = saved.state.round
    counts["no checkpoint to load"] += bool(problem)
    counts["finished rounds lost"] += number < stored
    expected = saved_of(spec, number)
    same = _same(saved.state.adapter, expected.state.adapter) and saved.memory == expected.memory
    same = same and all(_same(saved.state.personal[name], expected.state.personal[name]) for name in DEVICES)
    rounds = range(max(number - 1, 1), number + 1)
    for folder in [run / "adapter", *(run / "adapters" / name for name in DEVICES)]:
        if folder.parent.exists() and (number > 1 or folder.exists()):
            same = same and any(_same(read_peft_folder(folder), saved_of(spec, n).state.adapter) for n in rounds)
    counts["files of two rounds"] += not same or number > begun
    list(read_events(run / "events.jsonl"))
    return counts


def _same(one: Adapter, other: Adapter) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------- kills


def kill_writers(model: Path, run: Path, kills: int, draw: random.Random) -> Counter[str]:
    """Starts a writer, kills it, judges the folder, and so on. Writers are forked from the template, as imports take seconds."""
    warm_template()
    context = multiprocessing.get_context("forkserver")
    spec, counts, stored = spec_of(model), Counter[str](), 0
    for number in range(kills):
        heard, told = context.Pipe(duplex=False)
        writer = context.Process(target=write_for_ever, args=(model, run, told), daemon=True)
        writer.start()
        told.close()
        said = [heard.recv(), heard.recv()]
        time.sleep(draw.uniform(0, _LONGEST_S))
        writer.kill()
        with suppress(EOFError, OSError):
            while True:
                said.append(heard.recv())
        writer.join()
        begun = max(at for word, at in said if word == "begins")
        stored = max([stored, *(at for word, at in said if word == "stored")])
        counts["leftovers after the next start"] += said[0][1] > 0
        counts["inside"] += bool(leftovers(run)) or begun > stored
        counts += judge(spec, run, stored, begun)
        print(f"kill {number + 1} of {kills}: round {stored} is stored; {' '.join(leftovers(run))}", file=sys.stderr)
        if not stored:
            shutil.rmtree(run)  # a run without a finished round can only be started anew
    return counts


# ---------------------------------------------------------------- full disks


def fill_the_disk(model: Path, folder: Path, stride: int) -> tuple[Counter[str], str]:
    """Writes a checkpoint with room for no page, for one, for two, until it fits; returns what went wrong, and how it was done."""
    spec, counts = spec_of(model), Counter[str]()
    with disk(folder / "disk") as place:
        how = "a tmpfs that has room for one page more each time"
        if place is None:
            how, place = "one refused write after the other", folder / "disk"
        run = place / "run"
        writer = RunFolder(run, spec)
        writer.checkpoint(saved_of(spec, 1))
        step, stored = 0, 1
        while stored == 1:
            shutil.rmtree(run / CHECKPOINTS / "r000002", ignore_errors=True)
            writer = RunFolder.reopened(run, spec, load_newest(run)[0])
            with suppress(OSError):
                if how.startswith("one"):
                    fits = not fill_at(step + 1, partial(writer.checkpoint, saved_of(spec, 2)))
                else:
                    fill(place, step)
                    writer.checkpoint(saved_of(spec, 2))
                    fits = True
                stored += fits
            counts["refused"] += stored == 1
            counts["leftovers after the next start"] += bool(leftovers(run))  # nobody was killed: before it, too
            (place / "filler").unlink(missing_ok=True)
            counts += judge(spec, run, stored, 2)
            step += stride
    return counts, how


def fill(place: Path, pages: int) -> None:
    """Fills a disk up to the given number of pages."""
    room = shutil.disk_usage(place).free - pages * PAGE_BYTES
    (place / "filler").write_bytes(bytes(max(room, 0)))


@contextmanager
def disk(place: Path) -> Iterator[Path | None]:
    """Makes a small disk in memory and yields its folder; None if this user cannot make one."""
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(place)], capture_output=True)
    if made.returncode:
        yield None
        return
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)  # a log of the run may still be open


if __name__ == "__main__":
    main("commits", measure, add_options)
