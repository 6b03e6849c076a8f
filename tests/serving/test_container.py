"""Archives behind the real handler of SageMaker's Hugging Face containers, where that is installed.

    pip install --no-deps sagemaker-huggingface-inference-toolkit sagemaker-inference \
        multi-model-server six retrying

OPFA_TOOLKIT_PYTHON is an interpreter that has them, if this one has not.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from test_handler import ROWS, asked
from toys import TASKS, lines, toy

PYTHON = os.environ.get("OPFA_TOOLKIT_PYTHON", "")
HAS_TOOLKIT = bool(PYTHON) or all(
    map(find_spec, ("sagemaker_huggingface_inference_toolkit", "sagemaker_inference", "mms"))
)
pytestmark = pytest.mark.skipif(
    not HAS_TOOLKIT, reason="needs sagemaker-huggingface-inference-toolkit and multi-model-server"
)


def handled(directory: Path, requests: list[list[str]], work: Path) -> list[Any]:
    """What the handler answers; `work` is its /opt/ml."""
    environment = {**os.environ, "SAGEMAKER_BASE_DIR": str(work)}
    program = Path(__file__).with_name("by_toolkit.py")
    command = [PYTHON or sys.executable, str(program), str(directory)]
    done = subprocess.run(
        command,
        input=json.dumps(requests),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", TASKS)
def test_the_real_handler_answers_every_kind_of_task(name: str, tmp_path: Path) -> None:
    directory = toy(tmp_path / "model", name)
    rows = ROWS[name]
    requests = [
        [json.dumps({"inputs": rows}), "application/json", "application/json"],
        [lines(rows), "application/jsonlines", "application/jsonlines"],
        [json.dumps({"inputs": [{"no": "column"}]}), "application/json", "*/*"],
    ]
    whole, by_line, refused = handled(directory, requests, tmp_path)
    expected = asked(directory, rows)
    assert (json.loads(whole[0]), whole[1]) == (expected, "application/json")
    assert [json.loads(line) for line in by_line[0].splitlines()] == expected
    assert by_line[1] == "application/jsonlines"
    assert (
        refused.startswith("inputs[0]: ") and "no column" in refused or "is not a list" in refused
    )
