"""The pages hold: numbers are those of the result files, commands and run files work, messages are the program's own."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from typer.main import get_command

from edgelam_fl import __version__
from edgelam_fl.cli.main import app
from edgelam_fl.config import TaskSection, parse_run_file
from edgelam_fl.model.source import ModelSource, find_model
from edgelam_fl.plan.spec import RunSpec
from edgelam_fl.tasks.causal_lm import CausalLm
from edgelam_fl.tasks.data import Chat, read_pairs
from server.checks import check_config
from server.virtual.loads import Loads
from strategies.registry import BUILT_IN
from testbed.__main__ import app as app_of_testbeds
from testbed.shapes import read_testbed
from tools import figures, sequence
from tools.site_pages import strategies_page

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = {
    str(file.relative_to(ROOT)): file.read_text(encoding="utf-8")
    for file in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "PRIVACY.md",
        ROOT / "SECURITY.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    )
}
README, DATA, TROUBLESHOOTING = PAGES["README.md"], PAGES["docs/data.md"], PAGES["docs/troubleshooting.md"]
OTHER_TOML = {"devices.toml", "config.toml", "matrix.toml"}  # named in a block's first line; all others are run files


def fenced(page: str, language: str = "") -> list[str]:
    """Returns the contents of a page's fenced blocks, indented ones too."""
    blocks = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", page, flags=re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", text, flags=re.MULTILINE) for indent, text in blocks]


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("page", PAGES)
def test_numbers_are_those_of_the_result_files(page: str) -> None:
    assert PAGES[page] == figures.filled(PAGES[page]), "stale: python tools/figures.py --write " + page


def test_no_marker_begins_a_line() -> None:
    """There it would begin a block of HTML, and so end the paragraph."""
    assert not [name for name, page in PAGES.items() if re.search(r"^ *<!-- figure", page, flags=re.MULTILINE)]


def test_promises_quote_no_number_that_nobody_checks() -> None:
    promises = README[README.index("## Promises") : README.index("## Limits")]
    assert len(figures.marked(promises)) >= 9
    assert figure_like(figures.without_marked(promises)) == []
    privacy = README[README.index("## Who must be trusted") : README.index("## Install")]
    assert [name for name, _ in figures.marked(privacy)] == ["leakage"] * 3
    assert figure_like(figures.without_marked(privacy)) == []


def figure_like(text: str) -> list[str]:
    """Returns what looks like a measured number: a decimal fraction, or a number with a unit."""
    return re.findall(r"\d+\.\d+|\d+ ?(?:%|s|ms|MB|GB|MiB|GiB|x|times|tokens|Mbit/s)(?!\w)", text)


def test_a_number_without_a_marker_is_noticed() -> None:
    assert figure_like("takes 12 s, 3.5 of them idle, for 80 % of 3 devices; within 1e-5") == ["12 s", "3.5", "80 %"]
    assert figures.without_marked("a <!-- figure: demo; x; {value} -->12 s<!-- /figure --> b") == "a  b"


@pytest.mark.parametrize("page", PAGES)
def test_quoted_figures_hold_their_bars(page: str) -> None:
    for result, name in figures.marked(PAGES[page]):
        content = json.loads((RESULTS / f"{result}.json").read_text(encoding="utf-8"))
        missed = [figure["name"] for figure in figures.matching(content, name) if figure["holds"] is False]
        assert not missed, f"{result}: {missed}"


