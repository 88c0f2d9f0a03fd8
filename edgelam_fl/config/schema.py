"""The keys of a run file, each with a default, a rule and a description; the classes are named after the sections.

Knows nothing about devices: data paths, memory and addresses belong to `edgelam client`, so that the same file runs on
any federation.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Final, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator


class Section(BaseModel):
    """A section of a run file: frozen, without unknown keys, and without conversions between types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


AUTO: Final = "auto"
MOST_PIECES = 256  # of a batch


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _words_as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else _as_tuple(value)


def _numbers_as_tuple(value: Any) -> Any:
    return (value,) if type(value) is int else _as_tuple(value)


# TOML has lists, and a frozen section tuples.
_LISTED = BeforeValidator(_as_tuple)
_WORDS = BeforeValidator(_words_as_tuple)  # a single word counts as a list of one
_NUMBERS = BeforeValidator(_numbers_as_tuple)  # as does a single number


def most_read_by_hosts(trust: str) -> float:
    """Returns the largest share of a text that hosts may read under a value of split.trust. Raises ValueError for no such value."""
    if trust in ("hosts", "none"):
        return float(trust == "hosts")
    return share_after("measured", trust, "'hosts' or 'none'")


def share_after(word: str, text: str, others: str) -> float:
    """Returns X of "word:X". Raises ValueError unless 0 < X < 1; `others`: the values allowed besides, in words."""
    found, colon, number = text.partition(":")
    try:
        share = float(number) if found == word and colon else 0.0
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise ValueError(f"must be {others}, or '{word}:X' with a share X of the text above 0 and below 1")
    return share


class ModelSection(Section):
    name: str = Field("smollm2-135m", min_length=1, description="built-in name, folder, .gguf file or hub name")
    layers: int = Field(
        0, ge=0, description="the model's first layers that are used, for tasks of values alone; 0: all of them"
    )
    base: Literal["fp32", "bf16", "int8", "nf4", "auto"] = Field(
        "fp32",
        description="format of the frozen weights; int8: one scale per row; auto: the fastest that fits, measured on each node",
    )
    compute: Literal["fp32", "bf16", "auto"] = Field(
        "auto",
        description="format of the arithmetic; auto: bf16 if the base is bf16, else fp32; measured too if base = 'auto'",
    )
    adapter: str = Field(
        "",
        description="the adapter to begin with: an earlier run's folder, or a folder in peft's format with this run's [lora]; empty: a new one",
    )
    dropout: Literal["off", "own"] = Field(
        "off",
        description="the model's own dropout in training: off, or own: what its config.json says (GPT-2 and BERT: 0.1), as transformers' and peft's trainers have it. Not counted when memory is planned: attention then keeps its weights. LoRA's is lora.dropout",
    )


class Pieces(NamedTuple):
    """How a device's batch is cut into micro-batches, and what is kept of those that are under way."""

    micro_batches: int
    window: int
    checkpointing: bool


