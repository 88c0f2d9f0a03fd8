"""A hook of mkdocs (mkdocs.yml): pages that are made from the code at every build, diagrams, and links out of docs/.

The overview is README.md; CONTRIBUTING.md, PRIVACY.md and SECURITY.md are pages too. The page of the run file comes from the pydantic models, the
page of the commands from the command line itself, the page of the strategies from their table. None of them is kept in
the repository, so none is ever stale. A link from a page to a file outside docs/ leads to a copy in the site, so the site
works without the repository and without a network.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from posixpath import normpath, relpath
from typing import Any

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typer.main import get_command

from edgelam_fl.cli.main import app
from edgelam_fl.cli.run_file import allowed
from edgelam_fl.config import RunConfig, toml_value
from strategies.options import parameters
from strategies.registry import BUILT_IN
from tools import sequence

ROOT = Path(__file__).parents[1]
_LINK_TO_A_FOLDER = re.compile(r"\[([^\]]+)\]\((\.\./[^)\s]*/)\)")
_FROM_THE_ROOT = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "PRIVACY.md": "who-sees-what.md",
    "SECURITY.md": "security.md",
}
_DIAGRAM = re.compile(r"^```mermaid\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")


# ---------------------------------------------------------------- mkdocs calls these


def on_files(files: Files, config: MkDocsConfig) -> Files:
    generated = {
        **{page: from_the_root(name) for name, page in _FROM_THE_ROOT.items()},
        "run-file.md": run_file_page(),
        "commands.md": commands_page(),
        "built-in-strategies.md": strategies_page(),
    }
    for name, content in generated.items():
        files.append(File.generated(config, name, content=content))
    linked = {path for file in files if file.src_uri.endswith(".md") for path in _outside(file)}
    for path in sorted(linked - _FROM_THE_ROOT.keys()):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    folder = str(Path(page.file.src_uri).parent)

    def inside(match: re.Match[str]) -> str:
        path = _target(page.file.src_uri, match[2])
        if path is None:
            return match[0]
        return f"{match[1]}{relpath(_FROM_THE_ROOT.get(path, path), folder)}{match[3] or ''}{match[4]}"

    markdown = _LINK_TO_A_FOLDER.sub(lambda match: f"`{match[1]}`", markdown)  # the site has no lists of files
    return _DIAGRAM.sub(lambda match: sequence.svg(match[1]), _LINK.sub(inside, markdown))


def _outside(file: File) -> Iterator[str]:
    """Yields the repository's files outside docs/ that a page links to, as paths from the repository's root."""
    for match in _LINK.finditer(file.content_string):
        path = _target(file.src_uri, match[2])
        if path is not None:
            yield path


def _target(page: str, link: str) -> str | None:
    """The path from the repository's root of a link that leads out of docs/; None for every other link."""
    if "://" in link or link.startswith(("mailto:", "/")):
        return None
    path = normpath(f"docs/{Path(page).parent}/{link}")
    return path if not path.startswith(("docs/", "..")) and (ROOT / path).is_file() else None


# ---------------------------------------------------------------- pages of the repository's root


def from_the_root(name: str) -> str:
    """Returns a page of the repository's root with its links as they are from docs/."""

    def moved(match: re.Match[str]) -> str:
        link = match[2]
        if "://" in link:
            return match[0]
        inside = _FROM_THE_ROOT.get(link) or (link.removeprefix("docs/") if link.startswith("docs/") else f"../{link}")
        return f"{match[1]}{inside}{match[3] or ''}{match[4]}"

    return _LINK.sub(moved, (ROOT / name).read_text(encoding="utf-8"))


# ---------------------------------------------------------------- the run file

_RUN_FILE = """\
# The run file

One TOML file says what a run does. It knows nothing about devices: data paths, memory and addresses belong to
`edgelam client`, so that the same file runs on any federation. Every key has a default, and an empty file is a valid one.
Unknown keys are rejected with the closest match; a value out of range is rejected with key, value, rule and place.

```
edgelam init mine.toml --data ann.jsonl      # writes a commented file for your data
edgelam run mine.toml --explain              # prints what a run would use, and starts nothing
edgelam run mine.toml --set lora.rank=4      # overrides a key for once; --set may be repeated
```

Files to copy lie under `examples/`: {examples}. This page is made from the models that check the file
(`edgelam_fl/config/schema.py`).

"""


def run_file_page() -> str:
    examples = sorted((ROOT / "examples").glob("*.toml"))
    links = ", ".join(f"`{file.name}`" for file in examples)
    sections = "\n".join(_section(name, field) for name, field in RunConfig.model_fields.items())
    return _RUN_FILE.format(examples=links) + sections


