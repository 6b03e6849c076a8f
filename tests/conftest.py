"""Which tests are slow and in which order they run; `tiny` has what they share.

`tiny` imports torch and transformers. Where xdist hands tests out to workers, the process that does
so imports neither: that would take as long as a tenth of the quick tests, before the first starts.
"""

import importlib
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tiny import *  # noqa: F403 - and tests say `from conftest import pretrain_recipe`


def __getattr__(name: str) -> object:
    if name.startswith(("__", "pytest_")):  # what Python and pytest ask every module for
        raise AttributeError(name)
    return getattr(importlib.import_module("tiny"), name)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("dist", "no") == "no":  # this process runs tests itself
        config.pluginmanager.register(importlib.import_module("tiny"))


# Tests that train, export, wait or start processes, the longest first: so the workers end together.
# `-m "not slow"` doesn't even import such files.
SLOW = [
    "training/test_survival.py",
    "training/test_two_nodes.py",
    "releases/test_reproduce.py",
    "training/test_launch.py",
    "upstream/test_pretrain.py",
    "inference/test_export.py",
    "inference/test_shrink.py",
    "inference/test_trim.py",
    "inference/test_oneshot.py",
    "training/test_ranks.py",
    "integrations/test_loops.py",
    "bench/test_bench_train.py",
    "search/test_search.py",
    "search/test_study.py",
    "search/test_slices.py",
    "search/test_page.py",
    "sparsity/test_every_zero.py",
    "downstream/test_selection.py",
    "compression/test_seam.py",
    "training/test_loop.py",
    "storage/test_writing.py",
    "serving/test_stopping.py",
    "serving/test_server.py",
    "serving/test_try_page.py",
    "bench/test_bench_serve.py",
    "downstream/test_sentence_encoders.py",
    "downstream/test_finetune.py",
    "serving/test_sagemaker_train.py::test_a_spot_interruption_loses_nothing",
    "serving/test_sdk_container.py",
    "serving/test_archive.py",
    "serving/test_container.py",
    "serving/test_submit.py",
    "quickstart/test_quickstart.py",
    "quickstart/test_released.py",
    "commands/test_cli.py::test_pretrain_finetune_evaluate_inspect",
    "commands/test_cli.py::test_ctrl_c_leaves_a_run_that_resumes",
    "commands/test_outputs.py::test_a_bad_output_is_refused_before_a_heavy_library_is_loaded",
    "commands/test_outputs.py::test_an_output_without_the_right_to_write_is_refused",
    "bench/test_bench_page.py::test_a_step_is_measured_with_logits_kept_and_computed_anew",
    "commands/test_streams.py",
    "commands/test_own_data.py",
    "downstream/test_calibrate.py",
    "downstream/test_gradual.py",
    "downstream/test_hybrid.py",
    "downstream/test_fine_pruning.py",
    "downstream/test_structured.py",
    "downstream/test_sparse_kernels.py",
    "upstream/test_pretrain_in_kernels.py",
    "runtime/test_training.py",
    "downstream/test_scores.py",
    "upstream/test_score_scripts.py",
    "sparsity/test_chosen.py",
    "upstream/test_text.py",
    "downstream/test_kinds.py",
    "downstream/test_teacher.py",
    "hub/test_corrupted.py",
    "hub/test_download.py::test_of_two_processes_the_second_waits_and_finds_it_complete",
    "hub/test_hub_origin.py",
    "releases/test_release.py",
    "releases/test_by_name.py",
    "inference/test_predict.py::test_every_form_and_program_says_the_same",
    "commands/test_run_directories.py",
    "report/test_in_a_browser.py",
    "storage/test_aside.py",
    "storage/test_foreign.py",
    "storage/test_foreign_code.py",
    "storage/test_secrets.py",
    "test_recipe.py::test_any_value_is_taken_and_written_or_refused_in_few_words",
    "training/test_gradient_checkpointing.py",
    "training/test_signals.py",
    "training/test_trust.py",
    "upstream/test_clean_text.py",
    "upstream/test_corpus.py",
    "integrations/test_pruning.py",
    "api/test_api.py",
    "test_user_script.py",
    "weights/test_compact.py",
    "runtime/test_kernels.py",
    "runtime/test_build.py::test_of_processes_that_start_together_one_compiles",
]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    name = collection_path.relative_to(Path(__file__).parent).as_posix()
    return True if config.option.markexpr == "not slow" and name in SLOW else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def file(item: pytest.Item) -> str:
        return item.path.relative_to(Path(__file__).parent).as_posix()

    for item in items:
        test = item.name.partition("[")[0]
        if {file(item), f"{file(item)}::{test}"} & set(SLOW):
            item.add_marker("slow")
    items.sort(key=lambda item: SLOW.index(file(item)) if file(item) in SLOW else len(SLOW))


# Started in the background, a shell tells its children to ignore Ctrl-C, and they theirs.
signal.signal(signal.SIGINT, signal.default_int_handler)