class SplitSection(Section):
    front: int = Field(
        2, ge=0, description="layers after the embedding that a device keeps; 0 lets hosts read the text"
    )
    back: int = Field(
        2, ge=0, description="last layers before the head that a device keeps; 0 lets hosts solve for the labels"
    )
    fronts: dict[str, int] | str = Field(
        {},
        description="front for devices whose names match, as in { 'pi-*' = 1 }; 'auto:0.4': on every device as many layers as "
        "it takes, by what was measured for the model, for hosts to read at most that share of the text",
    )
    backs: dict[str, int] = Field({}, description="back for devices whose names match")
    hosts: int | Literal["auto"] = Field(
        1,
        description="hosts on a route, 0 to 64; 0: each device trains the whole model; auto (with cuts = 'auto'): the number "
        "of available hosts that makes a step shortest",
    )
    sites: int = Field(
        1, ge=1, le=256, description="chains of hosts that train the same layers, each for its own devices"
    )
    host_on: Literal["edge", "any"] = Field(
        "edge",
        description="nodes that may be hosts: edge servers only, or after them also devices that listen (--listen)",
    )
    cuts: Annotated[Literal["equal", "auto"] | tuple[int, ...], _LISTED] = Field(
        "equal",
        description="layers at which the hosts after the first begin; auto: cuts, hosts and their order are chosen from what the "
        "nodes measured, again whenever nodes come, go or slow down",
    )
    trust: str = Field(
        "hosts",
        description="who may read the devices' text: hosts (all of it) | measured:0.2 (hosts, a measured share of at most so much; "
        "a plan that leaks more is refused) | none (no host: split.hosts = 0)",
    )
    host_mode: Literal["joint", "sequential", "copies"] = Field(
        "joint",
        description="how a host trains for several devices: one step for all | one step per device in turn | one adapter per "
        "device, averaged later",
    )
    labels: Literal["device", "last-stage"] = Field(
        "device",
        description="place of the labels; last-stage: the last host gets them and holds the head, only to compare with SplitLoRA",
    )
    checkpointing: bool | Literal["auto"] = Field(
        False,
        description="recompute activations in the backward pass: less memory, more time; auto: if nothing fits without",
    )
    micro_batches: int | Literal["auto"] = Field(
        2,
        description="pieces that a device's batch is cut into, 1 to 256 and at most federation.batch_size; auto: as many as make a step shortest, by "
        "what the nodes measured; their number changes the last bits of gradients",
    )
    window: int | Literal["auto"] = Field(
        2,
        description="micro-batches of one device under way at a time, 1 to 256; bounds a host's memory; auto: as many as make a step shortest",
    )

    @property
    def named_fronts(self) -> dict[str, int]:
        """The numbers of layers by names of devices; empty with 'auto:...', which sets split.front for all."""
        return {} if isinstance(self.fronts, str) else self.fronts

    @property
    def least_hosts(self) -> int:
        """The fewest hosts that a site can have."""
        return 1 if self.hosts == "auto" else self.hosts

    @field_validator("hosts", mode="before")
    @classmethod
    def number_of_hosts(cls, value: Any) -> Any:
        if value != "auto" and not (type(value) is int and 0 <= value <= 64):
            raise ValueError("must be 0 to 64, or 'auto'")
        return value

    @field_validator("micro_batches", "window", mode="before")
    @classmethod
    def number_of_pieces(cls, value: Any) -> Any:
        if value != AUTO and not (type(value) is int and 1 <= value <= MOST_PIECES):
            raise ValueError(f"must be 1 to {MOST_PIECES}, or 'auto'")
        return value

    @field_validator("checkpointing", mode="before")
    @classmethod
    def switch_or_auto(cls, value: Any) -> Any:
        if value != AUTO and type(value) is not bool:
            raise ValueError("must be true, false or 'auto'")
        return value

    @field_validator("trust")
    @classmethod
    def known_trust(cls, value: str) -> str:
        most_read_by_hosts(value)
        return value

    @field_validator("fronts", mode="before")
    @classmethod
    def table_or_auto(cls, value: Any) -> Any:
        table = "a table of numbers by names of devices, as in { 'pi-*' = 1 }"
        if isinstance(value, dict) and all(type(front) is int for front in value.values()):
            return value
        share_after("auto", value if isinstance(value, str) else "", table)
        return value


