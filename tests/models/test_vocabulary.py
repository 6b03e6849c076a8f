"""A tokenizer with a part of its tokens splits the texts that it was cut for as before."""

import json
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import BertProcessing, Sequence, TemplateProcessing

from opfa.errors import ModelError
from opfa.models.vocabulary import KINDS, Cut, cut

LETTERS = "abcdeé"
TEXTS = [
    f"{a}{b}{c} {c}{a} {b}{b}{a}{c}" for a in LETTERS for b in LETTERS for c in ("d", "abc", "éa")
]
UNKNOWN, START, END = "[UNK]", "[CLS]", "[SEP]"
FORMS = ("WordPiece", "BPE", "BPE of bytes", "BPE of words' ends", "Unigram", "WordLevel")
words = st.lists(st.text(f"{LETTERS}x ", max_size=12), min_size=1, max_size=8)


@cache
def tokenizer_of(form: str) -> Tokenizer:
    """Trained on all texts, with two special tokens of the vocabulary and one added behind it."""
    special: dict[str, Any] = {"special_tokens": [UNKNOWN, START, END], "show_progress": False}
    bytes_: dict[str, Any] = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    ends: dict[str, Any] = {"end_of_word_suffix": "</w>"}
    model, trainer = {
        "WordPiece": (
            models.WordPiece(unk_token=UNKNOWN),
            trainers.WordPieceTrainer(vocab_size=90, **special),
        ),
        "BPE": (models.BPE(unk_token=UNKNOWN), trainers.BpeTrainer(vocab_size=80, **special)),
        "BPE of bytes": (models.BPE(), trainers.BpeTrainer(vocab_size=320, **special, **bytes_)),
        "BPE of words' ends": (
            models.BPE(unk_token=UNKNOWN, **ends),
            trainers.BpeTrainer(vocab_size=80, **special, **ends),
        ),
        "Unigram": (
            models.Unigram(),
            trainers.UnigramTrainer(vocab_size=70, unk_token=UNKNOWN, **special),
        ),
        "WordLevel": (models.WordLevel(unk_token=UNKNOWN), trainers.WordLevelTrainer(**special)),
    }[form]
    made = Tokenizer(model)
    if form == "BPE of bytes":
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        made.normalizer = normalizers.Lowercase()
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.train_from_iterator(TEXTS, trainer)
    made.add_tokens([AddedToken("ba", normalized=False)])
    template = [("[CLS]", 1), ("[SEP]", 2)]
    made.post_processor = TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B", template)
    return made


def cut_for(made: Tokenizer, texts: list[str]) -> tuple[Tokenizer, Cut]:
    """With the tokens of these texts."""
    used = {i for each in made.encode_batch(texts, add_special_tokens=False) for i in each.ids}
    found = cut(json.loads(made.to_str()), used)
    return Tokenizer.from_str(json.dumps(found.values)), found


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=8, deadline=None)
@given(words, words)
def test_texts_are_split_as_before_and_others_have_no_new_unknown(
    form: str, texts: list[str], others: list[str]
) -> None:
    old = tokenizer_of(form)
    new, made = cut_for(old, texts)
    renumbered = made.new_ids()
    for before, after in zip(old.encode_batch(texts), new.encode_batch(texts), strict=True):
        assert after.ids == [renumbered[i] for i in before.ids]
        assert after.tokens == before.tokens and after.offsets == before.offsets
    if form != "WordLevel":
        known = [text for text in others if UNKNOWN not in old.encode(text).tokens]
        assert not any(UNKNOWN in each.tokens for each in new.encode_batch(known))
    ids = {token: renumbered[i] for token, i in old.get_vocab().items() if i in renumbered}
    assert new.get_vocab() == ids


@pytest.mark.parametrize("form", FORMS)
def test_what_texts_dont_use_is_cut(form: str) -> None:
    old = tokenizer_of(form)
    new, made = cut_for(old, ["abc"])
    assert len(made.kept) == new.get_vocab_size() < old.get_vocab_size()
    assert {UNKNOWN, START, END, "ba"} <= set(new.get_vocab())
    assert new.encode("ba").tokens == old.encode("ba").tokens
    assert sorted(new.get_vocab().values()) == list(range(len(made.kept)))


def test_merges_are_those_that_lead_to_what_is_kept() -> None:
    merges = [("a", "b"), ("c", "d"), ("ab", "cd"), ("b", "c"), ("d", "d")]
    tokens = [*"abcd", *(first + second for first, second in merges)]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    new, found = cut_for(made, ["abcd"])
    assert found.values["model"]["merges"] == [["a", "b"], ["c", "d"], ["ab", "cd"]]
    assert new.get_vocab() == {t: i for i, t in enumerate([*"abcd", "ab", "cd", "abcd"])}


def test_the_score_of_an_unknown_character_stays() -> None:
    """It is the lowest score less 10: here -40, so "wza" and an unknown "q" have -41. With the
    lowest score of the used pieces they would have -31, which is better than -40.
    """
    pieces = [("[UNK]", 0.0), ("wz", -20.0), ("aq", -20.0), ("wza", -1.0)]
    pieces += [("never", -5.0), ("lowest", -30.0)]
    made = Tokenizer(models.Unigram(pieces, unk_id=0))
    new, found = cut_for(made, ["wzaq", "wza"])
    assert new.encode("wzaq").tokens == made.encode("wzaq").tokens == ["wz", "aq"]
    assert found.values["model"]["vocab"] == [[t, s] for t, s in pieces if t != "never"]


@pytest.mark.parametrize("is_nested", [False, True])
def test_every_processor_and_the_padding_have_the_new_ids(is_nested: bool) -> None:
    vocabulary = {token: i for i, token in enumerate(["one", "two", "[CLS]", "[SEP]", UNKNOWN])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    bert = BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    made.post_processor = Sequence([bert]) if is_nested else bert
    made.enable_padding(pad_id=4, pad_token=UNKNOWN, length=5)
    new = Tokenizer.from_str(json.dumps(cut(json.loads(made.to_str()), {1, 4}).values))
    assert new.encode("two").tokens == ["[CLS]", "two", "[SEP]", UNKNOWN, UNKNOWN]
    assert new.encode("two").ids == [1, 0, 2, 3, 3]


def test_an_unknown_kind_is_refused() -> None:
    values = {"model": {"type": "Ngram"}}
    with pytest.raises(ModelError, match=f"'Ngram' can't be cut; known are {', '.join(KINDS)}"):
        cut(values, set())
