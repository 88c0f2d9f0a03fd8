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
    group: int = 1  # a row is filled up to a multiple of so many numbers
    group_bytes: int = 0  # beside the numbers of each group

    def bytes_of_row(self, numbers: int, item_bytes: int) -> int:
        """Returns the bytes of a row of `numbers` numbers. `item_bytes`: what one takes in memory."""
        if not numbers:
            return 0
        groups = -(-numbers // self.group)
        return (self.bits or 8 * item_bytes) * groups * self.group // 8 + self.row_bytes + groups * self.group_bytes


RAW = "raw"
INT4_GROUP = 32
CODEC_BYTES = {
    RAW: CodecBytes(),
    "fp16": CodecBytes(bits=16, row_bytes=1),
    "bf16": CodecBytes(bits=16),
    "int8": CodecBytes(bits=8, row_bytes=4),
    "int4": CodecBytes(bits=4, group=INT4_GROUP, group_bytes=2),
}
