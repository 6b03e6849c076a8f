"""Documents to examples: what is cut how, what is refused, and that nothing is left behind."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import pretrain_values
from datasets import Dataset, load_from_disk
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerBase
from words import tiny

import opfa
from opfa.data.order import PAIRS, generator
from opfa.errors import DataError, ModelError, RunError
from opfa.upstream import corpus as corpus_module
from opfa.upstream import documents as documents_module
from opfa.upstream.corpus import prepare
from opfa.upstream.recipe import Corpus, TokenizerTraining
from opfa.upstream.segments import Example, packed, segment_pairs

CLS, SEP = 1001, 1002
SENTENCES = "The cat number {i} sees it. Does it run? It runs {i} times! And it ends."


def corpus_of(**values: Any) -> Corpus:
    options: dict[str, Any] = {
        "documents": ("unused",),
        "sequence_tokens": 16,
        "validation": 0.2,
        "train_tokenizer": TokenizerTraining(vocabulary=100),
    }
    return Corpus(**{**options, **values})


def write(path: Path, *texts: Any) -> Corpus:
    rows = [text if isinstance(text, dict) else {"text": text} for text in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return corpus_of(documents=(str(path),))


def texts(number: int) -> list[str]:
    return [SENTENCES.format(i=i) for i in range(number)]


# packed sequences


def test_packed_sequences_rebuild_the_stream_of_tokens() -> None:
    documents = [[[1, 2, 3], [4, 5]], [[6]], [[7, 8, 9, 10, 11]]]
    examples = packed(documents, 6, (CLS, SEP))
    assert [ids for ids, *_ in examples] == [
        [CLS, 1, 2, 3, 4, SEP],
        [CLS, 5, SEP, 6, SEP, SEP],
        [CLS, 7, 8, 9, 10, SEP],
        [CLS, 11, SEP, SEP],
    ]


def test_packed_sequences_do_not_end_with_one_of_separators_alone() -> None:
    assert packed([[[1, 2, 3, 4]]], 6, (CLS, SEP)) == [([CLS, 1, 2, 3, 4, SEP], 6, -100)]


def test_packed_sequences_have_one_segment_and_no_next_sentence() -> None:
    for ids, second_segment, label in packed([[[1] * 50]], 16, (CLS, SEP)):
        assert (second_segment, label) == (len(ids), -100)


# segment pairs: token 100 d + s is sentence s of document d, repeated


def numbered(*lengths: list[int]) -> Dataset:
    """Documents of sentences of the given lengths, each of one token said again and again."""
    documents = [
        [[100 * d + s] * length for s, length in enumerate(sentences)]
        for d, sentences in enumerate(lengths)
    ]
    return Dataset.from_dict({"segments": documents})


def pairs(documents: Dataset, index: int, **values: Any) -> list[Example]:
    return segment_pairs(documents, index, corpus_of(**values), (CLS, SEP))


def halves(example: Example) -> tuple[list[int], list[int]]:
    ids, second_segment, _ = example
    assert ids[0] == CLS and ids[second_segment - 1] == SEP and ids[-1] == SEP
    return ids[1 : second_segment - 1], ids[second_segment:-1]


@pytest.fixture(scope="module")
def long_documents() -> Dataset:
    random = generator(0)
    return numbered(*([int(n) for n in random.integers(1, 9, size=60)] for _ in range(6)))


@pytest.fixture(scope="module")
def many(long_documents: Dataset) -> list[tuple[int, Example]]:
    """Examples of many seeds, each with the document it is from."""
    return [
        (index, example)
        for seed in range(12)
        for index in range(len(long_documents))
        for example in pairs(long_documents, index, seed=seed)
    ]


def consecutive(sentences: list[int]) -> bool:
    found = list(dict.fromkeys(sentences))
    return found == list(range(found[0], found[-1] + 1))


def test_label_0_is_further_on_in_the_same_document(many: list[tuple[int, Example]]) -> None:
    for index, example in many:
        if example[2] == 0:
            first, second = halves(example)
            assert {token // 100 for token in first + second} == {index}
            assert first[-1] < second[0]
            assert consecutive(first) and consecutive(second)


def test_label_0_is_the_very_next_sentence_where_nothing_is_cut() -> None:
    documents, num_checked = numbered([1] * 60, [1] * 60), 0  # sentences of one token fit exactly
    for seed in range(10):
        for example in pairs(documents, 0, seed=seed):
            if example[2] == 0:
                first, second = halves(example)
                assert second[0] == first[-1] + 1 and consecutive(first + second)
                num_checked += 1
    assert num_checked > 10


def test_label_1_is_from_another_document(many: list[tuple[int, Example]]) -> None:
    others = set()
    for index, example in many:
        if example[2] == 1:
            first, second = halves(example)
            assert {token // 100 for token in first} == {index}
            (other,) = {token // 100 for token in second}
            assert other != index
            others.add((index, other))
    assert len(others) == 6 * 5  # every other document, the last one too


def test_both_labels_are_about_equally_frequent(many: list[tuple[int, Example]]) -> None:
    labels = [example[2] for _, example in many]
    assert set(labels) == {0, 1} and len(labels) > 1000
    assert 0.45 < sum(labels) / len(labels) < 0.62  # a last sentence alone is always label 1


def test_no_pair_is_longer_than_the_sequence_and_no_half_is_empty(
    many: list[tuple[int, Example]],
) -> None:
    for _, example in many:
        first, second = halves(example)
        assert first and second and len(example[0]) <= 16
    assert max(len(example[0]) for _, example in many) == 16


def bert_pairs(documents: Dataset, index: int, **values: Any) -> list[Example]:
    """What BERT's create_instances_from_document does, said again: a walk with one cursor, sentence
    by sentence, that goes back over what it did not use.
    """
    corpus = corpus_of(**values)
    random, texts = generator(corpus.seed, PAIRS, index), documents["segments"]
    text, most = texts[index], corpus.sequence_tokens - 3
    aim = random.integers(2, most, endpoint=True) if random.random() < 0.1 else most
    found: list[Example] = []
    gathered: list[list[int]] = []
    cursor = 0
    while cursor < len(text):
        gathered.append(text[cursor])
        if cursor == len(text) - 1 or sum(map(len, gathered)) >= aim:
            a_end = random.integers(1, len(gathered) - 1, endpoint=True) if gathered[1:] else 1
            a, b = sum(gathered[:a_end], []), sum(gathered[a_end:], [])
            is_random = len(gathered) == 1 or random.random() < 0.5
            if is_random:
                other = random.integers(len(texts) - 1)
                elsewhere, b, wanted = texts[other + (other >= index)], [], aim - len(a)
                for sentence in elsewhere[random.integers(len(elsewhere)) :]:
                    b = b + sentence
                    if len(b) >= wanted:
                        break
                cursor -= len(gathered) - a_end
            while len(a) + len(b) > most:
                longer = a if len(a) > len(b) else b
                del longer[0 if random.random() < 0.5 else -1]
            found.append(([CLS, *a, SEP, *b, SEP], len(a) + 2, int(is_random)))
            gathered = []
        cursor += 1
    return found


def test_pairs_are_those_of_bert(long_documents: Dataset) -> None:
    mixed = numbered([3] * 40, [1] * 9, [90, 2, 1], [5], [1, 30, 1, 1, 30])
    num_short = 0
    for documents in (long_documents, mixed):
        for index in range(len(documents)):
            for seed in range(15):
                settings = {"seed": seed, "sequence_tokens": (8, 16, 64)[seed % 3]}
                found = pairs(documents, index, **settings)
                assert found == bert_pairs(documents, index, **settings)
                num_short += len(found[0][0]) < settings["sequence_tokens"] - 9
    assert num_short > 5


def test_a_document_aims_at_one_length() -> None:
    documents = numbered([1] * 4000, [1] * 4000)  # sentences of one token hit the aim exactly
    lengths = []
    for seed in range(40):
        found = pairs(documents, 0, seed=seed, short_sequences=0.5, sequence_tokens=64)
        sizes = [len(ids) for ids, *_ in found]
        common = max(set(sizes), key=sizes.count)
        assert sizes.count(common) / len(sizes) > 0.5  # a random second half may end before it
        assert max(sizes) == common
        lengths.append(common)
    assert 10 < sum(length < 64 for length in lengths) < 30
    assert len(set(lengths)) > 8


def test_a_short_pair_is_cut_to_the_sequence_and_not_to_its_aim() -> None:
    documents = numbered([20] * 10, [20] * 10)
    for seed in range(20):
        for example in pairs(documents, 0, seed=seed, short_sequences=1.0, sequence_tokens=64):
            first, second = halves(example)
            assert {len(first), len(second)} <= {20, 40, 60, *range(30, 42)}
            assert len(first) + len(second) in (40, 60, 61)


@pytest.mark.parametrize("lengths", [[1] * 40_000, [40_000]])
def test_a_document_as_long_as_a_book_takes_no_quadratic_time(lengths: list[int]) -> None:
    documents = numbered(lengths, lengths)
    before = time.process_time()
    pairs(documents, 0, sequence_tokens=16)
    assert time.process_time() - before < 10  # of which every pair used to read both anew


def test_every_sentence_is_used_where_nothing_is_cut() -> None:
    documents = numbered([1] * 60, [1] * 60)
    for seed in range(10):
        examples = pairs(documents, 1, seed=seed, sequence_tokens=24)
        seen = {token for example in examples for token in example[0] if token // 100 == 1}
        assert seen == set(range(100, 160))


def test_a_document_of_one_sentence_has_one_pair_with_another_document() -> None:
    ((ids, second_segment, label),) = pairs(numbered([3], [4]), 0, short_sequences=0.0)
    assert (ids, second_segment, label) == ([CLS, 0, 0, 0, SEP, *[100] * 4, SEP], 5, 1)


def test_a_sentence_longer_than_the_sequence_is_cut() -> None:
    (example,) = pairs(numbered([90], [80]), 0, short_sequences=0.0)
    first, second = halves(example)
    assert len(first) + len(second) == 13 and set(first) == {0} and set(second) == {100}


@pytest.mark.parametrize("index", [0, 1])
def test_two_documents_are_each_the_other_s_random_one(index: int) -> None:
    for seed in range(20):
        for example in pairs(numbered([3] * 8, [3] * 8), index, seed=seed):
            if example[2] == 1:
                assert {token // 100 for token in halves(example)[1]} == {1 - index}


def test_a_pair_is_a_function_of_seed_and_document(long_documents: Dataset) -> None:
    assert pairs(long_documents, 1) == pairs(long_documents, 1)
    assert pairs(long_documents, 1) != pairs(long_documents, 1, seed=43)


# the whole of it


def test_prepare_does_not_depend_on_the_number_of_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_module, "GROUP", 8)
    corpus = write(tmp_path / "a.jsonl", *texts(40))
    summaries = []
    for num_cores in (1, 3):
        monkeypatch.setattr(os, "cpu_count", lambda n=num_cores: n)
        summaries.append(prepare(corpus, tmp_path / f"cores-{num_cores}"))
    assert summaries[0].values() == summaries[1].values()
    assert summaries[0].splits["train"].documents == 32


def test_a_trained_tokenizer_does_not_depend_on_chance() -> None:
    documents = Dataset.from_dict({"text": texts(40)})
    wanted = TokenizerTraining(vocabulary=100)
    first = corpus_module._vocabulary(wanted, documents)
    assert all(corpus_module._vocabulary(wanted, documents) == first for _ in range(3))
    assert list(dict(sorted(first.items(), key=lambda item: item[1])))[:5] == corpus_module.SPECIAL


def test_every_document_is_in_one_split_and_no_token_is_lost(tmp_path: Path) -> None:
    corpus = write(tmp_path / "a.jsonl", *texts(12)).model_copy(update={"objective": "mlm"})
    summary = prepare(corpus, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    sep = tokenizer.sep_token_id
    found: list[tuple[int, ...]] = []
    for split, numbers in summary.splits.items():
        rows = load_from_disk(str(tmp_path / "out" / split))["input_ids"]
        stream = [token for ids in rows for token in ids[1:-1]]
        documents = split_at(stream, sep)
        assert (len(rows), sum(map(len, rows))) == (numbers.examples, numbers.tokens)
        assert len(documents) == numbers.documents
        found += documents
    assert sorted(found) == sorted(encode(tokenizer, text) for text in texts(12))


def split_at(stream: list[int], sep: int) -> list[tuple[int, ...]]:
    """The documents of a stream, which ends one with a separator, the last perhaps without."""
    documents: list[list[int]] = [[]]
    for token in stream:
        if token == sep:
            documents.append([])
        else:
            documents[-1].append(token)
    return [tuple(document) for document in documents if document]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_the_recipe_s_own_tokenizer_is_kept(tmp_path: Path, prepared: Path) -> None:
    theirs = json.loads((prepared / "corpus.json").read_text())["tokenizer_sha256"]
    changes = {"train_tokenizer": None, "tokenizer": str(prepared / "tokenizer")}
    corpus = write(tmp_path / "a.jsonl", *texts(12)).model_copy(update=changes)
    assert prepare(corpus, tmp_path / "out").tokenizer_sha256 == theirs


def test_examples_are_cut_to_the_disk_and_not_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def examples(*arguments: Any) -> Dataset:
        made.append(cut(*arguments))
        return made[-1]

    cut = corpus_module._examples
    monkeypatch.setattr(corpus_module, "_examples", examples)
    prepare(write(tmp_path / "a.jsonl", *texts(12)), tmp_path / "out")
    assert len(made) == 2 and all(split.cache_files for split in made)
    assert not (tmp_path / "out/cache").exists()


# refusals

MISTAKES: dict[str, tuple[list[Any], str]] = {
    "wrong column": (
        [*texts(9), {"body": "x"}],
        r"a.jsonl, line 10: no column 'text' \(corpus.text_column\); there are 'body'",
    ),
    "empty text": (
        [*texts(9), " \n"],
        "a.jsonl, line 10: 'text' is empty, invisible or",
    ),
    "no text": (
        [*texts(9), {"text": 3}],
        "a.jsonl, line 10: 'text' is empty, invisible or",
    ),
    "invisible text": ([*texts(9), "\u200b"], "a.jsonl, line 10: 'text' is empty, invisible or"),
    "no tokens": ([*texts(9), "\ufffd"], "a document has no tokens, only invisible characters: '"),
    "too few": (texts(3), "3 documents leave only 1 for train; at least 2 are needed"),
    "nothing": ([], "a.jsonl: is empty"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_and_nothing_is_left(tmp_path: Path, mistake: str) -> None:
    rows, message = MISTAKES[mistake]
    corpus = write(tmp_path / "a.jsonl", *rows)
    with pytest.raises(DataError, match=message):
        prepare(corpus, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize("value", ["", None, "\u200b"])
def test_a_bad_row_of_a_hub_is_named_or_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    rows = Dataset.from_dict({"body": [*texts(6), value, *texts(6)]})
    monkeypatch.setattr(documents_module, "load_dataset", lambda *_, **__: rows)
    changes = {"documents": (), "hub": "org/texts", "text_column": "body"}
    corpus = corpus_of().model_copy(update=changes)
    with pytest.raises(DataError, match="org/texts, row 6: 'body' is empty, invisible or not"):
        prepare(corpus, tmp_path / "out")
    summary = prepare(corpus.model_copy(update={"bad_records": "skip"}), tmp_path / "out")
    assert summary.skipped_records == 1
    assert sum(split.documents for split in summary.splits.values()) == 12
    assert "row 6" in (tmp_path / "out/skipped.txt").read_text()


@pytest.mark.parametrize("place", [1, 10])
def test_a_malformed_line_is_named_wherever_it_is(tmp_path: Path, place: int) -> None:
    corpus = write(tmp_path / "a.jsonl", *texts(12))
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    lines[place - 1] = "{oops"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=f"a.jsonl, line {place}: malformed JSON"):
        prepare(corpus, tmp_path / "out")


def test_bad_records_are_skipped_counted_and_listed_when_the_recipe_says_so(
    tmp_path: Path,
) -> None:
    good = [json.dumps({"text": f"one sentence {i}. And another one {i}."}) for i in range(60)]
    bad = ["{", "[1]", json.dumps({"other": "x"}), json.dumps({"text": "  "})]
    file = tmp_path / "mixed.jsonl"
    file.write_text("\n".join([*good[:30], *bad, *good[30:]]) + "\n")
    corpus = corpus_of(documents=(str(file),), bad_records="skip")
    summary = prepare(corpus, tmp_path / "out")
    assert summary.skipped_records == len(bad)
    assert sum(split.documents for split in summary.splits.values()) == len(good)
    listed = (tmp_path / "out/skipped.txt").read_text().splitlines()
    assert [f"{file}, line {31 + i}:" in line for i, line in enumerate(listed)] == [True] * 4
    file.write_text("\n".join(bad))
    with pytest.raises(DataError, match="every record is bad"):
        prepare(corpus, tmp_path / "none")


def test_a_mistake_in_the_second_file_is_found(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", *texts(12))
    write(tmp_path / "b.jsonl", "fine", {"text": ""})
    with pytest.raises(DataError, match="b.jsonl, line 2: 'text' is empty"):
        prepare(corpus_of(documents=(f"{tmp_path}/*.jsonl",)), tmp_path / "out")


def test_missing_documents_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^corpus.documents: .*none\.jsonl: no such file"):
        prepare(corpus_of(documents=(f"{tmp_path}/none.jsonl",)), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_output_directory_that_exists_is_refused_and_kept(tmp_path: Path) -> None:
    corpus = write(tmp_path / "a.jsonl", *texts(12))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(RunError, match="out: exists already; give a new directory"):
        prepare(corpus, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_examples_that_the_model_has_no_positions_for_are_refused_before_documents_are_read(
    tmp_path: Path, tokenizer: BertTokenizer, has_tokenizer: bool
) -> None:
    model = tmp_path / "run/model"  # that of a run, for which the run stands
    tiny().save_pretrained(model)  # no weights
    tokenizer.save_pretrained(model)
    values = pretrain_values(tmp_path / "nowhere", corpus={"sequence_tokens": 33})
    if has_tokenizer:
        del values["corpus"]["train_tokenizer"]  # so it is the model's
    expected = "^corpus.sequence_tokens = 33: this model has only 32 positions$"
    for init in (model, model.parent):
        with pytest.raises(ModelError, match=expected):
            opfa.prepare({**values, "model": {"init": str(init)}}, tmp_path / "out")


def test_examples_can_be_prepared_before_their_model_is_made(tmp_path: Path) -> None:
    corpus = write(tmp_path / "a.jsonl", *texts(12))
    prepare(corpus, tmp_path / "out", str(tmp_path / "runs/teacher/model"))
    assert (tmp_path / "out/corpus.json").is_file()


def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "expected"),
    [(OSError(28, "No space left on device"), RunError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_nothing_is_left_when_it_stops_in_the_middle(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    expected: type[BaseException],
) -> None:
    corpus = write(tmp_path / "a.jsonl", *texts(12))
    monkeypatch.setattr(corpus_module, "tokenizer_digest", failing(error))
    with pytest.raises(expected):
        prepare(corpus, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_disk_that_is_full_while_documents_are_read_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write(tmp_path / "a.jsonl", *texts(12))
    full = failing(OSError(28, "No space left on device"))
    monkeypatch.setattr("datasets.arrow_writer.ArrowWriter.write", full)
    with pytest.raises(RunError, match="out: can't be written: no space left"):
        prepare(corpus, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_prepared_directories_hold_no_cache(prepared: Path) -> None:
    names = sorted(path.name for path in prepared.iterdir())
    assert names == ["corpus.json", "tokenizer", "train", "validation"]


def test_long_documents_are_tokenized_few_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare(write(tmp_path / "a.jsonl", *texts(30)), tmp_path / "whole")
    sizes = []
    tokenize = corpus_module._tokenize

    def spy(batch: dict[str, list[str]], *args: Any, **options: Any) -> Any:
        sizes.append(len(batch["text"]))
        return tokenize(batch, *args, **options)

    monkeypatch.setattr(corpus_module, "_tokenize", spy)
    monkeypatch.setattr(corpus_module, "CHARACTERS", 12 * len(SENTENCES))
    parts = prepare(write(tmp_path / "a.jsonl", *texts(30)), tmp_path / "parts")
    assert parts.values() == whole.values()
    assert sizes == [10, 10, 10]
