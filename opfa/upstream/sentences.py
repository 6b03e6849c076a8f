"""A text to its sentences, by nupunkt: an English Punkt model (Kiss and Strunk, 2006) that comes
with its data, and knows "Mr.", "U.S. Army", initials and "Fig. 2".

The end of a line always ends a sentence, as in BERT's own files: corpora have a paragraph, a
heading or what somebody says to a line, and joining lines would glue headings to what follows them.
"""

import re

from nupunkt import load

UNBROKEN = re.compile(r"((?<!\S)\S{1000,})")


def sentences_of(text: str) -> list[str]:
    """The sentences in order, without white space. nupunkt would take long for unbroken runs."""
    find = load("default").tokenize
    found: list[str] = []
    for line in text.splitlines():
        for index, part in enumerate(UNBROKEN.split(line)):
            found += [part] if index % 2 else find(part)
    return [sentence for sentence in map(str.strip, found) if sentence]
