"""EdgeLAM-FL: federated split fine-tuning of language models; data files stay on their devices.

What is public stands in `__all__`; every other name may change with any version. Names are imported when they are first
used, so that `import edgelam_fl` (and with it `edgelam --help`) loads neither torch nor Flower.

    import edgelam_fl

    result = edgelam_fl.run(["ann.jsonl", "bob.jsonl"], overrides={"federation.rounds": 2})
    print(result.summary.devices[0].perplexity_after)
    model = peft.PeftModel.from_pretrained(base, result.adapter)

The packages, each of which sees only those below it: `cli` (commands), `bench` (matrices of strategies), `simulation`
(all nodes in one process) and `doctor`, `node` (one machine that takes part) and `federation` (starting and following a
run), `serving` (a result in use), `split` (training over a route), `plan` (who holds which layers) and `hub` (the
server's end of the data plane), `wireless`, `tasks`, `wire` (bytes between nodes) and `model` (slices of a model),
`telemetry` and `config`. Flower's ServerApp and ClientApp live beside this package, in `server/` and `clients/`; the
strategies that they use, in `strategies/`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgelam_fl.config import RunConfig as RunConfig
    from edgelam_fl.config import parse_run_file as parse_run_file
    from edgelam_fl.config import read_run_file as read_run_file
    from edgelam_fl.errors import EdgelamError as EdgelamError
    from edgelam_fl.federation.local import run_local as run_local
    from edgelam_fl.federation.program import run as run
    from edgelam_fl.serving.results import Result as Result
    from edgelam_fl.serving.results import open_result as open_result
    from edgelam_fl.telemetry.events import read_events as read_events

__version__ = "0.2.0"
__all__ = [
    "EdgelamError",
    "Result",
    "RunConfig",
    "__version__",
    "open_result",
    "parse_run_file",
    "read_events",
    "read_run_file",
    "run",
    "run_local",
]
_HOMES = {
    "EdgelamError": "edgelam_fl.errors",
    "Result": "edgelam_fl.serving.results",
    "RunConfig": "edgelam_fl.config",
    "open_result": "edgelam_fl.serving.results",
    "parse_run_file": "edgelam_fl.config",
    "read_events": "edgelam_fl.telemetry.events",
    "read_run_file": "edgelam_fl.config",
    "run": "edgelam_fl.federation.program",
    "run_local": "edgelam_fl.federation.local",
}


def __getattr__(name: str) -> Any:
    """Imports a public name from the module that defines it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
