"""Prepared examples to batches: padding, labels, and no dependence on workers or a resume."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import dense_labels, pretrain_recipe
from datasets import Dataset
from transformers import BertTokenizer, PreTrainedTokenizerBase

from opfa.data.order import Order
from opfa.errors import DataError, RecipeError
from opfa.storage import seal
from opfa.upstream.batches import (
    Batch,
    Batches,
    Prepared,
    masker,
    training_steps,
    validation_batches,
)
from opfa.upstream.masking import Masker
from opfa.upstream.recipe import Corpus, Masking
from opfa.upstream.segments import EXAMPLE

TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PAD, CLS, SEP, MASK = 0, 2, 3, 4
PAIR: dict[str, Any] = {
    "input_ids": [CLS, 20, SEP, 21, 22, SEP],
    "second_segment": 3,
    "next_sentence_label": 1,
}
SHORT = {"input_ids": [CLS, 23, SEP, SEP], "second_segment": 3, "next_sentence_label": 0}


def word_pieces(directory: Path, *words: str) -> PreTrainedTokenizerBase:
    (directory / "vocab.txt").write_text("\n".join([*TOKENS, *words]))
    return BertTokenizer.from_pretrained(directory)


def tokens_only(examples: list[dict[str, Any]], objective: str, most: int) -> Prepared:
    """Examples as if from a prepared directory, under a tokenizer that has padding alone."""
    split = Dataset.from_list(examples, features=EXAMPLE).with_format("arrow")
    tokenizer: Any = SimpleNamespace(pad_token_id=PAD)
    summary = {"corpus": {"sequence_tokens": most, "objective": objective}}
    return Prepared(train=split, validation=split, tokenizer=tokenizer, summary=summary)


@pytest.mark.parametrize(
    ("words", "rest"),
    [
        (["go", "##ing", "Ġ"], ["##ing"]),  # a letter of Maltese in a vocabulary of word pieces
        (["Ġgo", "ing"], ["ing"]),
        (["go", "come"], []),
    ],
)
def test_what_goes_on_a_word_is_seen_by_the_vocabulary(
    tmp_path: Path, words: list[str], rest: list[str]
) -> None:
    tokenizer = word_pieces(tmp_path, *words)
    found = masker(tokenizer, Masking(whole_word=True), seed=0).is_continuation
    assert tokenizer.convert_ids_to_tokens(np.flatnonzero(found).tolist()) == rest


def made_masker(probability: float = 0.3) -> Masker:
    """Over a vocabulary of 100, of which the first 5 are special."""
    return Masker(
        seed=7,
        probability=probability,
        whole_word=False,
        mask_id=MASK,
        is_special=np.arange(100) < 5,
        is_continuation=np.zeros(100, dtype=bool),
    )


def made(
    *examples: dict[str, Any], objective: str = "mlm+nsp", most: int = 100, probability: float = 0.3
) -> Batch:
    """One batch of these examples, in this order."""
    prepared = tokens_only(list(examples), objective, most)
    places = [(0, index) for index in range(len(examples))]
    return Batches(prepared, prepared.train, made_masker(probability)).__getitems__(places)


# one batch


def test_a_batch_is_padded_with_everything_in_its_place() -> None:
    batch = made(PAIR, SHORT)
    before = [[CLS, 20, SEP, 21, 22, SEP, PAD, PAD], [CLS, 23, SEP, SEP, PAD, PAD, PAD, PAD]]
    ids, (first, second) = batch.inputs["input_ids"], batch.predicted.tolist()
    others = [i for i in (*range(6), *range(8, 12)) if i not in (first, second)]
    assert first in (1, 3, 4) and second == 9
    assert batch.labels.tolist() == [before[0][first], 23]
    assert batch.others.tolist() == others
    assert ids.flatten()[others].tolist() == torch.tensor(before).flatten()[others].tolist()
    assert ids.flatten()[[6, 7, 12, 13, 14, 15]].tolist() == [PAD] * 6
    assert batch.inputs["attention_mask"].tolist() == [[1] * 6 + [0] * 2, [1] * 4 + [0] * 4]
    assert batch.inputs["token_type_ids"].tolist() == [
        [0, 0, 0, 1, 1, 1, 0, 0],
        [0, 0, 0, 1, 0, 0, 0, 0],
    ]
    assert batch.next_sentence.tolist() == [1, 0]
    assert batch.counts() == (2, 10, 2)


@pytest.mark.parametrize(
    ("length", "most", "width"),
    [(6, 100, 8), (6, 8, 8), (6, 7, 7), (6, 6, 6), (8, 100, 8), (9, 100, 16), (17, 20, 20)],
)
def test_padding_reaches_to_a_multiple_of_8_but_never_beyond_the_sequence_length(
    length: int, most: int, width: int
) -> None:
    ids = {"input_ids": [CLS, *[20] * (length - 2), SEP]}
    assert made(PAIR | ids, most=most).inputs["input_ids"].shape == (1, width)


def test_padding_reaches_to_the_longest_example() -> None:
    long = PAIR | {"input_ids": [CLS, *[20] * 12, SEP]}
    assert made(SHORT, long, PAIR).inputs["input_ids"].shape == (3, 16)


def test_without_pairs_there_are_no_token_types() -> None:
    assert set(made(PAIR, objective="mlm").inputs) == {"input_ids", "attention_mask"}


def test_without_padding_there_is_no_attention_mask() -> None:
    assert set(made(PAIR, PAIR, objective="mlm", most=6).inputs) == {"input_ids"}
    assert set(made(PAIR, SHORT, objective="mlm", most=6).inputs) == {"input_ids", "attention_mask"}


def test_an_example_without_a_second_segment_is_all_of_the_first() -> None:
    batch = made(PAIR | {"second_segment": 6}, PAIR)
    assert batch.inputs["token_type_ids"].tolist() == [[0] * 8, [0, 0, 0, 1, 1, 1, 0, 0]]


def test_all_tensors_are_what_a_model_takes() -> None:
    batch = made(PAIR)
    tensors = [*batch.inputs.values(), *batch[1:]]
    assert {tensor.dtype for tensor in tensors} == {torch.int64}


def test_positions_part_the_real_tokens_into_predicted_and_others() -> None:
    batch = made(PAIR, SHORT, PAIR, probability=0.6)
    real = batch.inputs["attention_mask"].flatten().nonzero().flatten().tolist()
    assert sorted([*batch.predicted.tolist(), *batch.others.tolist()]) == real
    assert batch.counts() == (len(batch.predicted), len(real), 3) == (5, 16, 3)


def test_labels_belong_to_their_positions() -> None:
    rows = [PAIR | {"input_ids": [CLS, *range(20 + 10 * i, 30 + 10 * i), SEP]} for i in range(5)]
    batch = made(*rows, probability=0.5)
    dense = dense_labels(batch)
    assert (dense != -100).sum(1).tolist() == [5] * 5
    for row, labels in zip(rows, dense, strict=True):
        before = torch.tensor(row["input_ids"] + [PAD] * 4)
        assert torch.equal(labels[labels != -100], before[labels != -100])


def test_a_batch_may_hold_an_example_twice_in_different_epochs() -> None:
    prepared, mask = tokens_only([PAIR, SHORT], "mlm", 100), made_masker()
    found = Batches(prepared, prepared.train, mask).__getitems__([(0, 0), (1, 1), (1, 0), (2, 1)])
    alone = [
        Batches(prepared, prepared.train, mask).__getitems__([place]).inputs["input_ids"][0]
        for place in [(0, 0), (1, 1), (1, 0), (2, 1)]
    ]
    assert torch.equal(found.inputs["input_ids"], torch.stack(alone))


def test_to_moves_every_tensor() -> None:
    batch = made(PAIR, SHORT).to(torch.device("meta"))
    assert {t.device.type for t in (*batch.inputs.values(), *batch[1:])} == {"meta"}


# from a directory


@pytest.fixture(scope="module")
def opened(prepared: Path) -> Prepared:
    return Prepared.open(prepared, corpus(prepared))


def corpus(prepared: Path, **changes: Any) -> Corpus:
    return pretrain_recipe(prepared).corpus.model_copy(update=changes)


def order(opened: Prepared, **changes: Any) -> Order:
    options = {"seed": 1, "batch": 8, "micro_batch": 4, "rank": 0, "world_size": 1}
    return Order(num_examples=len(opened.train), **{**options, **changes})


def steps(opened: Prepared, which: range, workers: int = 0, **changes: Any) -> list[list[Batch]]:
    mask = masker(opened.tokenizer, Masking(), seed=1)
    orders = order(opened, **changes)
    return list(training_steps(opened, mask, orders, steps=which, workers=workers))


def flat(found: list[list[Batch]]) -> list[torch.Tensor]:
    """Of every row inputs, token types and labels, without padding."""
    return [
        torch.stack([tokens, types, labels])[:, tokens != PAD]
        for step in found
        for batch in step
        for tokens, types, labels in zip(
            batch.inputs["input_ids"],
            batch.inputs["token_type_ids"],
            dense_labels(batch),
            strict=True,
        )
    ]


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected) > 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_batches_do_not_depend_on_workers(opened: Prepared) -> None:
    assert_equal(flat(steps(opened, range(4), workers=2)), flat(steps(opened, range(4))))


def test_a_resumed_run_has_the_batches_of_the_unbroken_one(opened: Prepared) -> None:
    last = len(opened.train) // 8 + 4  # an epoch ends on the way
    assert_equal(flat(steps(opened, range(last - 6, last))), flat(steps(opened, range(last))[-6:]))


def test_batches_do_not_depend_on_micro_batches_and_ranks(opened: Prepared) -> None:
    whole = flat(steps(opened, range(3), micro_batch=8))
    assert_equal(flat(steps(opened, range(3), micro_batch=2)), whole)
    ranks = [steps(opened, range(3), micro_batch=2, world_size=2, rank=rank) for rank in (0, 1)]
    together = [[*first, *second] for first, second in zip(*ranks, strict=True)]
    assert_equal(flat(together), whole)


def test_each_step_is_one_list_of_micro_batches(opened: Prepared) -> None:
    found = steps(opened, range(3), micro_batch=2)
    assert [[len(batch.next_sentence) for batch in step] for step in found] == [[2] * 4] * 3


def whole(opened: Prepared) -> Batches:
    return Batches(opened, opened.train, masker(opened.tokenizer, Masking(), seed=1))


def test_an_epoch_masks_anew(opened: Prepared) -> None:
    first, second = (whole(opened).__getitems__([(epoch, 5)]) for epoch in (0, 1))
    assert not torch.equal(first.predicted, second.predicted)


def test_labels_are_the_tokens_that_were_there(opened: Prepared) -> None:
    for index in range(20):
        batch = whole(opened).__getitems__([(0, index)])
        found, labels = batch.inputs["input_ids"][0], dense_labels(batch)[0]
        plain = opened.train[index]["input_ids"][0].as_py()
        restored = torch.where(labels == -100, found, labels)
        assert restored.tolist() == plain + [PAD] * (len(found) - len(plain))


def test_lengths_are_those_of_all_training_examples(opened: Prepared) -> None:
    ids = opened.train.with_format(None)["input_ids"]
    assert opened.lengths().tolist() == [len(example) for example in ids]


def test_grouped_by_length_batches_hold_the_same_masked_examples(opened: Prepared) -> None:
    size = len(opened.train) // 8  # whole batches of the first epoch
    ours = flat(steps(opened, range(size), lengths=opened.lengths()))
    plain = whole(opened)
    orders = order(opened, lengths=opened.lengths())
    places = [place for step in range(size) for part in orders.step(step) for place in part]
    assert_equal(ours, flat([[plain.__getitems__([place]) for place in places]]))


def test_validation_is_always_masked_in_the_same_way(opened: Prepared) -> None:
    def batches() -> list[list[Batch]]:
        mask = masker(opened.tokenizer, Masking(), seed=1)
        return [list(validation_batches(opened, mask, batch=4, num_examples=8))]

    assert_equal(flat(batches()), flat(batches()))
    assert [len(batch.next_sentence) for batch in batches()[0]] == [4, 4]


def test_validation_does_not_depend_on_the_size_of_its_batches(opened: Prepared) -> None:
    mask = masker(opened.tokenizer, Masking(), seed=1)
    sizes = [
        flat([list(validation_batches(opened, mask, batch=batch, num_examples=8))])
        for batch in (3, 8)
    ]
    assert_equal(*sizes)


def test_validation_stops_at_the_end_of_the_data(opened: Prepared) -> None:
    mask, size = masker(opened.tokenizer, Masking(), seed=1), len(opened.validation)
    found = validation_batches(opened, mask, batch=5, num_examples=999)
    lengths = [len(batch.next_sentence) for batch in found]
    assert sum(lengths) == size and set(lengths[:-1]) <= {5}


# the tables of a masker


def test_a_word_goes_on_with_number_signs_in_a_word_piece_vocabulary(tmp_path: Path) -> None:
    found: Masker = masker(word_pieces(tmp_path, "un", "##able", "a"), Masking(), seed=3)
    assert found.is_special.tolist() == [True] * 5 + [False] * 3
    assert found.is_continuation.tolist() == [False] * 6 + [True, False]
    assert (found.mask_id, found.seed, found.probability) == (4, 3, 0.15)


# what is no prepared directory of this recipe


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("objective", "mlm", "corpus.objective = 'mlm': but .* was prepared with 'mlm[+]nsp'"),
        ("sequence_tokens", 32, "corpus.sequence_tokens = 32: but .* was prepared with 24"),
        ("seed", 7, "corpus.seed = 7: but .* was prepared with 42"),
        ("validation", 0.2, "corpus.validation = 0.2: but .* was prepared with 0.1"),
        ("short_sequences", 0.5, "corpus.short_sequences = 0.5: but"),
        ("train_tokenizer", None, "corpus.train_tokenizer = None: but"),
        ("text_column", "body", "corpus.text_column = 'body': but"),
        ("hub", "a/b", "corpus.hub = 'a/b': but"),
    ],
)
def test_another_corpus_section_is_refused(
    prepared: Path, key: str, value: Any, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        Prepared.open(prepared, corpus(prepared, **{key: value}))


def test_documents_may_lie_elsewhere_on_another_machine(prepared: Path) -> None:
    moved = corpus(prepared, documents=("/elsewhere/documents.jsonl",))
    assert len(Prepared.open(prepared, moved).train) > 0


@pytest.mark.parametrize("content", [None, "{oops", "[]", "{}", '{"format": "other/3"}'])
def test_a_foreign_directory_is_refused(tmp_path: Path, prepared: Path, content: str) -> None:
    if content is not None:
        (tmp_path / "corpus.json").write_text(content)
    message = "not a directory of `opfa prepare`|can't be read|this version reads 'opfa-corpus/2'"
    with pytest.raises(DataError, match=message):
        Prepared.open(tmp_path, corpus(prepared))


@pytest.mark.parametrize(("objective", "num_warnings"), [("mlm", 0), ("mlm+nsp", 1)])
def test_a_corpus_of_an_earlier_version_is_read_and_named_where_it_differs(
    prepared: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    objective: str,
    num_warnings: int,
) -> None:
    old = shutil.copytree(prepared, tmp_path / "old")
    summary = json.loads((old / "corpus.json").read_text())
    assert summary["format"] == "opfa-corpus/2"
    summary["corpus"]["objective"] = objective
    for key in (seal.SEAL, seal.FILES):
        del summary[key]
    (old / "corpus.json").write_text(json.dumps({**summary, "format": "opfa-corpus/1"}))
    assert len(Prepared.open(old, corpus(prepared, objective=objective)).train) > 0
    found = [r.message for r in caplog.records if "prepared by an earlier version" in r.message]
    assert len(found) == num_warnings


def test_a_tokenizer_that_was_exchanged_is_refused(tmp_path: Path, prepared: Path) -> None:
    shutil.copytree(prepared, tmp_path / "copy")
    path = tmp_path / "copy" / "corpus.json"
    summary = json.loads(path.read_text())
    seal.write_sealed(path, {**summary, "tokenizer_sha256": "0"})
    with pytest.raises(DataError, match="is not the one that the examples had"):
        Prepared.open(tmp_path / "copy", corpus(prepared))
