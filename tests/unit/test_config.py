from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelam_fl.config import RunConfig, known_keys, parse_run_file, read_run_file, to_toml
from edgelam_fl.config.toml import ELSEWHERE, nearest_key
from edgelam_fl.errors import ConfigError


def message(text: str = "", *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_run_file(text, source="my.toml", overrides=list(overrides))
    return str(caught.value)


def test_an_empty_file_is_the_defaults() -> None:
    assert parse_run_file("", source="x") == RunConfig()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[federation]\nround = 3", "unknown key federation.round in my.toml: did you mean 'federation.rounds'?"),
        ("[federatoin]\nrounds = 3", "unknown key federatoin in my.toml: did you mean 'federation'?"),
        ("[split]\nmicrobatches = 1", "unknown key split.microbatches in my.toml: did you mean 'split.micro_batches'?"),
        ('[data.fields]\npromt = "q"', "unknown key data.fields.promt in my.toml: did you mean 'data.fields.prompt'?"),
    ],
)
def test_an_unknown_key_names_the_nearest(text: str, expected: str) -> None:
    assert message(text) == expected


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("optimizer.learning_rate", "did you mean 'optimizer.lr'?"),
        ("lora.r", "did you mean 'lora.rank'?"),
        ("num_rounds", "did you mean 'federation.rounds'?"),
        ("federation.lr", "did you mean 'optimizer.lr'?"),
        ("rounds", "did you mean 'federation.rounds'?"),
        ("split.rounds", "did you mean 'federation.rounds'?"),
        ("optimiser.lr", "did you mean 'optimizer.lr'?"),
        ("run.zebra", "[run] has out, "),
        ("wireless.kapa", "did you mean 'wireless.kappa'?"),
    ],
)
def test_a_key_that_is_called_otherwise_elsewhere_or_stands_elsewhere_is_found(key: str, expected: str) -> None:
    assert nearest_key(key).startswith(expected)


def test_what_others_call_a_key_is_a_key_and_is_none_itself() -> None:
    known = known_keys()
    assert set(ELSEWHERE.values()) <= set(known)
    assert not {key for key in known if key.rpartition(".")[2] in ELSEWHERE}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[lora]\nrank = 0", "lora.rank = 0 must be greater than or equal to 1 (in my.toml)"),
        ("[lora]\nrank = 8.5", "lora.rank = 8.5 must be a valid integer (in my.toml)"),
        ('[lora]\nrank = "8"', "lora.rank = '8' must be a valid integer (in my.toml)"),
        ("[lora]\ntargets = []", "lora.targets = () must have at least 1 item"),
        ('[lora]\ntrain = ["middle"]', "lora.train = 'middle' must be 'front', 'hosts' or 'back' (in my.toml)"),
        ("[data]\nheld_out = 1.0", "data.held_out = 1.0 must be less than 1 (in my.toml)"),
        ('[model]\nbase = "fp16"', "model.base = 'fp16' must be 'fp32', 'bf16', 'int8', 'nf4' or 'auto' (in my.toml)"),
        ('[task]\ntemplate = "{answer} {prompt}"', "task.template = '{answer} {prompt}' must be 'chat', 'plain', or a"),
        ("[split]\nfront = true", "split.front = True must be a valid integer (in my.toml)"),
        ("[split]\nhosts = 65", "split.hosts = 65 must be 0 to 64, or 'auto' (in my.toml)"),
        ("model = 3", "model = 3 must be a valid dictionary"),
        ("[privacy]\ncut_noise = 0.1", "privacy.cut_noise = 0.1 needs privacy.cut_clip above 0 (such as 2.0)"),
        ("[privacy]\ndisguise = -1.0", "privacy.disguise = -1.0 must be greater than or equal to 0"),
    ],
)  # fmt: skip
def test_a_bad_value_names_key_value_rule_and_place(text: str, expected: str) -> None:
    got = message(text)
    assert got.startswith(expected)
    assert got.endswith("(in my.toml)")


def test_every_problem_is_named_a_line_each() -> None:
    lines = message("[lora]\nrank = 0\n[optimizer]\nlr = -1.0\nlearning = 2").splitlines()
    assert sorted(line.split()[0] for line in lines) == ["lora.rank", "optimizer.lr", "unknown"]


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("micro_batches", "0", "must be 1 to 256, or 'auto'"),
        ("window", "300", "must be 1 to 256, or 'auto'"),
        ("window", "2.0", "must be 1 to 256, or 'auto'"),
        ("checkpointing", "1", "must be true, false or 'auto'"),
    ],
)
def test_pieces_are_a_number_or_auto(key: str, value: str, rule: str) -> None:
    assert message(f"[split]\n{key} = {value}") == f"split.{key} = {value} {rule} (in my.toml)"
    assert parse_run_file(f"[split]\n{key} = 'auto'", source="x").has_open_pieces


