"""Writes a result's model card: README.md beside the weights, as the Hugging Face hub reads it.

Knows events and the run file, no tensors. Says numbers of devices and examples, never names of nodes or words of their data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgelam_fl.config import RunConfig
from edgelam_fl.model.value_ends import NETWORK, OwnNetwork
from edgelam_fl.serving.trained_on import TrainedOn
from edgelam_fl.tasks.kinds import values_of
from edgelam_fl.telemetry.events import BestTaken, DeviceResult, Event, of_kind
from edgelam_fl.telemetry.human import human_count, human_number
from edgelam_fl.telemetry.measures import human_measure, measure_of
from edgelam_fl.telemetry.summary import (
    Summary,
    build_summary,
    finished_rounds,
    is_training_round,
    measured,
    pooled,
)
from edgelam_fl.telemetry.summary_words import privacy_in_words

_OF_LANGUAGE_MODELS = ("LoRA", "frozen weights kept in", "hidden states sent as")  # of a card's rows on the training
_LIBRARIES = {"peft": "peft", "merged": "transformers", "gguf": "gguf"}
_KINDS = {"peft": "A LoRA adapter for", "merged": "A fine-tuned copy of", "gguf": "A fine-tuned copy, as GGUF, of"}
_LORA_KINDS = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "layers_to_transform", "modules_to_save")
_TAGS = ("lora", "federated-learning", "split-learning")


def model_card(config: RunConfig, base: TrainedOn, events: Sequence[Event], form: str, *, whole: bool = True) -> str:
    """Returns the card of a run's result.

    events: of the run, as far as it has come; form: "peft", "merged" or "gguf"; whole: false for the adapter as the run leaves
    it, which may lack a part that other programs need.
    """
    summary, network = build_summary(events), _network(config)
    if network is not None:
        title, what = "trained with EdgeLAM-FL", f"A network, {_named(base)}, trained by federated learning."
        of_model = [_section("Use", _use_of_network(network))]
    else:
        title, what = (
            "fine-tuned with EdgeLAM-FL",
            f"{_KINDS[form]} {_named(base)}, trained by federated split learning.",
        )
        use = _use(config, base, form) + ("" if whole else _lacking(config))
        of_model = [_section("Use", use), _section("Base model", _of_base(base))]
    parts = [
        f"# {_short(base)}, {title}",
        f"{what} {_who(config, summary)}",
        *of_model,
        _section("Training data", _of_data(summary)),
        _section("Result", _of_result(config, events)),
        _section("Training", _of_training(config, summary)),
        _section("Privacy", _of_privacy(summary)),
    ]
    return f"---\n{_metadata(config, base, form)}\n---\n\n" + "\n\n".join(parts) + "\n"


def _network(config: RunConfig) -> OwnNetwork | None:
    """Returns the network of our own that the run trained; None: it trained a language model."""
    values = values_of(config.task.kind)
    found = values.ends(config.radio) if values is not None else None
    return found if isinstance(found, OwnNetwork) else None


def _use_of_network(network: OwnNetwork) -> str:
    module, _, name = network.path.partition(":")
    lines = (
        f"from safetensors.torch import load_file\nfrom {module} import {name}\n\n"
        f'tensors = load_file("THIS FOLDER/adapter_model.safetensors")\nnetwork = {name}()\n'
        f'network.load_state_dict({{key.partition("{NETWORK}.")[2]: tensor for key, tensor in tensors.items()}})'
    )
    return f"{_code(lines)}\n\nThe tensors are all of its parameters; there is no base model, and the folder has peft's form alone."


def _section(heading: str, text: str) -> str:
    return f"## {heading}\n\n{text}"


def _metadata(config: RunConfig, base: TrainedOn, form: str) -> str:
    from huggingface_hub import ModelCardData

    relation = "adapter" if form == "peft" else "finetune"
    data = ModelCardData(
        base_model=base.name if base.is_public else None,
        base_model_relation=relation if base.is_public else None,
        license=base.licence or None,
        library_name=_LIBRARIES[form] if _network(config) is None else None,
        pipeline_tag=_pipeline(config),
        tags=[*_TAGS, *(["gguf"] if form == "gguf" else [])] if _network(config) is None else ["federated-learning"],
    )
    return data.to_yaml()


def _pipeline(config: RunConfig) -> str | None:
    """Returns the hub's word for what the model does; None: it has none."""
    if values_of(config.task.kind):
        return None
    return "text-classification" if config.task.classes else "text-generation"


