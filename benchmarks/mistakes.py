"""Types mistakes that people make, and measures how long each takes to be answered, and in how many lines.

Each is typed as a user's shell does, in a folder of its own that `prepare` fills. --smoke: five of them.
`tests/contract/test_mistakes.py` types all of them in one process, with a tiny model.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import Figure, main

MOST_S, MOST_WITH_TOKENS_S = 3.0, 15.0
_SMOKE = 5
_QUESTIONS = [
    {"question": f"When is tomato {day} watered?", "answer": f"On day {day}, by Ann."} for day in range(1, 42)
]
_CHATS = [
    {"messages": [{"role": "user", "content": f"Hello {n}"}, {"role": "assistant", "content": f"Good day {n}"}]}
    for n in range(8)
]
_FILES = {  # run files and what is wrong with them, if anything is
    "mine.toml": "",
    "plain.toml": '[task]\ntemplate = "plain"\n',
    "topics.toml": '[model]\nname = "minilm-l6"\n[lora]\ntargets = ["query", "value"]\n[task]\nkind = "classification"\nclasses = ["plant", "animal"]\n',
    "broken.toml": "[federation\nrounds = 2\n",
    "renamed.toml": "[optimizer]\nlearning_rate = 0.1\n",
    "README.md": "# My project\n\nSome text.\n",
    "empty.jsonl": "",
    "torn.jsonl": '{"question": "a", "answer": "b"\n',
    "semicolons.csv": "question;answer\nWho?;Ann.\nWhen?;Now.\n",
    "columns.csv": "Frage,Antwort\nWer?,Ann.\nWann?,Jetzt.\n",
    "passages.txt": "One passage.\n\nAnother one.\n\nA third one.\n",
    "taken/events.jsonl": "",
}


@dataclass(frozen=True)
class Mistake:
    """A line that somebody types, and words of the answer."""

    name: str
    typed: str
    says: str
    is_explained: bool = False
    """Whether `edgelam run --explain` must say the same."""
    takes_model: bool = True
    """Whether the model of the test may stand in for the default one."""
    tokenizes: bool = False
    """Whether only the model's tokenizer shows it, for which PyTorch is imported in a process of its own."""


MISTAKES = [
    Mistake("a command misspelt", "rnu mine.toml", "Did you mean 'run'?"),
    Mistake("an option misspelt", "run mine.toml --expalin", "--explain"),
    Mistake("an option without its value", "run mine.toml --local --data ann.jsonl", "--local needs a value (N), and --data stands in its place"),
    Mistake("nothing at all", "run", "edgelam run --data FILE"),
    Mistake("a run file that is not there", "run mien.toml", "no run file at mien.toml"),
    Mistake("another file for the run file", "run README.md", "README.md is not TOML"),
    Mistake("data for the run file", "run ann.jsonl", "edgelam run --data ann.jsonl"),
    Mistake("two data files for the run file", "run ann.jsonl bob.jsonl", "edgelam run --data ann.jsonl --data bob.jsonl"),
    Mistake("two run files", "run mine.toml plain.toml --data ann.jsonl", "one run file, got mine.toml and plain.toml"),
    Mistake("a bracket forgotten", "run broken.toml --data ann.jsonl", "broken.toml is not TOML", True),
    Mistake("a key of another program", "run renamed.toml --data ann.jsonl", "did you mean 'optimizer.lr'?", True),
    Mistake("a value out of range", "run mine.toml --data ann.jsonl --set lora.rank=0", "lora.rank = 0 must be greater than or equal to 1", True),
    Mistake("--set without its section", "run mine.toml --data ann.jsonl --set rounds=2", "must look like section.key=value", True),
    Mistake("a blank for the equals sign", "run mine.toml --data ann.jsonl --set lora.rank 4", "--set 'lora.rank' must look like section.key=value"),
    Mistake("a word for a number", "run mine.toml --data ann.jsonl --local two", "'two' is not a whole number"),
    Mistake("an address for the data", "run --data https://example.org/ann.jsonl", "fetch it first", True),
    Mistake("a strategy misspelt", "run mine.toml --data ann.jsonl --set strategy.aggregation=fedavgg", "did you mean 'fedavg'?", True),
    Mistake("a strategy in capitals", "run mine.toml --data ann.jsonl --set strategy.aggregation=FedAdam", "did you mean 'fedadam'?", True),
    Mistake("a model misspelt", "run mine.toml --data ann.jsonl --set model.name=smollm2-135n", "did you mean 'smollm2-135m'?", True, False),
    Mistake("more layers than there are", "run mine.toml --data ann.jsonl --set split.front=40", "split.front + split.back = 40 + 2 is outside the model", True),
    Mistake("a module misspelt", "run mine.toml --data ann.jsonl --set 'lora.targets=[\"q_projj\"]'", "did you mean 'q_proj'?", True),
    Mistake("more devices than files", "run mine.toml --data ann.jsonl --set federation.min_nodes=3", "federation.min_nodes = 3 and the run has 1 device", True),
    Mistake("--local and the number of files", "run mine.toml --local 2 --data ann.jsonl", "--local 2 needs --data once per device (2 times), got it once", True),
    Mistake("a rule for more devices", "run mine.toml --data ann.jsonl --data bob.jsonl --set strategy.aggregation=krum", "needs at least 5 devices per round, and the run has 2", True),
    Mistake("tags that nobody has", "run mine.toml --data ann.jsonl --set 'strategy.require_tags=[\"pi\"]'", "keeps every device of this run out", True),
    Mistake("data that are not there", "run mine.toml --data anna.jsonl", "no data file at anna.jsonl", True),
    Mistake("a pattern that fits nothing", "run --data 'people/*.jsonl'", "no file fits --data 'people/*.jsonl'", True),
    Mistake("the same data twice", "run --data ann.jsonl --data ./ann.jsonl", "ann.jsonl is given twice", True),
    Mistake("a field misspelt", "run mine.toml --data wrong.jsonl", "line 1 lacks the field 'answer' (did you mean 'anwser'?)", True),
    Mistake("one bad line", "run mine.toml --data bad.jsonl", "line 21 is not JSON", True),
    Mistake("a line without an end", "run --data torn.jsonl", "line 1 is not JSON", True),
    Mistake("an empty file", "run --data empty.jsonl", "holds no examples", True),
    Mistake("Latin-1", "run --data latin.csv", "is not UTF-8", True),
    Mistake("a spreadsheet", "run --data sheet.xlsx", "is a spreadsheet: save it as CSV", True),
    Mistake("semicolons", "run mine.toml --data semicolons.csv", "parted by ';'", True),
    Mistake("other columns", "run mine.toml --data columns.csv", "lacks the field 'question'", True),
    Mistake("passages and a chat template", "run mine.toml --data passages.txt", "task.template = 'plain' and task.loss_on = 'all'", True),
    Mistake("passages beside questions", "run --data ann.jsonl --data passages.txt", "The devices of one run are read by the same keys", True),
    Mistake("chats without their template", "run plain.toml --data chats.jsonl", "they need task.template = 'chat', got 'plain'", True),
    Mistake("questions for classes", "run topics.toml --data ann.jsonl", "is none of task.classes", True, False),
    Mistake("answers that are too long", "run --data long.jsonl --set task.max_tokens=16 --set task.too_long=skip", "has an answer within task.max_tokens = 16", True, tokenizes=True),
    Mistake("a folder in use", "run mine.toml --data ann.jsonl --out taken", "taken exists; choose another with --out", True),
    Mistake("a folder nowhere", "run mine.toml --data ann.jsonl --out ann.jsonl/run", "ann.jsonl/run cannot be made: Not a directory", True),
    Mistake("a split of nothing", "run --data ann.jsonl --split 0", "must be 1 to 16", True),
    Mistake("a split misspelt", "run --data ann.jsonl --split 3:dirichlet", "must be N, N:iid", True),
    Mistake("a split by answers that all differ", "run --data ann.jsonl --split 3:dirichlet=0.3", "deals by answers, as classes are", True),
    Mistake("a split of two files", "run --data ann.jsonl --data bob.jsonl --split 3", "deals one data file, got 2", True),
    Mistake("a server and data", "run mine.toml --data ann.jsonl --server 127.0.0.1:1", "--server names a server, and --data"),
    Mistake("--detach without a server", "run mine.toml --data ann.jsonl --detach", "--detach needs a server that stays"),
    Mistake("one hyphen for two", "run mine.toml -data ann.jsonl", "Options of one word begin with two hyphens"),
    Mistake("leakage of data that are not there", "leakage mine.toml --data anna.jsonl", "no data file at anna.jsonl"),
    Mistake("a run file over another", "init mine.toml --data ann.jsonl", "mine.toml exists; give another name"),
    Mistake("a task misspelt", "init new.toml --task clasification", "did you mean 'classification'?"),
]  # fmt: skip