def test_markers_are_filled_with_what_a_result_file_holds(tmp_path: Path) -> None:
    values = [("a step, first", 0.93), ("a step, second", 1.0412), ("sent", 31_052_510)]
    result = {"settings": {"limit": "1 GiB"}, "figures": [{"name": n, "value": v, "unit": "s"} for n, v in values]}
    (tmp_path / "bed.json").write_text(json.dumps(result))
    (tmp_path / "bed.txt").write_text("one\ntwo: 2 s  \nthree\n")

    def number(name: str, form: str) -> str:
        page = figures.filled(f"x <!-- figure: bed; {name}; {form} -->stale<!-- /figure --> y", tmp_path)
        return page.partition("-->")[2].partition("<!--")[0]

    assert number("a step, second", "{value:.2f} {unit}") == "1.04 s"
    assert number("a step*", "{off_percent} %") == "7 %"
    assert number("sent", "{millions:.1f} MB") == "31.1 MB"
    assert number("settings.limit", "{value}") == "1 GiB"
    for name, form in (("nobody", "{value}"), ("a step*", "{value}")):
        with pytest.raises(figures.StaleMarker):
            number(name, form)
    block = figures.filled("<!-- lines: bed.txt; two*; one -->\n<!-- /lines -->", tmp_path)
    assert block == "<!-- lines: bed.txt; two*; one -->\n```text\ntwo: 2 s\none\n```\n<!-- /lines -->"
    assert figures.filled(block, tmp_path) == block


def test_every_result_has_the_agreed_shape() -> None:
    files = list(RESULTS.glob("*.json"))
    assert files
    for file in files:
        result = json.loads(file.read_text(encoding="utf-8"))
        assert set(result) == {"name", "command", "machine", "versions", "settings", "figures"}
        for figure in result["figures"]:
            assert set(figure) == {"name", "value", "unit", "bar", "holds"}, file


# ---------------------------------------------------------------- the shape of README.md


def test_the_readme_is_short_and_shows_the_demo() -> None:
    assert len(README.encode()) <= 8 * 1024
    (quoted,) = fenced(README, "text")
    recorded = (RESULTS / "demo.txt").read_text(encoding="utf-8").splitlines()
    assert len(quoted.splitlines()) == 6
    assert all(line in [full.rstrip() for full in recorded] for line in quoted.splitlines())
    assert "docs/report.png" in README
    assert f"Status: {__version__.rpartition('.')[0]}" in README


# ---------------------------------------------------------------- commands


def commands(page: str) -> Iterator[list[str]]:
    """Yields the words of every `edgelam ...` and `python -m testbed ...` line in a page's fenced blocks."""
    for block in fenced(page):
        for line in block.splitlines():
            match = re.search(r"(?:^|[ /])(edgelam|python -m testbed) (?=[a-z])(.*)", line.partition("#")[0])
            if match and not line.lstrip().startswith("-"):
                yield [match[1], *shlex.split(match[2])]


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_their_options_exist(page: str) -> None:
    for program, name, *words in commands(PAGES[page]):
        group: Any = get_command(app if program == "edgelam" else app_of_testbeds)
        assert name in group.commands, f"{program} {name}"
        known = {option for item in group.commands[name].params for option in item.opts}
        assert {word for word in words if word.startswith("--")} <= known, f"{program} {name} {words}"


def test_the_pages_have_figures_and_run_files_to_check() -> None:
    assert sum(len(figures.marked(page)) for page in PAGES.values()) >= 20
    assert sum(len(fenced(page, "toml")) for page in PAGES.values()) >= 3


def test_the_pages_name_most_commands() -> None:
    named = {words[1] for page in PAGES.values() for words in commands(page) if words[0] == "edgelam"}
    assert {"init", "demo", "doctor", "run", "server", "client", "report", "chat", "export", "top", "bench"} <= named


# ---------------------------------------------------------------- run files


@pytest.mark.parametrize("page", PAGES)
def test_run_files_are_valid(page: str, tmp_path: Path) -> None:
    for block in fenced(PAGES[page], "toml"):
        name = block.splitlines()[0].removeprefix("# ").strip() if block.startswith("# ") else ""
        kind = name.split()[-1] if name else ""
        if kind == "devices.toml":
            (tmp_path / kind).write_text(block, encoding="utf-8")
            assert read_testbed(tmp_path / kind, cores=2).nodes
        elif kind not in OTHER_TOML:
            parse_run_file(block, source=page)