class LoraSection(Section):
    rank: int = Field(8, ge=1, le=1024, description="rank of every adapter")
    ranks: dict[str, int] = Field({}, description="rank on nodes whose names match, as in { 'zero-*' = 2 }")
    alpha: float = Field(16.0, gt=0, description="the adapter's output is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of an adapter's inputs that is dropped in training")
    targets: Annotated[tuple[str, ...], _WORDS] = Field(
        ("q_proj", "v_proj"), min_length=1, description="module names inside the layers, or 'all-linear'"
    )
    train: Annotated[tuple[Literal["front", "hosts", "back"], ...], _WORDS] = Field(
        ("front", "hosts", "back"), min_length=1, description="places where adapters learn; all others stay frozen"
    )
    layers_to_transform: Annotated[tuple[int, ...], _NUMBERS] = Field(
        (),
        description="numbers of the layers that get adapters, from 0, or one number; none: all (peft's key, as are the next five)",
    )
    rank_pattern: dict[str, int] = Field(
        {},
        description="rank of modules whose names end in what a key, a regular expression, matches, as in { 'layers.0.self_attn.q_proj' = 16 }; "
        "the first key counts",
    )
    alpha_pattern: dict[str, float] = Field(
        {},
        description="alpha of modules, as rank_pattern: their adapters' output is scaled by their own alpha / their own rank",
    )
    use_rslora: bool = Field(
        False,
        description="rank-stabilised LoRA: the adapter's output is scaled by alpha / sqrt(rank), so that a large rank learns as fast",
    )
    use_dora: bool = Field(
        False,
        description="DoRA: each row of an adapted matrix also learns its length, apart from its direction; slower, and not for every aggregation",
    )
    modules_to_save: Annotated[tuple[str, ...], _WORDS] = Field(
        (),
        description="modules that learn as a whole, by the ends of their names: norms, or a head that is not tied to the embedding",
    )

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def readable_patterns(cls, value: dict[str, float]) -> dict[str, float]:
        for pattern, term in value.items():
            try:
                re.compile(f"({pattern})")
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
            if term <= 0:
                raise ValueError(f"{pattern!r} = {term:g} must be above 0")
        return value


class FieldNames(Section):
    prompt: Annotated[str | tuple[str, ...], _LISTED] = Field(
        "question",
        min_length=1,
        description="what the model is asked, or a list of fields, joined by empty lines",
    )
    answer: str = Field(
        "answer", min_length=1, description="what the model should answer; in a classification the class"
    )

    @property
    def prompts(self) -> tuple[str, ...]:
        """The names of the fields that the prompt is made of."""
        return (self.prompt,) if isinstance(self.prompt, str) else self.prompt

    @model_validator(mode="after")
    def each_once(self) -> FieldNames:
        names = (*self.prompts, self.answer)
        if not all(names) or len(set(names)) < len(names):
            raise ValueError(f"data.fields must name fields, each once, got {', '.join(map(repr, names))}")
        return self


class TaskSection(Section):
    kind: str = Field(
        "causal-lm",
        description="what is learned: causal-lm, classification (with classes), or channel-prediction or beamforming (with [radio])",
    )
    classes: Annotated[tuple[str, ...], _LISTED] = Field(
        (), description="names of the classes, as the answers in the data spell them; for a classification only"
    )
    max_tokens: int = Field(
        96, ge=8, le=32768, description="tokens of the longest example; too_long says what becomes of longer ones"
    )
    too_long: Literal["cut-prompt", "cut-end", "skip"] = Field(
        "cut-prompt",
        description="what becomes of an example that is too long: the oldest part of its prompt goes, its end goes, or it is left out",
    )
    packing: bool = Field(
        False,
        description="whether short examples of a micro-batch share rows of at most max_tokens, each attending to itself alone: less padding to compute and to send, the same steps up to rounding; for causal-lm",
    )
    template: str = Field("chat", description="'chat' (the model's own), 'plain', or a text with {prompt} and {answer}")
    loss_on: Literal["answer", "assistant", "all"] = Field(
        "answer",
        description="tokens that are learned: the last answer, with template 'chat' every answer of a chat, or all",
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of each label's weight that all tokens (or classes) get alike, as torch's cross_entropy; held-out losses are without it",
    )
    metrics: Annotated[tuple[str, ...], _WORDS] = Field(
        (),
        max_length=8,
        description="measures of greedy answers to held-out questions: exact_match, rouge_l, or package.module:function of a text and the true one, from a module that the node's operator allows (edgelam client --metrics)",
    )
    metrics_examples: int = Field(
        16, ge=1, le=10_000, description="held-out questions that each device has answered per evaluation, for metrics"
    )
    metrics_tokens: int = Field(
        32,
        ge=1,
        le=4096,
        description="tokens of the longest of these answers; each costs a forward pass of the whole text so far, and its bytes",
    )
    private_modules: Annotated[tuple[Literal["input", "output"], ...], _WORDS] = Field(
        (),
        description="of a task of values, the modules that each device keeps to itself, never sent and never averaged: input, output; the others are averaged",
    )
    weighting: Literal["labels", "examples"] = Field(
        "labels", description="weights of losses and of the aggregation: the number of labelled tokens, or of examples"
    )

    @field_validator("template")
    @classmethod
    def known_template(cls, value: str) -> str:
        if value not in ("chat", "plain") and not ("{prompt}" in value and value.endswith("{answer}")):
            raise ValueError("must be 'chat', 'plain', or a text that holds {prompt} and ends with {answer}")
        return value


