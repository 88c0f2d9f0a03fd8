"""`python -m tests.integration.in_namespace FILE MODULE ARGUMENTS`: what `python -m MODULE ARGUMENTS` does, in the network namespace of FILE."""

from __future__ import annotations

import ctypes
import os
import runpy
import sys

_NETWORK = 0x40000000  # CLONE_NEWNET


def main() -> None:
    _, file, module, *arguments = sys.argv
    namespace = os.open(file, os.O_RDONLY)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, _NETWORK):  # of this thread, and of all that it starts
        raise OSError(ctypes.get_errno(), f"{file} cannot be entered")
    os.close(namespace)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
