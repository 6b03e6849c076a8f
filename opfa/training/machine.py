"""The software and the machine that a run had, and what of them decides its last bits."""

import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from opfa.errors import redacted

LIBRARIES = (
    "opfa",
    "torch",
    "transformers",
    "datasets",
    "tokenizers",
    "deepspeed",
    "safetensors",
    "numpy",
)


def arithmetic() -> dict[str, Any]:
    """What decides the order and the instructions in which this process computes, and so the last
    bits of its results.
    """
    import torch  # only here, so that reading a recipe stays fast

    has_gpu = torch.cuda.is_available()
    return {
        "torch": version("torch"),
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "processor": _processor(),
        "accelerator": torch.cuda.get_device_name() if has_gpu else None,
    }


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """How this arithmetic differs from an earlier one's, in words; empty where it doesn't."""
    names = [key for key in now if key in before and before[key] != now[key]]
    return ", ".join(f"{key} was {before[key]!r} and is {now[key]!r}" for key in names)


def has_bf16() -> bool:
    """Whether this machine has instructions for bf16: without them a matrix product in bf16 took
    ten times that in fp32.
    """
    import torch  # only here, so that reading a recipe stays fast

    able = torch.cpu.get_capabilities()
    is_accelerated = torch.cuda.is_available() or able["architecture"] != "x86_64"
    return is_accelerated or able["avx512_bf16"] or able["amx_bf16"]


def environment() -> dict[str, Any]:
    """The software and the machine."""
    import torch  # only here, so that reading a recipe stays fast

    git = shutil.which("git")
    commit = None
    if git:
        found = subprocess.run(
            [git, "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
        )
        commit = found.stdout.strip() or None
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in LIBRARIES},
        },
        "machine": {
            "system": platform.platform(),
            "processor": _processor(),
            "processors": os.cpu_count(),
            "accelerators": [
                torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())
            ],
        },
        "git_commit": commit,
        "command": redacted(sys.argv[1:]),
    }


def _processor() -> str:
    """What the processor is called, where the system tells."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(encoding="utf-8").splitlines() if facts.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
