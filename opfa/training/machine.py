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
from opfa.extras import has

LIBRARIES = ("torch", "transformers", "datasets", "tokenizers", "deepspeed", "safetensors", "numpy")


def arithmetic() -> dict[str, Any]:
    """What decides the order and instructions of this process's sums, and so their last bits."""
    import torch  # only here, so that reading a recipe stays fast

    has_gpu = torch.cuda.is_available()
    return {
        "torch": version("torch"),
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "processor": processor(),
        "accelerator": torch.cuda.get_device_name() if has_gpu else None,
    }


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """How this arithmetic differs from an earlier one's, in words; empty where it doesn't."""
    names = [key for key in now if key in before and before[key] != now[key]]
    return ", ".join(f"{key} was {before[key]!r} and is {now[key]!r}" for key in names)


def has_bf16() -> bool:
    """Whether there are instructions for bf16; without them a product took ten times as long."""
    import torch  # only here, so that reading a recipe stays fast

    able = torch.cpu.get_capabilities()
    is_accelerated = torch.cuda.is_available() or able["architecture"] != "x86_64"
    return is_accelerated or able["avx512_bf16"] or able["amx_bf16"]


def environment() -> dict[str, Any]:
    """The software and the machine."""
    import torch  # only here, so that reading a recipe stays fast

    versions = {name: version(name) for name in ("opfa", *LIBRARIES) if has(name)}
    machine = {
        "system": platform.platform(),
        "processor": processor(),
        "processors": os.cpu_count(),
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {"python": platform.python_version(), **versions},
        "machine": machine,
        "git_commit": _commit(),
        "command": redacted(sys.argv[1:]),
    }


def _commit() -> str | None:
    """The commit of this code, where it is a checkout and git is installed."""
    if (git := shutil.which("git")) is None:
        return None
    command = [git, "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def processor() -> str:
    """What the processor is called, where the system tells."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(encoding="utf-8").splitlines() if facts.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
