"""A text to its sentences, by nupunkt; README.md says why, and why a line's end ends a sentence."""

import re

from opfa.extras import importing

with importing("pre-training", "opfa[pretrain]"):
    from nupunkt import load

UNBROKEN = re.compile(r"((?<!\S)\S{1000,})")


def sentences_of(text: str) -> list[str]:
    """The sentences in order. 1,000 characters without a space stay whole: they would take long."""
    find = load("default").tokenize
    found: list[str] = []
    for line in text.splitlines():
        for index, part in enumerate(UNBROKEN.split(line)):
            found += [part] if index % 2 else find(part)
    return [sentence for sentence in map(str.strip, found) if sentence]