def test_more_pieces_than_examples_are_refused() -> None:
    assert message("[split]\nmicro_batches = 9\n[federation]\nbatch_size = 8") == (
        "split.micro_batches = 9 must be at most federation.batch_size = 8: a micro-batch holds at least one example (in my.toml)"
    )
    assert parse_run_file("[split]\nmicro_batches = 8", source="x").split.micro_batches == 8


@pytest.mark.parametrize(
    ("override", "section", "key", "expected"),
    [
        ("model.name=some/model", "model", "name", "some/model"),
        ('model.name="quoted one"', "model", "name", "quoted one"),
        ("lora.rank=4", "lora", "rank", 4),
        ("optimizer.lr=1e-4", "optimizer", "lr", 1e-4),
        ("lora.alpha=32", "lora", "alpha", 32.0),
        ('lora.targets=["k_proj", "v_proj"]', "lora", "targets", ("k_proj", "v_proj")),
        ("lora.targets=all-linear", "lora", "targets", ("all-linear",)),
        ("task.template=Q: {prompt} A: {answer}", "task", "template", "Q: {prompt} A: {answer}"),
        ("run.out=", "run", "out", None),
    ],
)
def test_overrides(override: str, section: str, key: str, expected: object) -> None:
    if expected is None:
        assert message("", override).startswith(f"{section}.{key} = ''")
        return
    config = parse_run_file("", source="x", overrides=[override])
    assert getattr(getattr(config, section), key) == expected


def test_overrides_beat_the_file_and_reach_nested_keys() -> None:
    text = '[federation]\nrounds = 9\n[data.fields]\nanswer = "a"'
    config = parse_run_file(text, source="x", overrides="federation.rounds=2 data.fields.prompt='my question'")
    assert config.federation.rounds == 2
    assert (config.data.fields.prompt, config.data.fields.answer) == ("my question", "a")


@pytest.mark.parametrize("override", ["federation.rounds", "rounds=2", "=2", ""])
def test_an_override_of_another_form_is_refused(override: str) -> None:
    assert message("", override).startswith(f"--set {override!r} must look like section.key=value")


def test_an_override_through_a_value_is_refused() -> None:
    assert message("", "lora.rank=4", "lora.rank.x=1") == "--set 'lora.rank.x=1': rank is a value, not a section"


def test_an_unknown_override_names_the_nearest() -> None:
    assert message("", "lora.rnak=4") == "unknown key lora.rnak in my.toml: did you mean 'lora.rank'?"


def test_overrides_with_an_open_quote_are_refused() -> None:
    with pytest.raises(ConfigError, match="quot"):
        parse_run_file("", source="x", overrides="model.name='open")


texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(name=texts, prompt=texts, lr=st.floats(1e-12, 10), targets=st.lists(texts, min_size=1, max_size=3))
def test_round_trip(name: str, prompt: str, lr: float, targets: list[str]) -> None:
    config = RunConfig.model_validate(
        {
            "model": {"name": name},
            "data": {"fields": {"prompt": prompt}},
            "optimizer": {"lr": lr},
            "lora": {"targets": targets},
        }
    )
    assert parse_run_file(to_toml(config), source="round trip") == config


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\nb", "a\x7fb", "a\u2028b", "päth"])
def test_odd_characters_survive_the_round_trip(name: str) -> None:
    config = RunConfig.model_validate({"model": {"name": name}})
    assert parse_run_file(to_toml(config), source="round trip") == config


@pytest.mark.parametrize("key", ["step_deadline_s", "round_deadline_s", "join_deadline_s"])
def test_an_endless_deadline_is_refused_or_survives_the_round_trip(key: str) -> None:
    try:
        config = parse_run_file(f"[federation]\n{key} = inf", source="x")
    except ConfigError:
        return
    assert parse_run_file(to_toml(config), source="round trip") == config


def test_a_file_that_is_not_toml() -> None:
    assert message("rounds: 3").startswith("my.toml is not TOML: ")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no run file at .*none\.toml; `edgelam init .*none\.toml` writes one"):
        read_run_file(tmp_path / "none.toml")


@pytest.mark.parametrize("kind", ["folder", "bytes"])
def test_a_file_that_cannot_be_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "run.toml"
    if kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"\xff\xfe")
    rule = (
        "cannot be read: Is a directory" if kind == "folder" else r"is not UTF-8 \(byte 0 is 0xff\); save it as UTF-8"
    )
    with pytest.raises(ConfigError, match=rf"the run file .*run\.toml {rule}"):
        read_run_file(path)


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path, ends: str) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(f"\ufeff[federation]{ends}rounds = 2{ends}".encode())
    assert read_run_file(path).federation.rounds == 2
    assert parse_run_file("\ufeff[lora]\nrank = 2", source="a submission").lora.rank == 2


