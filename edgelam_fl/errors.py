"""Every error that a user or a peer can cause, in one tree. The CLI prints the text and exits with the class's code.

    EdgelamError                       exit  retry makes sense
    |- UsageError                       2    no: the command line, the run file or the data is wrong
    |   |- ConfigError
    |   |- DataError
    |   `- ModelError
    |- EnvironmentProblem               3    once the machine is repaired: a port, a server, a missing package
    `- RunFailed                        4    no: the run started and could not continue
        |- PeerLost                          yes: the other end vanished or stayed silent
        |- TooFewSources                     yes: when more devices take part
        |- DoesNotFit                        no: no split of the model fits the memory of the nodes
        |- Refused                           no: the other end said why not
        `- ProtocolError                     no: the other end sent what it must not

A message says what is wrong, the value got, the value allowed and where to change it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

INTERRUPTED = 130  # exit code after Ctrl-C, which is not an error


class EdgelamError(Exception):
    """The root of the tree."""

    """Any of the errors below."""

    exit_code = 4


class UsageError(EdgelamError):
    """The command line, the run file or the data is wrong; nothing was started."""

    """The command line, the run file or the data is wrong."""

    exit_code = 2


class ConfigError(UsageError):
    """A run file, an override or an option that cannot be used."""


class DataError(UsageError):
    """A data file that cannot be used."""


class ModelError(UsageError):
    """A model that cannot be found, read or cut as asked."""


class EnvironmentProblem(EdgelamError):
    """This machine or the network lacks something that the command needs."""

    exit_code = 3


class RunFailed(EdgelamError):
    """A run that had started and could not continue."""


class PeerLost(RunFailed):
    """A link's other end vanished or stayed silent for longer than its deadline."""


class TooFewSources(RunFailed):
    """Fewer devices or sites trained a module than the aggregation needs."""


class DoesNotFit(RunFailed):
    """The available nodes have too little memory; `missing_bytes` says how much is missing."""

    def __init__(self, message: str, missing_bytes: float = 0.0) -> None:
        super().__init__(message)
        self.missing_bytes = missing_bytes


class Refused(RunFailed):
    """The other end of a link or of a submission declined, with its reason."""


class ProtocolError(RunFailed):
    """The other end sent something that the protocol does not allow."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Returns a half-sentence to close a message about an unknown word: the closest known word, else all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(known)}"