def prepare(folder: Path) -> None:
    """Writes the files that the mistakes are made with."""
    for name, text in _FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    _write(folder / "ann.jsonl", _QUESTIONS)
    _write(folder / "bob.jsonl", ({**row, "question": f"And {row['question']}"} for row in _QUESTIONS))
    _write(folder / "wrong.jsonl", ({"question": row["question"], "anwser": row["answer"]} for row in _QUESTIONS))
    _write(folder / "long.jsonl", ({**row, "answer": row["answer"] * 20} for row in _QUESTIONS))
    _write(folder / "chats.jsonl", _CHATS)
    lines = (folder / "ann.jsonl").read_text(encoding="utf-8").splitlines()
    lines[20] = "not JSON"
    (folder / "bad.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "latin.csv").write_bytes("question,answer\nWo?,In Köln.\nWann?,Später.\n".encode("latin-1"))
    (folder / "sheet.xlsx").write_bytes(b"PK\x03\x04" + bytes(60))


def _write(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def measure(smoke: bool) -> tuple[dict[str, Any], list[Figure]]:
    figures = list[Figure]()
    for mistake in MISTAKES[:_SMOKE] if smoke else MISTAKES:
        seconds, lines, status = _typed(mistake)
        most_s = MOST_WITH_TOKENS_S if mistake.tokenizes else MOST_S
        bar = f"one line, exit code 2, at most {most_s:g} s"
        holds = lines == 1 and status == 2 and seconds <= most_s
        figures.append(Figure(f"{mistake.name}: `edgelam {mistake.typed}`", round(seconds, 2), "s", bar, holds))
    settings = {"mistakes": len(figures), "answered in one line": sum(figure.holds is True for figure in figures)}
    return settings, figures


def answers(printed: str) -> list[str]:
    """Returns the lines that a command printed, without those that say that it still works."""
    return [line for line in printed.splitlines() if not line.endswith(" so far")]


def _typed(mistake: Mistake) -> tuple[float, int, int]:
    """Returns the seconds until the command ended, the lines that it printed, and its exit code."""
    command = [str(Path(sys.executable).with_name("edgelam")), *shlex.split(mistake.typed)]
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        began = time.monotonic()
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        )
        return time.monotonic() - began, len(answers(done.stdout + done.stderr)), done.returncode


if __name__ == "__main__":
    main("mistakes", measure)
