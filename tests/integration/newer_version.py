"""`python -m tests.integration.newer_version MODULE ARGUMENTS`: what `python -m MODULE ARGUMENTS` does, of protocol version 99."""

from __future__ import annotations

import runpy
import sys

import edgelam_fl.wire


def main() -> None:
    _, module, *arguments = sys.argv
    known = [loaded for name, loaded in sys.modules.items() if name.startswith("edgelam_fl.")]
    for each in (edgelam_fl.wire, *known):  # whoever was imported before has a copy
        if "PROTOCOL_VERSION" in vars(each):
            vars(each)["PROTOCOL_VERSION"] = 99
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
