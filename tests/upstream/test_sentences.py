"""Where sentences end: on a small set of hard ones, and that nothing is lost or takes long."""

import time

import pytest
from hard_sentences import HARD, PARAGRAPHS
from hypothesis import given
from hypothesis import strategies as st

from opfa.upstream.sentences import sentences_of


def ends(sentences: list[str]) -> set[int]:
    """Where sentences end, in letters of the text without white space; not where the text ends."""
    sizes = [len("".join(sentence.split())) for sentence in sentences]
    return {sum(sizes[: index + 1]) for index in range(len(sizes) - 1)}


def f1(texts: list[list[str]]) -> float:
    pairs = [(ends(text), ends(sentences_of(" ".join(text)))) for text in texts]
    hits = sum(len(true & found) for true, found in pairs)
    return 2 * hits / sum(len(true) + len(found) for true, found in pairs)


def test_most_sentences_end_where_a_reader_ends_them() -> None:
    assert len(HARD) > 60
    assert f1(HARD) >= 0.95  # the regular expression of before: 0.67
    assert f1(PARAGRAPHS) >= 0.98  # 0.87


@pytest.mark.parametrize(
    "text",
    [
        ["Mr. Brown met Mrs. Green.", "Dr. White came too."],
        ["She joined the U.S. Army.", "He did not."],
        ["J. R. R. Tolkien wrote it.", "C. S. Lewis read it."],
        ["See Fig. 2 for more.", "It is clear."],
        ["he met mr. brown of the u.s. army.", "then he left.", "was it late?", "it was."],
        ['He said "Go."', "Then he left.", 'And "Why?" she asked.'],
    ],
)
def test_an_abbreviation_ends_no_sentence(text: list[str]) -> None:
    assert sentences_of(" ".join(text)) == text


def test_a_line_ends_a_sentence() -> None:
    text = " A Heading\n\nIt begins. And goes\u2003on \r\nwithout an end\u2028\n\u00a0\nHere."
    expected = ["A Heading", "It begins.", "And goes\u2003on", "without an end", "Here."]
    assert sentences_of(text) == expected


@given(st.text(alphabet=st.sampled_from("aB1 .!?\"')(\n\t\u201d\u2026\u3002\u00e9"), max_size=80))
def test_nothing_but_white_space_is_lost(text: str) -> None:
    assert "".join("".join(sentences_of(text)).split()) == "".join(text.split())


@pytest.mark.parametrize("piece", ["a", "!?", 'a.")', "Mr. ", "A. ", ". . ", "a. b\n", "\u3002"])
def test_a_long_text_takes_no_quadratic_time(piece: str) -> None:
    text = piece * (200_000 // len(piece))
    before = time.process_time()
    found = sentences_of(text)
    assert time.process_time() - before < 8  # 14 s and more before
    assert "".join("".join(found).split()) == "".join(text.split())