def test_a_file_is_read_with_its_overrides(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[lora]\nrank = 2\n", encoding="utf-8")
    config = read_run_file(path, ["lora.alpha=4.0"])
    assert (config.lora.rank, config.lora.alpha) == (2, 4.0)


def test_known_keys_hold_sections_and_nested_ones() -> None:
    assert {"model", "model.name", "data.fields", "data.fields.answer", "run.seed"} <= set(known_keys())


# ---------------------------------------------------------------- strategies


def test_options_of_strategies_survive_the_round_trip() -> None:
    text = """
        [strategy]
        selection = "lyapunov"
        options.lyapunov = { delay_s = 30, v = 10.0 }
        options.Mine = { word = 'a "b"', on = true }
        require_tags = ["gpu", "fast"]
    """
    config = parse_run_file(
        text, source="x", overrides=["strategy.options.lyapunov.v=5", "strategy.options.oort.alpha=1.5"]
    )
    assert config.strategy.options == {
        "lyapunov": {"delay_s": 30, "v": 5}, "Mine": {"word": 'a "b"', "on": True}, "oort": {"alpha": 1.5},
    }  # fmt: skip
    assert config.strategy.require_tags == ("gpu", "fast")
    assert parse_run_file(to_toml(config), source="round trip") == config


@pytest.mark.parametrize("value", ["inf", "[1]", "1979-05-27", "{ a = 1 }"])
def test_options_are_texts_numbers_and_booleans(value: str) -> None:
    got = message(f"[strategy]\noptions.oort = {{ alpha = {value} }}")
    assert "must hold texts, numbers and booleans; oort.alpha = " in got
    assert got.startswith("strategy.options = ")


def test_fewer_devices_a_round_than_it_needs_are_refused() -> None:
    assert message("[federation]\nmin_nodes = 3\ndevices_per_round = 2") == (
        "federation.devices_per_round = 2 must be at least federation.min_nodes = 3, or 0 (in my.toml)"
    )
    assert parse_run_file("[federation]\nmin_nodes = 3\ndevices_per_round = 0", source="x").federation.min_nodes == 3


# ---------------------------------------------------------------- wireless


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("epsilon = 0.0", "privacy.epsilon = 0.0 must be greater than 0 (in my.toml)"),
        ("epsilon = -1.0", "privacy.epsilon = -1.0 must be greater than 0 (in my.toml)"),
        ("delta = 0.0", "privacy.delta = 0.0 must be greater than 0 (in my.toml)"),
        ("delta = 1.0", "privacy.delta = 1.0 must be less than 1 (in my.toml)"),
        ("clip = 0.0", "privacy.clip = 0.0 must be greater than 0 (in my.toml)"),
        ("noise = -0.1", "privacy.noise = -0.1 must be greater than or equal to 0 (in my.toml)"),
        ("clip_quantile = 1.0", "privacy.clip_quantile = 1.0 must be less than 1 (in my.toml)"),
        ("mode = 'local'", "privacy.mode = 'local' must be 'none', 'central', 'device' or 'channel' (in my.toml)"),
    ],
)
def test_a_promise_that_cannot_be(text: str, expected: str) -> None:
    assert message(f"[privacy]\n{text}") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bandwidth_hz = -1.0", "wireless.bandwidth_hz = -1.0 must be greater than or equal to 0 (in my.toml)"),
        ("dropout = 1.0", "wireless.dropout = 1.0 must be less than 1 (in my.toml)"),
        ("stragglers = 1.5", "wireless.stragglers = 1.5 must be less than or equal to 1 (in my.toml)"),
        ("slowdown = 0.5", "wireless.slowdown = 0.5 must be greater than or equal to 1 (in my.toml)"),
        ("bandwith_hz = 1e6", "unknown key wireless.bandwith_hz in my.toml: did you mean 'wireless.bandwidth_hz'?"),
    ],
)
def test_a_cell_that_cannot_be(text: str, expected: str) -> None:
    assert message(f"[wireless]\n{text}") == expected


def test_one_kind_of_capacity() -> None:
    assert message("[wireless]\nbandwidth_hz = 1e6\n[wire]\ncapacity = '8 Mbit/s'") == (
        "wireless.bandwidth_hz = 1e+06 does not go with wire.capacity = '8 Mbit/s': devices share either a band or a rate (in my.toml)"
    )


def test_hosts_do_not_drop_out() -> None:
    text = "[wireless]\nbandwidth_hz = 1e6\ndropout = 0.1\n[split]\nhost_on = 'any'"
    assert message(text).startswith("wireless.dropout = 0.1 does not go with split.host_on = 'any'")
    assert parse_run_file(text.replace("any", "edge"), source="x").wireless.dropout == 0.1
