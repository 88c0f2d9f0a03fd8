"""How many bytes each codec makes of a row of numbers. Imports no torch: planners and checks of run files ask here.

A row is a token's hidden states, or their gradient. The codecs themselves are in `wire.codecs`, one file each.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CodecBytes:
    """The bytes of one row, whatever its numbers are."""

    bits: int = 0  # per number; 0: as many as its element type has
    row_bytes: int = 0  # beside the numbers of each row
    group: int = (
        0  # numbers that share a scale, a power of two; a row is filled up to whole groups. 0: there are no groups
    )
    group_bytes: int = 0  # beside the numbers of each group

    def bytes_of_row(self, numbers: int, item_bytes: int) -> int:
        """Returns the bytes of a row of `numbers` numbers. `item_bytes`: what one takes in memory."""
        if not numbers:
            return 0
        group = self.group_of(numbers)
        groups = -(-numbers // group)
        return (self.bits or 8 * item_bytes) * groups * group // 8 + self.row_bytes + groups * self.group_bytes

    def group_of(self, numbers: int) -> int:
        """Returns the numbers of a group in rows of `numbers` numbers: fewer if the row is short, 1 without groups."""
        return min(self.group, max(2, 1 << (numbers - 1).bit_length())) if self.group else 1


RAW = "raw"
CODEC_BYTES = {
    RAW: CodecBytes(),
    "fp16": CodecBytes(bits=16, row_bytes=1),
    "bf16": CodecBytes(bits=16),
    "int8": CodecBytes(bits=8, group=64, group_bytes=2),
    "int4": CodecBytes(bits=4, group=32, group_bytes=2),
}
