"""Names of nodes, tags and words that came from elsewhere: the one pattern, for whoever gives a name and whoever is given one.

Knows neither nodes nor messages.
"""

from __future__ import annotations

import re

_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_RULE = "may hold letters, digits, '.', '_' and '-', begins with a letter or digit, and has 63 characters at most"
CALLER = "chat"
"""The name of whoever talks to a model over a federation's hosts, as one more device."""
# The others are folders beside those that are named after nodes.
AGAIN = "EDGELAM_AGAIN"
"""The environment variable that tells a ServerApp that an earlier process of its run has died."""
RESERVED = frozenset({CALLER, "adapter", "adapters", "chats", "flwr", "hub", "nodes", "operator", "server", "trust"})


def why_no_name(name: str) -> str:
    """Returns why no node may have this name, as the end of a sentence; empty if a node may."""
    if not _WORD.fullmatch(name):
        return _RULE
    return "is reserved; choose another name" if folded(name) in RESERVED else ""


def why_no_tag(tag: str) -> str:
    """Returns why no node may have this tag, as the end of a sentence; empty if a node may."""
    return "" if _WORD.fullmatch(tag) else _RULE


def folded(name: str) -> str:
    """Returns the form in which names are compared: `Ann` and `ann` are one name, as they are one folder on many disks."""
    return name.casefold()


def printable(text: str, most: int = 300) -> str:
    """Returns a text from elsewhere as one line for logs, events and terminals: control characters escaped, the end cut off."""
    line = " ".join(text[: 4 * most].split())
    shown = line
    if not line.isprintable():
        shown = "".join(mark if mark.isprintable() else mark.encode("unicode_escape").decode() for mark in line)
    return shown if len(shown) <= most else f"{shown[: most - 3]}..."


def without_colours(text: str) -> str:
    """Returns a text without a terminal's colours and movements (ANSI sequences that begin with ESC and a bracket)."""
    return _COLOURS.sub("", text)
