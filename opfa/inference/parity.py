"""Whether an exported file answers as the model does: torch and ONNX Runtime on the same batches.

In 8 bits sums in another order can carry a value to the next step, so there predictions and metrics
are compared, not logits. How much torch itself repeats is measured: once more, with every layer's
output disturbed by less than fp32 can tell apart. A file's answers may differ by the limit, or by
one point more than torch's own; its metrics by the limit, what torch's own do, and one standard
error.
"""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from opfa.downstream.evaluate import predict, score
from opfa.extras import importing
from opfa.inference.results import Parity
from opfa.tasks.features import NO_LABEL, Split
from opfa.tasks.recipe import Task
from opfa.tasks.squad import decode

with importing("answering with an ONNX file", "opfa[export]"):
    from onnxruntime import (
        InferenceSession,
        SessionOptions,  # pyright: ignore[reportAttributeAccessIssue] - made at run time
    )

MOST_DIFFERENCE = 1e-4  # of a logit, in fp32
LEAST_EQUAL = 0.99  # predictions, in 8 bits
MOST_POINTS = 0.3  # of a metric of 0..100, in 8 bits
MARGIN = 0.01  # predictions, below those that torch repeats
DISTURBED = "torch, disturbed"  # by less than fp32 can tell apart
NOISE = 1e-7  # relative; the step from 1 to the next fp32 number is 1.2e-7


def session_options() -> SessionOptions:
    """Those with which 8 bits are exact on every CPU: x86 without VNNI cuts off sums otherwise."""
    options = SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    return options


class OnnxModel(nn.Module):
    """An ONNX file that is called like the model it was made of."""

    def __init__(self, path: Path) -> None:
        """Load the file into ONNX Runtime, on the CPU."""
        super().__init__()
        self.session = InferenceSession(path, session_options(), providers=["CPUExecutionProvider"])
        self.names = [entry.name for entry in self.session.get_inputs()]
        self.outputs = [entry.name for entry in self.session.get_outputs()]

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """The file's outputs by name; inputs that it doesn't know are left out."""
        arrays = self.session.run(None, {name: inputs[name].numpy() for name in self.names})
        return {name: torch.as_tensor(a) for name, a in zip(self.outputs, arrays, strict=True)}


def parity(model: nn.Module, path: Path, task: Task, split: Split, *, is_int8: bool) -> Parity:
    """Logits, predictions and metrics of both over a whole split; in 8 bits torch once more."""
    torch_logits = predict(model, task, split, batch=64, device="cpu")
    onnx_logits = predict(OnnxModel(path), task, split, batch=64, device="cpu")
    pairs = zip(torch_logits, onnx_logits, strict=True)
    both = {"torch": torch_logits, "onnx": onnx_logits}
    repeated = {}
    if is_int8:
        with _disturbed(model):
            both[DISTURBED] = predict(model, task, split, batch=64, device="cpu")
        repeated["repeated_predictions"] = _equal(task, torch_logits, both[DISTURBED], split)
    return Parity(
        examples=len(split.examples.texts),
        max_difference=max(_difference(*pair) for pair in pairs),
        equal_predictions=_equal(task, torch_logits, onnx_logits, split),
        metrics={name: score(task, logits, split) for name, logits in both.items()},
        **repeated,
    )


@contextlib.contextmanager
def _disturbed(model: nn.Module) -> Iterator[None]:
    """Every float that a module without parts gives changes in its last digit, always alike."""
    numbers = torch.Generator().manual_seed(0)

    def disturb(_: nn.Module, __: Any, output: Any) -> Any:  # Any: torch's protocol
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return None
        return output * (1 + NOISE * torch.randn(output.shape, generator=numbers))

    leaves = [module for module in model.modules() if not list(module.children())]
    with contextlib.ExitStack() as hooks:
        for module in leaves:
            hooks.enter_context(module.register_forward_hook(disturb))
        yield


def problems(found: Parity, task: Task, *, is_int8: bool) -> list[str]:
    """What keeps a file from standing for its model."""
    if not is_int8:
        difference = found.max_difference
        is_close = difference <= MOST_DIFFERENCE  # not so when it is NaN
        return [] if is_close else [f"logits differ by up to {difference:g} (> {MOST_DIFFERENCE})"]
    wrong = []
    equal, repeated = found.equal_predictions, found.repeated_predictions
    points = MOST_POINTS
    if equal is not None and repeated is not None:
        points += 100 * math.sqrt((1 - repeated) / found.examples)
        least = min(LEAST_EQUAL, repeated - MARGIN)
        if equal < least:
            wrong.append(f"only {equal:.2%} of the predictions are equal (< {least:.2%})")
    if task.kind != "question-answering":
        points /= 100  # metrics of 0..1
    ours, theirs, again = (found.metrics[k] for k in ("torch", "onnx", DISTURBED))
    for name in ours:
        is_score = not name.endswith("_threshold")
        most = points + abs(ours[name] - again[name])
        if is_score and not abs(ours[name] - theirs[name]) <= most:
            said = f"{name} is {theirs[name]:.4f}, in torch {ours[name]:.4f}"
            wrong.append(f"{said} (differs by more than {most:.4f})")
    return wrong


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest; where a window has no token both are -inf."""
    return torch.where(ours == theirs, 0.0, (ours - theirs).abs()).max().item()


def _equal(
    task: Task, ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], split: Split
) -> float | None:
    """The share of equal predictions; None for numbers and vectors, which are never quite equal."""
    if task.kind in ("regression", "embedding"):
        return None
    if task.kind == "question-answering":
        answers = (decode(task, logits, split)[0] for logits in (ours, theirs))
        equal = torch.tensor([one == other for one, other in zip(*answers, strict=True)])
    else:
        equal = ours[0].argmax(-1) == theirs[0].argmax(-1)
    if task.kind == "token-classification":  # words' first tokens only
        labels = [torch.tensor(row) for row in split.features["labels"]]
        kept = pad_sequence(labels, batch_first=True, padding_value=NO_LABEL) != NO_LABEL
        equal = equal[kept]
    return equal.float().mean().item()
