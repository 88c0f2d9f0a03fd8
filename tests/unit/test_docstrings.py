from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections import Counter
from hashlib import sha256
from pathlib import Path

import pytest

from edgelam_fl.errors import DataError
from edgelam_fl.tasks.docstrings import (
    THEMES,
    DocstringPair,
    _worth_asking,
    docstring_pairs,
    first_paragraph,
    normalised,
    split_by_module,
    write_device_files,
)

QUIET_IMPORT = """
import sys
from hashlib import sha256
from edgelam_fl.tasks.docstrings import docstring_pairs
print(sha256(repr(docstring_pairs()).encode()).hexdigest())
assert not {"torch", "transformers", "tkinter", "turtle", "this", "antigravity", "rlcompleter"} & set(sys.modules)
"""


@pytest.fixture(scope="module")
def pairs() -> list[DocstringPair]:
    return docstring_pairs()


def pairs_of(**counts: int) -> list[DocstringPair]:
    return [
        DocstringPair(module, f"{module} {i}?", f"{module} {i}!")
        for module, count in counts.items()
        for i in range(count)
    ]


def test_known_pairs(pairs: list[DocstringPair]) -> None:
    by_prompt = {pair.prompt: pair for pair in pairs}
    assert by_prompt["What does math.gcd do?"] == DocstringPair(
        "math", "What does math.gcd do?", "Greatest Common Divisor."
    )
    assert by_prompt["What does hasattr do?"].module == "builtins"
    assert by_prompt["What does os.path.getsize do?"].answer == "Return the size of a file, reported by os.stat()."
    assert by_prompt["What is threading.Barrier?"].answer == "Implements a Barrier."


def test_shape_and_volume(pairs: list[DocstringPair]) -> None:
    assert len(pairs) >= 1500
    assert len({pair.prompt for pair in pairs}) == len(pairs)
    for pair in pairs:
        assert 20 <= len(pair.answer) <= 240
        assert pair.answer == " ".join(pair.answer.split())
        assert not pair.answer.endswith(":")
        assert not any(part.startswith("_") for part in pair.prompt.split()[2].split("."))
    assert docstring_pairs() == pairs


def test_no_answer_stands_in_another_owners_text(pairs: list[DocstringPair]) -> None:
    texts = [f"{pair.prompt} {pair.answer}" for pair in pairs]
    plain, stripped = "\n".join(texts), "\n".join(map(normalised, texts))
    assert [pair for pair in pairs if plain.count(pair.answer) != 1] == []
    assert [pair for pair in pairs if stripped.count(normalised(pair.answer)) != 1] == []


def test_normalised_keeps_containment() -> None:
    assert normalised('  Return the "Name"\n of x_1. ') == "return the name of x1"
    assert normalised("the base-name.") in normalised("Return THE basename, quickly")


def test_first_paragraph() -> None:
    def documented() -> None:
        """Says one
        thing.

        And another."""

    assert first_paragraph(documented) == "Says one thing."
    assert first_paragraph(lambda: None) == ""


@pytest.mark.parametrize(
    ("answer", "worth"),
    [
        ("Return the base name of a path.", True),
        ("Equivalent to calling f(x) and then g(x).", True),
        ("Convert a cmp= function into a key= function.", True),
        ("Nineteen characters", False),
        ("x" * 240, True),
        ("x" * 241, False),
        ("getattr(object, name[, default]) -> value", False),
        ("register(signum): register a handler for it", False),
        ("data [,options] -> marshalled data, as a string", False),
        ("m=None, name=None, globs=None, verbose=None", False),
        ("stmt = FunctionDef(identifier name, arguments args)", False),
        ("Subclass of ValueError with these attributes:", False),
    ],
)
def test_what_is_worth_asking(answer: str, worth: bool) -> None:
    assert _worth_asking(answer) is worth


def test_only_what_the_module_defines(pairs: list[DocstringPair]) -> None:
    prompts = {pair.prompt for pair in pairs}
    assert "What does urllib.parse.urljoin do?" in prompts
    assert "What does urllib.request.urljoin do?" not in prompts
    assert "What does inspect.signature do?" in prompts
    assert "What does xmlrpc.server.signature do?" not in prompts
    assert "What is email.policy.Compat32?" not in prompts


def test_a_fresh_process_has_the_same_pairs_and_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((sys, "excepthook"), (sys, "displayhook"), (inspect, "getfile")):
        monkeypatch.setattr(module, name, print)  # rich, notebooks and torch do this
    digest = sha256(repr(docstring_pairs()).encode()).hexdigest()
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", QUIET_IMPORT], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{digest}\n", "")


def test_themes_name_each_module_once() -> None:
    names = " ".join(THEMES.values()).split()
    assert [name for name, count in Counter(names).items() if count > 1] == []


def test_split_keeps_modules_whole_and_counts_even() -> None:
    parts = split_by_module(pairs_of(a=4, b=2, c=6, d=3, e=3), 3)
    assert [sorted({pair.module for pair in part}) for part in parts] == [["a", "b"], ["c"], ["d", "e"]]
    assert [len(part) for part in parts] == [6, 6, 6]


def test_split_takes_the_nearer_cut() -> None:
    assert [len(part) for part in split_by_module(pairs_of(a=3, b=2, c=3), 2)] == [5, 3]
    assert [len(part) for part in split_by_module(pairs_of(a=3, b=4, c=3), 2)] == [7, 3]
    assert [len(part) for part in split_by_module(pairs_of(a=3, b=6, c=3), 2)] == [9, 3]
    assert [len(part) for part in split_by_module(pairs_of(a=3, b=6, c=2), 2)] == [3, 8]


def test_split_gives_everyone_something() -> None:
    assert [len(part) for part in split_by_module(pairs_of(a=1, b=1, big=50), 3)] == [1, 1, 50]
    assert [len(part) for part in split_by_module(pairs_of(big=50, a=1, b=1), 3)] == [50, 1, 1]


@pytest.mark.parametrize("owners", [0, 3, -1])
def test_too_few_modules_are_refused(owners: int) -> None:
    with pytest.raises(DataError, match=f"2 modules cannot be dealt to {owners} devices"):
        split_by_module(pairs_of(a=3, b=3), owners)


@pytest.mark.parametrize("owners", [1, 2, 3, 8, 40])
def test_real_split(pairs: list[DocstringPair], owners: int) -> None:
    parts = split_by_module(pairs, owners)
    assert [pair for part in parts for pair in part] == pairs
    assert sum(len({pair.module for pair in part}) for part in parts) == len({pair.module for pair in pairs})
    assert owners != 3 or min(map(len, parts)) >= 400


def test_device_files(tmp_path: Path, pairs: list[DocstringPair]) -> None:
    paths = write_device_files(tmp_path / "data", 3)
    assert [path.name for path in paths] == ["device-1.jsonl", "device-2.jsonl", "device-3.jsonl"]
    rows = [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    assert rows == [{"question": pair.prompt, "answer": pair.answer, "module": pair.module} for pair in pairs]
