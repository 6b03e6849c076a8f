"""A model is saved in silence."""

import os
import subprocess
import sys
from pathlib import Path

from words import write_models

CODE = """
from transformers import AutoModel, AutoTokenizer
from opfa.models.encoders import write_model
write_model(AutoModel.from_pretrained("bare"), AutoTokenizer.from_pretrained("bare"), "copy")
"""


def test_saving_a_model_says_nothing_on_stdout(tmp_path: Path) -> None:
    """Where DeepSpeed is installed transformers imports it there, and `--json` is read from it."""
    write_models(tmp_path, {"bare": ("", {})})
    free = {key: value for key, value in os.environ.items() if key != "DS_ACCELERATOR"}
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=tmp_path,
        env=free,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "" and (tmp_path / "copy/model.safetensors").exists()
