"""Every architecture in slices against the whole model of transformers and peft, to the bit: random small models, and real ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    DynamicCache,
    GemmaConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from edgelam_fl.errors import ConfigError, ModelError
from edgelam_fl.model.adapter import Adapter, Span, initial_adapter, initial_cut, target_modules, write_peft_folder
from edgelam_fl.model.cut import CUT_A, CUT_B, CutAdapter
from edgelam_fl.model.families import FAMILIES
from edgelam_fl.model.lora import LoraKind
from edgelam_fl.model.of_base import read_of_base
from edgelam_fl.model.source import ModelSource, find_model
from edgelam_fl.model.stage import LoraSettings, Stage, load_stages
from tests.fleet import plain_base

VOCABULARY, HIDDEN, LAYERS, WINDOW = 96, 32, 6, 8
RANK, ALPHA = 4, 8.0
SIZES: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, initializer_range=0.2, bos_token_id=None,
    eos_token_id=None, pad_token_id=None,
)  # fmt: skip
BERT_SIZES = {key: value for key, value in SIZES.items() if key not in ("num_key_value_heads", "head_dim")}
GPT2_SIZES = dict(
    vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=LAYERS, n_head=4, n_positions=64, initializer_range=0.2,
    bos_token_id=None, eos_token_id=None,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    make: Callable[[], Any]  # the config
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    classes: int = 0
    written: dict[str, Any] = field(default_factory=dict)  # what config.json must say, lest the case be another


CASES = {
    "llama": Case(lambda: LlamaConfig(**SIZES, tie_word_embeddings=True), written={"tie_word_embeddings": True}),
    "llama-untied": Case(lambda: LlamaConfig(**SIZES, tie_word_embeddings=False)),
    "mistral": Case(lambda: MistralConfig(**SIZES, sliding_window=WINDOW), written={"sliding_window": WINDOW}),
    "qwen2": Case(lambda: Qwen2Config(**SIZES, tie_word_embeddings=True), ("q_proj", "gate_proj")),
    "qwen3": Case(
        lambda: Qwen3Config(
            **SIZES, use_sliding_window=True, sliding_window=WINDOW,
            layer_types=["full_attention", "sliding_attention"] * (LAYERS // 2),
        ),
        written={"layer_types": ["full_attention", "sliding_attention"] * (LAYERS // 2), "sliding_window": WINDOW},
    ),
    "gemma": Case(lambda: GemmaConfig(**SIZES)),
    "gpt2": Case(lambda: GPT2Config(**GPT2_SIZES), ("c_attn", "c_fc")),
    "bert": Case(lambda: BertConfig(**{**BERT_SIZES, "pad_token_id": 0}), ("query", "value"), classes=3),
}  # fmt: skip
CUTS = {
    "inside": [Span(0, 2, embed=True), Span(2, 3), Span(3, LAYERS, head=True)],
    "no layer in front": [Span(0, 0, embed=True), Span(0, 4), Span(4, LAYERS, head=True)],
    "no layer at the back": [Span(0, 1, embed=True), Span(1, LAYERS), Span(LAYERS, LAYERS, head=True)],
}
LENGTHS = [14, 9, 1]  # the window is shorter than the first two


@dataclass(frozen=True)
class Built:
    name: str
    case: Case
    source: ModelSource
    adapter: Adapter

    def stages(self, cut: str = "inside", base: str = "fp32") -> list[Stage]:
        lora = LoraSettings(RANK, ALPHA, self.case.targets)
        stages = load_stages(self.source, CUTS[cut], base, lora, classes=self.case.classes)
        for stage in stages:
            stage.load_adapter(self.adapter)
        return stages

    def whole(self, dtype: torch.dtype = torch.float32) -> Any:
        """transformers and peft alone."""
        auto: Any = AutoModelForCausalLM
        if self.case.classes:
            auto = AutoModelForSequenceClassification
        options = {"num_labels": self.case.classes} if self.case.classes else {}
        settings = LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=list(self.case.targets), fan_in_fan_out=self.name == "gpt2",
            task_type="SEQ_CLS" if self.case.classes else "CAUSAL_LM",
        )  # fmt: skip
        model = get_peft_model(auto.from_pretrained(self.source.folder, dtype=dtype, **options), settings)
        set_peft_model_state_dict(model, {name: torch.from_numpy(array) for name, array in self.adapter.items()})
        if self.case.classes:  # fp32 here whatever the base; peft alone would train it in bf16
            head = model.get_base_model().classifier.modules_to_save["default"].float()
            head.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(),))
            set_peft_model_state_dict(model, {name: torch.from_numpy(array) for name, array in self.adapter.items()})
        return model.eval()


@pytest.fixture(scope="module", params=[*CASES, pytest.param("minilm-l6", marks=pytest.mark.real_model)])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    if request.param == "minilm-l6":  # real weights, and as many layers
        return with_adapter("bert", CASES["bert"], find_model(request.param))
    case = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    config = case.make()
    torch.manual_seed(0)
    save(BertModel(config) if case.classes else AutoModelForCausalLM.from_config(config), folder)
    source = find_model(str(folder))
    assert {key: source.config[key] for key in case.written} == case.written
    return with_adapter(request.param, case, source)


def with_adapter(name: str, case: Case, source: ModelSource) -> Built:
    adapter = initial_adapter(source, case.targets, RANK, 1, classes=case.classes)
    drawn = np.random.default_rng(0)
    for tensor, array in adapter.items():
        if not array.any():  # B and the bias start at zero, where they hide faults
            adapter[tensor] = drawn.normal(0, 0.3, array.shape).astype(np.float32)
    return Built(name, case, source, adapter)


def save(model: PreTrainedModel, folder: Path) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases start at one and zero
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)


def token_ids(rows: int = len(LENGTHS)) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (rows, LENGTHS[0]), generator=torch.Generator().manual_seed(1))


def padding(left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The mask, and the positions as transformers' generation counts them."""
    slots, lengths = torch.arange(LENGTHS[0]), torch.tensor(LENGTHS)[:, None]
    mask = (slots >= LENGTHS[0] - lengths if left else slots < lengths).long()
    return mask, (mask.cumsum(1) - 1).clamp(min=0) if left else slots.expand(len(LENGTHS), -1)


