"""Reads definitions of WordNet 3.0 and the domain of each, for a classification. Knows no model and no device.

On Debian or Ubuntu, without root, the package wordnet-base (6.5 MB) is downloaded and unpacked into the user's cache.
"""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from edgelam_fl.errors import EnvironmentProblem
from edgelam_fl.files import cache_folder

DOMAINS = 10
# man 5 lexnames: the number in the second column of data.noun
NAMES = """
    Tops act animal artifact attribute body cognition communication event feeling food group location motive object person
    phenomenon plant possession process quantity relation shape state substance time
"""
NOUNS = dict(enumerate(NAMES.split(), start=3))


def rows() -> list[tuple[str, str]]:
    """Returns (definition, domain) of the DOMAINS largest domains, sorted and without definitions of two domains."""
    return clear(list(definitions(unpacked(cache_folder() / "wordnet") / "wordnet" / "data.noun")))


def unpacked(folder: Path) -> Path:
    """Returns the folder of the package's files under `folder`; downloads and unpacks the package if absent.

    Raises EnvironmentProblem without Debian's tools, or if one fails.
    """
    share = folder / "usr" / "share"
    if not (share / "wordnet").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
            raise EnvironmentProblem(
                f"WordNet comes as the Debian package wordnet-base, and apt-get is not here. Unpack it yourself into {folder}, "
                f"or take bench.dataset = a file of your own"
            )
        _run(["apt-get", "download", "wordnet-base"], folder)
        package = sorted(folder.glob("wordnet-base_*.deb"))[-1]
        _run(["dpkg-deb", "-x", package.name, "."], folder)
    return share


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EnvironmentProblem(f"`{' '.join(command)}` failed in {folder}: {' '.join(done.stderr.split())[-300:]}")


def definitions(file: Path) -> Iterator[tuple[str, str]]:
    """Yields (definition, domain) of each noun, without the example sentences, which have the word itself."""
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith(" "):  # the licence comes first, indented
            entry, gloss = line.split(" | ", 1)
            yield gloss.split('; "')[0].strip(), NOUNS[int(entry.split()[1])]


def clear(everything: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Returns the definitions of the largest domains that are in one domain only, each once, sorted."""
    domains: dict[str, set[str]] = {}
    for gloss, domain in everything:
        domains.setdefault(gloss, set()).add(domain)
    largest = {domain for domain, _ in Counter(domain for _, domain in everything).most_common(DOMAINS)}
    return sorted((gloss, min(found)) for gloss, found in domains.items() if len(found) == 1 and found <= largest)