class DataSection(Section):
    fields: FieldNames = Field(FieldNames(), description="names of the question and the answer in the devices' data")
    bad_lines: Literal["refuse", "skip"] = Field(
        "refuse",
        description="an example that cannot be read keeps the device out of the run, or is left out, counted and named by its place",
    )
    held_out: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="share of a device's examples that is only measured and never learned; 0: none is measured",
    )


class RadioSection(Section):
    """What a radio task learns from channels; for tasks of values alone."""

    snr_db: float = Field(
        10.0,
        ge=-30,
        le=60,
        description="noise on the channels that are heard, never on those that are learned or measured",
    )
    history_slots: int = Field(16, ge=2, le=512, description="past slots that a prediction is made from")
    future_slots: int = Field(4, ge=1, le=128, description="slots that are predicted")
    series: int = Field(
        64,
        ge=1,
        le=4096,
        description="strongest series of a sample that a model gets as tokens; at most task.max_tokens",
    )
    duplex: Literal["tdd", "fdd"] = Field(
        "tdd",
        description="whether the band that is heard is predicted, or the other one of the data, which lies right above it",
    )
    base: Literal["autoregressions", "last"] = Field(
        "autoregressions",
        description="what a model corrects: the mean of autoregressions, which it then gets beside each series, or, in the band that is heard, the "
        "series' last value, with nothing beside the series",
    )
    beam_snrs_db: Annotated[tuple[float, ...], _LISTED] = Field(
        (0.0, 5.0, 10.0, 15.0, 20.0),
        min_length=1,
        max_length=16,
        description="SNRs that beams are learned and measured at, each sample at every one; for beamforming",
    )
    pilot_snrs_db: Annotated[tuple[float, ...], _LISTED] = Field(
        (),
        max_length=16,
        description="SNRs of the pilots that channels are estimated from, each sample at every one: beams are made from estimates, and "
        "learned and measured over the true channels; none: channels are known; for beamforming",
    )

    @field_validator("beam_snrs_db", "pilot_snrs_db")
    @classmethod
    def snrs_of_beams(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(value)) < len(value) or not all(-30 <= snr_db <= 60 for snr_db in value):
            raise ValueError("must be SNRs of -30 to 60 dB, each once")
        return value


