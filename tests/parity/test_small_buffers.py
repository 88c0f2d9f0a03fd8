"""No cycle of waits: sockets that hold a fraction of an activation, links that stall, and one micro-batch in flight per device.

A chain of three host processes and three device processes; every link runs through a proxy. The same round in memory,
which nothing disturbs, is what it must equal.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from edgelam_fl.config import RunConfig
from edgelam_fl.model.adapter import digest, from_bytes, initial_adapter
from edgelam_fl.model.source import ModelSource, find_model
from edgelam_fl.wire import edgelam_pb2 as pb
from tests.fleet import Fleet, check_done, memory_fleet
from tests.integration.proxy import StallingProxy
from tests.parity.daemons import Daemon
from tests.support import run_config, write_tiny_llama

BUFFER_BYTES = 64 << 10
HIDDEN, TOKENS = 1024, 48
HOSTS = ("edge-1", "edge-2", "edge-3")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return write_wide_llama(tmp_path_factory.mktemp("wide-llama"))


def write_wide_llama(into: Path) -> ModelSource:
    """Writes a model with activations like a large one's and hardly anything to compute: wide, one thin head, a thin MLP."""
    folder = write_tiny_llama(into)
    config = LlamaConfig.from_pretrained(folder)
    config.update(
        {
            "hidden_size": HIDDEN, "intermediate_size": 16, "num_hidden_layers": 5, "num_attention_heads": 1,
            "num_key_value_heads": 1, "head_dim": 16,
        }
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return find_model(str(folder))


@pytest.mark.parametrize(("window", "steps"), [(1, 20), (2, 10)])  # 2: gradients meet activations on a link
def test_a_chain_of_stalling_links_with_small_buffers_trains_to_the_same_bits(
    daemons: dict[str, Daemon], wide: ModelSource, data_files: list[Path], window: int, steps: int
) -> None:
    stalling_links_train_to_the_same_bits(daemons, wide, data_files, window, steps)


def stalling_links_train_to_the_same_bits(
    daemons: dict[str, Daemon], wide: ModelSource, data_files: list[Path], window: int, steps: int
) -> None:
    config = _config(wide, window)
    start = initial_adapter(wide, config.lora.targets, config.lora.rank, config.run.seed)
    with memory_fleet(wide, config, data_files) as undisturbed:  # while the daemons start
        expected = undisturbed.run(start, steps)
    check_done(expected)

    proxies = {name: StallingProxy(daemons[name].address(), BUFFER_BYTES, seed) for seed, name in enumerate(HOSTS, 1)}
    devices = {name: daemon for name, daemon in daemons.items() if name not in HOSTS}
    hosts = {name: (daemons[name], proxies[name].address) for name in HOSTS}
    fleet = Fleet(wide, config, dict(devices), dict(hosts), f"stalling-{window}")
    reports = fleet.run(start, steps)
    for proxy in proxies.values():
        proxy.close()
    check_done(reports)

    activations = [entry for entry in reports["device-1"].bytes if entry.kind == "ACT" and entry.direction == "sent"]
    assert activations
    for entry in activations:
        assert entry.payload_bytes / entry.messages > 2 * BUFFER_BYTES, "the buffers must not hold an activation"
    for name, report in reports.items():
        assert report.contributions, name
        assert trained(report) == trained(expected[name]), name
        assert report.eval_loss_sum == expected[name].eval_loss_sum


def _config(source: ModelSource, window: int) -> RunConfig:
    """Cuts a batch into as many pieces of one row as may be in flight."""
    return run_config(
        source.name, "split.hosts=3", "split.front=1", "split.back=1", f"split.window={window}",
        f"split.micro_batches={window}", f"federation.batch_size={window}", "federation.min_nodes=3",
        f"task.max_tokens={TOKENS}", "task.loss_on=all",
    )  # fmt: skip


def trained(report: pb.JobReport) -> dict[tuple[str, str], str]:
    """Returns the digest of what each source trained."""
    return {(c.scope, c.source): digest(from_bytes(c.adapter)) for c in report.contributions}
