"""How this process's C library keeps freed memory. Knows no tensors."""

from __future__ import annotations

import ctypes

_M_MMAP_THRESHOLD = -3
_THRESHOLD_BYTES = 128 * 1024


def give_back_at_once() -> bool:
    """Makes glibc return every freed block of 128 KiB or more to the system; False where the C library is another.

    By itself it raises that limit to 32 MiB as large blocks come and go. Activations then live between the holes that
    dequantized weights leave: a step on 26 layers of SmolLM2 in int8 took 205 MiB more than its tensors, and kept it;
    so it is 38 MiB, and none of it stays. It costs 0 to 5 % of a step's time, measured step by step in turns.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # musl, macOS
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _THRESHOLD_BYTES))
