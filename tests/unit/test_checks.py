from __future__ import annotations

import pytest

from edgelam_fl.errors import ConfigError
from edgelam_fl.model.source import ModelSource
from server.checks import check_config
from tests.support import run_config

CLASSES = ["task.kind=classification", "task.classes=['yes', 'no']"]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        CLASSES,
        ["split.labels=last-stage", "split.back=0"],
        ["split.host_mode=copies", "optimizer.clip=global"],
        ["federation.epochs=2", "federation.local_steps=5"],
        ["split.fronts={'a'=0, 'b'=5}", "split.backs={'a'=5}", "lora.ranks={'a'=32}", "split.sites=3"],
        ["split.hosts=2", "split.front=1", "split.cuts=[3]"],
        ["strategy.aggregation=krum", "lora.train=hosts", "split.sites=5"],
        ["strategy.aggregation=fedprox", "lora.train=hosts", "split.host_mode=copies"],
        ["strategy.aggregation=fedmedian", "lora.train=hosts", "split.hosts=0"],
        ["strategy.aggregation=krum", "split.host_mode=copies"],
        ["strategy.aggregation=fedsa", "split.host_mode=copies", "split.hosts=0"],
        ["strategy.aggregation=flora", "lora.train=hosts", "split.sites=2", "strategy.options.flora.residual='svd:64'"],
        ["strategy.aggregation=fedex", "optimizer.keep=always", "lora.ranks={'a'=2}"],
        ["strategy.aggregation=scaffold", "optimizer.name=sgd", "optimizer.schedule=cosine"],
        ["strategy.aggregation=scaffold", "optimizer.name=sgd", "split.hosts=0", "split.host_mode=sequential"],
        ["strategy.aggregation=scaffold", "optimizer.name=sgd", "lora.train=hosts", "split.sites=2"],
    ],
)
def test_settings_that_can_be_combined(tiny: ModelSource, overrides: list[str]) -> None:
    assert check_config(run_config(tiny.name, *overrides)).source.digest == tiny.digest


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["model.base=fp32", "model.compute=bf16"],
            "model.compute = 'bf16' cannot be combined with model.base = 'fp32'",
        ),
        (["split.sites=2", "split.hosts=0"], "split.sites = 2 needs split.hosts of at least 1"),
        (["split.labels=last-stage"], "split.back = 2: split.back must be 0 with split.labels"),
        (["split.labels=last-stage", "split.back=0", "split.backs={'a'=1}"], "split.backs.a = 1: split.back must be 0"),
        (["split.labels=last-stage", "split.back=0", "split.hosts=0"], "'last-stage' needs split.hosts of at least 1"),
        (
            ["split.host_mode=copies", "strategy.aggregation=none"],
            "'none' cannot be combined with split.host_mode = 'copies'",
        ),
        (
            ["split.host_mode=copies", "strategy.aggregation=fedsa"],
            "'fedsa' .* each device would need its own there. Allowed: 'joint', 'sequential'",
        ),
        (
            ["strategy.aggregation=fedex", "lora.train=hosts"],
            "'fedex' adds up the updates of several sources, and has one source, the site, with .* or split.sites of at least 2",
        ),
        (
            ["strategy.aggregation=flora", "optimizer.keep=always"],
            "'flora' starts with new factors in every round, .*Allowed: optimizer.keep = 'exact'",
        ),
        (
            ["strategy.aggregation=flora", "strategy.options.flora.residual='svd:65'"],
            "strategy.options.flora.residual = 'svd:65' must be at most 'svd:64', the largest rank of a module",
        ),
        (
            ["strategy.aggregation=scaffold"],
            "'scaffold' .* only plain SGD allows; optimizer.name = 'adamw' .* Allowed: optimizer.name = 'sgd'",
        ),
        (
            ["strategy.aggregation=scaffold", "optimizer.name=sgd", "optimizer.clip=stage"],
            "'scaffold' .* optimizer.clip = 'stage' would shorten it. Allowed: optimizer.clip = 'none'",
        ),
        (
            ["strategy.aggregation=scaffold", "optimizer.name=sgd", "split.host_mode=sequential"],
            "'scaffold' cannot be combined with split.host_mode = 'sequential': .* Allowed: 'joint', 'copies', or split.hosts = 0",
        ),
        (
            ["strategy.aggregation=scaffold", "optimizer.name=sgd", "lora.train=hosts"],
            "'scaffold' corrects how sources differ, and has one source, the site, with .* or split.sites of at least 2",
        ),
        (["split.fronts={'pi-*'=6}"], r"split.fronts: 'pi-\*' = 6 must be 0 to 5"),
        (["split.backs={'a'=-1}"], "split.backs: 'a' = -1 must be 0 to 5"),
        (["lora.ranks={'a'=33}"], "lora.ranks: 'a' = 33 must be 1 to 32, the smallest width"),
        (["lora.ranks={'a'=0}"], "lora.ranks: 'a' = 0 must be 1 to 32"),
        (["lora.rank=33"], "lora.rank = 33 must be at most 32"),
        (["split.hosts=2", "split.front=1", "split.cuts=[1]"], r"split.cuts = \[1\] must be 1 rising layer numbers"),
        (["strategy.aggregation=fedavgg"], "fedavg"),
        (
            ["strategy.aggregation=fedprox", "lora.train=hosts"],
            r"strategy.aggregation = 'fedprox' .* nothing to hold with lora.train = \['hosts'\] and split.host_mode = 'joint'",
        ),
        (
            ["strategy.aggregation=krum", "lora.train=hosts", "split.sites=2", "split.host_mode=sequential"],
            r"'krum' needs at least 5 sources, and has split.sites = 2 with lora.train = \['hosts'\] .*'sequential'",
        ),
    ],
)
def test_settings_that_cannot_be_combined(tiny: ModelSource, overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_config(run_config(tiny.name, *overrides))
