"""The texts of the measurements: private ones, which devices hold, and public ones, which an attacker has.

Private: docstrings of MODULES of the standard library. Public: glosses of WordNet, and docstrings of other modules of the
standard library. They are the same on every machine with the same version of Python.
"""

from __future__ import annotations

import importlib
import inspect
import json
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.data.wordnet import SAMPLE

MOST_TOKENS, LEAST_TOKENS = 96, 4
MODULES = (
    "statistics", "asyncio", "email", "logging", "argparse", "subprocess", "decimal", "datetime", "csv", "zipfile",
    "threading", "socket",
)  # fmt: skip
OTHER_MODULES = (
    "abc", "array", "ast", "base64", "bdb", "bisect", "bz2", "calendar", "cmd", "code", "codecs", "collections",
    "concurrent.futures", "configparser", "contextlib", "contextvars", "copy", "ctypes", "dataclasses",
    "difflib", "dis", "doctest", "enum", "filecmp", "fileinput", "fractions", "ftplib", "functools", "gc", "getpass",
    "gettext", "glob", "graphlib", "gzip", "hashlib", "heapq", "hmac", "html.parser", "http.client", "http.cookiejar",
    "http.server", "imaplib", "importlib.metadata", "importlib.resources", "inspect", "io", "ipaddress",
    "itertools", "json", "linecache", "locale", "lzma", "mailbox", "math", "mimetypes", "mmap", "multiprocessing",
    "netrc", "numbers", "operator", "optparse", "os", "pathlib", "pdb", "pickle", "pickletools", "pkgutil", "platform",
    "plistlib", "poplib", "pprint", "profile", "pstats", "pyclbr", "pydoc", "queue", "random", "re", "reprlib",
    "sched", "secrets", "selectors", "shelve", "shlex", "shutil", "signal", "smtplib", "socketserver", "sqlite3", "ssl",
    "string", "struct", "symtable", "sys", "tarfile", "tempfile", "textwrap", "timeit", "tokenize", "trace", "traceback",
    "tracemalloc", "types", "typing", "unittest", "unittest.mock", "urllib.parse", "urllib.request", "uuid",
    "venv", "warnings", "wave", "weakref", "webbrowser", "wsgiref.handlers", "xml.dom.minidom", "xml.etree.ElementTree",
    "xml.sax", "xmlrpc.client", "xmlrpc.server", "zipapp", "zipimport", "zoneinfo",
)  # fmt: skip
SHORTEST, LONGEST = 40, 400  # characters of a docstring, both excluded
RUN = 6  # words in a row that two texts share if one is taken from the other


def glosses() -> list[str]:
    """Returns the definitions of the repository's sample of WordNet, each with its domain."""
    rows = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    return [f"{row['gloss']} {row['domain']}" for row in rows]


def private_texts() -> list[str]:
    """Returns the private modules' docstrings, sorted."""
    return sorted(_docstrings(MODULES, methods=False))


def other_docstrings() -> list[str]:
    """Returns the other modules' docstrings, those of methods too, in an order that mixes modules.

    None shares a run of RUN words with a private text.
    """
    private = {run for text in _docstrings(MODULES, methods=True) for run in _runs(text)}
    found = (text for text in _docstrings(OTHER_MODULES, methods=True) if not private & _runs(text))
    return sorted(found, key=lambda text: text[::-1])


def _runs(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[start : start + RUN]) for start in range(max(1, len(words) - RUN + 1))}


def _docstrings(modules: Sequence[str], methods: bool) -> set[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a look at some old names warns
        members = [m for name in modules for _, m in inspect.getmembers(importlib.import_module(name), callable)]
        if methods:
            members += [m for kind in members if inspect.isclass(kind) for _, m in inspect.getmembers(kind, callable)]
        found = {inspect.getdoc(member) or "" for member in members}
    return {text for text in found if SHORTEST < len(text) < LONGEST}


def token_ids(tokenizer: Callable[..., Any], text: str) -> list[int]:
    ids: list[int] = tokenizer(text, truncation=True, max_length=MOST_TOKENS)["input_ids"]
    return ids
