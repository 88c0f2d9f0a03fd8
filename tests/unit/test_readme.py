"""README.md quotes only what stands in benchmarks/results, and names only commands that there are."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from typer.main import get_command

from edgelam_fl.cli.main import app
from edgelam_fl.config import TaskSection, parse_run_file
from edgelam_fl.model.source import ModelSource, find_model
from edgelam_fl.tasks.causal_lm import CausalLm
from edgelam_fl.tasks.data import read_pairs

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_demos_output_is_the_recorded_one() -> None:
    assert (ROOT / "benchmarks" / "results" / "demo.txt").read_text(encoding="utf-8").strip() in README


def test_the_accuracies_are_the_recorded_ones() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "classification.json").read_text(encoding="utf-8"))
    accuracies = [f["value"] for f in result["figures"] if f["name"].endswith("held-out accuracy")]
    paragraph = README[README.index("- **Measured on a task.**") : README.index("- **Counted.**")]
    order = [0, 2, 1, 3]  # unsplit, an adapter a device, one for all, one device
    assert re.findall(r"([\d.]+) %", paragraph) == [f"{accuracies[n]:.2f}" for n in order]


def test_the_containers_memory_is_the_recorded_one() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "testbed_memory.json").read_text(encoding="utf-8"))
    values = {figure["name"]: figure["value"] for figure in result["figures"]}
    paragraph = README[README.index("What fits into none") :].split("\n\n")[0]
    kinds = ("split, limited", "unsplit, unlimited")
    recorded = [f"{values[f'SmolLM2-135M perplexity after, {kind}']:.4f}" for kind in kinds]
    assert re.findall(r"\d\.\d{4}", paragraph) == recorded
    assert values["SmolLM2-135M unsplit, limited: processes killed for memory"] >= 1
    assert result["settings"]["smollm2_limit"] in paragraph.replace("\n", " ")


def test_what_the_planner_predicts_is_as_near_as_recorded() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "planner_testbeds.json").read_text(encoding="utf-8"))
    values = {figure["name"]: figure["value"] for figure in result["figures"]}
    apart = {what: max(abs(value - 1) for name, value in values.items() if f": {what}" in name and name.endswith("predicted over measured"))
             for what in ("a step", "memory")}  # fmt: skip
    (faster,) = (value for name, value in values.items() if name.startswith("a step with equal cuts"))
    paragraph = README[README.index("On five unlike testbeds") :].split("\n\n")[0]
    assert re.findall(r"(\d+) %", paragraph) == [str(math.ceil(100 * apart[what])) for what in ("a step", "memory")]
    assert re.findall(r"([\d.]+) times", paragraph) == [f"{faster:.2f}"]


def test_what_comes_of_a_slow_link_is_as_recorded() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "link_change.json").read_text(encoding="utf-8"))
    values = {figure["name"]: figure["value"] for figure in result["figures"]}
    later, before = (values[f"a step with {plan}"] for plan in ("the last plan", "the slow link and the old plan"))
    assert f"a step took {later:.1f} s instead of {before:.1f} s" in README.replace("\n", " ")
    assert f"{result['settings']['slow_kbit'] / 1e3:g} Mbit/s in the middle of a run" in README.replace("\n", " ")


def test_its_commands_exist() -> None:
    named = set(re.findall(r"^(?:\S*/)?edgelam (\w+)", README, flags=re.MULTILINE))
    assert {"run", "server", "client"} <= named <= set(get_command(app).commands)  # type: ignore[attr-defined]


def test_its_run_files_are_valid() -> None:
    files = re.findall(r"```toml\n# (\S+)\n(.*?)```", README, flags=re.DOTALL)
    assert len(files) == README.count("```toml") == 2
    configs = {name: parse_run_file(text, source="README.md") for name, text in files}
    assert configs["mine.toml"].lora.rank == 8
    assert configs["topics.toml"].task.kind == "classification"


def table(header: str) -> dict[str, str]:
    """First and second column of one of its tables."""
    rows = re.search(rf"^\| {re.escape(header)}.*\n\|.*\n((?:\|.*\n)+)", README, flags=re.MULTILINE)
    assert rows is not None
    return dict(row.strip("|").split("|", 1) for row in rows[1].replace(" | ", "|").splitlines())


def codes(cell: str) -> list[str]:
    return re.findall(r"`([^`]*)`", cell)


def test_its_data_files_are_read_as_it_says(tmp_path: Path) -> None:
    rows = {codes(name)[0] + ("s" if "chats" in name else ""): codes(cell) for name, cell in table("file").items()}
    question, answer = "Who keeps the data?", "The device that owns them."
    pair = (question, answer)
    listed = rows[".json"][0].replace(", ...", f", {rows['.jsonl'][0]}")
    row, header = rows[".csv"]
    chat = rows[".jsonls"][0]
    for name, content, expected in [
        ("a.jsonl", f"{rows['.jsonl'][0]}\n" * 2, pair),
        ("a.json", listed, pair),
        ("a.csv", f"{header}\n{row}\n{row}\n", (question, "The device, always.")),
        ("a.tsv", f"{header}\n{row}\n{row}\n".replace("n,a", "n\ta").replace("?,", "?\t"), (question, "The device, always.")),
        ("b.jsonl", f"{chat}\n" * 2, ((("user", question),), "The device.")),
        ("a.txt", "A passage.\n\n" * 2, ("", "A passage.")),
    ]:  # fmt: skip
        (tmp_path / name).write_text(content, encoding="utf-8")
        assert read_pairs(tmp_path / name, "question", "answer") == [expected] * 2, name
    config = parse_run_file(rows[".txt"][0], source="README.md")
    assert (config.task.template, config.task.loss_on) == ("plain", "all")


def test_its_templates_write_what_it_says(tiny: ModelSource) -> None:
    for name, cell in table("`task.template`").items():
        template = codes(name)[0].strip('"')
        task = CausalLm(tiny.folder, TaskSection(template=template, max_tokens=200, loss_on="all"))
        (example,) = task.examples([("Who keeps the data?", "The device that owns them.")])
        text = task.tokenizer.decode(example.ids)
        if template == "chat":
            assert text == "<user>Who keeps the data?</s><assistant>The device that owns them.</s>"
        else:
            assert text == "\n".join(codes(cell)) + "</s>"


def test_models_are_found_by_the_names_that_it_lists(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub name is answered from the hub's cache on disk where there is no network."""
    name = codes(README[README.index("or a hub name") :])[0]
    repository = tmp_path / ("models--" + name.replace("/", "--"))
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(tiny_folder, repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert find_model(name).digest == find_model(str(tiny_folder)).digest


def test_every_result_has_the_agreed_shape() -> None:
    files = list((ROOT / "benchmarks" / "results").glob("*.json"))
    assert files
    for file in files:
        result = json.loads(file.read_text(encoding="utf-8"))
        assert set(result) == {"name", "command", "machine", "versions", "settings", "figures"}
        for figure in result["figures"]:
            assert set(figure) == {"name", "value", "unit", "bar", "holds"}, file