def _named(base: TrainedOn) -> str:
    return f"[{base.name}](https://huggingface.co/{base.name})" if base.is_public else f"`{base.name}`"


def _short(base: TrainedOn) -> str:
    return base.name.rsplit("/", 1)[-1]


def _who(config: RunConfig, summary: Summary) -> str:
    count = len(summary.devices)
    begin = (
        "Its device kept its"
        if count == 1
        else f"Its {count} devices kept their"
        if count
        else "Its devices kept their"
    )
    if config.split.hosts == 0:
        return f"{begin} data and computed the whole model."
    return f"{begin} data and computed the first and last layers, while other machines computed the layers between."


# ---------------------------------------------------------------- how it is used, what it stands on


def _use(config: RunConfig, base: TrainedOn, form: str) -> str:
    classes = config.task.classes
    kind = "SequenceClassification" if classes else "CausalLM"
    if form == "gguf":
        return (
            "`model.gguf` is the whole model: `llama-cli -m model.gguf`, or `ollama create NAME -f Modelfile`. `adapter.gguf`, if it is "
            "here, is the change alone: `llama-cli -m BASE.gguf --lora adapter.gguf`."
        )
    if form == "merged":
        return _code(
            f"from transformers import AutoModelFor{kind}, AutoTokenizer\n\n"
            f'model = AutoModelFor{kind}.from_pretrained("THIS FOLDER")\ntokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")'
        )
    place = f'"{base.name}"' if base.is_public else f'"YOUR COPY OF {_short(base)}"'
    labels = f", num_labels={len(classes)}" if classes else ""
    told = f"\n\nThe classes, in the order of the outputs: {', '.join(classes)}." if classes else ""
    lines = (
        f"from peft import PeftModel\nfrom transformers import AutoModelFor{kind}, AutoTokenizer\n\n"
        f"base = AutoModelFor{kind}.from_pretrained({place}{labels})\n"
        'model = PeftModel.from_pretrained(base, "THIS FOLDER")\ntokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")'
    )
    return _code(lines) + told + _modules_told(config)


def _modules_told(config: RunConfig) -> str:
    """Says what belongs to an adapter of values that peft does not load."""
    if values_of(config.task.kind) is None:
        return ""
    return (
        "\n\nIt takes values in the place of tokens. The modules for that, `input_module` and `output_module` in "
        "adapter_model.safetensors with their sizes under `value_ends` in adapter_config.json, are left out by peft: their code is "
        "`edgelam_fl.model.task_modules`."
    )


def _lacking(config: RunConfig) -> str:
    if kept := config.task.private_modules:
        return f"\n\nThe modules {' and '.join(kept)} are as the run began with them: each device keeps its own."
    if config.privacy.private_front:
        return "\n\nThe front's adapter is not here: each device keeps its own, and without one the model does not answer as trained."
    if config.wire.gradients == "lowrank":
        return "\n\nA cut adapter belongs to it (`cut_adapter` in adapter_config.json), which peft leaves out: EdgeLAM-FL alone uses it."
    return ""


def _code(text: str) -> str:
    return f"```python\n{text}\n```"


def _of_base(base: TrainedOn) -> str:
    said = [f"Trained on {base.in_words}.", f"Licence of the base model: {base.licence or 'not named in its files'}."]
    if base.is_rounded_copy:
        said.insert(
            1,
            f"The weights at {base.name} are not rounded, so losses and answers there differ a little from those below.",
        )
    return "\n".join(said)


# ---------------------------------------------------------------- what was learned


def _of_data(summary: Summary) -> str:
    known = [device for device in summary.devices if device.examples is not None]
    if not known:
        return "No device has reported its data."
    learned = sum(device.examples or 0 for device in known)
    held_out = sum(device.held_out or 0 for device in known)
    each = sorted(device.examples or 0 for device in known)
    spread = f", {human_number(each[0])} to {human_number(each[-1])} on each" if len(each) > 1 else ""
    return (
        f"{human_count(len(known), 'device')} with {human_number(learned)} examples to learn{spread}, and {human_number(held_out)} held out to "
        f"measure with. The data stayed on the devices and are not published with this model."
    )


