"""Sets how the C library of this process keeps freed memory. Knows no tensors."""

from __future__ import annotations

import ctypes

_M_MMAP_THRESHOLD = -3
_THRESHOLD_BYTES = 128 * 1024


def give_back_at_once() -> bool:
    """Makes glibc return every freed block of 128 KiB or more to the system; False for another C library.

    By default glibc raises that limit to 32 MiB as large blocks come and go. Activations then sit between the holes that
    dequantized weights leave: a step on 26 layers of SmolLM2 in int8 took 205 MiB more than its tensors, and kept them; with
    the fixed limit it takes 38 MiB more and keeps none. The cost is 0 to 5 % of a step's time, measured by alternating steps.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # musl, macOS
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _THRESHOLD_BYTES))