class FederationSection(Section):
    rounds: int = Field(4, ge=1, le=100_000, description="aggregations in the run")
    local_steps: int = Field(10, ge=1, le=100_000, description="optimizer steps between two aggregations")
    epochs: int = Field(
        0, ge=0, description="passes over each device's data per round, instead of local_steps; 0: local_steps"
    )
    batch_size: int = Field(8, ge=1, le=65_536, description="examples of one device per step")
    min_nodes: int = Field(1, ge=1, description="devices that a round needs")
    devices_per_round: int = Field(
        0,
        ge=0,
        description="devices that strategy.selection chooses; 0: as many as it wants (fedcs, lyapunov), else all",
    )
    expect_nodes: int = Field(
        0, ge=0, description="devices to wait for at the start; after join_deadline_s, min_nodes are enough"
    )
    wait: Literal["block", "park"] = Field(
        "block",
        description="a node's ClientApp waits for its job to end, or hands the job over and is asked again (simulations need park)",
    )
    evaluate_every: int = Field(1, ge=1, description="rounds between two evaluations; the result is always evaluated")
    evaluate_examples: int = Field(
        0,
        ge=0,
        le=100_000_000,
        description="most held-out examples that a device measures with, the same in every round; 0: all that data.held_out sets aside",
    )
    early_stopping_patience: int = Field(
        0,
        ge=0,
        description="evaluations in a row without a lower held-out loss after which the run ends, as transformers' EarlyStoppingCallback; 0: it makes all rounds",
    )
    early_stopping_threshold: float = Field(
        0.0, ge=0, description="nats per label by which a loss must be lower to count, for early_stopping_patience"
    )
    load_best: bool = Field(
        False,
        description="whether the result is the adapter with the lowest held-out loss, as transformers' load_best_model_at_end; else it is the last",
    )
    snapshot_every: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        "auto",
        description="steps between two snapshots within a round, from which a new attempt of it goes on; auto: so that they cost little; 0: none, and an attempt always begins again",
    )
    join_deadline_s: float = Field(120.0, gt=0, description="longest wait for min_nodes devices and for a host")
    reconnect_deadline_s: float = Field(
        60.0,
        ge=0,
        description="a link that gets no connection again for so long is lost; 0: as soon as its connection breaks",
    )
    step_deadline_s: float = Field(120.0, gt=0, description="a device that takes longer is left out of the step")
    round_deadline_s: float = Field(3600.0, gt=0, description="a node that takes longer is left out of the round")
    deadline: Literal["fixed", "percentile", "predicted"] = Field(
        "fixed",
        description="when a device is late for its round: after round_deadline_s alone, or after deadline_factor times a percentile of the devices' last rounds, or times what is predicted from their bytes, rates and compute",
    )
    deadline_factor: float = Field(2.0, ge=1, le=1000, description="of deadline = 'percentile' and 'predicted'")
    deadline_percentile: float = Field(90.0, gt=0, le=100, description="of deadline = 'percentile'")
    enough_nodes: int = Field(
        0,
        ge=0,
        description="devices that a round waits for: soon after so many have delivered, the others are late; 0: all",
    )
    late: Literal["drop", "next"] = Field(
        "drop",
        description="the update of a late device is dropped, or used in the next round with half its weight (split.hosts = 0, fedavg and fedprox)",
    )
    gradient_factor: float = Field(
        30.0,
        ge=0,
        description="a device whose gradient is larger than so many times the median of its host's devices is left out of the step, and after three in a row of the round, as is one whose gradients work against those of the others in a task of texts; 0: any size and direction, and so with privacy, which clips it",
    )
    update_factor: float = Field(
        12.0,
        ge=0,
        description="a contribution whose update is larger than so many times the median of the others is left out of the aggregate, and in a task of texts, in a round of up to 32 nodes, one that points against theirs; 0: any size and direction, and so with privacy, which clips it",
    )