def test_the_run_file_of_the_strategies_page_is_valid() -> None:
    (block,) = fenced(strategies_page(), "toml")
    check_config(parse_run_file(block, source="built-in-strategies.md"))


def test_the_page_of_data_shows_classes() -> None:
    files = dict(re.findall(r"```toml\n# (\S+)\n(.*?)```", DATA, flags=re.DOTALL))
    assert parse_run_file(files["topics.toml"], source="docs/data.md").task.kind == "classification"
    assert parse_run_file(files["fields.toml"], source="docs/data.md").data.fields.prompt == "instruction"


@pytest.mark.real_model
def test_the_page_of_speed_lowers_the_ranks_beside_the_cut() -> None:
    """Of the two layers at each end, a device has one with its factors in the pattern's rank: r (in + out) numbers per matrix."""
    page = PAGES["docs/speed.md"]
    (block,) = (text for text in fenced(page, "toml") if text.startswith("# ranks.toml"))
    source = find_model("smollm2-135m")
    found = [
        Loads(RunSpec(parse_run_file(text, source="docs/speed.md", overrides=["model.name=smollm2-135m"]), source))
        for text in (block, "lora.rank = 8")
    ]
    own, usual = (loads.adapter_bytes("a") for loads in found)
    widths = (576 + 576) + (576 + 192)
    assert (own, usual) == (4 * widths * 2 * (8 + 2), 4 * widths * 2 * (8 + 8))
    assert own == 5 / 8 * usual
    for words in (f"{usual / 1e3:.0f} kB of a device", f"{own / 1e3:.0f} kB, five eighths of it"):
        assert words in page


# ---------------------------------------------------------------- data and models


def table(header: str) -> dict[str, str]:
    """Returns the first and the second column of one of the tables of docs/data.md."""
    rows = re.search(rf"^\| {re.escape(header)}.*\n\|.*\n((?:\|.*\n)+)", DATA, flags=re.MULTILINE)
    assert rows is not None
    return dict(row.strip("|").split("|", 1) for row in rows[1].replace(" | ", "|").splitlines())


def codes(cell: str) -> list[str]:
    return re.findall(r"`([^`]*)`", cell)


def test_data_files_are_read_as_the_page_says(tmp_path: Path) -> None:
    rows = {codes(name)[0] + ("s" if "chats" in name else ""): codes(cell) for name, cell in table("file").items()}
    question, answer = "Who keeps the data?", "The device that owns them."
    pair = (question, answer)
    listed = rows[".json"][0].replace(", ...", f", {rows['.jsonl'][0]}")
    row, header = rows[".csv"]
    chat = rows[".jsonls"][0]
    whole = Chat(({"role": "user", "content": question}, {"role": "assistant", "content": "The device."}))
    for name, content, expected in [
        ("a.jsonl", f"{rows['.jsonl'][0]}\n" * 2, pair),
        ("a.json", listed, pair),
        ("a.csv", f"{header}\n{row}\n{row}\n", (question, "The device, always.")),
        ("a.tsv", f"{header}\n{row}\n{row}\n".replace("n,a", "n\ta").replace("?,", "?\t"), (question, "The device, always.")),
        ("b.jsonl", f"{chat}\n" * 2, (whole, "The device.")),
        ("a.txt", "A passage.\n\n" * 2, ("", "A passage.")),
    ]:  # fmt: skip
        (tmp_path / name).write_text(content, encoding="utf-8")
        assert read_pairs(tmp_path / name, "question", "answer") == [expected] * 2, name
    config = parse_run_file(rows[".txt"][0], source="docs/data.md")
    assert (config.task.template, config.task.loss_on) == ("plain", "all")
    assert rows[".jsonl"][0] in README, "the example of README.md is the first one"


