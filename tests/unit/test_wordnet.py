"""The definitions that the classification benchmark learns from, and how they were made."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from benchmarks.data.wordnet import LICENCE, SAMPLE, SIZE, definitions, licence, sample
from edgelam_fl.bench.wordnet import DOMAINS, NOUNS
from edgelam_fl.tasks.data import read_pairs


def test_the_sample_names_ten_domains_and_no_definition_twice() -> None:
    pairs = read_pairs(SAMPLE, "gloss", "domain", list(NOUNS.values()))
    assert len({gloss for gloss, _ in pairs}) == len(pairs) == SIZE
    counts = Counter(domain for _, domain in pairs)
    assert len(counts) == DOMAINS
    assert min(counts.values()) > SIZE / DOMAINS / 3
    assert SAMPLE.stat().st_size < 400_000
    assert "WordNet 3.0 Copyright 2006 by Princeton University.  All rights reserved." in LICENCE.read_text("utf-8")


def test_a_definition_ends_where_its_sentences_begin(tmp_path: Path) -> None:
    file = tmp_path / "data.noun"
    file.write_text(
        "  1 This software and database | is licensed\n"
        '00001740 20 n 01 oak 0 000 | a tree; of some age; "an oak"; "oaks"  \n'
        "00002137 03 n 01 thing 0 000 | what is  \n",
        encoding="utf-8",
    )
    assert list(definitions(file)) == [("a tree; of some age", "plant"), ("what is", "Tops")]


def test_what_stands_in_two_domains_is_in_no_sample() -> None:
    clear = [(f"gloss {n}", "plant" if n % 2 else "animal") for n in range(SIZE)]
    rows = sample([*clear, *clear[:9], ("both", "plant"), ("both", "animal")])
    assert sorted(rows) == sorted(clear)
    assert rows != clear


def test_the_licence_is_wordnets_own(tmp_path: Path) -> None:
    file = tmp_path / "copyright"
    file.write_text("Files: *\nLicense: WordNet3.0\n Free.\n .\n As is.\n\nFiles: debian/*\nLicense: GPL-2+\n", "utf-8")
    assert licence(file).endswith(":\n\nFree.\n\nAs is.\n")
