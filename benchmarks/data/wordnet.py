"""Makes wordnet_sample.jsonl: definitions of WordNet 3.0 with their domains, for classification.

`python benchmarks/data/wordnet.py` needs Debian or Ubuntu, but no root: it downloads the package wordnet-base (6.5 MB) and
unpacks it into the cache. The sample and WordNet's licence are in the repository, so only a change of the sample needs this.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path

from edgelam_fl.bench.wordnet import clear, definitions, unpacked
from edgelam_fl.files import cache_folder

HERE = Path(__file__).parent
SAMPLE, LICENCE = HERE / "wordnet_sample.jsonl", HERE / "LICENSE.wordnet"
SIZE, SEED = 3000, 1


def sample(everything: list[tuple[str, str]], size: int = SIZE) -> list[tuple[str, str]]:
    """Draws `size` definitions of the largest domains, in their natural proportions. No definition is in two domains."""
    return random.Random(SEED).sample(clear(everything), size)


def licence(copyright_file: Path) -> str:
    """Returns WordNet's licence, from the package's copyright file."""
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
