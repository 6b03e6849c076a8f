"""Does a sentence encoder find the paragraph that answers a question, among all of a SQuAD file?

python recipes/minilm/retrieval.py OUTPUT.json SQUAD.jsonl.gz MODEL ...

OUTPUT.json gets recall@1 and @10 of each model: the share of questions whose own paragraph is the
nearest, or among the ten nearest, by cosine.
"""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

import opfa
from opfa.data.records import read_records
from opfa.tasks.sentences import retrieval

METRICS = ("recall@1", "recall@10")


def vectors(model: str, texts: list[str]) -> Tensor:
    """[N, H], of each text; one that stands there twice is computed once."""
    once = list(dict.fromkeys(texts))
    answers = opfa.predict(model, once, kind="embedding", sequence_tokens=128)
    found = {text: answer.prediction for text, answer in zip(once, answers, strict=True)}
    return torch.tensor([found[text] for text in texts])


def main(output: str, file: str, *models: str) -> None:
    """Measure each model, and write what was found."""
    pairs = [(record["question"], record["context"]) for _, record in read_records(Path(file))]
    questions, contexts = map(list, zip(*pairs, strict=True))
    found = {"questions": len(pairs), "paragraphs": len(set(contexts)), "models": {}}
    for model in models:
        both = torch.stack([vectors(model, questions), vectors(model, contexts)], dim=1)
        found["models"][Path(model).name] = retrieval(both, questions, contexts, METRICS)
        print(model, found["models"][Path(model).name], flush=True)
    Path(output).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