def through(stages: list[Stage], inputs: torch.Tensor, lengths: list[int], **options: Any) -> torch.Tensor:
    for stage in stages:
        inputs = stage(inputs, lengths, **options)
    return inputs


@pytest.mark.parametrize("base", ["fp32", "bf16"])
@pytest.mark.parametrize("left", [False, True])
@torch.no_grad()
def test_logits(built: Built, left: bool, base: str) -> None:
    whole = built.whole(torch.float32 if base == "fp32" else torch.bfloat16)
    mask, positions = padding(left)
    expected = whole(input_ids=token_ids(), attention_mask=mask, position_ids=positions).logits
    for cut in CUTS:
        got = through(built.stages(cut, base), token_ids(), LENGTHS, pad_left=left)
        assert torch.equal(got, expected.to(got.dtype)), cut
    assert expected.std() > 0.1, "the model says the same of everything"


@torch.no_grad()
def test_logits_of_chosen_positions(built: Built) -> None:
    """They are the model's for these positions, and the same bits whoever chose them, if the back has no layer."""
    if built.case.classes:
        pytest.skip("a classifier has one output per row")
    rows = torch.tensor([0, 5, 13, 14 + 8, 2 * 14])
    mask, positions = padding(left=False)
    expected = built.whole()(input_ids=token_ids(), attention_mask=mask, position_ids=positions).logits
    *before, back = built.stages("no layer at the back")
    hidden = through(before, token_ids(), LENGTHS)
    got = back.logits(back(hidden, LENGTHS, rows=rows))
    torch.testing.assert_close(got, expected.flatten(0, 1)[rows])
    chosen_before = hidden.flatten(0, 1)[rows][None]
    assert torch.equal(got, back.logits(back(chosen_before, [len(rows)], rows=torch.arange(len(rows)))))


