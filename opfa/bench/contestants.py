"""Who takes part in `opfa bench inference`, and what is measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from opfa.runtime.library import LEVEL

WITHOUT_AMX = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}  # the most that oneDNN may use
BERT_BASE = {"model_type": "bert"}
MINILM = {
    "model_type": "bert",
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}
FEW = 3  # a section of many points takes one round for so many of the race


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A library with its options."""

    engine: str  # a class of worker.py, or module:class
    package: str  # what it needs
    form: str = ""  # the ONNX file that it reads; "": the model's directory
    options: Mapping[str, Any] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_here(self) -> bool:
        """Whether it needs opfa."""
        return ":" in self.engine

    def model(self, directory: Path) -> Path:
        """The file or directory that it reads."""
        return directory / f"{self.form}.onnx" if self.form else directory


def _here(name: str, dtype: str, **variables: str) -> Contestant:
    engine, options = f"opfa.bench.ours:{name}", {"dtype": dtype}
    return Contestant(engine=engine, package="torch", options=options, variables=variables)


def _openvino(form: str, precision: str, **variables: str) -> Contestant:
    known = {"engine": "OpenVino", "package": "openvino", "form": form}
    return Contestant(**known, options={"precision": precision}, variables=variables)


OURS, TORCH = "ours, fp32", "torch, fp32"
CONTESTANTS = {
    OURS: _here("Ours", "fp32"),
    "ours, bf16": _here("Ours", "bf16"),
    "ours, int8": _here("Ours", "int8"),
    "ours, fp32, AVX2": _here("Ours", "fp32", **{LEVEL: "avx2"}),
    "drop-in, fp32": _here("Swapped", "fp32"),
    TORCH: _here("Torch", "fp32"),
    "torch, bf16": _here("Torch", "bf16"),
    "torch, bf16, no AMX": _here("Torch", "bf16", **WITHOUT_AMX),
    "ONNX Runtime, fp32": Contestant(engine="OnnxRuntime", package="onnxruntime", form="fp32"),
    "ONNX Runtime, int8": Contestant(engine="OnnxRuntime", package="onnxruntime", form="int8"),
    "OpenVINO, fp32": _openvino("fp32", "f32"),
    "OpenVINO, bf16": _openvino("fp32", "bf16"),
    "OpenVINO, bf16, no AMX": _openvino("fp32", "bf16", **WITHOUT_AMX),
    "OpenVINO, int8": _openvino("int8", "bf16"),
    "OpenVINO, int8, no AMX": _openvino("int8", "bf16", **WITHOUT_AMX),
    "DeepSparse, fp32": Contestant(engine="DeepSparse", package="deepsparse", form="fixed"),
}


def _sensible() -> list[str]:
    """All, but on a CPU without AMX nobody who is to do without."""
    has_amx = torch.cpu.get_capabilities().get("amx_bf16", False)
    return [n for n, c in CONTESTANTS.items() if has_amx or c.variables != WITHOUT_AMX]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured. Tests take less of everything."""

    rounds: int = 25
    threads: int = 2
    sparsity: float = 0.9
    tokens: int = 128
    config: Mapping[str, Any] = field(default_factory=lambda: BERT_BASE)
    small: Mapping[str, Any] = field(default_factory=lambda: MINILM)
    contestants: Sequence[str] = field(default_factory=_sensible)
    sparsities: Sequence[float] = (0.0, 0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 0.97)
    lengths: Sequence[int] = (8, 16, 32, 64, 128, 256, 512)
    batch: Sequence[int] = tuple(range(16, 129, 16))
    peers: Sequence[str] = ()  # Pythons that have other engines

    @property
    def ours(self) -> list[str]:
        """The runtime at its best level, in each type."""
        return [n for n in self.contestants if n.startswith("ours") and "AVX2" not in n]

    @property
    def few_rounds(self) -> int:
        """For sections of many points."""
        return max(1, self.rounds // FEW)

    def on_small(self) -> "Plan":
        """The same on the small shape, without what one number says already."""
        names = [name for name in self.contestants if "AVX2" not in name]
        return replace(self, contestants=names)