def _of_result(config: RunConfig, events: Sequence[Event]) -> str:
    """Says the held-out measure before and after, pooled over the devices that were measured both times."""
    measure, change = measure_of(config.task.kind), _change(config, events)
    if change is None:
        return "Not measured: no device has measured the adapter both at the start and later."
    spread = ""
    if len(change.devices) > 1:
        low, high = (human_measure(measure, each(change.devices.values())) for each in (min, max))
        spread = f" Of single devices afterwards: {low} to {high}."
    note = f" {change.note}" if change.note else ""
    if config.model.base != "fp32":
        note += (
            f" Measured with frozen weights kept in {config.model.base}; those that were published are not rounded so, and losses "
            f"differ a little there."
        )
    return (
        f"| held-out {measure} | before | after |\n|---|---|---|\n"
        f"| {change.who} | {human_measure(measure, change.before)} | "
        f"{human_measure(measure, change.after)} |\n\n"
        f"Held-out examples were never learned.{spread}{note}"
    )


@dataclass(frozen=True)
class _Change:
    before: float
    after: float
    devices: Mapping[str, float]  # measured both times -> afterwards
    all_devices: int
    note: str  # what has to be known of `after`

    @property
    def who(self) -> str:
        measured = len(self.devices)
        of_all = "" if measured == self.all_devices else f"{measured} of "
        return f"{of_all}{human_count(self.all_devices, 'device')}{', pooled' if measured > 1 else ''}"


def _change(config: RunConfig, events: Sequence[Event]) -> _Change | None:
    measure, rounds = measure_of(config.task.kind), finished_rounds(events)
    best = next(of_kind(events, BestTaken), None)
    until = [done for done in rounds if best is None or done.round <= best.round + 1]  # it measures what it starts from
    if len(until) < 2:
        return None
    first, last = (_measured(done.devices, measure) for done in (until[0], until[-1]))
    both = sorted(first.keys() & last.keys())
    before, after = (pooled(found[name] for name in both).get(measure) for found in (first, last))
    if before is None or after is None:
        return None
    afterwards = {name: measured(last[name], measure) or 0.0 for name in both}
    note = ""
    if best is not None:
        note = f"The adapter is {best.words()}."
    elif is_training_round(rounds[-1]):
        note = "The run did not end, so the adapter is one round newer than this measurement."
    return _Change(before, after, afterwards, len(first.keys() | last.keys()), note)


def _measured(devices: Sequence[DeviceResult], measure: str) -> dict[str, DeviceResult]:
    return {device.name: device for device in devices if measured(device, measure) is not None}


def _of_training(config: RunConfig, summary: Summary) -> str:
    learning, task = config.optimizer, config.task
    passes = (
        f"{config.federation.epochs} passes" if config.federation.epochs else f"{config.federation.local_steps} steps"
    )
    rows = {
        "rounds": f"{summary.rounds} of {config.federation.rounds}, {passes} each, {config.step_examples} examples per step",
        "LoRA": _of_lora(config),
        **({"began with the adapter of": _run_of(config.model.adapter)} if config.model.adapter else {}),
        "optimizer": f"{learning.name}, learning rate {learning.lr:g} ({learning.schedule})",
        "task": f"{task.kind}, at most {task.max_tokens} tokens, loss on {task.loss_on}, template {task.template!r}",
        "combined by": config.strategy.aggregation,
        "frozen weights kept in": config.model.base,
        "hidden states sent as": _codecs(config),
        "seed": str(config.run.seed),
        "versions": ", ".join(f"{name} {number}" for name, number in summary.versions.items()) or "not known",
    }
    if _network(config) is not None:
        rows = {name: text for name, text in rows.items() if name not in _OF_LANGUAGE_MODELS} | {"task": task.kind}
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {_cell(text)} |" for name, text in rows.items())


def _run_of(adapter: str) -> str:
    """Returns the name of an adapter's run, without the path to it."""
    return Path(adapter.removesuffix("/").removesuffix("/adapter")).name


def _codecs(config: RunConfig) -> str:
    states, gradients = config.wire.activation_codec, config.wire.gradient_codec
    return states if states == gradients else f"{states}, their gradients as {gradients}"


def _of_lora(config: RunConfig) -> str:
    """Returns the settings of LoRA, and those of its kinds that are not at their defaults, by their names in the run file."""
    lora = config.lora
    kinds = {key: getattr(lora, key) for key in _LORA_KINDS if getattr(lora, key)}
    told = "".join(f", {key} = {value}" for key, value in kinds.items())
    return f"rank {lora.rank}, alpha {lora.alpha:g}, on {', '.join(lora.targets)}; learned in {', '.join(lora.train)}{told}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "\\n")


def _of_privacy(summary: Summary) -> str:
    if summary.privacy is not None:
        return "\n".join(f"- {sentence}" for sentence in privacy_in_words(summary.privacy))
    return (
        "No differential privacy: nothing is promised about what this model tells of the examples that it was trained on. Who must "
        "not learn of them should not get it."
    )