@torch.no_grad()
def test_texts_that_share_a_row_do_not_see_each_other(built: Built) -> None:
    if built.case.classes:
        pytest.skip("a classifier has one class per row")
    check_packing(built.stages(), built.whole())


def check_packing(stages: list[Stage], whole: Any) -> None:
    """Two texts in one row have the bits that transformers gives them, the logits that they have alone, and none of each other."""
    ids, lengths, (first, second) = token_ids()[:2], [LENGTHS[0] - 1, 9], (8, 5)
    segments, other = [[first, second], [9]], ids.clone()
    other[0, first:] = (other[0, first:] + 1) % VOCABULARY
    row = [*range(first), *range(second), 0]
    positions = torch.tensor([row, [*range(9), *[0] * (LENGTHS[0] - 9)]])
    got = through(stages, ids, lengths, segments=segments)
    assert torch.equal(got, whole(input_ids=ids, position_ids=positions, use_cache=False).logits)
    beside = through(stages, other, lengths, segments=segments)
    # Not to the bit: experts compute the tokens that they get together, and round unlike beside others.
    torch.testing.assert_close(got[0, :first], beside[0, :first], rtol=1e-5, atol=1e-5)
    for begin, length in ((0, first), (first, second)):
        alone = through(stages, ids[:1, begin : begin + length], [length])
        torch.testing.assert_close(got[:1, begin : begin + length], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cut", ["inside", "no layer at the back"])
@torch.no_grad()
def test_logits_with_a_cut_adapter(built: Built, cut: str) -> None:
    """The last host gives rank values per token beside its hidden states, from which the device's back goes on."""
    spans, drawn = CUTS[cut], np.random.default_rng(2)
    place = CutAdapter(spans[1].last - 1, RANK, 2.0)
    parts = {name: drawn.normal(0, 0.3, a.shape).astype("f") for name, a in initial_cut(built.source, place, 1).items()}
    lora = LoraSettings(RANK, ALPHA, built.case.targets, cut=place)
    stages = load_stages(built.source, spans, "fp32", lora, classes=built.case.classes)
    for stage in stages:
        stage.load_adapter(built.adapter | parts)
    width = through(stages[:2], token_ids(), LENGTHS).shape[-1]
    assert width == built.source.hidden_size + RANK

    whole, family = built.whole(), built.source.family
    layer = whole.get_base_model().get_submodule(f"{family.body}.{family.layers}.{place.layer}")
    (a,), (b,) = ([torch.from_numpy(parts[name]) for name in parts if name.endswith(end)] for end in (CUT_A, CUT_B))
    mask, positions = padding(False)
    asked = {"input_ids": token_ids(), "attention_mask": mask, "position_ids": positions}
    without = whole(**asked).logits
    layer.register_forward_hook(lambda _layer, _inputs, hidden: hidden + 2.0 * (hidden @ a.T) @ b.T)
    expected = whole(**asked).logits
    torch.testing.assert_close(through(stages, token_ids(), LENGTHS), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(without, expected, atol=0.01)


@torch.no_grad()
def test_generation_with_caches(built: Built) -> None:
    """Rows of unequal lengths; windows overflow in the prompt of one row and in the answer of another."""
    if built.case.classes:
        with pytest.raises(ModelError, match="is a classifier"):
            built.stages()[0].new_cache()
        return
    steps, whole = 10, built.whole()
    expected = whole_generation(whole, steps)
    for cut in CUTS:
        check_generation(built.stages(cut), expected, cut)
    answers = torch.stack([logits[:, -1].argmax(-1) for logits in expected], dim=1)
    assert len(set(answers.flatten().tolist())) > 2, "answers that say one thing show little"
    made = whole.generate(
        input_ids=token_ids(),
        attention_mask=padding(left=True)[0],
        max_new_tokens=steps,
        do_sample=False,
        pad_token_id=0,
    )
    assert torch.equal(made[:, LENGTHS[0] :], answers)


def check_generation(stages: list[Stage], expected: list[torch.Tensor], cut: str) -> None:
    """Fails unless the stages, each with a cache of its own, give the logits of each greedy step to the bit."""
    caches = [stage.new_cache() for stage in stages]
    ids, lengths = token_ids(), LENGTHS
    for step, logits in enumerate(expected):
        hidden = ids
        for stage, cache in zip(stages, caches, strict=True):
            hidden = stage(hidden, lengths, cache=cache, pad_left=step == 0)
        assert torch.equal(hidden, logits), f"{cut}, token {step}"
        ids, lengths = hidden[:, -1:].argmax(-1), [1] * len(LENGTHS)


def whole_generation(whole: Any, steps: int) -> list[torch.Tensor]:
    """The logits of each greedy step, with transformers' own cache. (`generate` projects the last token alone: other bits.)"""
    cache = DynamicCache(config=whole.config)
    ids, (mask, positions) = token_ids(), padding(left=True)
    results = []
    for _ in range(steps):
        logits = whole(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).logits
        results.append(logits)
        ids, positions = logits[:, -1:].argmax(-1), positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
    return results


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(built: Built, checkpointing: bool) -> None:
    whole, stages = built.whole(), built.stages()
    mask, positions = padding(left=False)
    logits = whole(input_ids=token_ids(), attention_mask=mask, position_ids=positions).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    logits.backward(weights)
    expected = {
        name.replace(".default.", ".").replace(".modules_to_save.", "."): p.grad
        for name, p in whole.named_parameters()
        if p.grad is not None
    }

    inputs, outputs = [token_ids()], []
    for stage in stages:
        stage.set_checkpointing(checkpointing)
        outputs.append(stage(inputs[-1], LENGTHS))
        inputs.append(outputs[-1].detach().requires_grad_())
    grad = weights
    for output, outside in zip(reversed(outputs), reversed(inputs[:-1]), strict=True):
        output.backward(grad)
        grad = outside.grad
    names = [name for stage in stages for name in stage.adapter_parameters]
    assert len(names) == len(set(names)), "two stages hold one tensor"
    assert set(names) == set(get_peft_model_state_dict(whole)) == set(built.adapter) == set(expected)
    for stage in stages:
        for name, parameter in stage.adapter_parameters.items():
            assert torch.equal(parameter.grad, expected[name]), name
            assert parameter.grad.any(), name


@torch.no_grad()
def test_the_exported_folder_is_the_model_elsewhere(built: Built, tmp_path: Path) -> None:
    """Of ranks that differ, too: the front's stage has another one than the rest."""
    case, ranks = built.case, (2, RANK, RANK)
    adapter: Adapter = {}
    hidden = token_ids()
    for span, rank in zip(CUTS["inside"], ranks, strict=True):
        (stage,) = load_stages(
            built.source, [span], "fp32", LoraSettings(rank, ALPHA, case.targets), classes=case.classes
        )
        cut = {
            name: array[:rank] if "lora_A" in name else array[:, :rank] if "lora_B" in name else array
            for name, array in built.adapter.items()
        }
        stage.load_adapter(cut)
        adapter |= stage.adapter()
        hidden = stage(hidden, LENGTHS)
    classes = [f"class {number}" for number in range(case.classes)]
    write_peft_folder(
        adapter,
        tmp_path,
        reference=str(built.source.folder),
        rank=RANK,
        alpha=ALPHA,
        targets=case.targets,
        classes=classes,
    )
    auto: Any = AutoModelForSequenceClassification if classes else AutoModelForCausalLM
    options = {"num_labels": case.classes} if classes else {}
    model = PeftModel.from_pretrained(auto.from_pretrained(built.source.folder, **options), tmp_path).eval()
    assert model.peft_config["default"].task_type == ("SEQ_CLS" if classes else "CAUSAL_LM")
    assert torch.equal(model(input_ids=token_ids(), attention_mask=padding(left=False)[0]).logits, hidden)
    assert set(get_peft_model_state_dict(model)) == set(adapter)


NORMS = {"gpt2": ("ln_1", "ln_f"), "bert": ("output.LayerNorm",), "minilm-l6": ("output.LayerNorm",)}


@torch.no_grad()
def test_rslora_dora_and_norms_in_slices(built: Built) -> None:
    """Against peft alone, and the first magnitudes and norms as peft makes them."""
    case, words = built.case, NORMS.get(built.name, ("norm",))
    kind = LoraKind(rslora=True, dora=True, saved=words)
    lora = LoraSettings(RANK, ALPHA, case.targets, kind=kind)
    auto: Any = AutoModelForSequenceClassification if case.classes else AutoModelForCausalLM
    options = {"num_labels": case.classes} if case.classes else {}
    settings = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=sorted(target_modules(built.source, case.targets)), use_rslora=True,
        use_dora=True, fan_in_fan_out=built.name == "gpt2", modules_to_save=[*words, *(["classifier"] if case.classes else [])],
        task_type="SEQ_CLS" if case.classes else "CAUSAL_LM",
    )  # fmt: skip
    whole = get_peft_model(auto.from_pretrained(built.source.folder, **options), settings).eval()
    fresh = {name: tensor.numpy() for name, tensor in get_peft_model_state_dict(whole).items()}
    of_base = read_of_base(built.source, lora, "fp32", classes=case.classes)
    assert of_base
    assert all(np.array_equal(fresh[name], array) for name, array in of_base.items())
    drawn = np.random.default_rng(0)
    adapter = {name: a + drawn.normal(0, 0.1, a.shape).astype(np.float32) for name, a in fresh.items()}
    set_peft_model_state_dict(whole, {name: torch.from_numpy(array) for name, array in adapter.items()})
    mask, positions = padding(left=False)
    expected = whole(input_ids=token_ids(), attention_mask=mask, position_ids=positions).logits
    stages = load_stages(built.source, CUTS["inside"], "fp32", lora, classes=case.classes)
    for stage in stages:
        stage.load_adapter(adapter)
    assert {name for stage in stages for name in stage.adapter_parameters} == adapter.keys()
    assert torch.equal(through(stages, token_ids(), LENGTHS), expected)


def test_a_target_of_another_family(built: Built) -> None:
    known = {
        "gpt2": "did you mean 'c_proj'? Known: c_attn, c_fc, c_proj",
        "bert": "known: dense, key, query, value",
    }.get(built.name)
    if known is None:
        assert len(initial_adapter(built.source, ("q_proj", "v_proj"), RANK, 1)) == LAYERS * 2 * 2
        return
    with pytest.raises(ConfigError) as caught:
        initial_adapter(built.source, ("q_proj", "v_proj"), RANK, 1)
    assert str(caught.value) == f"lora.targets: no module of {built.source.name} is called 'q_proj'; {known}"


# ---------------------------------------------------------------- what is refused, and other names in the files


def test_an_unknown_architecture_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    from transformers import OPTConfig, OPTForCausalLM

    sizes = dict(vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, ffn_dim=8)
    OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=8, max_position_embeddings=8)).save_pretrained(tmp_path)
    with pytest.raises(ModelError) as caught:
        find_model(str(tmp_path))
    assert str(caught.value) == (
        f"model.name: {tmp_path} is of the architecture 'opt', which cannot be cut; known: {', '.join(FAMILIES)}"
    )


