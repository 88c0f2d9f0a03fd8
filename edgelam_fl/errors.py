"""Every error that a user or a peer can cause, in one tree. The CLI prints the text and exits with the class's code.

    EdgelamError                       exit  code         may a later attempt of the same run succeed?
    |- UsageError                       2    usage        never: the command line, the run file or the data is wrong
    |   |- ConfigError                       config       never
    |   |- DataError                         data         never
    |   `- ModelError                        model        never
    |       `- ModelNotFound                 model        never: nothing of the model is on this machine
    |- EnvironmentProblem               3    environment  once the machine is repaired: a port, a server, a missing package
    `- RunFailed                        4    run          the run started and could not continue
        |- PeerLost                          peer-lost    yes: the other end vanished or stayed silent
        |- TooFewSources                     too-few      yes: when more devices take part
        |- DoesNotFit                        no-fit       when other nodes are here: no split fits the memory of these
        |- Refused                           refused      perhaps: the other end said why not
        |   |- Mismatch                      mismatch     never: both sides differ in a model, a version or a setting
        |   `- Busy                          busy         later: the node plays for another run
        |- Restarted                         restarted    yes: the node was started again and has lost its part
        `- ProtocolError                     protocol     perhaps, with other peers: the other end sent what it must not

What is none of these is a bug, code "bug". A node that refuses tells the server the code beside its words, and is not asked
again within the run if that code is final.

A message says what is wrong, the value got, the value allowed and where to change it. Such a message stays on its machine if
it may hold a value or a path of this machine: what other machines hear is `for_others` of the error.
"""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

from edgelam_fl.names import printable

INTERRUPTED = 130  # exit code after Ctrl-C, which is not an error


class EdgelamError(Exception):
    """Any of the errors below."""

    exit_code = 4
    code: ClassVar[str] = "run"
    """The kind of error, for other machines; a subclass without one of its own is of its base's kind."""
    is_final: ClassVar[bool] = False
    """Whether nothing within the same run can change it."""
    outward: ClassVar[str] = ""
    """What other machines may hear of such an error; empty: its message, which names no value and no path."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), self.args, self.__dict__)

    def for_others(self) -> str:
        """Returns what other machines may hear."""
        return self.outward or printable(str(self), 500)


def _restored(kind: type[EdgelamError], arguments: tuple[Any, ...], state: dict[str, Any]) -> EdgelamError:
    """Makes an error that comes from another process of this machine as it was there."""
    error = kind.__new__(kind, *arguments)
    error.__dict__.update(state)
    return error


class UsageError(EdgelamError):
    """The command line, the run file or the data is wrong."""

    exit_code = 2
    code, is_final = "usage", True
    outward = "what it was given cannot be used (usage)"


class ConfigError(UsageError):
    """A run file, an override or an option that cannot be used."""

    code = "config"
    outward = "a setting of the run cannot be used (config)"


DataFault = Literal[
    "axes", "chat", "columns", "csv", "empty-field", "few-examples", "folder", "format", "header", "json", "missing-field",
    "missing-file", "no-answer-fits", "numbers", "object", "passages", "preference", "several-sets", "template", "too-long",
    "tools", "turn", "unknown-class", "unreadable", "utf-8",
]  # fmt: skip


class DataError(UsageError):
    """A data file that cannot be used. Its message may quote the data: others hear `fault` and `place` alone."""

    code = "data"

    def __init__(self, message: str, fault: DataFault, place: str = "") -> None:
        """`fault`: a code for what is wrong. `place`: where in the file, as "line 3", made of counts alone."""
        super().__init__(message)
        self.fault, self.place = fault, place

    def for_others(self) -> str:
        where = f" at {self.place}" if self.place else ""
        return f"its data cannot be used: {self.fault}{where}"


class ModelError(UsageError):
    """A model that cannot be found, read or cut as asked."""

    code = "model"
    outward = "the model cannot be found, read or cut as asked (model)"


class ModelNotFound(ModelError):
    """A model of which nothing is on this machine; another machine may have it."""


class EnvironmentProblem(EdgelamError):
    """This machine or the network lacks something that the command needs."""

    exit_code = 3
    code = "environment"

    def __init__(self, message: str, outward: str = "") -> None:
        """`outward`: what other machines may hear, without a value or a path of this machine."""
        super().__init__(message)
        self._outward = outward

    def for_others(self) -> str:
        return self._outward or "the machine or its network lacks something that is needed (environment)"


class RunFailed(EdgelamError):
    """A run that had started and could not continue."""

    def __init__(self, message: str, exit_code: int = 4) -> None:
        """`exit_code`: 2 if all that could have taken part refused because of what they were given."""
        super().__init__(message)
        self.exit_code = exit_code


class PeerLost(RunFailed):
    """A link's other end vanished or stayed silent for longer than its deadline."""

    code = "peer-lost"


class TooFewSources(RunFailed):
    """Fewer devices or sites trained a module than the aggregation needs."""

    code = "too-few"


class DoesNotFit(RunFailed):
    """The available nodes have too little memory; `missing_bytes` says how much is missing."""

    code = "no-fit"

    def __init__(self, message: str, missing_bytes: float = 0.0) -> None:
        super().__init__(message)
        self.missing_bytes = missing_bytes


class Refused(RunFailed):
    """The other end of a link or of a submission declined, with its reason."""

    code = "refused"


class Mismatch(Refused):
    """The two sides differ in what a run cannot change: the files of the model, the version, a setting."""

    code, is_final = "mismatch", True


class Busy(Refused):
    """The node plays for another run, which it does not leave."""

    code = "busy"


class Restarted(RunFailed):
    """The node was started again since it was given its part, and has lost it."""

    code = "restarted"


class ProtocolError(RunFailed):
    """The other end sent something that the protocol does not allow."""

    code = "protocol"


BUG = "bug"


def _kinds(kind: type[EdgelamError]) -> Iterator[tuple[str, type[EdgelamError]]]:
    """Yields (code, class) of a class with a code of its own, and of those below it."""
    if "code" in vars(kind):
        yield kind.code, kind
    for below in kind.__subclasses__():
        yield from _kinds(below)


_KINDS = dict(_kinds(EdgelamError))


def code_of(error: BaseException) -> str:
    """Returns the code of any exception."""
    return error.code if isinstance(error, EdgelamError) else BUG


def known_code(code: str) -> str:
    """Returns a code that another machine sent; "" if there is none such."""
    return code if code in _KINDS or code == BUG else ""


def is_final(code: str) -> bool:
    """Returns whether a node that refuses with this code refuses for the rest of the run. An unknown code is not final."""
    return code in _KINDS and _KINDS[code].is_final


def exit_code_of(codes: Collection[str]) -> int:
    """Returns the exit code of a run that ended because nodes refused with these codes: 2 if all name what they were given."""
    given = [code in _KINDS and issubclass(_KINDS[code], UsageError) for code in codes]
    return UsageError.exit_code if given and all(given) else EdgelamError.exit_code


def for_others(error: BaseException) -> str:
    """Returns what other machines may hear of any exception: a code, places and counts, but no value and no path."""
    if isinstance(error, EdgelamError):
        return error.for_others()
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if "edgelam_fl" in Path(frame.filename).parts
    ]
    where = f" in {Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{where} (a bug)"


def nearest(word: str, known: Iterable[str]) -> str:
    """Returns a half-sentence to close a message about an unknown word: the closest known word, else all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(known)}"
