"""The DeepSpeed engine, and the only file that names it. Runs on one process too.

What was measured of DeepSpeed 0.19 and is arranged here: on CPU its shared-memory op would need a
compiler, so it is switched off; `round_robin_gradients` breaks the map from parameters to fp32
masters, so it stays off; gradients are accumulated in fp32 at stages 2 and 3; a successful process
may abort while the interpreter exits, so `end_process` leaves without unwinding. Elsewhere
parameters are only read, with `read_fp32`.
"""

import logging
import math
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from opfa.recipe import RunError


def start_distributed() -> torch.device:
    """Join the process group that a launcher announced, or make one of this process alone; the
    device to use.
    """
    accelerated = choose_accelerator() == "cuda"
    for key, value in _alone().items():
        os.environ.setdefault(key, value)
    local_rank = int(os.environ["LOCAL_RANK"])
    # Imported here, since DeepSpeed reads DS_ACCELERATOR while it is imported.
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    if not accelerated:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        deepspeed.init_distributed(
            "nccl" if accelerated else "gloo", auto_mpi_discovery=False, verbose=False
        )
    return torch.device("cuda", local_rank) if accelerated else torch.device("cpu")


def choose_accelerator() -> str:
    """Where to compute, "cuda" or "cpu"; DeepSpeed is told too.

    transformers imports it while it saves a model, and it would warn that it had to guess.
    """
    if torch.cuda.is_available():
        return "cuda"
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return "cpu"


def _alone() -> dict[str, str]:
    if "RANK" in os.environ or dist.is_initialized():
        return {"LOCAL_RANK": "0"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    return {**one, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def end_process(status: int) -> NoReturn:
    """Leave at once, all files closed: some ranks abort in the interpreter's own exit after a
    successful run.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class Engine:
    """A model, its optimizer and its shards. Every rank makes the same calls in the same order."""

    def __init__(
        self,
        model: nn.Module,
        groups: list[dict[str, Any]],
        *,
        betas: tuple[float, float],
        epsilon: float,
        max_grad_norm: float,
        micro_batch: int,
        accumulation: int,
        zero_stage: int,
        bf16: bool,
    ) -> None:
        """Wrap a model whose modules will not be swapped any more. Collective."""
        import deepspeed

        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": max_grad_norm,
            "steps_per_print": 10**9,
            "zero_optimization": {"stage": zero_stage, "round_robin_gradients": False},
            "bf16": {"enabled": bf16},
        }
        if bf16 and zero_stage >= 2:
            config["data_types"] = {"grad_accum_dtype": "fp32"}
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=epsilon, fused=True)
        self.module = model  # its parameters may become 16-bit or shards
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        self._engine: Any = engine  # Any: DeepSpeed is not typed
        self._sharded = zero_stage > 0

    def __call__(self, *inputs: Any) -> Any:  # Any: whatever the model takes and gives
        """One forward pass."""
        return self._engine(*inputs)

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Accumulate the gradient of this rank's share of the global batch's loss.

        DeepSpeed divides by accumulation steps and ranks; our shares are already divided by the
        global counts.
        """
        scale = self._engine.gradient_accumulation_steps() * dist.get_world_size()
        self._engine.backward(loss * scale)
        if not is_last:
            self._engine.step()

    def step(self, learning_rate: float) -> float:
        """One optimizer step after the last backward pass; the gradient norm before clipping."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return math.nan if norm is None else float(norm)  # stage 0 in fp32 doesn't tell

    def read_fp32(self, parameter: Tensor) -> Tensor:
        """The full fp32 value of a parameter. Collective. Never falls back to 16-bit values."""
        if not self._sharded:
            return parameter.detach().float()
        from deepspeed.utils import safe_get_full_fp32_param

        value = safe_get_full_fp32_param(parameter)
        if value is None:
            raise RunError("DeepSpeed gives no fp32 master of a parameter; use another ZeRO stage")
        return value.detach()

    def save(self, directory: Path) -> None:
        """Write this engine's state under `directory`. Collective."""
        self._engine.save_checkpoint(str(directory), tag="engine", save_latest=False)

    def load(self, directory: Path) -> None:
        """Read what `save` wrote. Collective."""
        path, _ = self._engine.load_checkpoint(str(directory), tag="engine")
        if path is None:  # it doesn't raise
            raise RunError(f"{directory}: the engine's state can't be loaded")


def sum_over_ranks(values: Sequence[float], device: torch.device) -> list[float]:
    """Add these numbers over all ranks. Collective."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def gather_texts(text: str) -> list[str]:
    """This text of every rank, by rank. Collective."""
    texts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(texts, text)
    return texts


def broadcast_text(text: str) -> str:
    """Rank 0's text. Collective."""
    box = [text]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    """Wait for every rank. Collective."""
    dist.barrier()
