"""Prepared examples to batches: padding, labels, and no dependence on workers or a resume."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import pretrain_recipe
from transformers import BertTokenizer, PreTrainedTokenizerBase

from opfa.order import Order
from opfa.recipe import DataError, RecipeError
from opfa.upstream.batches import (
    Batch,
    MaskedExamples,
    Prepared,
    collate,
    masker,
    training_steps,
    validation_batches,
)
from opfa.upstream.masking import Masker
from opfa.upstream.recipe import Corpus, Masking

PAD = 9


def example(ids: list[int], labels: list[int], second: int, label: int = 0) -> dict[str, Any]:
    return {
        "input_ids": np.array(ids),
        "labels": np.array(labels),
        "second_segment": second,
        "next_sentence_label": label,
    }


PAIR = example([1, 20, 2, 21, 22, 2], [-100, -100, -100, 41, -100, -100], second=3, label=1)
SHORT = example([1, 23, 2, 2], [-100, 43, -100, -100], second=3)


# collate


def test_a_batch_is_padded_with_everything_in_its_place() -> None:
    batch = collate([PAIR, SHORT], pad_id=PAD, has_pairs=True, most=100, multiple=4)
    assert batch.inputs["input_ids"].tolist() == [
        [1, 20, 2, 21, 22, 2, PAD, PAD],
        [1, 23, 2, 2, PAD, PAD, PAD, PAD],
    ]
    assert batch.inputs["attention_mask"].tolist() == [[1] * 6 + [0] * 2, [1] * 4 + [0] * 4]
    assert batch.inputs["token_type_ids"].tolist() == [
        [0, 0, 0, 1, 1, 1, 0, 0],
        [0, 0, 0, 1, 0, 0, 0, 0],
    ]
    assert batch.labels.tolist() == [
        [-100, -100, -100, 41, -100, -100, -100, -100],
        [-100, 43, -100, -100, -100, -100, -100, -100],
    ]
    assert batch.next_sentence.tolist() == [1, 0]
    assert batch.counts() == (2, 10, 2)


@pytest.mark.parametrize(("most", "width"), [(100, 8), (8, 8), (7, 7), (6, 6)])
def test_padding_never_reaches_beyond_the_sequence_length(most: int, width: int) -> None:
    batch = collate([PAIR], pad_id=PAD, has_pairs=True, most=most, multiple=8)
    assert batch.inputs["input_ids"].shape == (1, width)


def test_without_pairs_there_are_no_token_types() -> None:
    batch = collate([PAIR], pad_id=PAD, has_pairs=False, most=100)
    assert set(batch.inputs) == {"input_ids", "attention_mask"}


def test_all_tensors_are_what_a_model_takes() -> None:
    batch = collate([PAIR], pad_id=PAD, has_pairs=True, most=100)
    tensors = [*batch.inputs.values(), batch.labels, batch.next_sentence]
    assert {tensor.dtype for tensor in tensors} == {torch.int64}


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
    return list(
        training_steps(
            opened, mask, order(opened, **changes), steps=which, has_pairs=True, workers=workers
        )
    )


def flat(found: list[list[Batch]]) -> list[torch.Tensor]:
    """Every row of every tensor, without padding."""
    return [
        torch.stack([batch.inputs["input_ids"][row], batch.labels[row]])[
            :, batch.inputs["attention_mask"][row].bool()
        ]
        for step in found
        for batch in step
        for row in range(len(batch.labels))
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
    assert [[len(batch.labels) for batch in step] for step in found] == [[2] * 4] * 3


def test_an_epoch_masks_anew(opened: Prepared) -> None:
    examples = MaskedExamples(opened.train, masker(opened.tokenizer, Masking(), seed=1))
    first, second = examples[0, 5], examples[1, 5]
    assert not np.array_equal(first["labels"], second["labels"])


def test_labels_are_the_tokens_that_were_there(opened: Prepared) -> None:
    examples = MaskedExamples(opened.train, masker(opened.tokenizer, Masking(), seed=1))
    for index in range(20):
        found, plain = examples[0, index], np.asarray(opened.train[index]["input_ids"])
        is_masked = found["labels"] != -100
        np.testing.assert_array_equal(found["labels"][is_masked], plain[is_masked])
        np.testing.assert_array_equal(found["input_ids"][~is_masked], plain[~is_masked])


def test_validation_is_always_masked_in_the_same_way(opened: Prepared) -> None:
    def batches() -> list[list[Batch]]:
        mask = masker(opened.tokenizer, Masking(), seed=1)
        return [list(validation_batches(opened, mask, batch=4, num_examples=8, has_pairs=True))]

    assert_equal(flat(batches()), flat(batches()))
    assert [len(batch.labels) for batch in batches()[0]] == [4, 4]


def test_validation_stops_at_the_end_of_the_data(opened: Prepared) -> None:
    mask, size = masker(opened.tokenizer, Masking(), seed=1), len(opened.validation)
    found = validation_batches(opened, mask, batch=5, num_examples=999, has_pairs=False)
    lengths = [len(batch.labels) for batch in found]
    assert sum(lengths) == size and set(lengths[:-1]) <= {5}


# the tables of a masker


def word_pieces(tmp_path: Path, *words: str) -> PreTrainedTokenizerBase:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (tmp_path / "vocab.txt").write_text("\n".join([*special, *words]))
    return BertTokenizer.from_pretrained(tmp_path)


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
    message = "not a directory of `opfa prepare`|this version reads 'opfa-corpus/1'"
    with pytest.raises(DataError, match=message):
        Prepared.open(tmp_path, corpus(prepared))


def test_a_tokenizer_that_was_exchanged_is_refused(tmp_path: Path, prepared: Path) -> None:
    shutil.copytree(prepared, tmp_path / "copy")
    path = tmp_path / "copy" / "corpus.json"
    summary = json.loads(path.read_text())
    path.write_text(json.dumps({**summary, "tokenizer_sha256": "0"}))
    with pytest.raises(DataError, match="is not the one that the examples had"):
        Prepared.open(tmp_path / "copy", corpus(prepared))
