"""The same predictions by `opfa predict` on each form of a model, by transformers' `pipeline`, and
by ONNX Runtime by hand. On real data: python tests/inference/same_predictions.py DATA [KIND ...]

Every kind of task gets a small random BERT, which is fine-tuned for a minute with half of its
weights pruned, then released, exported, and asked about as many examples as there are.
"""

import gzip
import itertools
import json
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnxruntime import InferenceSession
from sentence_transformers import SentenceTransformer
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizer,
    pipeline,
)

import opfa
from opfa.downstream.finetune import finetune
from opfa.downstream.recipe import FinetuneRecipe
from opfa.inference.export import export
from opfa.inference.parity import session_options
from opfa.releases.release import release
from opfa.tasks.predictions import Prediction

NUM_TRAIN, NUM_EXAMPLES = 3_000, 500
EPOCHS = {"classification": 8.0}  # else 2; enough to have opinions
SIZES: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
Rows = list[dict[str, Any]]


def numbers_of(found: Prediction) -> list[float]:
    """All probabilities of a prediction, or its number; for comparisons."""
    if hasattr(found, "probabilities"):
        return list(_flat(found.probabilities))  # pyright: ignore[reportAttributeAccessIssue]
    if hasattr(found, "score"):
        return [found.score]  # pyright: ignore[reportAttributeAccessIssue]
    return list(_flat([found.prediction]))


def _flat(value: Any) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    else:
        for item in value.values() if isinstance(value, dict) else value:
            yield from _flat(item)


def differences(ours: Sequence[Prediction], theirs: Sequence[Prediction]) -> tuple[int, float]:
    """How many predictions are equal (numbers and vectors: to four digits), and the largest
    difference of a probability or number.
    """
    equal, largest = 0, 0.0
    for one, other in zip(ours, theirs, strict=True):
        pairs = zip(numbers_of(one), numbers_of(other), strict=True)
        difference = max(abs(a - b) for a, b in pairs)
        is_number = isinstance(one.prediction, float | list) and not hasattr(one, "score")
        equal += difference < 1e-4 if is_number else one.prediction == other.prediction
        largest = max(largest, difference)
    return equal, largest


def by_pipeline(model: Path, rows: Rows, tokens: int, text: str, pair: str | None) -> Iterator[Any]:
    """What `pipeline("text-classification", top_k=None)` gives, sorted by class."""
    asked: Any = pipeline("text-classification", model=str(model))
    texts = [{"text": row[text], "text_pair": row[pair]} if pair else row[text] for row in rows]
    for found in asked(texts, top_k=None, truncation=True, max_length=tokens):
        yield {each["label"]: each["score"] for each in found}


def tags_by_pipeline(model: Path, rows: Rows) -> Iterator[list[tuple[str, float]]]:
    """Tag and score of each word's first token by `pipeline("token-classification")`."""
    asked: Any = pipeline("token-classification", model=str(model))
    words = [row["words"] for row in rows]
    found = asked(words, is_split_into_words=True, delimiter=" ", ignore_labels=[])
    for sentence, entities in zip(words, found, strict=True):
        starts = [0, *itertools.accumulate(len(word) + 1 for word in sentence[:-1])]
        first = {each["start"]: (each["entity"], float(each["score"])) for each in entities[::-1]}
        yield [first[start] for start in starts]


def by_session(file: Path, texts: Sequence[str], tokens: int) -> Iterator[np.ndarray]:
    """Probabilities by ONNX Runtime and the tokenizer, as a reader would write it by hand."""
    tokenizer = AutoTokenizer.from_pretrained(file.parent)
    session = InferenceSession(file, session_options(), providers=["CPUExecutionProvider"])
    for text in texts:
        inputs = dict(tokenizer(text, truncation=True, max_length=tokens, return_tensors="np"))
        logits = np.asarray(session.run(["logits"], inputs)[0])[0]
        shares = np.exp(logits - logits.max())
        yield shares / shares.sum()


def read(path: Path, num: int) -> Rows:
    """The first rows of a file."""
    with gzip.open(path, "rt") as lines:
        return [json.loads(line) for line in itertools.islice(lines, num)]


