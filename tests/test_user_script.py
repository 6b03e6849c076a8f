"""mypy reads a user's script with opfa's types: it passes, and wrong calls are reported."""

import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("user_script.py")
# Others' packages take minutes to read. What opfa says of its own arguments and results stays.
SKIPPED = [
    "torch",
    "transformers",
    "peft",
    "datasets",
    "numpy",
    "huggingface_hub",
    "matplotlib",
    "rich",
    "jinja2",
    "yaml",
    "sklearn",
    "scipy",
    "pyarrow",
    "httpx2",
    "tenacity",
    "regex",
    "deepspeed",
    "safetensors",
    "tokenizers",
    "wandb",
    "onnx",
    "onnxruntime",
    "onnxscript",
]
FOREIGN = "[mypy-" + ".*,".join(SKIPPED) + ".*]\nfollow_imports = skip\n"


def test_mypy_passes_and_reports_wrong_calls(tmp_path: Path) -> None:
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nstrict = True\n{FOREIGN}")
    how = ["--config-file", str(tmp_path / "mypy.ini"), "--follow-imports=silent", "--no-pretty"]
    how += ["--cache-dir", str(tmp_path / "cache"), "--no-error-summary", "--hide-error-context"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *how, str(SCRIPT)],
        cwd=SCRIPT.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.findall(r"user_script\.py:(\d+): error: .*\[([a-z-]+)\]", done.stdout)
    lines = enumerate(SCRIPT.read_text().splitlines(), 1)
    expected = [(str(n), line.partition("# error: ")[2]) for n, line in lines if "# error" in line]
    assert found == expected[1:], done.stdout + done.stderr  # the first is the docstring
