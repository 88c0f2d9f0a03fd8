"""Imports what nodes compute with, without what these libraries would bring along and nothing here uses. Knows no node.

peft imports bitsandbytes if it is installed, and transformers scipy and scikit-learn; bitsandbytes has torch load its compiler.
That is a fifth of a node's memory before it has a model. `model.quantized` itself imports bitsandbytes once a base needs it.

For processes of this program alone, before anything else in them imports these libraries: peft then takes bitsandbytes for not
installed until the process ends.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import cast

UNUSED = ("bitsandbytes", "scipy", "sklearn")
_SELDOM = 1000  # collections of the middle generation until all objects are looked at: Python's own is 10


def import_libraries() -> None:
    """Imports torch, transformers and peft. Changes nothing about what has been imported before."""
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # nothing is compiled, so the compiler is not loaded
    with hidden(UNUSED), few_collections():
        import peft.import_utils
        import transformers.models.llama.modeling_llama  # noqa: F401

        peft.import_utils.is_bnb_available()  # both keep their first answer
        peft.import_utils.is_bnb_4bit_available()


@contextmanager
def hidden(names: tuple[str, ...]) -> Iterator[None]:
    """Lets packages seem not installed while the block runs, unless they have been imported before."""
    absent = [name for name in names if name not in sys.modules]
    for name in absent:
        sys.modules[name] = cast(ModuleType, None)  # an import of it fails at once
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


@contextmanager
def few_collections() -> Iterator[None]:
    """Keeps Python from looking through all objects for garbage while the block runs.

    These imports make half a million objects that stay: looking through them again and again is a sixth of their time. Young garbage is
    collected as ever, so memory is the same.
    """
    before = gc.get_threshold()
    gc.set_threshold(*before[:2], _SELDOM)
    try:
        yield
    finally:
        gc.set_threshold(*before)