class OptimizerSection(Section):
    name: Literal["adamw", "sgd"] = Field("adamw", description="torch's AdamW or torch's SGD")
    lr: float = Field(1e-3, gt=0, le=10, description="learning rate")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="how lr changes over all planned steps"
    )
    warmup_steps: int = Field(
        0,
        ge=0,
        description="first steps of the run, over which lr rises to its value: step s, counted from 0, has lr (s + 1) / warmup_steps. transformers' schedules have lr s / warmup_steps, so that their first step learns nothing",
    )
    weight_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="adamw: each step multiplies every tensor that it changes, LoRA factors and the head of a classification, by 1 - lr weight_decay (decoupled, as torch's AdamW); frozen tensors stay",
    )
    betas: Annotated[tuple[float, float], _LISTED] = Field(
        (0.9, 0.999), description="adamw: decay of the mean and of the square of gradients"
    )
    eps: float = Field(1e-8, gt=0, le=1, description="adamw: added to the root of the mean square")
    momentum: float = Field(0.0, ge=0, lt=1, description="sgd: share of the step before that is kept, as torch's SGD")
    gradient_accumulation_steps: int = Field(
        1,
        ge=1,
        le=256,
        description="batches whose gradients make one step: the same, to the bit, as so many times federation.batch_size and split.micro_batches; split.window bounds the memory all the same",
    )
    clip: Literal["none", "stage", "global"] = Field(
        "none",
        description="limit the norm of the gradient: stage: on each node alone | global: over all nodes together",
    )
    max_norm: float = Field(1.0, gt=0, description="limit of the norm, for clip")
    keep: Literal["exact", "always"] = Field(
        "exact",
        description="when a node keeps its moments: only if it starts from exactly the adapter that they belong to, or always",
    )

    @field_validator("betas")
    @classmethod
    def betas_below_one(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("must be two numbers, each at least 0 and below 1")
        return value


class StrategySection(Section):
    aggregation: str = Field(
        "fedavg",
        description="fedavg, ffa, rolora, flexlora, hetlora, flora, fedex, fedsa, fedprox, scaffold (with sgd), over_the_air, fedadam, fedyogi, fedadagrad, fedavgm, fedmedian, fedtrimmedavg, krum, multikrum, none, or package.module:Class",
    )
    selection: str = Field(
        "all",
        description="all, random, poisson (each by a coin of its own), round_robin, best_channel, power_of_choice, oort, fedcs (a deadline), tifl (tiers), "
        "lyapunov (a bound on the average round), or package.module:Class",
    )
    bandwidth: str = Field(
        "uniform",
        description="uniform, proportional (to payload), equalise (all finish together), lyapunov, or package.module:Class",
    )
    options: dict[str, dict[str, Any]] = Field(
        {}, description="options per strategy, by its name, as in { lyapunov = { delay_s = 30, v = 10.0 } }"
    )
    require_tags: Annotated[tuple[str, ...], _WORDS] = Field(
        (), description="tags that a device must have to take part (edgelam client --tag)"
    )
    min_memory_bytes: int = Field(0, ge=0, description="free memory that a device must have to take part")

    @field_validator("options")
    @classmethod
    def plain_values(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, options in value.items():
            for option, given in options.items():
                number = isinstance(given, int | float) and math.isfinite(given)
                if not (number or isinstance(given, str)):
                    raise ValueError(f"must hold texts, numbers and booleans; {name}.{option} = {given!r}")
        return value


class WireSection(Section):
    capacity: str = Field(
        "", description="rate of the server's uplink and downlink, shared out by strategy.bandwidth; '': unlimited"
    )
    gradients: Literal["full", "lowrank"] = Field(
        "full",
        description="gradient that a device sends to the last host: of the hidden states, or (with lora.train = 'back') of "
        "lora.rank numbers per token, from which the hosts learn one matrix at the cut",
    )
    front_cache_mb: int = Field(
        0,
        ge=0,
        le=1_000_000,
        description="megabytes of devices' hidden states that a first host may keep on its disk while the run lasts, so that those "
        "of an example travel once and not in every epoch and evaluation (needs a front that does not learn; each example goes "
        "through it alone); 0: none",
    )
    activation_codec: str = Field(
        "raw",
        description="how hidden states become bytes on every link: raw (every bit) | fp16 | bf16 | int8 (one scale per 64 numbers) | int4 "
        "(one scale per 32 numbers), or a codec of one's own; all but raw round, in training, evaluation and chats over hosts",
    )
    gradient_codec: str = Field(
        "raw", description="how gradients of hidden states become bytes on every link: as wire.activation_codec"
    )

    @property
    def lossy_codecs(self) -> list[str]:
        """The run's codecs other than raw, which every node knows."""
        return sorted({self.activation_codec, self.gradient_codec} - {"raw"})

    @property
    def capacity_bps(self) -> float:
        """The capacity in bits per second; 0: unlimited."""
        return _bits_per_second(self.capacity) if self.capacity else 0.0

    @field_validator("capacity")
    @classmethod
    def readable(cls, value: str) -> str:
        if value:
            _bits_per_second(value)
        return value


def _bits_per_second(text: str) -> float:
    number, _, unit = text.strip().partition(" ")
    scale = {"kbit/s": 1e3, "Mbit/s": 1e6, "Gbit/s": 1e9}.get(unit.strip())
    try:
        rate = float(number) * (scale or 0)
    except ValueError:
        rate = 0.0
    if not (scale and 0 < rate < 1e15):
        raise ValueError("must be a rate such as '100 Mbit/s' (kbit/s, Mbit/s or Gbit/s), or '' for no limit")
    return rate


class WirelessSection(Section):
    """A radio cell in virtual time (edgelam_fl.wireless); powers and noise refer to the whole band."""

    bandwidth_hz: float = Field(
        0.0,
        ge=0,
        description="band that strategy.bandwidth shares out to the devices: rounds get a virtual time; 0: no wireless model",
    )
    radius_m: float = Field(500.0, gt=0, description="radius of the cell; devices are spread evenly over its area")
    power_dbm: float = Field(23.0, ge=-50, le=100, description="transmit power of a device")
    server_power_dbm: float = Field(
        46.0, ge=-50, le=100, description="transmit power of the server, on a band of its own"
    )
    antennas: int = Field(
        4,
        ge=1,
        le=1024,
        description="antennas of the server, which average the Rayleigh fading; 1: a deep fade takes hours",
    )
    noise_dbm_hz: float = Field(-174.0, ge=-250, le=0, description="noise power per Hz")
    flops: float = Field(1e10, gt=0, description="operations per second of a device")
    speed_spread: float = Field(
        2.0, ge=1, description="factor by which the fastest devices are faster and the slowest slower"
    )
    stragglers: float = Field(
        0.0, ge=0, le=1, description="probability that a device is a straggler, for the whole run"
    )
    slowdown: float = Field(10.0, ge=1, description="factor by which stragglers compute slower")
    dropout: float = Field(0.0, ge=0, lt=1, description="probability that a chosen device does not deliver in a round")
    kappa: float = Field(1e-28, ge=0, description="computing C cycles at f Hz takes kappa C f^2 joules")
    flops_per_cycle: float = Field(8.0, gt=0, description="operations in one cycle of a device")


class PrivacySection(Section):
    """Differential privacy of what devices train, with one device as the unit."""

    mode: Literal["none", "central", "device", "channel"] = Field(
        "none",
        description="who adds the noise to the devices' updates: nobody | the server | each device | the emulated radio channel",
    )
    epsilon: float = Field(8.0, gt=0, description="privacy budget of the whole run; a run that has spent it ends early")
    delta: float = Field(
        1e-5, gt=0, lt=1, description="probability that epsilon does not hold; below 1 / the number of devices"
    )
    noise: float = Field(
        0.0,
        ge=0,
        description="standard deviation of the noise over the bound; 0: the smallest that keeps epsilon over all rounds",
    )
    clip: float = Field(1.0, gt=0, description="L2 bound of one device's update, all its tensors as one vector")
    clip_quantile: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the updates that an adaptive bound leaves whole (clip: its first value); 0: the bound stays",
    )
    accountant: Literal["pld", "rdp"] = Field(
        "pld", description="how epsilon is computed: privacy loss distributions, or Renyi divergences, which give more"
    )
    cut_clip: float = Field(
        0.0,
        ge=0,
        le=1000,
        description="longest hidden state of a token that leaves a device, as a multiple of the typical one at its cut (2 costs "
        "next to nothing); the first token of a text has no limit; gradients: a multiple of their median; 0: no limit",
    )
    cut_noise: float = Field(
        0.0,
        ge=0,
        le=10,
        description="length of the noise on each hidden state and gradient that leaves a device, as a part of the limit that "
        "cut_clip sets",
    )
    private_front: bool = Field(
        False, description="whether each device keeps its front's adapter to itself: never sent, never averaged"
    )
    disguise: float = Field(
        0.0,
        ge=0,
        le=1000,
        description="how strongly a front learns to hide its tokens from a linear reader, beside its task; 0: not at all",
    )

    @property
    def defends_cut(self) -> bool:
        """Whether a device does anything to its hidden states or its front that hosts are not to know or read."""
        return bool(self.cut_clip or self.cut_noise or self.private_front or self.disguise)


class RunSection(Section):
    out: str = Field(
        "runs/{name}-{time}",
        min_length=1,
        description="folder of the results; {name}: the name of this file; {time}: the start",
    )
    seed: int = Field(1, ge=0, lt=2**63, description="seed of the first adapter, the order of examples and dropout")
    report_to: Annotated[tuple[Literal["tensorboard", "mlflow", "wandb", "trackio"], ...], _WORDS] = Field(
        (),
        description="trackers that get losses, held-out measures and costs during the run: tensorboard, mlflow, wandb, trackio. Their "
        "packages are needed on the server; wandb sends run file, names of devices and figures to its service",
    )


class RunConfig(Section):
    model: ModelSection = ModelSection()
    split: SplitSection = SplitSection()
    lora: LoraSection = LoraSection()
    task: TaskSection = TaskSection()
    data: DataSection = DataSection()
    radio: RadioSection = RadioSection()
    federation: FederationSection = FederationSection()
    optimizer: OptimizerSection = OptimizerSection()
    strategy: StrategySection = StrategySection()
    wire: WireSection = WireSection()
    wireless: WirelessSection = WirelessSection()
    privacy: PrivacySection = PrivacySection()
    run: RunSection = RunSection()

    @property
    def step_examples(self) -> int:
        """The examples of one device per optimizer step: those of all batches that the step accumulates."""
        return self.federation.batch_size * self.optimizer.gradient_accumulation_steps

    @property
    def step_micro_batches(self) -> int:
        """The micro-batches that one device's examples of an optimizer step are cut into."""
        return self.pieces.micro_batches * self.optimizer.gradient_accumulation_steps

    @property
    def pieces(self) -> Pieces:
        """The pieces of a batch; with the defaults in place of what is "auto" and still to be decided (`plan.pieces`)."""
        split, default = self.split, SplitSection()
        micro_batches, window, checkpointing = (
            getattr(default if getattr(split, key) == AUTO else split, key) for key in Pieces._fields
        )
        return Pieces(min(micro_batches, self.federation.batch_size), window, checkpointing)

    @property
    def has_open_pieces(self) -> bool:
        """Whether any of the pieces is "auto"."""
        return any(getattr(self.split, key) == AUTO for key in Pieces._fields)

    @model_validator(mode="after")
    def consistent(self) -> RunConfig:
        if self.split.micro_batches != AUTO and self.split.micro_batches > self.federation.batch_size:
            raise ValueError(
                f"split.micro_batches = {self.split.micro_batches} must be at most federation.batch_size = "
                f"{self.federation.batch_size}: a micro-batch holds at least one example"
            )
        return self

    @model_validator(mode="after")
    def enough_devices(self) -> RunConfig:
        federation = self.federation
        if 0 < federation.devices_per_round < federation.min_nodes:
            raise ValueError(
                f"federation.devices_per_round = {federation.devices_per_round} must be at least federation.min_nodes = "
                f"{federation.min_nodes}, or 0"
            )
        return self

    @model_validator(mode="after")
    def noise_has_a_limit(self) -> RunConfig:
        if self.privacy.cut_noise and not self.privacy.cut_clip:
            raise ValueError(
                f"privacy.cut_noise = {self.privacy.cut_noise:g} needs privacy.cut_clip above 0 (such as 2.0): the noise is a part "
                f"of the limit that cut_clip sets"
            )
        return self

    @model_validator(mode="after")
    def one_kind_of_capacity(self) -> RunConfig:
        wireless = self.wireless
        if wireless.bandwidth_hz and self.wire.capacity:
            raise ValueError(
                f"wireless.bandwidth_hz = {wireless.bandwidth_hz:g} does not go with wire.capacity = {self.wire.capacity!r}: "
                f"devices share either a band or a rate"
            )
        if wireless.bandwidth_hz and wireless.dropout and self.split.host_on == "any":
            raise ValueError(
                f"wireless.dropout = {wireless.dropout:g} does not go with split.host_on = 'any': a device that drops out "
                f"would also stop the devices that it hosts for"
            )
        return self
