"""Dynamic masking: exact counts, shares within statistical bounds, whole words."""

from typing import Any

import numpy as np
import pytest

from opfa.upstream.masking import CHOICE, FATE, REPLACEMENT, Masker, _numbers, _uniform

VOCABULARY, PAD, CLS, SEP, MASK = 1000, 0, 1, 2, 3
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


def one(mask: Masker, ids: np.ndarray, epoch: int, example: int) -> tuple[np.ndarray, list[int]]:
    """One example alone: its inputs, and its positions to predict."""
    inputs, chosen = mask(ids[None], np.array([len(ids)]), np.array([[epoch, example]]))
    return inputs[0], chosen.tolist()


def many(mask: Masker, ids: np.ndarray, num_examples: int) -> tuple[np.ndarray, np.ndarray]:
    """The same tokens as so many examples of one batch: inputs [B, T], and bool [B, T] of those to
    predict.
    """
    batch = np.tile(ids, (num_examples, 1))
    places = np.stack([np.zeros(num_examples, int), np.arange(num_examples)], axis=1)
    inputs, chosen = mask(batch, np.full(num_examples, len(ids)), places)
    is_chosen = np.zeros(batch.shape, dtype=bool)
    is_chosen.reshape(-1)[chosen] = True
    return inputs, is_chosen


# a pure function of seed, epoch and example