def _section(name: str, field: FieldInfo) -> str:
    model: type[BaseModel] = field.annotation  # type: ignore[assignment]
    rows = [
        f"| `{key}` | {_code(_default(inner))} | {_cell(allowed(inner))} | {_cell(_description(inner))} |"
        for key, inner in model.model_fields.items()
    ]
    head = [f"## \\[{name}\\] {{ #{name} }}", ""]
    if model.__doc__ and model.__doc__ != BaseModel.__doc__:
        head += [" ".join(model.__doc__.split()), ""]
    return "\n".join([*head, "| key | default | allowed | what it is |", "|---|---|---|---|", *rows, ""])


def _default(field: FieldInfo) -> str:
    value: Any = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    return toml_value(list(value) if isinstance(value, tuple) else value)


def _description(field: FieldInfo) -> str:
    text = field.description or ""
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
        keys = (f"{key}: {inner.description}" for key, inner in field.annotation.model_fields.items())
        text = "; ".join([text, *keys] if text else keys)
    return text


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|")


def _cell(text: str) -> str:
    """Returns plain text for a cell of a table: Markdown and its extensions find nothing in it."""
    return text.translate({ord(character): f"&#{ord(character)};" for character in "|<>{}*_"})


# ---------------------------------------------------------------- the strategies

_STRATEGIES = """\
# Built-in strategies

This page is made from the table of strategies and their classes. A run file names one of each kind:

```toml
# strategies.toml
[strategy]
aggregation = "flexlora"
selection = "oort"
bandwidth = "equalise"
options = { oort = { alpha = 2.0 } }
[federation]
devices_per_round = 4
[wire]
capacity = "20 Mbit/s"
```

Options are checked, and belong to the strategy of that name. The reason for every device, chosen or not, is in the event `plan`; `round_done` has the
aggregation's error, its distance from the mean of the products B·A. With `wireless.bandwidth_hz` the devices share a simulated cell
instead of `wire.capacity`. [Your own](strategies.md) is a class in a file.

"""
_DUTIES = {
    "aggregation": "how adapters become one",
    "selection": "which devices take part in a round (`federation.devices_per_round`)",
    "bandwidth": "which share of `wire.capacity` each device gets; links keep to it",
}


def strategies_page() -> str:
    return _STRATEGIES + "\n".join(_strategies_of_kind(kind, table) for kind, table in BUILT_IN.items())


def _strategies_of_kind(kind: str, table: Mapping[str, str]) -> str:
    modules = [path.partition(":")[0] for path in table.values()]
    rows = []
    for name, path in table.items():
        module, _, class_name = path.partition(":")
        home = import_module(module)
        about = " ".join((home.__doc__ or "").split("\n\n")[0].split())
        if modules.count(module) > 1:
            about = f"{class_name}: {about.partition(':')[0]}"
        options = parameters(getattr(home, class_name)).values()
        defaults = ", ".join(f"`{option.name} = {toml_value(option.default)}`" for option in options)
        rows.append(f"| `{name}` | {_cell(about)} | {defaults} |")
    head = [
        f"## strategy.{kind}",
        "",
        f"Decides {_DUTIES[kind]}.",
        "",
        "| name | what it does | options |",
        "|---|---|---|",
    ]
    return "\n".join([*head, *rows, ""])


# ---------------------------------------------------------------- the commands


def commands_page() -> str:
    group: Any = get_command(app)
    context = click.Context(group, info_name="edgelam")
    commands = [group.get_command(context, name) for name in group.list_commands(context)]
    parts = [
        "# Commands\n\nThis page is made from the command line itself: `edgelam COMMAND --help` prints the same. Exit codes: 0 done,"
        " 2 the command line, the run file or the data is wrong, 3 this machine or the network is not as the command needs it,"
        " 4 the run failed, 130 interrupted.\n"
    ]
    return "\n".join([*parts, *map(_command, commands)])


def _command(command: Any) -> str:
    context = click.Context(command)
    arguments = [item.make_metavar(context) for item in command.params if item.param_type_name == "argument"]
    options = [item for item in command.params if item.param_type_name == "option"]
    usage = " ".join(["edgelam", command.name, "[OPTIONS]", *arguments])
    paragraphs = [" ".join(paragraph.split()) for paragraph in (command.help or "").split("\n\n")]
    rows = [f"| {_code(_spelled(item, context))} | {_cell(_plain(item.help or ''))} |" for item in options]
    return "\n".join(
        [f"## {command.name}", "", f"`{usage}`", "", _plain("\n\n".join(paragraphs)), "",
         "| option | what it does |", "|---|---|", *rows, ""]
    )  # fmt: skip


def _spelled(option: Any, context: click.Context) -> str:
    value = "" if option.is_flag else option.make_metavar(context)
    return " ".join([*option.opts, "N" if value.startswith("INTEGER") else value]).strip()


def _plain(text: str) -> str:
    """Typer's rich markup escapes brackets."""
    return text.replace("\\[", "[")
