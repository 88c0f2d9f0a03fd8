"""Names of bases and of what they are computed in, as run files, profiles and plans write them. Imports no torch.

A base is what a frozen slice is kept in. A run file writes "bf16" for what torch calls "bfloat16". A pair names both at once:
"int8/bf16" is kept in int8 and computed in bfloat16.
"""

from __future__ import annotations

BASES = ("fp32", "bf16", "int8", "nf4")
COMPUTES = {
    "fp32": ("float32",),
    "bf16": ("bfloat16",),
    "int8": ("float32", "bfloat16"),
    "nf4": ("float32", "bfloat16"),
}
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}  # torch's name of what is computed in, by the run file's
SHORT = {dtype: short for short, dtype in DTYPES.items()}
ITEM_BYTES = {"float32": 4, "bfloat16": 2}  # per number
FP32_BYTES = ITEM_BYTES["float32"]
PROFILED_TOKENS = 128  # what a profile's base_seconds are for: a layer's matrices over so many tokens