def _tagged(rows: Rows) -> Rows:
    """Words of real paragraphs, tagged by what they look like."""
    contexts = list(dict.fromkeys(row["context"] for row in rows))
    found = []
    for sentence in (s for context in contexts for s in context.split(". ")):
        words = sentence.split()[:60]
        tags = [
            "B-NUM" if any(c.isdigit() for c in w) else "B-CAP" if w[0].isupper() else "O"
            for w in words
        ]
        if words:
            found.append({"words": words, "tags": tags})
    return found


def _chosen(rows: Rows) -> Rows:
    """Which of four paragraphs is the question about?"""
    numbers, found = random.Random(0), []
    contexts = list(dict.fromkeys(row["context"] for row in rows))
    for row in rows:
        others = numbers.sample([c for c in contexts if c != row["context"]], 3)
        place = numbers.randrange(4)
        choices = [*others[:place], row["context"], *others[place:]]
        found.append({"question": row["question"], "paragraphs": choices, "right": place})
    return found


def tasks(data: Path) -> dict[str, tuple[dict[str, Any], Rows, Rows]]:
    """By kind the task, its training rows and the rows that are asked."""

    def rows(name: str, make: Callable[[Rows], Rows] = lambda rows: rows) -> tuple[Rows, Rows]:
        files = sorted(data.glob(f"{name}/*.jsonl.gz"))
        train = next(file for file in files if "train" in file.name)
        asked = next(file for file in files if "validation" in file.name)
        return make(read(train, NUM_TRAIN))[:NUM_TRAIN], make(read(asked, 1_000))[:NUM_EXAMPLES]

    columns = {"text": "question", "text_pair": "context", "label": "answers"}
    two = {"text": "sentence1", "text_pair": "sentence2", "label": "label"}
    return {
        "classification": ({"text": "sentence", "metrics": ["accuracy"]}, *rows("sst2")),
        "regression": ({**two, "metrics": ["pearson"]}, *rows("stsb")),
        "question-answering": (
            {**columns, "metrics": ["squad_f1"], "sequence_tokens": 192, "stride_tokens": 64},
            *rows("squad"),
        ),
        "token-classification": (
            {"text": "words", "label": "tags", "metrics": ["accuracy"], "sequence_tokens": 256},
            *rows("squad", _tagged),
        ),
        "multiple-choice": (
            {"text": "question", "choices": ["paragraphs"], "label": "right"},
            *rows("squad", _chosen),
        ),
        "embedding": ({**two, "metrics": ["spearman"]}, *rows("stsb")),
    }