@pytest.mark.parametrize("whole_word", [False, True])
@pytest.mark.parametrize("width", [53, 56, 100])
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2], [2], [1, 3, 1]])
def test_an_example_is_masked_the_same_in_whatever_batch_it_is(
    whole_word: bool, width: int, order: list[int]
) -> None:
    mask, examples = masker(whole_word=whole_word), [sequence(n, n) for n in (50, 20, 33, 1)]
    ids = np.full((len(order), width), PAD)
    for row, index in enumerate(order):
        ids[row, : len(examples[index])] = examples[index]
    lengths = np.array([len(examples[index]) for index in order])
    places = np.array([(3, 8 + index) for index in order])
    inputs, chosen = mask(ids, lengths, places)
    for row, index in enumerate(order):
        alone, positions = one(mask, examples[index], 3, 8 + index)
        assert inputs[row].tolist() == [*alone, *[PAD] * (width - len(alone))]
        assert (chosen[chosen // width == row] % width).tolist() == positions


@pytest.mark.parametrize(("seed", "epoch", "example"), [(8, 3, 8), (7, 4, 8), (7, 3, 9), (7, 8, 3)])
def test_another_seed_epoch_or_example_gives_other_masks(
    seed: int, epoch: int, example: int
) -> None:
    ids = sequence(50)
    expected = one(masker(), ids, 3, 8)[1]
    assert one(masker(seed=seed), ids, epoch, example)[1] != expected


def test_the_given_ids_are_not_changed() -> None:
    ids = sequence(50)
    before = ids.copy()
    one(masker(), ids, 0, 0)
    np.testing.assert_array_equal(ids, before)


def test_positions_are_flat_and_ascending() -> None:
    mask, ids = masker(), np.stack([sequence(20, seed) for seed in range(3)])
    _, chosen = mask(ids, np.full(3, 23), np.array([(0, 0), (0, 1), (0, 2)]))
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert np.bincount(chosen // 23).tolist() == [3, 3, 3]


# random numbers

LIMIT = 2**64


def split_mix(state: int) -> int:
    """The next number of SplitMix64, as in Steele et al. (2014), in plain integers."""
    z = (state + 0x9E3779B97F4A7C15) % LIMIT
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % LIMIT
    z = (z ^ z >> 27) * 0x94D049BB133111EB % LIMIT
    return z ^ z >> 31


def expected_number(seed: int, use: int, epoch: int, example: int, counter: int) -> int:
    number = split_mix(seed)
    for part in (use, epoch, example, counter):
        number = split_mix((number + part) % LIMIT)
    return number


def test_the_reference_is_split_mix_64() -> None:
    # The published first numbers for seed 1234567 (rosettacode.org, Pseudo-random_numbers).
    golden = 0x9E3779B97F4A7C15
    found = [split_mix((1234567 + i * golden) % LIMIT) for i in range(3)]
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("seed", [0, 7, 42, 2**31, 2**63 + 5])
def test_numbers_are_the_same_on_every_machine(seed: int) -> None:
    places = [(0, 0), (3, 8), (1, 2**40), (1000, 7)]
    counters = [0, 1, 511, 2**20]
    for use in (CHOICE, FATE, REPLACEMENT):
        found = _numbers(seed, use, np.array(places)[:, None], np.array([counters]))
        assert found.dtype == np.uint64
        assert found.tolist() == [
            [expected_number(seed, use, *p, c) for c in counters] for p in places
        ]


def test_the_tokens_chosen_have_the_smallest_numbers() -> None:
    ids = np.arange(100, 140)
    numbers = [expected_number(7, 1, 3, 8, column) for column in range(40)]
    smallest = sorted(range(40), key=numbers.__getitem__)[:6]
    assert one(masker(), ids, 3, 8)[1] == sorted(smallest)


def test_what_becomes_of_a_token_is_said_by_its_own_numbers() -> None:
    ids = np.arange(100, 140)
    inputs, chosen = one(masker(probability=1.0), ids, 3, 8)
    assert chosen == list(range(40))
    for column in chosen:
        fate = (expected_number(7, 2, 3, 8, column) >> 11) / 2**53
        other = FIRST_ORDINARY + expected_number(7, 3, 3, 8, column) % (VOCABULARY - FIRST_ORDINARY)
        assert inputs[column] == (MASK if fate < 0.8 else other if fate < 0.9 else ids[column])


def test_uniform_numbers_reach_from_0_to_just_below_1() -> None:
    found = _uniform(np.array([0, 2**63, 2**64 - 1], dtype=np.uint64))
    assert found.tolist() == [0.0, 0.5, 1 - 2**-53]


# which tokens


@pytest.mark.parametrize(
    ("length", "probability", "count"),
    [(100, 0.15, 15), (10, 0.15, 2), (13, 0.15, 2), (3, 0.15, 1), (1, 0.15, 1), (9, 0.99, 9)],
)
def test_the_count_is_exact_and_at_least_one(length: int, probability: float, count: int) -> None:
    _, is_chosen = many(masker(probability=probability), sequence(length), 200)
    assert is_chosen.sum(1).tolist() == [count] * 200


def test_the_count_is_of_real_tokens_in_each_row() -> None:
    ids = np.full((3, 100), 50)
    lengths = np.array([100, 40, 7])
    _, chosen = masker()(ids, lengths, np.array([(0, 0), (0, 1), (0, 2)]))
    assert np.bincount(chosen // 100).tolist() == [15, 6, 1]


@pytest.mark.parametrize("whole_word", [False, True])
def test_a_sequence_of_special_tokens_is_left_alone(whole_word: bool) -> None:
    mask = masker(whole_word=whole_word)
    inputs, chosen = one(mask, np.array([CLS, SEP, SEP]), 0, 0)
    assert (inputs.tolist(), chosen) == ([CLS, SEP, SEP], [])


def test_all_tokens_that_are_not_predicted_are_untouched() -> None:
    ids = sequence(200)
    inputs, chosen = one(masker(), ids, 0, 0)
    np.testing.assert_array_equal(np.delete(inputs, chosen), np.delete(ids, chosen))


@pytest.mark.parametrize("whole_word", [False, True])
def test_probability_0_chooses_nothing(whole_word: bool) -> None:
    ids = sequence(50)
    before = ids.copy()
    inputs, chosen = one(masker(probability=0.0, whole_word=whole_word), ids, 0, 0)
    assert chosen == []
    np.testing.assert_array_equal(inputs, before)
    inputs[:] = 9
    np.testing.assert_array_equal(ids, before)  # a copy


@pytest.mark.parametrize("whole_word", [False, True])
@pytest.mark.parametrize("probability", [0.5, 1.0])
def test_special_tokens_are_never_chosen(whole_word: bool, probability: float) -> None:
    mask = masker(whole_word=whole_word, probability=probability)
    _, is_chosen = many(mask, sequence(30), 300)
    assert not is_chosen[:, [0, 16, 32]].any()


@pytest.mark.parametrize("whole_word", [False, True])
def test_padding_is_never_chosen_whatever_its_token(whole_word: bool) -> None:
    mask = masker(whole_word=whole_word, probability=1.0)
    for pad in (PAD, 50, 700):
        ids = np.full((1, 10), pad)
        ids[0, :4] = [CLS, 60, 61, SEP]
        inputs, chosen = mask(ids, np.array([4]), np.array([(0, 0)]))
        assert chosen.tolist() == [1, 2]
        assert inputs[0, 4:].tolist() == [pad] * 6


def test_every_ordinary_token_is_chosen_equally_often() -> None:
    _, is_chosen = many(masker(), sequence(20), 20_000)
    ordinary = np.delete(is_chosen.sum(0), [0, 11, 22])
    assert abs(ordinary - 3000).max() < 5 * np.sqrt(3000 * 0.85)  # 5 standard deviations


def test_every_ordinary_token_is_chosen_equally_often_over_epochs() -> None:
    ids, num_epochs = np.tile(np.arange(100, 120), (20_000, 1)), 20_000
    places = np.stack([np.arange(num_epochs), np.full(num_epochs, 5)], axis=1)
    _, chosen = masker()(ids, np.full(num_epochs, 20), places)
    counts = np.bincount(chosen % 20, minlength=20)
    assert abs(counts - 3000).max() < 5 * np.sqrt(3000 * 0.85)


def test_two_tokens_are_chosen_together_as_often_as_chance_has_it() -> None:
    _, is_chosen = many(masker(), np.arange(100, 120), 20_000)  # 3 of 20
    together = is_chosen.T.astype(int) @ is_chosen
    share = 3 / 20 * 2 / 19
    pairs = together[np.triu_indices(20, 1)]
    assert abs(pairs - 20_000 * share).max() < 5 * np.sqrt(20_000 * share)


def test_80_percent_become_mask_10_percent_another_token_and_10_percent_stay() -> None:
    ids = sequence(100)
    inputs, is_chosen = many(masker(), ids, 4000)
    found, before = inputs[is_chosen], np.tile(ids, (4000, 1))[is_chosen]
    total = len(found)
    assert total == 60_000
    assert abs((found == MASK).sum() - 0.8 * total) < 5 * np.sqrt(0.16 * total)
    # of the 10 % that are replaced, 1 in 995 gets its own token back
    share_same = 0.1 + 0.1 / (VOCABULARY - FIRST_ORDINARY)
    assert abs((found == before).sum() - share_same * total) < 5 * np.sqrt(0.09 * total)


def test_replacements_are_uniform_over_the_ordinary_vocabulary() -> None:
    ids = np.full(1000, 50)
    inputs, is_chosen = many(masker(probability=1.0), ids, 1000)
    found = inputs[is_chosen]
    counts = np.bincount(found, minlength=VOCABULARY)
    assert not np.delete(counts[:FIRST_ORDINARY], MASK).any()
    counts = np.delete(counts, [*range(FIRST_ORDINARY), 50])  # 50 is also what stays
    expected = 0.1 * 1_000_000 / (VOCABULARY - FIRST_ORDINARY)
    assert abs(counts - expected).max() < 5 * np.sqrt(expected)


def test_what_is_chosen_does_not_say_what_becomes_of_it() -> None:
    # The first position is as often masked, given that it is chosen, as all others are.
    inputs, is_chosen = many(masker(), np.arange(100, 120), 20_000)
    for column in range(20):
        found = inputs[is_chosen[:, column], column]
        assert abs((found == MASK).mean() - 0.8) < 5 * np.sqrt(0.16 / len(found))


def test_replacements_come_from_ordinary_tokens_wherever_special_ones_lie() -> None:
    ids = np.arange(VOCABULARY)
    mask = masker(probability=1.0, is_special=ids % 2 == 0)
    inputs, is_chosen = many(mask, np.full(50, 51), 200)
    found = set(inputs[is_chosen].tolist()) - {MASK, 51}
    assert len(found) > 300 and all(i % 2 for i in found)


# whole words

WORDS = [[10, 700, 701], [11], [12, 702], [13], [14, 703, 704, 705], [15], [16, 706]]


def spans(first: int) -> list[list[int]]:
    ends = first + np.cumsum([len(word) for word in WORDS])
    return [list(range(e - len(word), e)) for e, word in zip(ends, WORDS, strict=True)]


def test_whole_words_are_chosen_whole() -> None:
    ids = np.array([CLS, *(token for word in WORDS for token in word), SEP])
    _, is_chosen = many(masker(whole_word=True, probability=0.3), ids, 300)
    for span in spans(first=1):
        parts = is_chosen[:, span].sum(1)
        assert set(parts.tolist()) == {0, len(span)}


def test_whole_words_reach_the_count_with_the_last_word_needed() -> None:
    ids = np.array([token for word in WORDS for token in word])  # 14 tokens: 30 % is 4
    _, is_chosen = many(masker(whole_word=True, probability=0.3), ids, 300)
    for row in is_chosen:
        sizes = [len(span) for span in spans(first=0) if row[span[0]]]
        assert sum(sizes) >= 4
        assert sum(sizes) - max(sizes) < 4  # without the last, whichever it was, too few


def test_words_are_chosen_in_the_order_of_their_numbers() -> None:
    ids = np.array([token for word in WORDS for token in word])
    numbers = [expected_number(7, 1, 0, 4, span[0]) for span in spans(first=0)]
    expected: list[int] = []
    for index in sorted(range(len(WORDS)), key=numbers.__getitem__):
        if len(expected) < 4:
            expected += spans(first=0)[index]
    assert one(masker(whole_word=True, probability=0.3), ids, 0, 4)[1] == sorted(expected)


def test_every_word_comes_first_equally_often() -> None:
    ids = np.array([token for word in WORDS for token in word])
    _, is_chosen = many(masker(whole_word=True, probability=0.05), ids, 7000)  # one word
    counts = is_chosen[:, [span[0] for span in spans(first=0)]].sum(0)
    assert counts.sum() == 7000
    assert abs(counts - 1000).max() < 5 * np.sqrt(1000)


def test_whole_words_of_one_token_each_have_the_exact_count() -> None:
    ids = np.arange(100, 140)
    assert len(one(masker(whole_word=True), ids, 0, 0)[1]) == 6


def test_a_continuation_at_the_beginning_is_a_word_of_its_own() -> None:
    _, is_chosen = many(masker(whole_word=True, probability=0.3), np.array([700, 701, 10]), 99)
    assert {tuple(np.flatnonzero(row)) for row in is_chosen} == {(0, 1), (2,)}


def test_a_word_does_not_go_on_behind_a_special_token() -> None:
    ids = np.array([CLS, 10, SEP, 700, 701, SEP])
    _, is_chosen = many(masker(whole_word=True, probability=0.3), ids, 99)
    assert {tuple(np.flatnonzero(row)) for row in is_chosen} == {(1,), (3, 4)}


def test_a_word_does_not_go_on_from_one_example_to_the_next() -> None:
    ids = np.array([[10, 11, 12], [700, 701, 13]])
    places = np.array([(0, 0), (0, 1)])
    for seed in range(50):
        mask = masker(whole_word=True, probability=0.3, seed=seed)
        _, chosen = mask(ids, np.array([3, 3]), places)
        assert sum(c < 3 for c in chosen) == 1
        assert [c - 3 for c in chosen if c >= 3] in ([0, 1], [2])