def test_the_task_must_be_the_familys(built: Built) -> None:
    classes = 0 if built.case.classes else 3
    with pytest.raises(ModelError, match=r"^task\.kind: "):
        load_stages(built.source, CUTS["inside"], "fp32", None, classes=classes)
    if classes:
        with pytest.raises(ConfigError, match=r"^task\.kind: "):
            initial_adapter(built.source, built.case.targets, RANK, 1, classes=classes)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_files_of_a_model_without_head_lack_a_prefix(family: str, tmp_path: Path) -> None:
    """As GPT-2's own on the hub. Such a file can only be of a tied model."""
    torch.manual_seed(0)
    if family == "llama":
        save(LlamaModel(LlamaConfig(**SIZES, tie_word_embeddings=True)), tmp_path)
    else:
        save(GPT2LMHeadModel(GPT2Config(**GPT2_SIZES)).transformer, tmp_path)
    source = find_model(str(tmp_path))
    for base, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):  # mapped as they lie, and converted
        got = through(load_stages(source, CUTS["inside"], base, None), token_ids(), [LENGTHS[0]] * len(LENGTHS))
        whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert torch.equal(got, whole(input_ids=token_ids()).logits)


@pytest.mark.parametrize(("base", "compute"), [("int8", ""), ("int8", "bfloat16"), ("nf4", ""), ("nf4", "bfloat16")])
def test_slices_of_a_quantized_base_are_the_wholes(built: Built, base: str, compute: str) -> None:
    """Each matrix is quantized alone: logits and gradients of three stages are those of one."""
    lora = LoraSettings(RANK, ALPHA, built.case.targets)
    results = []
    for spans in ([Span(0, LAYERS, embed=True, head=True)], CUTS["inside"]):
        stages = load_stages(built.source, spans, base, lora, compute, classes=built.case.classes)
        assert {stage.dtype for stage in stages} == {torch.bfloat16 if compute else torch.float32}
        for stage in stages:
            stage.load_adapter(built.adapter)
        logits = through(stages, token_ids(), LENGTHS)
        logits.float().square().sum().backward()
        results.append({name: p.grad for stage in stages for name, p in stage.adapter_parameters.items()})
        results[-1]["logits"] = logits.detach()
    whole, slices = results
    assert whole.keys() == slices.keys()
    assert all(torch.equal(tensor, slices[name]) for name, tensor in whole.items())
    mask, positions = padding(left=False)
    plain = built.whole()(input_ids=token_ids(), attention_mask=mask, position_ids=positions).logits
    error = (whole["logits"] - plain).norm() / plain.norm()
    assert 0 < error < {"int8": 0.15, "nf4": 1.0}[base]


