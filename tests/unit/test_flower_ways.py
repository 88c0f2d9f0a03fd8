"""Flower's own ways: keys of the run config one by one, what a round says in `flwr log`, a run that reached no server of ours."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import tomli
from flwr.common.config import flatten_dict, fuse_dicts, parse_config_args
from flwr.common.serde import user_config_to_proto
from flwr.proto.control_pb2 import StartRunRequest
from flwr.superlink.grid import InMemoryGrid

from edgelam_fl.config import RunConfig, known_keys, overrides_of, parse_run_file
from edgelam_fl.errors import ConfigError
from edgelam_fl.federation import superlink_daemon
from edgelam_fl.federation.app_archive import run_config_keys
from edgelam_fl.telemetry.events import RoundDone
from server.app import main
from server.log_lines import lines_of
from tests.recorded import as_events
from tools.flower_config import PROJECT, with_block

# ---------------------------------------------------------------- keys of the run config


def test_pyproject_has_the_keys_of_the_run_file() -> None:
    project = PROJECT.read_text(encoding="utf-8")
    assert project == with_block(project), "stale: python -m tools.flower_config"
    sections = {key.rpartition(".")[0] for key in known_keys()}
    assert set(run_config_keys()) >= {key for key in known_keys() if "." in key and key not in sections}


def through_flower(*typed: str) -> RunConfig:
    """Reads `flwr run --run-config` as Flower and the ServerApp do."""
    ours = flatten_dict(tomli.loads(PROJECT.read_text(encoding="utf-8"))["tool"]["flwr"]["app"]["config"])
    values = fuse_dicts(ours, parse_config_args(list(typed)))
    return parse_run_file(str(values["run-toml"]), source="test", overrides=overrides_of(values))


def test_keys_are_typed_one_by_one() -> None:
    config = through_flower(
        "federation.rounds=2 optimizer.lr=1e-3 split.checkpointing=true strategy.aggregation='fedadam'"
    )
    assert (config.federation.rounds, config.optimizer.lr, config.split.checkpointing) == (2, 1e-3, True)
    assert config.strategy.aggregation == "fedadam"
    assert through_flower() == RunConfig()


def test_lists_and_tables_are_texts_in_toml() -> None:
    config = through_flower(
        "lora.targets='[\"q_proj\"]' strategy.options='{fedadam={eta=0.5}}' data.fields.prompt='ask'"
    )
    assert config.lora.targets == ("q_proj",)
    assert config.strategy.options == {"fedadam": {"eta": 0.5}}
    assert config.data.fields.prompt == "ask"


def test_a_key_wins_over_the_run_file_even_if_it_says_the_default() -> None:
    rounds = RunConfig().federation.rounds
    typed = f'run-toml="[federation]\\nrounds = {rounds + 2}" federation.rounds={rounds}'
    assert through_flower(typed).federation.rounds == rounds


def test_a_misspelt_key_is_refused_with_the_one_that_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(superlink_daemon, "archive_digest", lambda content: "ours")
    for key in ("federation.round", "num-server-rounds"):
        request = StartRunRequest(override_config=user_config_to_proto({key: 2, "command": "run"}))
        request.fab.content = b"App"
        said = superlink_daemon.refusal_of_run(request.SerializeToString(), own="ours")
        assert said == f"the run config has no key {key!r}: did you mean 'federation.rounds'?"
    assert superlink_daemon.refusal_of_run(request.SerializeToString(), own="") == "", "another App's keys are its own"


# ---------------------------------------------------------------- no server of ours


def test_a_run_in_a_simulation_of_flowers_own_says_which_line_is_missing() -> None:
    grid = InMemoryGrid.__new__(InMemoryGrid)
    context: Any = SimpleNamespace(run_id=1, run_config={"command": "run", "run-toml": "", "set": "", "out": ""})
    with pytest.raises(ConfigError, match="export FLWR_HOME="):
        main(grid, context)


# ---------------------------------------------------------------- flwr log


def round_done(steps: int, **values: Any) -> RoundDone:
    ann = {
        "name": "ann", "labels": 30, "held_out_labels": 10, "examples": 24, "metrics": {}, "loss": 2.0, "perplexity": math.e**2,
        "tokens": 300, "train_seconds": 2.0, "step_losses": [2.0], "bytes_up": 1000, "bytes_down": 2000, **values,
    }  # fmt: skip
    bob = {
        "name": "bob",
        "labels": 10,
        "held_out_labels": 30,
        "metrics": {},
        "loss": 1.0,
        "perplexity": math.e,
        **values,
    }
    (event,) = as_events([{"event": "round_done", "round": 2, "steps": steps, "seconds": 61.0, "devices": [ann, bob]}])
    assert isinstance(event, RoundDone)
    return event


def test_a_round_logs_means_over_labels_and_each_device() -> None:
    first, ann, bob = lines_of(round_done(1), 3)
    assert first == (
        "round 2 of 3 took 1 min 01 s; over 2 devices: train loss 1.7500, held-out perplexity 3.4903 at its start, "
        "held-out loss 1.2500 at its start"
    )
    assert ann == (
        "  ann: 24 examples, train loss 2.0000, held-out perplexity 7.3891 at its start, 150 tokens/s, sent 1.00 kB, received 2.00 kB"
    )
    assert bob == "  bob: train loss 1.0000, held-out perplexity 2.7183 at its start"
    *_, of_values = lines_of(round_done(1, perplexity=None, metrics={"NMSE": 0.1}), 3)
    assert of_values == "  bob: train loss 1.0000, held-out NMSE -10.00 dB at its start"


def test_the_last_evaluation_is_no_round() -> None:
    done = round_done(0, loss=None, step_losses=[], perplexity=None, metrics={"accuracy": 0.5})
    first, ann, _ = lines_of(done, 1)
    assert first == "last evaluation took 1 min 01 s; over 2 devices: held-out accuracy 0.5000"
    assert "held-out accuracy 0.5000" in ann
    assert "at its start" not in ann


def test_a_round_in_which_nothing_was_measured_says_so() -> None:
    done = round_done(1, loss=None, step_losses=[1.0], perplexity=None, held_out_labels=None)
    first, *_ = lines_of(done, 1)
    assert first.endswith("over 2 devices: nothing held out was measured")