def new_encoder(directory: Path, vocabulary: Path) -> None:
    """A small random BERT with a real vocabulary."""
    torch.manual_seed(0)
    tokenizer = BertTokenizer.from_pretrained(str(vocabulary.parent), vocab_file=str(vocabulary))
    config = BertConfig(vocab_size=len(tokenizer), intermediate_size=256, **SIZES)
    BertModel(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def run_of(
    work: Path, kind: str, task: dict[str, Any], train: Rows, asked: Rows, *, bits: int = 32
) -> Path:
    """A finished run for a task; in 8 bits if asked for."""
    files = {"train": train, "validation": asked}
    for name, rows in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (work / f"{kind}-{name}.jsonl").write_text(text)
    paths = {name: str(work / f"{kind}-{name}.jsonl") for name in files}
    values: dict[str, Any] = {
        "name": kind,
        "model": {"init": str(work / "encoder"), "zeros": "free"},
        "task": {"kind": kind, "sequence_tokens": 128, **task, **paths},
        "training": {"epochs": EPOCHS.get(kind, 2.0), "batch": 32, "learning_rate": 2e-3},
        "pruning": {"schedule": {"end": 0, "target": 0.5}},
        "logging": {"every_steps": 50, "checkpoint_steps": 1_000},
    }
    if bits == 8:
        values["quantization"] = {"start": 0.5}
    run = work / f"{kind}-{bits}"
    finetune(FinetuneRecipe.check(values), run)
    return run


def compare(work: Path, kind: str, task: dict[str, Any], run: Path, asked: Rows) -> Rows:
    """How far every other form and program agrees with `opfa predict RUN`."""
    is_8bit = (run / "model/quantization.safetensors").is_file()
    compact = work / f"{run.name}-compact"
    release(run, compact, form="compact-int8" if is_8bit else "compact")
    export(str(run), work / f"{run.name}-onnx/model.onnx")
    opfa.pack(run, work / f"{run.name}-packed")
    ours = opfa.predict(run, asked)
    forms = {
        "RUN/model": run / "model",
        "compact": compact,
        "ONNX": work / f"{run.name}-onnx/model.onnx",
        "packed": work / f"{run.name}-packed",
    }
    if is_8bit:  # in 8 bits is only what the model was trained in
        forms["compact, other weights as they are"] = exact = work / f"{run.name}-exact"
        release(run, exact, form="compact-int8", dtype="fp32", embeddings=False)
    columns = {"text": task["text"], "text_pair": task.get("text_pair")}
    found = []

    def note(who: str, equal: int, largest: float) -> None:
        found.append({"kind": kind, "bits": 8 if is_8bit else 32, "who": who, "equal": equal})
        found[-1] |= {"of": len(asked), "largest": largest}

    for name, model in forms.items():
        recipe = run / "recipe.toml"
        note(name, *differences(ours, opfa.predict(model, asked, recipe=recipe)))
    tokens = task.get("sequence_tokens", 128)
    if kind == "classification":
        shares = by_session(forms["ONNX"], [row[task["text"]] for row in asked], tokens)
        pairs = [(one, list(other)) for one, other in zip(ours, shares, strict=True)]
        same = sum(list(one.probabilities)[int(np.argmax(o))] == one.prediction for one, o in pairs)  # pyright: ignore[reportAttributeAccessIssue]
        largest = max(
            abs(a - b) for one, o in pairs for a, b in zip(numbers_of(one), o, strict=True)
        )
        note("onnxruntime by hand", same, largest)
    if is_8bit:  # from_pretrained computes in fp32
        return found
    if kind in ("classification", "regression"):
        theirs = list(by_pipeline(run / "model", asked, tokens, **columns_of(columns)))
        pairs = list(zip(ours, theirs, strict=True))
        if kind == "classification":
            equal = sum(max(t, key=t.__getitem__) == o.prediction for o, t in pairs)
            largest = max(abs(o.probabilities[k] - t[k]) for o, t in pairs for k in t)  # pyright: ignore[reportAttributeAccessIssue]
        else:
            apart = [abs(o.prediction - next(iter(t.values()))) for o, t in pairs]
            equal, largest = sum(value < 1e-4 for value in apart), max(apart)
        note("pipeline", equal, largest)
    if kind == "embedding":
        texts = [row[task["text"]] for row in asked]
        vectors = SentenceTransformer(str(run / "model"), device="cpu").encode(texts)
        apart = np.abs(vectors - np.array([one.prediction for one in ours])).max(axis=1)
        note("SentenceTransformer", int((apart < 1e-4).sum()), float(apart.max()))
    if kind == "token-classification":
        theirs = list(tags_by_pipeline(run / "model", asked))
        pairs = list(zip(ours, theirs, strict=True))
        equal = sum([tag for tag, _ in t] == o.prediction for o, t in pairs)
        scores = ((o.score, [score for _, score in t]) for o, t in pairs)  # pyright: ignore[reportAttributeAccessIssue]
        largest = max(abs(a - b) for one in scores for a, b in zip(*one, strict=True))
        note("pipeline", equal, largest)
    return found


def columns_of(columns: dict[str, Any]) -> dict[str, Any]:
    """As `by_pipeline` calls them."""
    return {"text": columns["text"], "pair": columns["text_pair"]}


def main(data: Path, *kinds: str) -> None:
    """Print one line for each comparison, of all kinds of task or some."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        new_encoder(work / "encoder", next(data.glob("vocab/*vocab.txt")))
        every = tasks(data)
        for kind in kinds or every:
            task, train, asked = every[kind]
            for bits in (32, 8):
                run = run_of(work, kind, task, train, asked, bits=bits)
                metrics = json.loads((run / "results.json").read_text())["metrics"]
                num = len({str(one.prediction) for one in opfa.predict(run, asked)})
                print(f"{kind}, {bits} bits: {metrics}, {num} different answers")
                for row in compare(work, kind, task, run, asked):
                    print("  {who}: {equal} of {of} equal, {largest:.1e}".format(**row), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
