"""What a model is: its weights, config, tokenizer, templates and ends of answers, and who notices that they are others."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from edgelam_fl.errors import Mismatch, ModelError, ProtocolError, Refused
from edgelam_fl.hub.daemon import HubServer
from edgelam_fl.hub.fetch import check_model, open_model
from edgelam_fl.hub.slices import offered
from edgelam_fl.model.generation import GENERATION
from edgelam_fl.model.identity import difference, of_gguf
from edgelam_fl.model.served import AnnouncedPart, check_part
from edgelam_fl.model.source import ModelSource, find_model, is_as_found, why_changed
from edgelam_fl.model.stage import load_stages
from edgelam_fl.model.weights import read_tensors, tensor_file
from edgelam_fl.node.held import Held, NodeMemory
from edgelam_fl.node.private_fronts import PrivateFronts
from edgelam_fl.node.snapshots import Snapshots
from edgelam_fl.plan.layout import make_layout
from edgelam_fl.plan.making import RoundFacts, make_plans
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.privacy.known import KnownLeakage, known_leakage, store
from edgelam_fl.serving.export import export
from edgelam_fl.serving.results import BASE_MODEL, open_result
from edgelam_fl.telemetry.events import Event
from edgelam_fl.wire import edgelam_pb2 as pb
from tests.results import write_result
from tests.support import CHAT, byte_tokenizer, run_config
from tests.unit.conftest import MakeFederation

TEXT_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "special_tokens_map.json",
    "added_tokens.json", "tokenizer.model", "additional_chat_templates/tool_use.jinja",
)  # fmt: skip


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be changed."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGELAM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def rewrite(file: Path, more: str = " ") -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text((file.read_text(encoding="utf-8") if file.exists() else "") + more, encoding="utf-8")


def keep_time(file: Path, old: bytes, new: bytes) -> None:
    """Rewrites a file with as many bytes and the same time of modification, as rsync -t and cp -p leave it."""
    stat = file.stat()
    content = file.read_bytes()
    assert old in content
    assert len(old) == len(new)
    file.write_bytes(content.replace(old, new, 1))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def device_plan(source: ModelSource) -> pb.Plan:
    """The plan of a device that has the whole model."""
    spec = RunSpec(run_config(source.name, "split.hosts=0"), source)
    device = pb.Profile(name="ann", role=pb.DEVICE)
    layout = make_layout(spec, [device], [])
    return make_plans(spec, RoundFacts("run", 1, 1, 0, 1), {"ann": device}, layout, {}, {"ann": b"secret"})["ann"]


# ---------------------------------------------------------------- the two digests


@pytest.mark.parametrize("name", TEXT_FILES)
def test_every_file_that_makes_text_into_ids_is_part_of_the_identity(folder: Path, name: str) -> None:
    before = find_model(str(folder))
    rewrite(folder / name)
    after = find_model(str(folder))
    assert after.digest != before.digest
    assert after.weights_digest == before.weights_digest
    assert {file for file in after.files if after.files[file] != before.files.get(file)} == {name}


def test_strays_beside_a_model_are_not_part_of_it(folder: Path) -> None:
    before = find_model(str(folder))
    for name in ("README.md", "optimizer.pt", "training_args.json", "additional_chat_templates/notes.txt"):
        rewrite(folder / name)
    assert find_model(str(folder)).digest == before.digest
    assert is_as_found(before)


def test_what_older_versions_kept_under_a_models_digest_is_found(
    tiny: ModelSource, tiny_folder: Path, cache: Path
) -> None:
    """Their digest was that of config.json and the files with weights."""
    shard = hashlib.sha256((tiny_folder / "model.safetensors").read_bytes()).hexdigest()
    old = hashlib.sha256((tiny_folder / "config.json").read_bytes() + shard.encode()).hexdigest()
    assert tiny.weights_digest == old
    store(KnownLeakage("m", old, {0: 1.0, 2: 0.4}, {}, 0.01))
    found = known_leakage("m", tiny.leakage_key)
    assert found is not None
    assert found.read == {0: 1.0, 2: 0.4}


def test_leakage_is_that_of_weights_and_tokenizer(tiny: ModelSource, folder: Path, cache: Path) -> None:
    """A template changes no id of a token; another tokenizer does."""
    store(KnownLeakage("m", tiny.leakage_key, {0: 1.0, 2: 0.3}, {}, 0.01))
    rewrite(folder / "chat_template.jinja", "x")
    assert known_leakage("m", find_model(str(folder)).leakage_key) == known_leakage("m", tiny.leakage_key)
    byte_tokenizer(shuffled=3).save_pretrained(folder)
    assert known_leakage("m", find_model(str(folder)).leakage_key) is None


def test_a_template_that_changes_costs_no_conversion(tiny: ModelSource, folder: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    made, _ = tensor_file(tiny, name, "int8")
    rewrite(folder / "chat_template.jinja", "x")
    assert tensor_file(find_model(str(folder)), name, "int8")[0] == made


# ---------------------------------------------------------------- changes are noticed


def test_a_file_with_other_bytes_and_the_old_time_is_noticed(folder: Path) -> None:
    before = find_model(str(folder))
    keep_time(folder / "tokenizer.json", b'"</s>"', b'"</t>"')
    assert find_model(str(folder)).digest != before.digest
    assert why_changed(before) == "tokenizer.json is not the same"


def test_another_file_in_the_place_of_one_with_the_same_size_and_time_is_noticed(folder: Path) -> None:
    before = find_model(str(folder))
    other = folder / "new"
    shutil.copy2(folder / "generation_config.json", other)
    keep_time(other, b"1", b"2")
    other.replace(folder / "generation_config.json")
    assert why_changed(before) == "generation_config.json is not the same"


def test_a_file_that_comes_or_goes_is_noticed(folder: Path) -> None:
    before = find_model(str(folder))
    (folder / "generation_config.json").unlink()
    rewrite(folder / "added_tokens.json", "{}")
    assert why_changed(before) == "generation_config.json is missing here, added_tokens.json is here alone"
    (folder / "config.json").unlink()
    assert "config.json" in why_changed(before)


def test_a_node_with_another_template_is_told_which_file_it_is(tiny: ModelSource, folder: Path) -> None:
    plan = device_plan(tiny)
    rewrite(folder / "chat_template.jinja", "x")
    rewrite(folder / "special_tokens_map.json", "{}")
    with pytest.raises(Mismatch, match=r"is not the server's: chat_template.jinja is not the same, special_tokens_map.json is here alone"):  # fmt: skip
        Held(plan, find=lambda plan: find_model(str(folder)))


def test_a_model_that_changes_between_rounds_is_not_trained_on(folder: Path) -> None:
    """The slices are in memory, and the tokenizer that the next part would load is another one."""
    plan = device_plan(find_model(str(folder)))
    memory = NodeMemory(
        load=load_stages,
        find=lambda plan: find_model(plan.model.name),
        gone_s=1.0,
        fronts=PrivateFronts(),
        snapshots=Snapshots(None, lambda event: None),
    )
    held = memory.hold(plan)
    os.utime(folder / "tokenizer.json")
    assert memory.hold(plan) is held, "the bytes are the same"
    byte_tokenizer(shuffled=3).save_pretrained(folder)
    with pytest.raises(Mismatch, match=r"tokenizer\.json is not the same"):
        memory.hold(plan)


def test_a_model_that_changes_on_the_server_ends_the_run(federation: MakeFederation, tiny: ModelSource, folder: Path) -> None:  # fmt: skip
    run = federation("ab", "e", "federation.rounds=2", source=find_model(str(folder)))
    run.nodes["a"].fails = lambda plan: rewrite(folder / "chat_template.jinja", "x") or ""
    with pytest.raises(ModelError, match=r"have changed since the run began: chat_template\.jinja is not the same") as caught:  # fmt: skip
        run.run()
    assert caught.value.exit_code == 2
    assert len(run.events("round_done")) == 1


# ---------------------------------------------------------------- slices


def test_a_served_model_has_every_file_that_counts(folder: Path, tmp_path: Path, cache: Path) -> None:
    for name in TEXT_FILES:
        rewrite(folder / name)
    source = find_model(str(folder))
    server = HubServer("127.0.0.1", 0, tmp_path / "hub")
    with offered(source, tmp_path / "hub") as token:
        served = open_model("elsewhere/m", source.digest, f"127.0.0.1:{server.port}", token=token, tokenizer=True)
    server.stop()
    assert (served.digest, served.weights_digest, served.files) == (source.digest, source.weights_digest, source.files)
    for name in TEXT_FILES:
        assert (served.folder / name).read_bytes() == (folder / name).read_bytes()


def test_the_hub_refuses_a_model_that_has_changed_and_says_how(folder: Path, tmp_path: Path, cache: Path) -> None:
    source = find_model(str(folder))
    server = HubServer("127.0.0.1", 0, tmp_path / "hub")
    address = f"127.0.0.1:{server.port}"
    with offered(source, tmp_path / "hub") as token:
        served = open_model("elsewhere/m", source.digest, address, token=token)
        keep_time(folder / "tokenizer.json", b'"</s>"', b'"</t>"')
        with pytest.raises(Refused, match=r"have changed on the server \(tokenizer\.json is not the same\)"):
            dict(read_tensors(served, ["model.norm.weight"], "fp32"))
    server.stop()


def test_tensors_are_fetched_once_for_two_templates(folder: Path, tmp_path: Path, cache: Path) -> None:
    server = HubServer("127.0.0.1", 0, tmp_path / "hub")
    came: list[Event] = []
    for template in (CHAT, CHAT + " "):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        source = find_model(str(folder))
        with offered(source, tmp_path / "hub") as token:
            served = open_model(
                "elsewhere/m", source.digest, f"127.0.0.1:{server.port}", token=token, tokenizer=True, emit=came.append
            )
            dict(read_tensors(served, ["model.norm.weight"], "fp32"))
        assert (served.folder / "chat_template.jinja").read_text(encoding="utf-8") == template
    server.stop()
    assert len(came) == 1


def test_a_description_with_other_small_files_than_the_plans_model_is_refused(tiny: ModelSource) -> None:
    def described(**change: str) -> pb.SliceModel:
        sums = {**tiny.files, **change}
        files = [pb.SliceFile(name=name, size_bytes=1, sha256=sums[name]) for name in sums if name != "weights"]
        entry = pb.SliceEntry(name="model.norm.weight", shape=[64])
        return pb.SliceModel(
            model_digest=tiny.digest, files=files, tensors=[entry], identity=tiny.files, weights_digest=tiny.weights_digest
        )  # fmt: skip

    check_model(described(), tiny.digest)
    with pytest.raises(ProtocolError, match=r"announced tokenizer\.json with other bytes"):
        check_model(described(**{"tokenizer.json": "0" * 64}), tiny.digest)
    lacking = described()
    del lacking.files[[file.name for file in lacking.files].index("tokenizer.json")]
    with pytest.raises(ProtocolError, match=r"with other files \(tokenizer\.json\)"):
        check_model(lacking, tiny.digest)


@pytest.mark.parametrize("name", ["../x.jinja", "additional_chat_templates/../x", "other/x.jinja", "/etc/passwd"])
def test_no_announced_file_leaves_the_models_folder(name: str) -> None:
    with pytest.raises(ProtocolError, match="the hub announced a part with the name"):
        check_part(AnnouncedPart(name, 1, "0" * 64), 10)


# ---------------------------------------------------------------- results


def test_a_runs_folder_says_what_its_model_was(federation: MakeFederation, tiny: ModelSource) -> None:
    run = federation("a", "e", "federation.rounds=1")
    run.run()
    kept = json.loads((run.folder.path / BASE_MODEL).read_text(encoding="utf-8"))
    assert kept == {"model": tiny.name, "files": tiny.files}


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "config.json"])
def test_an_adapter_is_not_put_on_another_model(folder: Path, tmp_path: Path, name: str) -> None:
    source = find_model(str(folder))
    result = open_result(write_result(tmp_path / "run", source))
    result.check_base(source)  # a folder of an older version says nothing
    (result.folder / BASE_MODEL).write_text(json.dumps({"files": dict(source.files)}), encoding="utf-8")
    rewrite(folder / GENERATION)
    result.check_base(find_model(str(folder)))
    rewrite(folder / name)
    with pytest.raises(ModelError, match=rf"was trained on another model than .* is now: {name} is not the same"):
        export(result, "peft", None)


def test_another_reader_of_a_gguf_file_makes_another_model_of_it(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"weights")
    one, other = (of_gguf(tmp_path / "m.gguf", reader) for reader in (1, 2))
    assert one.digest != other.digest
    assert one.weights_digest == other.weights_digest == one.leakage_key == hashlib.sha256(b"weights").hexdigest()
    assert difference(one.files, other.files) == "GGUF reader is not the same"
