"""The types that the functions of `opfa` return, for annotations."""

from opfa.downstream.results import CalibrateResult, EvaluateResult, FinetuneResult, SweepResult
from opfa.hub.index import Released
from opfa.hub.results import DownloadResult, PushResult
from opfa.inference.results import ExportResult, PruneResult
from opfa.inference.shrink import ShrinkResult
from opfa.inference.trim import TrimResult
from opfa.releases.results import ReleaseResult, UnpackResult
from opfa.report.tables import Result
from opfa.runtime.packer import PackResult
from opfa.search.results import SearchResult
from opfa.serving.results import ArchiveResult, Served
from opfa.upstream.results import PrepareResult, PretrainResult

__all__ = [
    "ArchiveResult",
    "CalibrateResult",
    "DownloadResult",
    "EvaluateResult",
    "ExportResult",
    "FinetuneResult",
    "PackResult",
    "PrepareResult",
    "PretrainResult",
    "PruneResult",
    "PushResult",
    "ReleaseResult",
    "Released",
    "Result",
    "SearchResult",
    "Served",
    "ShrinkResult",
    "SweepResult",
    "TrimResult",
    "UnpackResult",
]
