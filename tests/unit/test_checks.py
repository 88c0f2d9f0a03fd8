from __future__ import annotations

import pytest

from edgelam_fl.errors import ConfigError
from edgelam_fl.model.source import ModelSource
from server.checks import check_config
from tests.support import run_config

PRIVATE = ["privacy.mode=central", "split.hosts=0"]
LOWRANK = ["wire.gradients=lowrank", "lora.train=back"]
CACHE = ["wire.front_cache_mb=9", "lora.train=['hosts','back']"]
DORA = ["lora.use_dora=true"]
CLASSES = ["task.kind=classification", "task.classes=['yes', 'no']"]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
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
        [
            "strategy.aggregation=fedprox",
            "optimizer.weight_decay=0.1",
            "optimizer.keep=always",
            "task.label_smoothing=0.1",
        ],
        ["strategy.aggregation=scaffold", "optimizer.name=sgd", "task.label_smoothing=0.1"],
        [*PRIVATE, "optimizer.weight_decay=0.1", "optimizer.betas=[0.8, 0.9]", "task.label_smoothing=0.1"],
        [*PRIVATE, "optimizer.name=sgd", "optimizer.momentum=0.9"],
        ["optimizer.warmup_steps=39", "federation.rounds=4", "federation.local_steps=10"],
        [*PRIVATE, "privacy.noise=2.0"],
        [*PRIVATE, "strategy.selection=poisson", "strategy.aggregation=ffa", "privacy.clip_quantile=0.5"],
        ["privacy.mode=central", "split.host_mode=copies", "split.fronts={'a'=1}", "strategy.aggregation=fedadam"],
        ["privacy.mode=central", "lora.train=['front', 'back']"],
        ["privacy.mode=central", "split.host_mode=sequential", "split.sites=2"],
        ["privacy.mode=central", "strategy.selection=poisson", "federation.expect_nodes=200"],
        ["privacy.mode=device", "split.hosts=0"],
        ["privacy.mode=device", "lora.train=['front', 'back']"],
        ["privacy.cut_clip=2.0", "privacy.cut_noise=0.1", "split.front=0", "lora.train=hosts"],
        ["privacy.private_front=true", "privacy.disguise=0.5", "strategy.aggregation=flora", "split.host_mode=copies"],
        ["privacy.disguise=0.5", "strategy.aggregation=fedsa", "split.host_on=any"],
        [*LOWRANK, "privacy.cut_clip=2.0", "privacy.cut_noise=0.1"],
        [*LOWRANK, "split.back=0", "split.hosts=2", "split.host_mode=sequential", "lora.ranks={'a'=2}"],
        [*LOWRANK, "split.back=0", "split.host_mode=copies", "strategy.aggregation=fedprox"],
        [*LOWRANK, "strategy.aggregation=flora"],
        ["federation.deadline=predicted", "federation.deadline_factor=3", "strategy.aggregation=flora"],
        ["federation.late=next", "federation.enough_nodes=2", "split.hosts=0", "strategy.aggregation=fedprox"],
        [
            "task.metrics=['exact_match', 'rouge_l', 'my.own:measure']",
            "task.metrics_tokens=9",
            "wire.front_cache_mb=9",
            "lora.train=back",
        ],
        ["task.packing=true", "optimizer.gradient_accumulation_steps=4", "split.labels=last-stage", "split.back=0"],
        [
            "federation.early_stopping_patience=2",
            "federation.early_stopping_threshold=0.01",
            "federation.load_best=true",
        ],
        [
            "lora.use_rslora=true",
            "lora.alpha_pattern={ q_proj = 2.5 }",
            "lora.ranks={'a'=2}",
            "strategy.aggregation=flora",
        ],
        ["lora.rank_pattern={ 'layers.0.self_attn.q_proj' = 64, v_proj = 32 }", "strategy.aggregation=fedsa"],
        [*DORA, "strategy.aggregation=fedmedian", "lora.dropout=0.1", "lora.modules_to_save=norm"],
        [*DORA, *PRIVATE, "strategy.aggregation=fedadam"],
        [*DORA, "strategy.aggregation=scaffold", "optimizer.name=sgd", "model.base=auto"],
        [*LOWRANK, *DORA],
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
        (
            [*DORA, "strategy.aggregation=ffa"],
            "use_dora = true cannot be combined with strategy.aggregation = 'ffa', .* Allowed: .* such as 'fedavg'",
        ),
        ([*DORA, "strategy.aggregation=rolora"], "use_dora = true cannot be combined with .* 'rolora'"),
        ([*DORA, "strategy.aggregation=fedsa"], "use_dora = true cannot be combined with .* 'fedsa'"),
        ([*DORA, "strategy.aggregation=flora"], "use_dora = true cannot be combined with .* 'flora'"),
        ([*DORA, "strategy.aggregation=fedex"], "use_dora = true cannot be combined with .* 'fedex'"),
        ([*DORA, "strategy.aggregation=hetlora"], "use_dora = true cannot be combined with .* 'hetlora'"),
        ([*DORA, "strategy.aggregation=flexlora"], "use_dora = true cannot be combined with .* 'flexlora'"),
        (
            ["lora.rank_pattern={ q_proj = 4 }", "lora.ranks={'a'=2}"],
            "rank_pattern cannot be combined with lora.ranks: .* Allowed: either of them",
        ),
        (
            ["lora.rank_pattern={ k_proj = 4 }"],
            "lora.rank_pattern: 'k_proj' matches no module that gets an adapter. Allowed: .* such as 'q_proj' or 'model.layers.0.self_attn",
        ),
        (["lora.alpha_pattern={ proj = 4.0 }"], "lora.alpha_pattern: 'proj' matches no module"),
        (
            ["lora.rank_pattern={ v_proj = 33 }"],
            "lora.rank_pattern gives model.layers.0.self_attn.v_proj the rank 33; allowed: 1 to 32",
        ),
        (["lora.layers_to_transform=[0, 6]"], "layer 6 gets no adapter: .* has layers 0 to 5"),
        (["lora.layers_to_transform=-1"], "layer -1 gets no adapter: .* has layers 0 to 5"),
        (
            ["lora.layers_to_transform=[0, 5]", "lora.train=hosts"],
            r"layers_to_transform = \[0, 5\] has no layer that learns: .* they are in back, front, and lora.train = \['hosts'\]. Allowed: ",
        ),
        (
            ["lora.modules_to_save=lm_head"],
            "'lm_head' cannot be taken: the head of .* is its embedding, .*Allowed for this model: input_layernorm, norm, post_attention",
        ),
        (
            ["lora.modules_to_save=embed_tokens"],
            "'embed_tokens' cannot be taken: .* would list the tokens of a device's text",
        ),
        (["lora.modules_to_save=o_proj"], "'o_proj' cannot be taken: it ends .*, a matrix inside the layers"),
        (["lora.modules_to_save=layernorms"], "'layernorms' cannot be taken: no module of .* has a name that ends so"),
        (["split.sites=2", "split.hosts=0"], "split.sites = 2 needs split.hosts of at least 1"),
        (["privacy.cut_clip=2.0", "split.hosts=0"], "privacy.cut_clip = 2 needs split.hosts of at least 1"),
        (["privacy.private_front=true", "split.hosts=0"], "privacy.private_front = true needs split.hosts"),
        (
            ["privacy.disguise=0.5", "split.labels=last-stage", "split.back=0"],
            "privacy.disguise = 0.5 cannot be combined with split.labels = 'last-stage'",
        ),
        (
            ["privacy.disguise=0.5", "split.front=0"],
            "privacy.disguise = 0.5 needs a front that can learn, and split.front = 0",
        ),
        (
            ["privacy.private_front=true", "split.fronts={'a'=0}"],
            "privacy.private_front = true needs a front that can learn, and split.fronts.a = 0",
        ),
        (
            ["privacy.disguise=0.5", "lora.train=['hosts','back']"],
            r"privacy.disguise = 0.5 needs a front that learns, and lora.train = \['hosts', 'back'\] freezes it",
        ),
        (["privacy.private_front=true", "lora.train=front"], "leaves nothing to aggregate"),
        (
            ["privacy.private_front=true", "privacy.mode=central", "split.fronts={'a'=1}", "split.host_mode=copies"],
            "cannot be combined with privacy.mode = 'central' and split.fronts",
        ),
        (["privacy.private_front=true", "split.host_on=any"], "cannot be combined with split.host_on = 'any'"),
        (
            ["privacy.private_front=true", "strategy.aggregation=scaffold", "optimizer.name=sgd"],
            "cannot be combined with strategy.aggregation = 'scaffold'",
        ),
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
            ["strategy.aggregation=scaffold", "optimizer.name=sgd", "optimizer.momentum=0.9"],
            "'scaffold' .* optimizer.momentum = 0.9 would mix them .* Allowed: optimizer.momentum = 0",
        ),
        (["model.dropout=own"], "model.dropout = 'own' has no effect: .* has no dropout in its config.json"),
        (["optimizer.momentum=0.9"], "momentum = 0.9 has no effect with optimizer.name = 'adamw'. Allowed: .* 'sgd'"),
        (["optimizer.name=sgd", "optimizer.weight_decay=0.1"], "weight_decay = 0.1 has no effect with .* 'sgd'"),
        (["optimizer.name=sgd", "optimizer.betas=[0.8, 0.9]"], r"betas = \[0.8, 0.9\] has no effect with .* 'sgd'"),
        (
            ["optimizer.warmup_steps=40", "federation.rounds=4", "federation.local_steps=10"],
            r"optimizer.warmup_steps = 40 must be below 40, the steps of the run \(4 rounds of 10\)",
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
        (
            [*PRIVATE, "strategy.aggregation=flora"],
            r"'flora' needs every device's update, and privacy.mode = 'central' .* Allowed: 'fedavg', 'ffa', 'rolora', 'fedprox', "
            r"'fedadam', 'fedyogi', 'fedadagrad', 'fedavgm', or a class of your own with needs_only_mean = True",
        ),
        ([*PRIVATE, "strategy.aggregation=none"], "'none' needs every device's update"),
        ([*PRIVATE, "strategy.aggregation=scaffold", "optimizer.name=sgd"], "'scaffold' needs every device's update"),
        (
            [*PRIVATE, "strategy.selection=oort"],
            r"'oort' chooses by what devices measured, .* Allowed: 'all', 'random', 'round_robin', 'poisson', or a class of your own",
        ),
        (
            ["privacy.mode=central", "split.labels=last-stage", "split.back=0", "split.host_mode=copies"],
            "split.labels = 'last-stage' cannot be combined with privacy.mode = 'central': .* Allowed: 'device'",
        ),
        (
            ["privacy.mode=central", "split.fronts={'a'=1}", "lora.train=['front', 'back']"],
            "split.fronts cannot be combined with privacy.mode = 'central' here",
        ),
        (
            ["privacy.mode=device"],
            "privacy.mode = 'device' cannot be combined with hosts that train: .* Allowed: lora.train without 'hosts', split.hosts = 0",
        ),
        (["privacy.mode=device", "split.host_mode=copies"], "'device' cannot be combined with hosts that train"),
        (
            ["privacy.mode=device", "split.hosts=0", "privacy.clip_quantile=0.5"],
            "privacy.clip_quantile = 0.5 needs whoever clips to count",
        ),
        (
            ["privacy.mode=central", "federation.epochs=1"],
            "federation.epochs = 1 cannot be combined with privacy.mode = 'central' and split.host_mode = 'joint'",
        ),
        (
            ["privacy.mode=central", "split.backs={'a'=1}"],
            "split.backs cannot be combined with privacy.mode = 'central' here",
        ),
        (
            ["privacy.mode=central", "optimizer.clip=global", "split.host_mode=copies"],
            "optimizer.clip = 'global' cannot be combined with privacy.mode = 'central' and hosts: .* Allowed: 'stage', 'none'",
        ),
        (
            ["privacy.mode=central", "privacy.clip_quantile=0.5"],
            "privacy.clip_quantile = 0.5 cannot be combined with split.host_mode = 'joint'",
        ),
        (
            ["privacy.mode=central", "split.host_mode=sequential", "strategy.selection=poisson"],
            "'poisson' cannot be combined with .* 'sequential' while hosts train: .* Allowed: split.host_mode = 'joint' or 'copies'",
        ),
        (
            ["privacy.mode=central", "split.sites=2", "strategy.selection=poisson"],
            "'poisson' cannot be combined with .* split.sites = 2 while hosts train .* Allowed: split.sites = 1",
        ),
        (
            ["privacy.mode=central", "strategy.selection=poisson", "federation.expect_nodes=20"],
            r"'poisson' draws none of 19 devices in some round .* Allowed: a rate of at least 0\.\d+,",
        ),
        (
            ["privacy.epsilon=1.0"],
            "privacy.epsilon = 1.0 has no effect with privacy.mode = 'none', .* Allowed: privacy.mode = 'central', 'device', .*"
            "or leave privacy.epsilon out",
        ),
        (["privacy.clip=0.5"], "privacy.clip = 0.5 has no effect with privacy.mode = 'none'"),
        ([*PRIVATE, "lora.ranks={'a'=2}"], "lora.ranks cannot be combined with privacy.mode = 'central'"),
        (
            ["privacy.mode=central", "lora.train=['front']", "split.front=0"],
            r"privacy.mode = 'central' has nothing to protect: lora.train = \['front'\]",
        ),
        (
            [*PRIVATE, "privacy.noise=0.5"],
            r"privacy.noise = 0.5 spends an epsilon of 9\.\d+ in the first round, and privacy.epsilon = 8 .* a noise of at least "
            r"0\.6\d+ is needed for one round, or 0 for the smallest",
        ),
        (
            [*PRIVATE, "federation.expect_nodes=20", "privacy.delta=0.05"],
            r"privacy.delta = 0.05 must be below 1 / the number of devices, 1 / 20 = 0.05",
        ),
        (
            [*PRIVATE, "federation.expect_nodes=20", "federation.devices_per_round=21"],
            "federation.devices_per_round = 21, and there are 20. Allowed: at most 20",
        ),
        (
            ["strategy.selection=poisson", "federation.devices_per_round=2"],
            "federation.devices_per_round = 2 cannot be combined with strategy.selection = 'poisson'.*Allowed: 0",
        ),
        (
            ["strategy.selection=poisson", "split.host_on=any"],
            "split.host_on = 'any' cannot be combined with strategy.selection = 'poisson'",
        ),
        (
            ["strategy.selection=poisson", "strategy.options.poisson.rate=0.0"],
            r"strategy.options.poisson.rate = 0.0 must be greater than 0",
        ),
        (
            ["wire.gradients=lowrank"],
            r"with lora.train = \['front', 'hosts', 'back'\]: .* Allowed: lora.train = 'back', or",
        ),
        (
            ["wire.gradients=lowrank", "lora.train=['front','back']"],
            r"cannot be combined with lora.train = \['front', 'back'\]",
        ),
        (["wire.gradients=lowrank", "lora.train=hosts"], "from 8 numbers per token .* neither their own LoRA nor"),
        (
            [*LOWRANK, "split.hosts=0"],
            "'lowrank' needs split.hosts of at least 1: .* Allowed: a host, or wire.gradients",
        ),
        (
            [*LOWRANK, "split.labels=last-stage", "split.back=0"],
            "'lowrank' cannot be combined with split.labels = 'last-stage': .* Allowed: split.labels = 'device', or",
        ),
        (
            [*LOWRANK, "privacy.mode=central"],
            "'lowrank' cannot be combined with privacy.mode = 'central': .* Allowed: privacy.mode = 'none', or",
        ),
        (
            [*LOWRANK, "split.backs={'a'=1}"],
            "cannot be combined with split.backs = {'a': 1}: .* Allowed: split.back alone",
        ),
        (
            ["federation.local_steps=10000", "optimizer.gradient_accumulation_steps=64"],
            r"local_steps = 10000 of 128 micro-batches each .* are 1,280,000 in a round, .* Allowed: at most 1,000,000",
        ),
        (
            ["task.metrics=bleu"],
            r"task.metrics: 'bleu' is not known \(known: exact_match, rouge_l\), nor package.module",
        ),
        (["task.metrics=rouge"], "did you mean 'rouge_l'"),
        (["task.metrics=a b:f"], "is not known"),
        (
            ["task.metrics=exact_match", "task.loss_on=all"],
            "measures answers, and with task.loss_on = 'all' .* no metrics",
        ),
        (
            ["task.metrics=exact_match", "split.labels=last-stage", "split.back=0"],
            "metrics = .* cannot be combined with split.labels = 'last-stage': .* Allowed: split.labels = 'device', or",
        ),
        (["task.metrics_tokens=9"], "metrics_tokens = 9 has no effect without task.metrics. Allowed: leave it out"),
        (
            [*CACHE, "task.packing=true"],
            "packing = true cannot be combined with wire.front_cache_mb = .*: states are kept per example",
        ),
        (
            ["task.packing=true", "privacy.cut_clip=2.0"],
            "packing = true cannot be combined with privacy.cut_clip = 2, which knows the first token .* Allowed: one of the two",
        ),
        (["task.packing=true", "privacy.disguise=0.5"], "cannot be combined with privacy.disguise = 0.5"),
        (
            ["federation.early_stopping_threshold=0.1"],
            "early_stopping_threshold = 0.1 has no effect without early_stopping_patience. Allowed: leave it out, or",
        ),
        (
            ["privacy.mode=central", "federation.early_stopping_patience=2"],
            "early_stopping_patience = 2 cannot be combined with privacy.mode = 'central': held-out losses are not",
        ),
        (["privacy.mode=device", "federation.load_best=true"], "load_best = true cannot be combined with privacy.mode"),
        (
            ["privacy.private_front=true", "federation.load_best=true"],
            "load_best = true cannot be combined with privacy.private_front = true: .* Allowed: one of the two",
        ),
        (["wire.front_cache_mb=9", "split.hosts=0"], "front_cache_mb = 9 needs split.hosts of at least 1"),
        (
            ["wire.front_cache_mb=9"],
            "needs a front that does not learn, and lora.train = .* Allowed: lora.train without 'front'",
        ),
        ([*CACHE, "lora.dropout=0.1"], "cannot be combined with lora.dropout = 0.1, .* Allowed: no dropout"),
        ([*CACHE, "model.dropout=own"], "cannot be combined with model.dropout = 'own'"),
        (
            [*CACHE, "privacy.cut_clip=1", "privacy.cut_noise=0.5"],
            "cannot be combined with privacy.cut_clip = 1, whose noise",
        ),
        ([*LOWRANK, "lora.rank=65"], "lora.rank = 65 must be at most 64 with wire.gradients = 'lowrank': the width of"),
        (
            ["federation.deadline_factor=3"],
            "has no effect with federation.deadline = 'fixed'.*'percentile' or 'predicted'",
        ),
        (["federation.deadline=predicted", "federation.deadline_percentile=50"], "Allowed: .* = 'percentile'$"),
        (["federation.enough_nodes=2", "federation.min_nodes=3"], "must be at least federation.min_nodes = 3"),
        (
            ["federation.enough_nodes=3", "federation.devices_per_round=3"],
            "must be below federation.devices_per_round = 3",
        ),
        (["federation.late=next", "split.hosts=0"], "has no effect with federation.deadline = 'fixed'"),
        (["federation.late=next", "federation.enough_nodes=2"], "needs split.hosts = 0"),
        (
            ["federation.late=next", "federation.enough_nodes=2", "split.hosts=0", "strategy.aggregation=fedadam"],
            "cannot be combined with strategy.aggregation = 'fedadam', .* Allowed: 'fedavg', 'fedprox'",
        ),
        (
            ["federation.late=next", "federation.enough_nodes=2", "privacy.mode=device", "split.hosts=0"],
            "cannot be combined with privacy.mode = 'device'",
        ),
        (
            [*LOWRANK, "split.back=0", "strategy.aggregation=fedprox"],
            "'fedprox' .* with wire.gradients = 'lowrank', split.back = 0 and .* Allowed: split.back of at least 1, .*'copies'$",
        ),
        (
            ["wire.activation_codec=int3"],
            "wire.activation_codec = 'int3' is not known. Allowed: 'raw', 'fp16', 'bf16', 'int8'",
        ),
        (["wire.gradient_codec=INT8"], "wire.gradient_codec = 'INT8' is not known"),
        (["wire.activation_codec=int8", "split.hosts=0"], "'int8' needs split.hosts of at least 1"),
        (
            [*LOWRANK, "wire.activation_codec=fp16"],
            "'fp16' cannot be combined with wire.gradients = 'lowrank': 8 small numbers",
        ),
        (
            ["lora.train=back", "wire.gradient_codec=int8"],
            "has no effect with lora.train = .'back'.: no gradient leaves",
        ),
    ],
)
def test_settings_that_cannot_be_combined(tiny: ModelSource, overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_config(run_config(tiny.name, *overrides))


@pytest.mark.real_model
def test_the_head_of_classes_learns_though_no_layer_at_the_back_does() -> None:
    check_config(
        run_config("minilm-l6", *CLASSES, "lora.targets=query", "lora.layers_to_transform=3", "lora.train=back")
    )
