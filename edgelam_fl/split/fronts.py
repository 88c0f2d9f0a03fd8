"""The hidden states of devices' frozen fronts, which the first host of a route keeps, so that each example's travel once in a run.

A front that does not learn gives the same states for an example in every epoch and evaluation. The device computes each example
alone, without padding, so that they do not depend on the micro-batch either, and sends them under a name: an HMAC that nobody
else can compute. Later it sends the name. A host that does not have the states says so, and gets them in the same step.

Knows tensors and names; knows no files (`node.front_cache` keeps the states) and no links. Neighbours: `split.step` sends,
`split.host` receives. Shapes: B rows, T tokens, D hidden, N tokens of several rows.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import torch

from edgelam_fl.errors import ProtocolError
from edgelam_fl.plan.reading import allowed_unit, allows_unit
from edgelam_fl.split.judging import is_finite
from edgelam_fl.tasks.base import Unit
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.link import Frame

NAME_BYTES = 16
_PLACES_KNOWN = 16  # a restarted host has a new one
_MOST_LACKED = 2  # a frame of a step that was closed without its device is not read, and what was in it not kept


class KeptFronts(Protocol):
    """A place where a host keeps devices' states of one run."""

    @property
    def number(self) -> bytes:
        """Returns the random number of this place: another one means that nothing is left of what was kept."""

    def find(self, device: str, name: bytes, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor | None:
        """Returns a device's states [T, D] of a name; None: they are not here, or not of this shape."""

    def keep(self, device: str, name: bytes, states_TD: torch.Tensor) -> None:
        """Keeps a device's states under a name, if there is room. What has the name already stays."""


# ---------------------------------------------------------------- at the device


class SentTo:
    """The names of the states that a device has sent to one place."""

    def __init__(self) -> None:
        self._lacked: dict[bytes, int] = {}  # how often the host did not have what was sent, by name

    def is_there(self, name: bytes) -> bool:
        """Returns whether the host has the states of a name, as far as the device knows."""
        return self._lacked.get(name, _MOST_LACKED) < _MOST_LACKED

    def sent(self, name: bytes) -> None:
        """Notes that the states of a name have been sent."""
        self._lacked.setdefault(name, 0)

    def lacks(self, name: bytes) -> None:
        """Notes that the host does not have what was sent: if again and again, it has no room, and gets the states every time."""
        self._lacked[name] = self._lacked.get(name, 0) + 1


class SentFronts:
    """The names of the states that a device has sent, by the number of the place where a host keeps them."""

    def __init__(self) -> None:
        self._by_place: dict[bytes, SentTo] = {}

    def at(self, place: bytes) -> SentTo:
        """Returns what was sent to a place, to be added to."""
        found = self._by_place.setdefault(place, SentTo())
        while len(self._by_place) > _PLACES_KNOWN:
            self._by_place.pop(next(iter(self._by_place)))
        return found


class NamedFronts:
    """The names of one device's states, and the memory of those that were sent."""

    def __init__(self, secret: bytes, meaning: str, sent: SentFronts) -> None:
        """`secret`: the device's own. `meaning`: all but the tokens that decides what the states are."""
        self._secret, self._meaning, self.sent = secret, meaning.encode(), sent

    def names(self, unit: Unit) -> list[bytes]:
        """Returns the name of each row's states."""
        each = [row[:length].numpy().tobytes() for row, length in zip(unit.inputs, unit.row_lengths, strict=True)]
        return [hmac.digest(self._secret, self._meaning + b"\0" + ids, hashlib.sha256)[:NAME_BYTES] for ids in each]


# ---------------------------------------------------------------- at the host


def put_together(
    frame: Frame, device: str, plan: pb.Plan, hidden_size: int, dtype: torch.dtype, kept: KeptFronts
) -> Frame | list[int]:
    """Returns the frame with the states [B, T, D] of all rows of a micro-batch, or the rows whose states are not kept here.

    The tensor of the frame has the rows that came, one after the other; they are kept. Padding is zero. Raises ProtocolError for
    a frame that does not fit the plan or itself: nothing of it is kept then.
    """
    header, lengths, named = frame.header, list(frame.header.row_lengths), list(frame.header.row_names)
    here = list(header.kept_rows)
    _check_rows(lengths, named, here, plan, header.phase)
    came = [row for row in range(len(lengths)) if row not in set(here)]
    states_1ND = _checked_states(frame, [lengths[row] for row in came], hidden_size, dtype)
    found = {row: kept.find(device, named[row], (lengths[row], hidden_size), dtype) for row in here}
    missing = [row for row, states in found.items() if states is None]
    if missing:
        return missing
    if states_1ND is not None:
        pieces = states_1ND[0].split([lengths[row] for row in came])
        if is_finite(states_1ND):
            for row, states_TD in zip(came, pieces, strict=True):
                kept.keep(device, named[row], states_TD)
        found |= dict(zip(came, pieces, strict=True))
    states_BTD = torch.zeros(len(lengths), max(lengths), hidden_size, dtype=dtype)
    for row, states in found.items():
        assert states is not None
        states_BTD[row, : lengths[row]] = states
    return Frame(header, states_BTD)


def _check_rows(
    lengths: Sequence[int], named: Sequence[bytes], here: Sequence[int], plan: pb.Plan, phase: pb.Phase
) -> None:
    if not (lengths and min(lengths) >= 1 and allows_unit(plan, phase, len(lengths), max(lengths))):
        raise ProtocolError(f"row lengths {list(lengths)[:8]}; the plan allows {allowed_unit(plan, phase)}")
    if len(named) != len(lengths) or any(len(name) != NAME_BYTES for name in named):
        raise ProtocolError(f"{len(named)} names for {len(lengths)} rows; each has one of {NAME_BYTES} bytes")
    if here and not (here[-1] < len(lengths) and all(before < after for before, after in pairwise(here))):
        raise ProtocolError(f"kept rows {list(here)[:8]} of {len(lengths)}: each may come once, in order")


def _checked_states(frame: Frame, lengths: Sequence[int], hidden_size: int, dtype: torch.dtype) -> torch.Tensor | None:
    """Returns the states of the rows that came, [1, N, D]; None if none came."""
    tensor, expected = frame.tensor, [1, sum(lengths), hidden_size]
    if tensor is None and not lengths:
        return None
    if tensor is None or list(tensor.shape) != expected or tensor.dtype != dtype:
        got = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
        raise ProtocolError(f"hidden states must be {dtype} {expected if lengths else 'of no row'}, got {got}")
    return tensor