def test_templates_write_what_the_page_says(tiny: ModelSource) -> None:
    for name, cell in table("`task.template`").items():
        template = codes(name)[0].strip('"')
        task = CausalLm(tiny.folder, TaskSection(template=template, max_tokens=200, loss_on="all"))
        (example,) = task.examples([("Who keeps the data?", "The device that owns them.")]).examples
        text = task.tokenizer.decode(example.ids)
        if template == "chat":
            assert text == "<user>Who keeps the data?</s><assistant>The device that owns them.</s>"
        else:
            assert text == "\n".join(codes(cell)) + "</s>"


def test_models_are_found_by_the_names_that_the_page_lists(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub name is answered from the hub's cache on disk if there is no network."""
    name = codes(DATA[DATA.index("| a hub name") :])[0]
    repository = tmp_path / ("models--" + name.replace("/", "--"))
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(tiny_folder, repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert find_model(name).digest == find_model(str(tiny_folder)).digest


# ---------------------------------------------------------------- messages


@cache
def messages() -> list[str]:
    """Returns every text of the source; what an f-string fills in is an ellipsis, a part that is chosen as well."""
    found = []
    for folder in ("edgelam_fl", "server", "clients", "strategies", "testbed"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = (p.value if isinstance(p, ast.Constant) else "…" for p in node.values)
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def is_a_message(quoted: str) -> bool:
    """Whether all parts of a quoted message, between its ellipses, come in this order in one text of the source."""
    parts = [part for part in quoted.split("…") if part.strip(" .:()")]
    pattern = re.compile(".*".join(map(re.escape, parts)), flags=re.DOTALL)
    return any(pattern.search(text) for text in messages())


def test_quoted_messages_are_the_programs_own() -> None:
    quoted = re.findall(r"^### `(.*)`$", TROUBLESHOOTING, flags=re.MULTILINE)
    assert len(quoted) > 30
    unknown = [text for text in quoted if not is_a_message(text) and text != "edgelam: command not found"]
    assert not unknown, unknown
    assert not is_a_message("no server answers at … o'clock")


# ---------------------------------------------------------------- the site


def test_a_sequence_diagram_is_drawn() -> None:
    lines = ["participant D as device", "participant H", "D->>H: ACT <1>", "H-->>D: GRAD", "Note over D,H: step"]
    drawn = sequence.svg("\n".join(["sequenceDiagram", *lines, "opt clip", "D->>H: norm", "end"]))
    assert re.findall(r"<text[^>]*>([^<]*)</text>", drawn) == [
        "device", "H", "ACT &lt;1&gt;", "GRAD", "step", "norm", "only if clip",
    ]  # fmt: skip
    assert drawn.count('stroke-dasharray="5 4"') == 1, "the answer"
    with pytest.raises(ValueError, match="loop"):
        sequence.svg("sequenceDiagram\nloop for ever")


def built_site(folder: Path) -> Path:
    """Builds the site strictly in `folder`. Takes the site in $EDGELAM_TESTS_SITE instead, which whoever sets it has just built so."""
    if built := os.environ.get("EDGELAM_TESTS_SITE"):
        return Path(built)
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_builds_strictly_and_asks_no_other_server(tmp_path: Path) -> None:
    site, drawn = built_site(tmp_path / "site"), []
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|img|iframe)[^>]* src="https?:', text), page
        assert not re.findall(r'<link[^>]* rel="(?:stylesheet|preconnect|icon)"[^>]* href="https?:', text), page
        assert 'class="mermaid"' not in text, f"{page}: its program would come from another server"
        if "<svg viewBox" in text and "sequence" in text:
            drawn.append(page.name)
    assert drawn == ["protocol.html"]
    text = (site / "run-file.html").read_text(encoding="utf-8")
    assert "micro_batches" in text
    assert "bandwidth_hz" in text
    text = (site / "built-in-strategies.html").read_text(encoding="utf-8")
    assert all(f"<code>{name}</code>" in text for table in BUILT_IN.values() for name in table)
