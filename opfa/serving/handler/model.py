"""A model in ONNX Runtime with its tokenizer: texts to tokens, tokens to logits.

Tokens are those that transformers gives in opfa/tasks/features.py, whose fast tokenizers are the
same library. `opfa.json` says what else there is to know.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from onnxruntime import (
    InferenceSession,
    SessionOptions,  # pyright: ignore[reportAttributeAccessIssue] - made at run time
)
from tokenizers import Encoding, Tokenizer

from .asking import ASK, Asked, row_of

TASK = "opfa.json"
BATCH = 64  # sequences that are computed at once
CHARACTERS, SPARE = 64, 200  # of a token, and tokens beyond the limit, as in tasks/beginnings.py
WORKERS = "SAGEMAKER_MODEL_SERVER_WORKERS"  # processes of the server; by default one a core


class Model:
    """Computes on the CPU, for one thread at a time: the server has a process for each worker."""

    def __init__(self, directory: Path) -> None:
        """Load what `opfa pack` wrote."""
        self.task = SimpleNamespace(**json.loads((directory / TASK).read_text(encoding="utf-8")))
        options = SessionOptions()
        options.add_session_config_entry("session.x64quantprecision", "1")  # else 8 bits saturate
        options.intra_op_num_threads = threads()
        file, providers = directory / self.task.file, ["CPUExecutionProvider"]
        self.session = InferenceSession(str(file), options, providers=providers)
        self.names = [entry.name for entry in self.session.get_inputs()]
        # One cuts; the other says how many tokens a text has.
        self.tokenizer, self.whole = (
            Tokenizer.from_file(str(directory / "tokenizer.json")) for _ in range(2)
        )
        is_question = self.task.kind == "question-answering"
        self.tokenizer.enable_truncation(
            self.task.sequence_tokens,
            stride=self.task.stride_tokens if is_question else 0,
            strategy="only_second" if is_question else "longest_first",
            direction=self.task.truncation_side,
        )
        self.tokenizer.no_padding()
        self.whole.no_padding()
        self.whole.no_truncation()

    def asked(self, inputs: Sequence[Any]) -> list[Asked]:  # Any: unchecked
        """What each input asks; `ValueError` names the one that is wrong."""
        found = []
        for index, item in enumerate(inputs):
            try:
                found.append(ASK[self.task.kind](self.task, row_of(self.task, item)))
            except ValueError as error:
                raise ValueError(f"inputs[{index}]: {error}") from None
        return found

    def encoded(self, text: str, pair: str | None = None) -> Encoding:
        """Tokens of a text or a pair, cut; a long one before the tokenizer sees it."""
        return self.tokenizer.encode(self._beginning(text), pair and self._beginning(pair))

    def windows(self, question: str, context: str) -> list[Encoding]:
        """A question with every window of its context."""
        room = self.task.sequence_tokens - self.tokenizer.num_special_tokens_to_add(True)
        if room - (num := self._count(question)) <= self.task.stride_tokens:
            sizes = f"{self.task.sequence_tokens} that overlap by {self.task.stride_tokens}"
            raise ValueError(f"the question has {num} tokens, too many for windows of {sizes}")
        first = self.tokenizer.encode(question, context)
        return [first, *first.overflowing]

    def words(self, words: Sequence[str]) -> Encoding:
        """Tokens of words. Byte-level tokenizers know a word by the blank before it."""
        tokens, kept = self.task.sequence_tokens, [self._beginning(word) for word in words]
        if self.task.truncation_side == "right":
            size = tokens + SPARE
            while size < len(kept) and self._count(kept[:size]) < tokens + SPARE:
                size *= 4
            kept = kept[:size]
        stripped = [word.strip() for word in kept]
        spaced = [*stripped[:1], *(f" {word}" for word in stripped[1:])]
        return self.tokenizer.encode(spaced, is_pretokenized=True)

    def _beginning(self, text: str) -> str:
        """The beginning of a text, with the same first tokens."""
        enough = self.task.sequence_tokens + SPARE
        size = CHARACTERS * enough
        if self.task.truncation_side != "right":
            return text
        while size < len(text) and self._count(text[:size]) < enough:
            size *= 4
        return text[:size]

    def _count(self, text: str | list[str]) -> int:
        is_words = isinstance(text, list)
        return len(self.whole.encode(text, is_pretokenized=is_words, add_special_tokens=False).ids)

    def outputs(self, groups: Sequence[Sequence[Encoding]], *names: str) -> list[list[np.ndarray]]:
        """The outputs of these names for each group, in their order. A group is one sequence, or
        the choices of one example, of which all have equally many.
        """
        # The longest come first, as in opfa: little is padded.
        order = sorted(range(len(groups)), key=lambda i: -max(len(e.ids) for e in groups[i]))
        found: dict[int, list[np.ndarray]] = {}
        for start in range(0, len(order), BATCH):
            places = order[start : start + BATCH]
            arrays = self.session.run(list(names), self._batch([groups[i] for i in places]))
            for row, place in enumerate(places):
                found[place] = [np.asarray(array)[row] for array in arrays]
        return [found[place] for place in range(len(groups))]

    def _batch(self, groups: Sequence[Sequence[Encoding]]) -> dict[str, np.ndarray]:
        """Arrays [groups, tokens], or [groups, choices, tokens], padded to the right."""
        tokens = max(len(encoding.ids) for group in groups for encoding in group)
        shape = (len(groups), len(groups[0]), tokens)
        fill = {"input_ids": self.task.pad_token_id}
        arrays = {name: np.full(shape, fill.get(name, 0), np.int64) for name in self.names}
        for i, group in enumerate(groups):
            for j, encoding in enumerate(group):
                known = {"input_ids": encoding.ids, "token_type_ids": encoding.type_ids}
                known["attention_mask"] = encoding.attention_mask
                for name, array in arrays.items():
                    array[i, j, : len(encoding.ids)] = known[name]
        has_choices = self.task.kind == "multiple-choice"
        return {name: array if has_choices else array[:, 0] for name, array in arrays.items()}


def threads() -> int:
    """Threads of one process of the server, so that all of them together have one for each core."""
    cores = len(os.sched_getaffinity(0))
    return max(1, cores // int(os.environ.get(WORKERS) or cores))
