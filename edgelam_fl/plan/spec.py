"""What a run is: its run file, and the index of the model that it trains. Knows nothing about nodes or rounds."""

from __future__ import annotations

from dataclasses import dataclass

from edgelam_fl.config import RunConfig
from edgelam_fl.model.adapter import target_modules
from edgelam_fl.model.base_names import FP32_BYTES, ITEM_BYTES
from edgelam_fl.model.cut import CutAdapter
from edgelam_fl.model.lora import LoraKind, OwnTerms, own_terms
from edgelam_fl.model.source import ModelSource, find_model
from edgelam_fl.model.value_ends import ValueModel
from edgelam_fl.tasks.kinds import values_of
from edgelam_fl.wire.codec_bytes import CODEC_BYTES


@dataclass(frozen=True, slots=True)
class RunSpec:
    """The two values that every decision about a run needs, and that never change while the run goes on."""

    config: RunConfig
    source: ModelSource

    @property
    def unit_rows(self) -> int:
        """The most rows in one micro-batch of a device: ceil(batch_size / micro_batches)."""
        return -(-self.config.federation.batch_size // self.config.pieces.micro_batches)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's hidden states on a link, as far as the run file decides them: by their codec and element type."""
        return CODEC_BYTES[self.config.wire.activation_codec].bytes_of_row(self.source.hidden_size, self._item_bytes)

    @property
    def gradient_share(self) -> float:
        """Size of a gradient on a link by that of the hidden states, or of a cut adapter's values, that it is of."""
        wire, numbers = self.config.wire, self.cut.rank if self.cut else self.source.hidden_size
        gradient, states = (
            CODEC_BYTES[codec].bytes_of_row(numbers, self._item_bytes)
            for codec in (wire.gradient_codec, wire.activation_codec)
        )
        return gradient / states

    @property
    def _item_bytes(self) -> int:
        model = self.config.model
        return ITEM_BYTES["bfloat16"] if "bf16" in (model.base, model.compute) else FP32_BYTES

    @property
    def cut_share(self) -> float:
        """Size of the cut adapter's values by that of the hidden states: rank / hidden; 0 without a cut adapter."""
        return self.cut.rank / self.source.hidden_size if self.cut else 0.0

    @property
    def cut(self) -> CutAdapter | None:
        """The cut adapter of the run's routes; None: gradients go back whole (wire.gradients = "full")."""
        config = self.config
        if config.wire.gradients == "full":
            return None
        rank = config.lora.rank
        return CutAdapter(self.source.num_layers - config.split.back - 1, rank, config.lora.alpha / rank)

    @property
    def values(self) -> ValueModel | None:
        """What stands in the places of embedding and head for a task of values; None for a task of texts."""
        values = values_of(self.config.task.kind)
        return values.ends(self.config.radio) if values is not None else None

    @property
    def value_weights(self) -> int:
        """Counts the numbers of what stands in the places of embedding and head; 0 for a task of texts."""
        values = self.values
        return values.count(self.source.hidden_size) if values is not None else 0

    @property
    def outputs(self) -> int:
        """The numbers that the head gives per position, or per row in classification."""
        values = self.values
        classes = len(self.config.task.classes)
        return values.outputs if values is not None else classes or int(self.source.config["vocab_size"])

    @property
    def kind(self) -> LoraKind:
        """The kind of the run's LoRA. Reads the model's index anew each time: keep it where it is asked for often."""
        lora = self.config.lora
        layers = lora.layers_to_transform
        own: tuple[OwnTerms, ...] = ()
        if lora.rank_pattern or lora.alpha_pattern:
            modules = target_modules(self.source, lora.targets, layers)
            own = own_terms(modules, lora.rank_pattern, lora.alpha_pattern)
        return LoraKind(layers, lora.use_rslora, lora.use_dora, lora.modules_to_save, own)


def model_of(config: RunConfig, *, download: bool = True) -> ModelSource:
    """Finds the model of a run, with the layers that the run uses. `download`, errors: as of `find_model`."""
    return find_model(config.model.name, download=download).first(config.model.layers)


def tensors_per_round(spec: RunSpec, trained: int, held_out: int) -> tuple[float, float]:
    """Returns how many hidden states of an example a device sends and receives in a round; gradients count by their size.

    Each way, a hidden state per example, and its gradient if the example is learned (`trained` of them). An upper bound: a
    gradient that nobody needs does not travel.
    """
    if not spec.config.split.hosts:
        return 0, 0
    if not spec.cut:
        both_ways = (1 + spec.gradient_share) * trained + held_out
        return both_ways, both_ways
    share = spec.cut_share
    return (1 + share * spec.gradient_share) * trained + held_out, (1 + share) * (trained + held_out)
