"""How many of a fine-tuned model's answers are the same in the kernels as in torch's fp32.

python tests/runtime/same_answers.py RUN EXAMPLES

fp32 and bf16 are compared. Of bf16's answers at least 99.5 % are expected to be equal.
"""

import sys
import tempfile
from pathlib import Path
from unittest import mock

import opfa
from opfa import runtime


def main(run: str, examples: str) -> None:
    """Print the share of equal answers by type."""
    with mock.patch.object(runtime, "speed_up", lambda _: "torch"):  # nothing goes into kernels
        expected = opfa.predict(run, Path(examples))
    for dtype in ("fp32", "bf16"):
        with tempfile.TemporaryDirectory() as aside:
            packed = Path(aside, "packed")
            opfa.pack(run, packed, dtype=dtype)
            found = opfa.predict(packed, Path(examples))
        pairs = zip(expected, found, strict=True)
        equal = sum(one.prediction == other.prediction for one, other in pairs)
        print(f"{dtype}: {equal} of {len(found)} equal, {equal / len(found):.2%}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
