"""Training state in runs."""

from pathlib import Path

import pytest
import torch

from opfa.errors import RunError
from opfa.training.state import Piece, Pieces, save_pieces


def saved(directory: Path, *starts: int) -> Pieces:
    """Pieces of two elements each, every one in a file of its own."""
    for index, start in enumerate(starts):
        values = torch.tensor([start, start + 1.0])
        save_pieces(
            directory / f"state-{index}.safetensors", [Piece("a/b@c", start, values)], {"n": 1}
        )
    return Pieces(directory, "state-*.safetensors")


def test_runs_are_joined_in_order_whatever_file_they_are_in(tmp_path: Path) -> None:
    runs = saved(tmp_path, 4, 0, 2)
    assert runs.whole("a/b@c", 6).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert runs.facts == {"n": 1}


@pytest.mark.parametrize(("starts", "size"), [((0, 3), 4), ((0, 1), 4), ((2,), 2), ((0, 2), 6)])
def test_gaps_overlaps_and_missing_ends_are_refused(
    tmp_path: Path, starts: tuple[int, ...], size: int
) -> None:
    with pytest.raises(RunError, match=f"of {size} elements here"):
        saved(tmp_path, *starts).whole("a/b@c", size)


def test_an_empty_tensor_needs_no_run_and_an_unknown_one_is_refused(tmp_path: Path) -> None:
    runs = saved(tmp_path, 0)
    assert runs.whole("empty", 0).numel() == 0
    with pytest.raises(RunError, match="unknown has 0 of 2 elements"):
        runs.whole("unknown", 2)


def test_signs_of_zero_and_all_bits_survive(tmp_path: Path) -> None:
    values = torch.tensor([-0.0, float("nan"), 1e-42, -1.5])
    save_pieces(tmp_path / "state-0.safetensors", [Piece("w", 0, values)], {})
    found = Pieces(tmp_path, "state-*.safetensors").whole("w", 4)
    assert torch.equal(found.view(torch.int32), values.view(torch.int32))


def test_a_directory_without_state_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no training state"):
        Pieces(tmp_path, "state-*.safetensors")
