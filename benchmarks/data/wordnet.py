"""Makes wordnet_sample.jsonl: definitions of WordNet 3.0 and the domain that each belongs to, for a classification.

`python benchmarks/data/wordnet.py`, on a Debian or Ubuntu, without root: the package wordnet-base (6.5 MB) is fetched and
unpacked into the cache. The sample and WordNet's licence lie in the repository, so that only a change needs this.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from edgelam_fl.model.source import cache_folder

HERE = Path(__file__).parent
SAMPLE, LICENCE = HERE / "wordnet_sample.jsonl", HERE / "LICENSE.wordnet"
SIZE, DOMAINS, SEED = 3000, 10, 1
# man 5 lexnames: the number in the second column of data.noun
NAMES = """
    Tops act animal artifact attribute body cognition communication event feeling food group location motive object person
    phenomenon plant possession process quantity relation shape state substance time
"""
NOUNS = dict(enumerate(NAMES.split(), start=3))


def unpacked(folder: Path) -> Path:
    """The package's files under `folder`, fetched where they are not there yet."""
    if not (folder / "usr").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "wordnet-base"], cwd=folder, check=True)
        (package,) = folder.glob("wordnet-base_*.deb")
        subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
    return folder / "usr" / "share"


def definitions(file: Path) -> Iterator[tuple[str, str]]:
    """(definition, domain) of each noun. What follows a definition are sentences with the word itself."""
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith(" "):  # the licence stands in front
            entry, gloss = line.split(" | ", 1)
            yield gloss.split('; "')[0].strip(), NOUNS[int(entry.split()[1])]


def sample(everything: list[tuple[str, str]], size: int = SIZE) -> list[tuple[str, str]]:
    """`size` definitions of the DOMAINS largest domains, as often as they come; none twice, nor in two domains."""
    domains: dict[str, set[str]] = {}
    for gloss, domain in everything:
        domains.setdefault(gloss, set()).add(domain)
    largest = [domain for domain, _ in Counter(domain for _, domain in everything).most_common(DOMAINS)]
    clear = sorted((gloss, *found) for gloss, found in domains.items() if len(found) == 1 and found <= set(largest))
    return [(gloss, domain) for gloss, domain in random.Random(SEED).sample(clear, size)]


def licence(copyright_file: Path) -> str:
    """WordNet's own, out of the package's copyright file."""
    block = re.search(r"^License: WordNet3\.0\n((?: .*\n)+)", copyright_file.read_text(encoding="utf-8"), re.MULTILINE)
    assert block is not None
    lines = [line[1:] for line in block[1].splitlines()]
    text = "\n".join("" if line == "." else line for line in lines)
    return f"wordnet_sample.jsonl is a part of WordNet 3.0:\n\n{text}\n"


def main() -> None:
    share = unpacked(cache_folder() / "wordnet")
    rows = sample(list(definitions(share / "wordnet" / "data.noun")))
    lines = [json.dumps({"gloss": gloss, "domain": domain}, ensure_ascii=False) + "\n" for gloss, domain in rows]
    SAMPLE.write_text("".join(lines), encoding="utf-8")
    LICENCE.write_text(licence(share / "doc" / "wordnet-base" / "copyright"), encoding="utf-8")
    print(f"{SAMPLE}: {SAMPLE.stat().st_size} bytes, {Counter(domain for _, domain in rows).most_common()}")


if __name__ == "__main__":
    main()
