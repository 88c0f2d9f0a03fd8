"""Makes the page that a package index shows: README.md with whole addresses, and the links beside it.

A hook of hatchling (pyproject.toml). An index has no files of the repository, so a relative link or picture would be dead there. The
repository's address stands in one place, [tool.edgelam-fl] of pyproject.toml. Imports no other module of the project.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

_RELATIVE = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|#|mailto:)([^)\s]+)\)")
_COMMENT = re.compile(r"<!--.*?-->\n?", flags=re.DOTALL)


def get_metadata_hook() -> type:
    """Makes the class that hatchling asks for; hatchling itself is there only while a package is built."""
    from hatchling.metadata.plugin.interface import MetadataHookInterface

    class PageHook(MetadataHookInterface):
        """Fills in the metadata that pyproject.toml calls dynamic."""

        def update(self, metadata: dict[str, Any]) -> None:
            root = Path(self.root)
            project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
            repository = project["tool"]["edgelam-fl"]["repository"]
            text = (root / "README.md").read_text(encoding="utf-8")
            metadata["readme"] = {"content-type": "text/markdown", "text": page(text, repository)}
            metadata["urls"] = urls(repository)

    return PageHook


def page(readme: str, repository: str) -> str:
    """Returns README.md for a page elsewhere: links lead to the repository, and comments for our own tools are left out."""

    def whole(match: re.Match[str]) -> str:
        picture, words, path = match.groups()
        return f"{picture}[{words}]({repository}/{'raw' if picture else 'blob'}/main/{path})"

    return _RELATIVE.sub(whole, _COMMENT.sub("", readme))


def urls(repository: str) -> dict[str, str]:
    """Returns the addresses that an index shows beside the page, by their names."""
    return {
        "Repository": repository,
        "Documentation": f"{repository}/tree/main/docs",
        "Changelog": f"{repository}/blob/main/CHANGELOG.md",
        "Issues": f"{repository}/issues",
    }
