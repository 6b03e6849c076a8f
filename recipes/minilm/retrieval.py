"""Does a sentence encoder find the paragraph that answers a question, among all of a SQuAD file?

python recipes/minilm/retrieval.py OUTPUT.json SQUAD.jsonl.gz MODEL ...

OUTPUT.json gets recall@1 and @10 of each model: the share of questions whose own paragraph is the
nearest, or among the ten nearest, by cosine.
"""

import json
import sys
from pathlib import Path

import numpy as np

import opfa
from opfa.data.records import read_records

COUNTS = (1, 10)


def vectors(model: str, texts: list[str]) -> np.ndarray:
    """Vectors of length 1, [N, H]."""
    answers = opfa.predict(model, texts, kind="embedding", sequence_tokens=128)
    found = np.array([answer.prediction for answer in answers], dtype=np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def recalls(questions: np.ndarray, paragraphs: np.ndarray, own: np.ndarray) -> dict[str, float]:
    """Of questions [N, H] whose own paragraph [M, H] has the number `own` [N]."""
    scores = questions @ paragraphs.T
    ranks = (scores > scores[np.arange(len(own)), own, None]).sum(axis=1)
    return {f"recall@{count}": float((ranks < count).mean()) for count in COUNTS}


def main(output: str, file: str, *models: str) -> None:
    """Measure each model, and write what was found."""
    pairs = [(record["question"], record["context"]) for _, record in read_records(Path(file))]
    paragraphs = list(dict.fromkeys(context for _, context in pairs))
    numbers = {context: number for number, context in enumerate(paragraphs)}
    own = np.array([numbers[context] for _, context in pairs])
    found = {"questions": len(pairs), "paragraphs": len(paragraphs), "models": {}}
    for model in models:
        asked = vectors(model, [question for question, _ in pairs])
        found["models"][Path(model).name] = recalls(asked, vectors(model, paragraphs), own)
        print(model, found["models"][Path(model).name], flush=True)
    Path(output).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