def test_the_task_head_is_freed_apart_from_the_layers(built: Built) -> None:
    stage = built.stages()[-1]
    head = [p for name, p in stage.adapter_parameters.items() if ".lora_" not in name]
    assert len(head) == (2 if built.case.classes else 0)
    assert [id(p) for p in stage.set_trainable(lambda layer: layer is None)] == [id(p) for p in head]
    layers = stage.set_trainable(lambda layer: layer is not None)
    assert {id(p) for p in [*layers, *head]} == {id(p) for p in stage.adapter_parameters.values()}
    assert not any(p.requires_grad for p in head)


@pytest.mark.real_model
@pytest.mark.parametrize("cuts", [(2, 28), (7, 15)])
@torch.no_grad()
def test_smollm2(smollm: ModelSource, smollm_whole: Any, cuts: tuple[int, int]) -> None:
    """Logits of unequal rows, and a greedy answer with caches."""
    spans = [Span(0, cuts[0], embed=True), Span(*cuts), Span(cuts[1], smollm.num_layers, head=True)]
    stages = load_stages(smollm, spans, "fp32", None)
    mask, _ = padding(left=False)
    expected = smollm_whole(input_ids=token_ids(), attention_mask=mask).logits
    assert torch.equal(through(stages, token_ids(), LENGTHS), expected)

    tokenizer = AutoTokenizer.from_pretrained(smollm.folder)
    prompt = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    made = smollm_whole.generate(input_ids=prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
    caches = [stage.new_cache() for stage in stages]
    ids, answer = prompt, list[int]()
    while len(answer) < made.shape[1] - prompt.shape[1]:
        hidden = ids
        for stage, cache in zip(stages, caches, strict=True):
            hidden = stage(hidden, [ids.shape[1]], cache=cache)
        ids = hidden[:, -1:].argmax(-1)
        answer.append(int(ids))
    assert answer == made[0, prompt.shape[1] :].tolist()
    assert "Paris" in tokenizer.decode(answer)


@pytest.fixture(scope="module")
def smollm_whole(smollm: ModelSource) -> Any:
    return plain_base(smollm.folder, smollm.gguf, "fp32")
