"""What must not leave a device, in every form in which it could be written down, and the search for it in a recording."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

from tests.integration.proxy import Connection, grpc_messages, streams

TOKENS = 6  # so many successive ids are a leak
CHARACTERS = 12  # so many successive characters of a prompt or an answer are one
_KEY = 6  # bytes by which a pattern is looked up; none is shorter
_BLOCK = 4 << 20


def varint(number: int) -> bytes:
    """protobuf's: seven bits a byte, the lowest first; negative numbers as 64 bits."""
    number &= (1 << 64) - 1
    coded = bytearray()
    while number > 0x7F:
        coded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*coded, number])


def _bfloat16(ids: Sequence[int]) -> bytes:
    return torch.tensor(ids, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()


ENCODINGS: dict[str, Callable[[Sequence[int]], bytes]] = {
    **{
        name: lambda ids, dtype=name: np.asarray(ids).astype(dtype).tobytes()  # type: ignore[misc]
        for name in ("<i2", ">i2", "<i4", ">i4", "<i8", ">i8", "<f2", "<f4", "<f8")
    },
    "bfloat16": _bfloat16,
    "varint": lambda ids: b"".join(map(varint, ids)),
}


class Secrets:
    """Byte patterns and what they are."""

    def __init__(self) -> None:
        self._by_key: dict[int, dict[bytes, str]] = defaultdict(dict)
        self._longest = 0

    def add(self, pattern: bytes, what: str) -> None:
        pattern = pattern.lstrip(b"\0")  # zeros are everywhere
        if len(pattern) >= _KEY:
            self._by_key[int.from_bytes(pattern[:_KEY], "little")].setdefault(pattern, what)
            self._longest = max(self._longest, len(pattern))

    def add_numbers(self, numbers: Sequence[int], what: str) -> None:
        """Every run of TOKENS of them, in every encoding."""
        for start in range(len(numbers) - TOKENS + 1):
            window = numbers[start : start + TOKENS]
            if len(set(window)) > 1:  # padding and masks say nothing
                for name, encode in ENCODINGS.items():
                    self.add(encode(window), f"{what}[{start}:{start + TOKENS}] as {name}")

    def add_text(self, text: str, what: str) -> None:
        for start in range(len(text) - CHARACTERS + 1):
            part = text[start : start + CHARACTERS]
            for encoding in ("utf-8", "utf-16-le"):
                self.add(part.encode(encoding), f"{what}: {part!r}")

    def found_in(self, data: bytes) -> set[str]:
        """What of it stands in `data`, at any byte."""
        keys = np.array(sorted(self._by_key), dtype=np.uint64)
        found = set()
        for start in range(0, len(data), _BLOCK):
            block = np.frombuffer(data[start : start + _BLOCK + self._longest], np.uint8)
            if len(block) < _KEY:
                continue
            here = sum(block[i : len(block) - _KEY + 1 + i].astype(np.uint64) << np.uint64(8 * i) for i in range(_KEY))
            slots = np.minimum(np.searchsorted(keys, here), len(keys) - 1)
            for position in np.flatnonzero(keys[slots] == here) + start:
                key = int.from_bytes(data[position : position + _KEY], "little")
                found |= {w for pattern, w in self._by_key[key].items() if data.startswith(pattern, int(position))}
        return found


def leaks(secrets: Secrets, connections: Iterable[Connection]) -> set[str]:
    """What of the secrets left through these connections: in the bytes as they are, and in the gRPC messages inside."""
    found = set()
    for connection in connections:
        found |= secrets.found_in(bytes(connection.up))
        for stream in streams(bytes(connection.up)).values():
            for compressed, message in grpc_messages(stream):
                assert not compressed, "a compressed message could hide anything: teach this test to read it"
                found |= secrets.found_in(message) if len(message) >= _KEY else set()
    return found
