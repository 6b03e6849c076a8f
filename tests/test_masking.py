"""Dynamic masking: exact counts, shares within statistical bounds, whole words."""

from typing import Any

import numpy as np
import pytest

from opfa.upstream.masking import IGNORED, Masker

VOCABULARY, CLS, SEP, MASK = 1000, 1, 2, 3
FIRST_ORDINARY, FIRST_CONTINUATION = 5, 600  # ids 0..4 are special, 600.. go on with a word


def masker(**changes: Any) -> Masker:
    ids = np.arange(VOCABULARY)
    options: dict[str, Any] = {
        "seed": 7,
        "probability": 0.15,
        "whole_word": False,
        "mask_id": MASK,
        "is_special": ids < FIRST_ORDINARY,
        "is_continuation": ids >= FIRST_CONTINUATION,
    }
    return Masker(**{**options, **changes})


def sequence(length: int, seed: int = 0) -> np.ndarray:
    """[CLS] tokens [SEP] tokens [SEP], `length` ordinary tokens in all."""
    tokens = np.random.default_rng(seed).integers(FIRST_ORDINARY, VOCABULARY, size=length)
    half = length // 2
    return np.concatenate([[CLS], tokens[:half], [SEP], tokens[half:], [SEP]])


def chosen(labels: np.ndarray) -> list[int]:
    return np.flatnonzero(labels != IGNORED).tolist()


# a pure function


def test_the_same_seed_epoch_and_example_give_the_same_masks() -> None:
    ids, first, second = sequence(50), masker(), masker()
    first(ids, 9, 9)  # what was masked before does not matter
    for a, b in zip(first(ids, 3, 8), second(ids, 3, 8), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("seed", "epoch", "example"), [(8, 3, 8), (7, 4, 8), (7, 3, 9)])
def test_another_seed_epoch_or_example_gives_other_masks(
    seed: int, epoch: int, example: int
) -> None:
    ids = sequence(50)
    expected = masker()(ids, 3, 8)[1]
    assert chosen(masker(seed=seed)(ids, epoch, example)[1]) != chosen(expected)


def test_the_given_ids_are_not_changed() -> None:
    ids = sequence(50)
    before = ids.copy()
    masker()(ids, 0, 0)
    np.testing.assert_array_equal(ids, before)


# which tokens


@pytest.mark.parametrize(
    ("length", "probability", "count"),
    [(100, 0.15, 15), (10, 0.15, 2), (13, 0.15, 2), (3, 0.15, 1), (1, 0.15, 1), (9, 0.99, 9)],
)
def test_the_count_is_exact_and_at_least_one(length: int, probability: float, count: int) -> None:
    for example in range(20):
        _, labels = masker(probability=probability)(sequence(length), 0, example)
        assert len(chosen(labels)) == count


def test_a_sequence_of_special_tokens_is_left_alone() -> None:
    for whole_word in (False, True):
        inputs, labels = masker(whole_word=whole_word)(np.array([CLS, SEP, SEP]), 0, 0)
        assert (inputs.tolist(), chosen(labels)) == ([CLS, SEP, SEP], [])


def test_labels_are_the_original_tokens_and_all_others_are_untouched() -> None:
    ids = sequence(200)
    inputs, labels = masker()(ids, 0, 0)
    is_chosen = labels != IGNORED
    np.testing.assert_array_equal(labels[is_chosen], ids[is_chosen])
    np.testing.assert_array_equal(inputs[~is_chosen], ids[~is_chosen])


@pytest.mark.parametrize("whole_word", [False, True])
def test_special_tokens_are_never_chosen(whole_word: bool) -> None:
    ids = sequence(30)
    for example in range(300):
        _, labels = masker(whole_word=whole_word, probability=0.5)(ids, 0, example)
        assert not set(chosen(labels)) & {0, 16, len(ids) - 1}


def test_every_ordinary_token_is_chosen_equally_often() -> None:
    ids = sequence(20)
    counts = np.zeros(len(ids))
    for example in range(2000):
        counts[chosen(masker()(ids, 0, example)[1])] += 1
    ordinary = np.delete(counts, [0, 11, 22])
    assert abs(ordinary - 300).max() < 5 * np.sqrt(300 * 0.85)  # 5 standard deviations


def test_80_percent_become_mask_10_percent_another_token_and_10_percent_stay() -> None:
    ids = sequence(100)
    total = num_mask = num_same = 0
    replacements: list[int] = []
    for example in range(1000):
        inputs, labels = masker()(ids, 0, example)
        where = chosen(labels)
        total += len(where)
        num_mask += int((inputs[where] == MASK).sum())
        num_same += int((inputs[where] == ids[where]).sum())
        replacements += [int(i) for i in inputs[where] if i != MASK]
    bound = 5 * np.sqrt(0.16 / total)  # 5 standard deviations
    assert total == 15_000
    assert abs(num_mask / total - 0.8) < bound
    assert abs(num_same / total - 0.1) < bound
    assert min(replacements) >= FIRST_ORDINARY


def test_replacements_are_drawn_from_the_whole_ordinary_vocabulary() -> None:
    ids, found = np.full(1000, 50), set()
    for example in range(100):
        inputs, labels = masker(probability=0.9)(ids, 0, example)
        found |= set(inputs[labels != IGNORED].tolist())
    assert found - {MASK} == set(range(FIRST_ORDINARY, VOCABULARY))


# whole words

WORDS = [[10, 700, 701], [11], [12, 702], [13], [14, 703, 704, 705], [15], [16, 706]]


def test_whole_words_are_chosen_whole() -> None:
    ids = np.array([CLS, *(token for word in WORDS for token in word), SEP])
    spans, start = [], 1
    for word in WORDS:
        spans.append(set(range(start, start + len(word))))
        start += len(word)
    seen = set()
    for example in range(300):
        where = set(chosen(masker(whole_word=True, probability=0.3)(ids, 0, example)[1]))
        assert all(span <= where or not span & where for span in spans)
        seen |= {i for i, span in enumerate(spans) if span <= where}
    assert seen == set(range(len(WORDS)))


def test_whole_words_reach_the_count_with_the_last_word_needed() -> None:
    ids = np.array([token for word in WORDS for token in word])  # 14 tokens: 30 % is 4
    lengths = {
        len(chosen(masker(whole_word=True, probability=0.3)(ids, 0, e)[1])) for e in range(300)
    }
    assert min(lengths) == 4 and max(lengths) <= 3 + 4


def test_whole_words_of_one_token_each_have_the_exact_count() -> None:
    ids = np.arange(100, 140)
    assert len(chosen(masker(whole_word=True)(ids, 0, 0)[1])) == 6


def test_a_continuation_at_the_beginning_is_a_word_of_its_own() -> None:
    ids = np.array([700, 701, 10])
    found = {
        tuple(chosen(masker(whole_word=True, probability=0.3)(ids, 0, e)[1])) for e in range(99)
    }
    assert found == {(0, 1), (2,)}


def test_a_word_does_not_go_on_behind_a_special_token() -> None:
    ids = np.array([CLS, 10, SEP, 700, 701, SEP])
    found = {
        tuple(chosen(masker(whole_word=True, probability=0.3)(ids, 0, e)[1])) for e in range(99)
    }
    assert found == {(1,), (3, 4)}
