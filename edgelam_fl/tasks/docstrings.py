"""The demo's data set: questions about Python's standard library, answered by its own docstrings.

Every machine with Python has it (PSF licence), it needs no download, and its modules are natural, dissimilar owners.
Knows nothing about tokens, templates or held-out shares. `edgelam demo` writes one file per device with it.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from edgelam_fl.errors import DataError

SHORTEST, LONGEST = 20, 240  # characters of an answer
SIGNATURE = re.compile(r"[\w.]+\(|\w+ ?= ?\w|.{,40} --?> ")  # "f(x)", "a=None, b=None", "f x -> y": no sentence

# Neighbouring modules get the same owner. Left out on purpose: what prints or opens a window on import (this, antigravity,
# tkinter, turtle, idlelib), what is deprecated in 3.11 to 3.13, and what changes the process (rlcompleter).
THEMES = {
    "the language": "builtins operator functools itertools collections collections.abc types typing dataclasses enum "
    "abc contextlib contextvars copy copyreg weakref heapq bisect array queue graphlib reprlib pprint",
    "text": "string re difflib textwrap unicodedata shlex codecs html html.parser gettext locale csv json "
    "configparser tomllib plistlib xml.etree.ElementTree xml.dom.minidom xml.sax.saxutils "
    "xml.sax.handler struct",
    "numbers": "math cmath decimal fractions numbers random statistics colorsys datetime calendar zoneinfo time "
    "hashlib hmac secrets binascii base64 zlib",
    "files": "os os.path pathlib shutil tempfile glob fnmatch filecmp fileinput stat io mmap zipfile tarfile "
    "gzip bz2 lzma pickle shelve sqlite3 dbm",
    "processes": "sys platform sysconfig resource pwd grp fcntl pty tty errno getpass syslog signal sched select "
    "selectors subprocess threading multiprocessing multiprocessing.pool multiprocessing.managers "
    "multiprocessing.connection multiprocessing.shared_memory concurrent.futures",
    "the network": "asyncio socket ssl socketserver ipaddress uuid http http.client http.server http.cookies "
    "http.cookiejar urllib.request urllib.parse urllib.error urllib.robotparser urllib.response ftplib "
    "imaplib poplib smtplib email email.message email.header email.headerregistry email.utils "
    "email.policy email.charset email.parser email.generator mimetypes mailbox quopri netrc "
    "xmlrpc.client xmlrpc.server wsgiref.util wsgiref.headers wsgiref.handlers webbrowser",
    "programs": "argparse getopt optparse cmd logging logging.handlers logging.config warnings traceback inspect "
    "dis symtable tokenize token keyword importlib importlib.util importlib.machinery importlib.abc "
    "importlib.metadata importlib.resources pkgutil runpy zipimport compileall py_compile pyclbr "
    "pickletools modulefinder unittest unittest.mock doctest bdb trace timeit profile cProfile pstats "
    "tracemalloc faulthandler linecache pydoc gc atexit ctypes wave venv",
}
OFTEN_REPLACED = {"excepthook", "displayhook", "unraisablehook", "breakpointhook", "showwarning", "getfile"}
OTHER_HOMES = {"posix": "os", "nt": "os", "genericpath": "posixpath"}


@dataclass(frozen=True)
class DocstringPair:
    """One question and its answer; the owner of `module` (its dotted name) owns the pair."""

    module: str
    prompt: str
    answer: str


def docstring_pairs() -> list[DocstringPair]:
    """Makes all pairs, in the order of THEMES, then by name; the same list in every process of one Python.

    No answer equals another or is inside another, even without case, punctuation and white space: however the pairs are
    dealt out, no held-out answer can be read in any training text.
    """
    by_answer: dict[str, DocstringPair] = {}
    for name in " ".join(THEMES.values()).split():
        for pair in _module_pairs(name):
            by_answer.setdefault(normalised(pair.answer), pair)
    everything = "\n".join(by_answer)
    return [pair for answer, pair in by_answer.items() if everything.count(answer) == 1]


def normalised(text: str) -> str:
    """Folds case, drops punctuation and collapses white space: a text inside another stays inside it."""
    return " ".join(re.sub(r"[^\w\s]|_", "", text.casefold()).split())


def split_by_module(pairs: list[DocstringPair], owners: int) -> list[list[DocstringPair]]:
    """Deals the pairs to owners: whole modules, neighbours in THEMES together, counts as even as modules allow.

    Raises DataError if there are fewer modules than owners.
    """
    modules: dict[str, list[DocstringPair]] = {}
    for pair in pairs:
        modules.setdefault(pair.module, []).append(pair)
    if not 1 <= owners <= len(modules):
        raise DataError(
            f"the docstrings of {len(modules)} modules cannot be dealt to {owners} devices: at least 1 module each",
            "few-examples",
        )
    waiting, parts = list(modules.values()), []
    for left in range(owners, 0, -1):
        even = sum(map(len, waiting)) / left
        part = list(waiting.pop(0))
        while len(waiting) >= left and len(part) + len(waiting[0]) / 2 <= even:
            part += waiting.pop(0)
        parts.append(part)
    return parts


def write_device_files(folder: Path, owners: int) -> list[Path]:
    """Writes folder/device-1.jsonl and so on (per line question, answer and module; UTF-8) and returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, part in enumerate(split_by_module(docstring_pairs(), owners), start=1):
        rows = [{"question": pair.prompt, "answer": pair.answer, "module": pair.module} for pair in part]
        path = folder / f"device-{number}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        paths.append(path)
    return paths


def _module_pairs(name: str) -> Iterator[DocstringPair]:
    """Yields the pairs of one module; none if this Python was built without it."""
    try:
        module = importlib.import_module(name)
    except ImportError:
        return
    for public in sorted(set(getattr(module, "__all__", vars(module))) - OFTEN_REPLACED):
        thing = vars(module).get(public)
        if thing is None or public.startswith("_") or not _defined_here(thing, module):
            continue
        answer = first_paragraph(thing)
        if _worth_asking(answer):
            full_name = public if name == "builtins" else f"{name}.{public}"
            question = f"What is {full_name}?" if inspect.isclass(thing) else f"What does {full_name} do?"
            yield DocstringPair(name, question, answer)


def _worth_asking(answer: str) -> bool:
    """Whether an answer is a sentence of the right length; a text that ends in a colon lost what it announces."""
    return SHORTEST <= len(answer) <= LONGEST and not SIGNATURE.match(answer) and not answer.endswith(":")


def _defined_here(thing: Any, module: ModuleType) -> bool:
    """Whether `thing` is a class or function of this module, of its C half (`_socket`) or of a submodule."""
    if not (inspect.isclass(thing) or inspect.isroutine(thing)):
        return False
    home = str(getattr(thing, "__module__", None)).lstrip("_")
    return f"{OTHER_HOMES.get(home, home)}.".startswith(f"{module.__name__}.")


def first_paragraph(thing: type | Callable[..., Any]) -> str:
    """Returns the first paragraph of a docstring on one line; empty without a docstring."""
    doc = thing.__doc__ if isinstance(thing.__doc__, str) else ""
    return " ".join(re.split(r"\n\s*\n", inspect.cleandoc(doc))[0].split())
